"""No key that does nothing: each key of a dataset file, as in `test_every_key.py`."""

from typing import Any

import pytest

from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline_tests.config import seen_in_artifacts as made
from sft_pipeline_tests.config import seen_in_libraries as arrives
from sft_pipeline_tests.config.every_key import (
    DIFFERENT,
    Key,
    Side,
    Workshop,
    changed,
    check_changes,
    check_complete,
    ids_of,
    with_keys,
)
from sft_pipeline_tests.config.small_branch import DATASET_DOCUMENT, RECIPE_DOCUMENT

MOVING = {"sources": [{"path": "moving"}]}
NEAR = {"split.near_duplicates": {"threshold": 0.3, "action": "drop_from_train"}}
REPORTED = {"split.near_duplicates": {"threshold": 0.3, "action": "report"}}

BAD = ["empty_completion", "missing_group"]

PAIRS = {"path": "pairs", "static": True, "files": "prompts*"}
JOINED: dict[str, list[dict[str, Any]]] = {"sources": [{**PAIRS, "join": {"files": "replies*", "by": "id"}}]}
JOINED_BY_PATH = {"sources": [{**PAIRS, "join": {"path": "pairs/replies.jsonl", "by": "id"}}]}
TALKS = {"sources": [{"path": "talk.jsonl", "static": True, "format": "messages"}]}
ARRANGED = {"contract.drop_leading_assistant": True, "contract.trim_trailing_user": True}
ARRANGED |= {"contract.merge_consecutive": True, "contract.max_reject_rate": 1.0}
TALK = ["user 1 0", "assistant 1 1"]
ODD_TALK = ["user 0 1\nuser 0 2", "assistant 0 3"]
ACCEPTED = made.count("validated_rows", "accepted")


def arranged_without(key: str) -> dict[str, object]:
    return TALKS | {name: value for name, value in ARRANGED.items() if name != key}


def pairs(*numbers: int) -> list[list[str]]:
    return [[f"Door {i}?", f"no {5 - i}"] for i in numbers]


