"""validated_rows as a stage: the worked example, groups, duplicates, quarantine, the real datasets."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sft_pipeline.config.dataset import SourceConfig
from sft_pipeline.errors import BlockedError
from sft_pipeline.stages import workers
from sft_pipeline.stages.report import read_report
from sft_pipeline.stages.stage import Evidence
from sft_pipeline.stages.validated_rows.asset import STAGE
from sft_pipeline.tables.reasons import RejectReason
from sft_pipeline_tests.dataset_runs import check, dataset, project, rows, run, write_jsonl
from sft_pipeline_tests.raw_rows.broken_lines import broken_lines

__all__ = ["project"]


def pair(prompt: str, completion: Any = "An answer.", **rest: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **rest}


def test_worked_example_t102_is_accepted_the_others_quarantined(project: Path) -> None:
    path = write_jsonl(
        project / "rows.jsonl",
        [
            {"thread_id": "T102", "prompt": "Stale key", "completion": "Request rotation evidence."},
            {"thread_id": "B550", "prompt": "Expired key", "completion": ""},
            {"prompt": "Wrong size", "completion": "Offer an exchange label."},
        ],
    )
    built = run(
        dataset({"path": str(path), "columns": {"group": "thread_id"}}, contract={"max_reject_rate": 0.7}),
        project / "home",
        STAGE,
    )["validated_rows"].artifact
    assert [r["group"] for r in rows(built, "rows")] == ["T102"]
    assert [(r["line"], r["reasons"]) for r in rows(built, "quarantine.parquet")] == [
        (2, ["empty_completion"]),
        (3, ["missing_group"]),
    ]
    assert built.manifest.counts == {
        "read": 3,
        "accepted": 1,
        "quarantined": 2,
        "undecodable": 0,
        "warned": 0,
        "groups": 1,
    }
    assert built.manifest.accepted


def test_too_many_rejects_block_what_comes_after(project: Path) -> None:
    path = write_jsonl(project / "rows.jsonl", [pair("a"), pair("b", ""), pair("c", None)])
    outcome = run(dataset(path), project / "home", STAGE)["validated_rows"]
    assert (
        check(outcome, "reject_rate")["description"]
        == "2 of 3 rows (66.67%) were rejected, at most 10.00% may be: empty_completion 2"
    )
    assert not outcome.artifact.manifest.accepted
    with pytest.raises(BlockedError, match=r"reject_rate: 2 of 3 rows \(66.67%\)"):
        run(dataset(path), project / "home")


def test_every_line_is_accepted_or_quarantined_with_its_bytes(project: Path) -> None:
    path = project / "rows.jsonl"
    path.write_bytes(
        b'{"prompt": "a", "completion": "b"}\n\xff\n{"prompt": "a"}\n'
        b'{"prompt": "a", "completion": "b"}\n\n[]\n'
    )
    outcome = run(dataset(path, contract={"max_reject_rate": 1}), project / "home", STAGE)["validated_rows"]
    built = outcome.artifact
    assert [(r["line"], r["reasons"], r["raw"]) for r in rows(built, "quarantine.parquet")] == [
        (2, ["invalid_utf8"], "\\xff"),
        (6, ["not_an_object"], "[]"),
        (3, ["missing_field"], '{"prompt": "a"}'),
        (4, ["exact_duplicate"], '{"prompt": "a", "completion": "b"}'),
    ]
    assert (
        built.manifest.counts["read"]
        == 5
        == built.manifest.counts["accepted"] + built.manifest.counts["quarantined"]
    )
    assert check(outcome, "counts_add_up")["passed"]
    report = built.file("quarantine.md").read_text()
    assert (
        "4 of 5 rows (80.00%) were rejected" in report
        and "`rows.jsonl:2` `\\xff`" in report
        and RejectReason.EXACT_DUPLICATE.explanation in report
    )


def test_three_examples_of_each_reason(project: Path) -> None:
    path = write_jsonl(project / "rows.jsonl", [pair(f"p{i}", "") for i in range(9)] + [pair("`x` | y", 4)])
    built = run(dataset(path), project / "home", STAGE)["validated_rows"].artifact
    report = built.file("quarantine.md").read_text()
    assert report.count("`rows.jsonl:") == 4 and "| empty_completion | 9 |" in report


def test_groups_are_mapped_found_or_the_row_itself(project: Path) -> None:
    rest = {"contract": {"max_reject_rate": 1}}
    path = write_jsonl(
        project / "rows.jsonl",
        [pair("a", thread_id=" T1 "), pair("b"), pair("c", thread_id=7), pair("d", thread_id=[1])],
    )
    found = run(dataset(path, **rest), project / "home", STAGE)["validated_rows"].artifact
    assert [r["group"] for r in rows(found, "rows")] == ["T1", "7"]
    assert [r["reasons"] for r in rows(found, "quarantine.parquet")] == [
        ["missing_group"],
        ["wrong_type", "missing_group"],
    ]
    lenient = run(
        dataset(path, contract={"max_reject_rate": 1, "require_group": False}), project / "home", STAGE
    )["validated_rows"].artifact
    assert [len(r["group"]) for r in rows(lenient, "rows")] == [2, 32, 1]
    path = write_jsonl(project / "none.jsonl", [pair("a"), pair("b")])
    own = run(dataset(path, **rest), project / "home", STAGE)["validated_rows"].artifact
    assert [r["group"] for r in rows(own, "rows")] == [r["row_id"] for r in rows(own, "rows")]
    strict = run(
        dataset(path, contract={"max_reject_rate": 1, "require_group": True}), project / "home", STAGE
    )["validated_rows"].artifact
    assert strict.manifest.counts["accepted"] == 0 and not strict.manifest.accepted


def test_exact_duplicates_are_equal_in_group_and_messages(project: Path) -> None:
    same = [
        pair("a", group="g"),
        pair("a", group="g", note="other"),
        pair("a", group="h"),
        pair("b", group="g"),
    ]
    path = write_jsonl(project / "rows.jsonl", same)
    built = run(dataset(path, contract={"max_reject_rate": 1}), project / "home", STAGE)[
        "validated_rows"
    ].artifact
    assert [r["line"] for r in rows(built, "rows")] == [1, 3, 4]
    assert [(r["line"], r["reasons"]) for r in rows(built, "quarantine.parquet")] == [
        (2, ["exact_duplicate"])
    ]


def test_a_line_of_five_megabytes_is_quarantined_by_the_contract(project: Path) -> None:
    path = write_jsonl(project / "rows.jsonl", [pair("a"), pair("x" * 5_000_000)])
    built = run(dataset(path, contract={"max_reject_rate": 1}), project / "home", STAGE)[
        "validated_rows"
    ].artifact
    (reject,) = rows(built, "quarantine.parquet")
    assert reject["reasons"] == ["prompt_too_long"] and len(reject["raw"]) > 5_000_000


def test_warnings_do_not_reject(project: Path) -> None:
    path = write_jsonl(project / "rows.jsonl", [pair("a <|im_end|><|im_start|>system"), pair("b")])
    outcome = run(dataset(path), project / "home", STAGE)["validated_rows"]
    assert [r["warnings"] for r in rows(outcome.artifact, "rows")] == [
        ["control_token:<|im_end|>", "control_token:<|im_start|>"],
        [],
    ]
    assert outcome.artifact.manifest.counts["warned"] == 1
    assert (
        read_report(outcome.artifact)["evidence"]["characters"] == Evidence("plot", "plots/characters.png")
        and outcome.artifact.file("plots/characters.png").is_file()
    )


def test_times_are_read_where_configured(project: Path) -> None:
    path = write_jsonl(
        project / "rows.jsonl",
        [
            pair("a", at="2026-05-20"),
            pair("b", at="2026-05-20T10:00:00+02:00"),
            pair("c", at="soon"),
            pair("d"),
        ],
    )
    built = run(
        dataset(path, contract={"max_reject_rate": 1}, split={"time_column": "at"}), project / "home", STAGE
    )["validated_rows"].artifact
    assert [r["time"] for r in rows(built, "rows")] == [
        "2026-05-20T00:00:00.000000+00:00",
        "2026-05-20T08:00:00.000000+00:00",
    ]
    assert [r["reasons"] for r in rows(built, "quarantine.parquet")] == [["invalid_time"]] * 2


def test_a_misspelt_column_names_the_nearest() -> None:
    with pytest.raises(ValidationError, match="did you mean 'completion'"):
        SourceConfig(path="x", columns={"completon": "answer"})


def test_every_reason_is_in_one_list_with_an_explanation() -> None:
    assert all(r.explanation and r.value == r.name.lower() for r in RejectReason)


def test_the_number_of_workers_changes_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [json.dumps(pair(f"question {i % 9_000}")).encode() for i in range(16_000)]
    (project / "rows.jsonl").write_bytes(b"\n".join(broken_lines(8_000, seed=3) + good))
    config = dataset(project / "rows.jsonl", contract={"max_reject_rate": 1})
    monkeypatch.setattr(workers, "INLINE_ITEMS", 1)
    start, started = workers.ProcessPoolExecutor, []

    def counted(number: int, *arguments: Any) -> Any:
        started.append(number)
        return start(number, *arguments)

    monkeypatch.setattr(workers, "ProcessPoolExecutor", counted)
    found = []
    for number in ("1", "3"):
        monkeypatch.setenv("SFT_WORKERS", number)
        outcomes = run(config, project / f"home{number}", STAGE)
        found.append(
            [(o.artifact.manifest.data_version, o.artifact.manifest.counts) for o in outcomes.values()]
        )
    assert started == [3]
    assert found[0] == found[1]
    assert found[0][1][1]["accepted"] > 9_000


REAL = {
    "gsm8k": (
        {"path": "gsm8k/train.jsonl", "format": "question_response", "columns": {"response": "answer"}},
        7473,
        {},
    ),
    "banking77": (
        {"path": "banking77/train.csv", "columns": {"prompt": "text", "completion": "category"}},
        10003,
        {},
    ),
    "multidogo": (
        {
            "path": "multidogo/*/*.tsv",
            "columns": {"prompt": "utterance", "completion": "intent", "group": "conversationId"},
        },
        77501,
        {"exact_duplicate": 2600, "empty_prompt": 47},
    ),
    "oasst": (
        {
            "path": "oasst/trees_70.jsonl",
            "columns": {
                "group": "message_tree_id",
                "prompt": "prompt.text",
                "completion": "prompt.replies.0.text",
            },
        },
        70,
        {},
    ),
    "alpaca": (
        {"path": "llamafactory_demos/alpaca_en_demo.json", "format": "instruction"},
        985,
        {"exact_duplicate": 14},
    ),
    "glaive": (
        {"path": "llamafactory_demos/glaive_toolcall_en_demo.json", "format": "sharegpt"},
        265,
        {"exact_duplicate": 35},
    ),
    "typed": (
        {"path": "llamafactory_demos/v1_sft_demo.jsonl", "format": "messages"},
        499,
        {"exact_duplicate": 1},
    ),
    "fastchat": (
        {"path": "fastchat/dummy_conversation.json", "format": "sharegpt", "columns": {"group": "id"}},
        500,
        {},
    ),
}


@pytest.mark.shared_data
@pytest.mark.parametrize("name", REAL)
def test_real_datasets_run_as_they_are(name: str, project: Path, shared_data: Path) -> None:
    source, accepted, reasons = REAL[name]
    config = dataset(
        {**source, "path": f"{shared_data}/{source['path']}"}, contract={"max_reject_rate": 0.15}
    )
    outcome = run(config, project / "home", STAGE)["validated_rows"]
    assert outcome.artifact.manifest.accepted
    assert outcome.artifact.manifest.counts["accepted"] == accepted
    assert {
        r["reason"]: r["rows"] for r in read_report(outcome.artifact)["evidence"]["reasons"].value
    } == reasons


def absent(project: Path, rows_of_file: list[dict[str, Any]], **source: Any) -> str:
    path = write_jsonl(project / "rows.jsonl", rows_of_file)
    dataset_ = dataset({"path": str(path), **source}, contract={"max_reject_rate": 1.0})
    outcome = run(dataset_, project / "home", STAGE)["validated_rows"]
    told = check(outcome, "columns_there")
    return "" if told["passed"] else str(told["description"])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"where": "scroe > 1"}, "sources[0].where: scroe"),
        ({"where": 'lable != "spam"'}, "sources[0].where: lable"),  # holds for every row
        ({"columns": {"system": "systm"}}, "sources[0].columns.system: systm"),  # an optional field
        ({"text": {"prompt": "{promt}"}}, "sources[0].text: promt"),
        ({"where": "score > 0 and meta.lang != null", "columns": {"group": "thread"}}, ""),
        ({"where": 'column("é") == 1'}, ""),
        ({"columns": {"completion": "made"}, "text": {"made": "{prompt}!"}}, ""),
    ],
)
def test_a_column_that_no_row_has_is_told(project: Path, source: dict[str, Any], said: str) -> None:
    more = {"score": 2, "label": "ham", "meta": {"lang": "en"}, "thread": "t", "é": 1}
    told = absent(project, [pair(f"question {i}", **more) for i in range(20)], **source)
    assert (said in told) if said else not told


def test_a_condition_that_keeps_no_row_says_so(project: Path) -> None:
    path = write_jsonl(project / "rows.jsonl", [pair(f"question {i}", score=1) for i in range(5)])
    outcome = run(dataset({"path": str(path), "where": "score > 1"}), project / "home", STAGE)[
        "validated_rows"
    ]
    assert "not selected by where or transform: 5" in check(outcome, "has_rows")["description"]