DATASET = [
    Key("name", "other", made.asset_name, "small/raw_rows", "other/raw_rows"),
    Key("description", "Doors.", arrives.of_dagster(arrives.sensor_description), "", "Doors."),
    Key(
        "owner",
        "team:doors",
        arrives.of_dagster(arrives.owners("small/raw_rows")),
        ["team:sft"],
        ["team:doors"],
    ),
    Key("sources[].path", "few.jsonl", made.rows_by_source, [62], [6]),
    Key(
        "sources[].files",
        "prompts*",
        made.rows_by_source,
        [12],
        [6],
        {"sources": [{"path": "pairs", "static": True}]},
    ),
    Key(
        "sources[].join",
        JOINED["sources"][0]["join"],
        made.rejections,
        ["missing_field"],
        ["not_joined"],
        {"sources": [PAIRS]},
    ),
    Key("sources[].join.files", "more*", made.conversations, pairs(1, 2, 3, 4, 5), pairs(5), JOINED),
    Key("sources[].join.path", "few.jsonl", made.conversations, pairs(1, 2, 3, 4, 5), [], JOINED_BY_PATH),
    Key("sources[].join.by", "prompt", ACCEPTED, 5, 0, JOINED),
    Key(
        "sources[].join.key",
        "ref",
        made.conversations,
        pairs(1, 2, 3, 4, 5),
        [[f"Door {i}?", f"no {i}"] for i in range(5)],
        JOINED,
    ),
    Key(
        "sources[].join.fields",
        {"completion": "ref"},
        made.rejections,
        ["not_joined"],
        ["not_joined", "wrong_type"],
        JOINED,
    ),
    Key("sources[].join.required", False, made.rejections, ["not_joined"], ["missing_field"], JOINED),
    Key("sources[].where", 'shelf == "S1"', ACCEPTED, 60, 30),
    Key("sources[].transform", "changes_of_this_test:twice", ACCEPTED, 60, 120),
    Key("sources[].text", {"completion": "Door {day}"}, made.rejections, BAD, ["missing_group"]),
    Key(
        "sources[].roles",
        {"guest": "user"},
        made.rejections,
        ["illegal_role", "no_final_completion", "roles_do_not_alternate"],
        ["no_final_completion", "roles_do_not_alternate"],
        TALKS | {"contract.max_reject_rate": 1.0},
    ),
    Key("sources[].limit", 10, made.rows_by_source, [62], [10]),
    Key(
        "sources[].weight",
        3.0,
        made.rows_by_source,
        [6, 6],
        [6, 2],
        {"sources": [{"path": "few.jsonl", "static": True}, {"path": "few_more.jsonl", "static": True}]},
    ),
    Key("sources[].static", True, made.snapshot_count, 2, 1, MOVING),
    Key("sources[].format", "dolly", made.count("validated_rows", "accepted"), 60, 0),
    Key("sources[].columns", {"group": "shelf"}, made.count("validated_rows", "groups"), 60, 2),
    Key(
        "sources[].unused",
        ["image"],
        made.rejections,
        ["unused_field: image"],
        [],
        {"sources": [{"path": "pictures.jsonl", "static": True}]},
    ),
    # contract
    Key("contract.max_reject_rate", 0.0, made.check("validated_rows", "reject_rate"), True, False),
    Key("contract.require_group", False, made.count("validated_rows", "accepted"), 60, 61),
    *(
        Key(f"contract.{key}", bound, made.rejections, BAD, sorted([*BAD, reason]))
        for key, bound, reason in (
            ("min_prompt_chars", 1000, "prompt_too_short"),
            ("max_prompt_chars", 5, "prompt_too_long"),
            ("min_completion_chars", 1000, "completion_too_short"),
            ("max_completion_chars", 5, "completion_too_long"),
        )
    ),
    *(
        Key(
            f"contract.{name}",
            True,
            made.conversations,
            [TALK],
            [ODD_TALK, TALK],
            arranged_without(f"contract.{name}"),
        )
        for name in ("merge_consecutive", "drop_leading_assistant", "trim_trailing_user")
    ),
    # split
    Key("split.validation", 0, made.number_of_groups_in("validation"), DIFFERENT, 0),
    Key("split.test", 0, made.number_of_groups_in("test"), DIFFERENT, 0),
    Key("split.salt", "pepper", made.groups_in("test"), DIFFERENT, DIFFERENT),
    Key("split.groups.train", ["T0"], made.split_of("T0"), "test", "train", {"split.test": 0.79}),
    Key("split.groups.validation", ["T0"], made.split_of("T0"), "train", "validation", {"split.test": 0}),
    Key("split.groups.test", ["T0"], made.split_of("T0"), "train", "test", {"split.test": 0}),
    Key("split.time_column", "day", made.times, {None}, DIFFERENT),
    Key(
        "split.time_cutoff",
        "2026-01-11",
        made.number_of_groups_in("test"),
        0,
        40,
        {"split.time_column": "day", "split.test": 0},
    ),
    Key(
        "split.near_duplicates",
        NEAR["split.near_duplicates"],
        made.count("grouped_split", "near_duplicates"),
        0,
        DIFFERENT,
    ),
    Key(
        "split.near_duplicates.threshold",
        1.0,
        made.count("grouped_split", "near_duplicates"),
        DIFFERENT,
        0,
        NEAR,
    ),
    Key("split.near_duplicates.action", "report", made.count("grouped_split", "rejects"), DIFFERENT, 0, NEAR),
    Key(
        "split.near_duplicates.max_leakage",
        0.0,
        made.check("grouped_split", "near_duplicate_leakage"),
        True,
        False,
        REPORTED,
    ),
]


def test_every_key_of_a_dataset_has_an_entry() -> None:
    check_complete(DatasetConfig, DATASET)


@pytest.mark.parametrize("key", DATASET, ids=ids_of(DATASET))
def test_each_key_of_a_dataset_changes_what_it_says(shop: Workshop, key: Key) -> None:
    document = with_keys(DATASET_DOCUMENT, key.given)
    after = changed(document, key.key, key.value)
    check_changes(shop, key, Side(document, RECIPE_DOCUMENT), Side(after, RECIPE_DOCUMENT))
