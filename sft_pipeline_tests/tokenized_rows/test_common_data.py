"""Data as people have it, from raw files to tokens with YAML alone, compared with source and server.

`served_prompt_equal` makes each prompt from the source files by code of its own, so that it also says whether
joins, turns, texts and transforms did what they should.
"""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.lineage import trace
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.run import Run, run_stage
from sft_pipeline.stages.stage import Branch
from sft_pipeline.stages.tokenized_rows.asset import STAGE as TOKENIZED_ROWS
from sft_pipeline.store import Artifact, Store
from sft_pipeline.tables.parquet import read_rows
from sft_pipeline_tests import dataset_runs
from sft_pipeline_tests.text.tiny import save_tokenizer
from sft_pipeline_tests.tokenized_rows.test_served_prompts import TEMPLATE, check

Files = Mapping[str, Any]  # name -> rows (a list), or text

WORDS = [
    "red",
    "blue",
    "green",
    "tall",
    "short",
    "old",
    "new",
    "warm",
    "cold",
    "near",
    "far",
    "soft",
    "hard",
    "loud",
    "calm",
    "deep",
    "flat",
    "wide",
    "thin",
    "dark",
]


def text(number: int) -> str:
    """A text that is like no other."""
    return " ".join(WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(6)) + f" {number}"


def written(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        elif name.endswith((".csv", ".tsv")):
            stream = io.StringIO()
            writer = csv.DictWriter(stream, list(content[0]), delimiter="\t" if name.endswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(content)
            path.write_text(stream.getvalue())
        else:
            path.write_text(json.dumps(content))
    return folder / "data"


def conversations(
    folder: Path, data: Files, contract: dict[str, Any] | None = None, **source: Any
) -> tuple[list[list[tuple[str, str]]], Artifact]:
    """([(role, content), ...] of each accepted row, validated_rows); tokenized_rows has accepted them."""
    path = written(folder, data)
    dataset = dataset_runs.dataset(
        {"path": str(path), "static": True, **source},
        split={"validation": 0.2, "test": 0.2, "near_duplicates": None},
        contract=contract or {},
    )
    built = dataset_runs.run(dataset, folder / "home")
    save_tokenizer(folder / "tokenizer", TEMPLATE)
    recipe = {"name": "r", "dataset": dataset.name, "model": {"base": str(folder / "tokenizer")}}
    snapshot = dataset_runs.snapshots(dataset.sources)[-1]
    branch = Branch(dataset, snapshot, RecipeConfig.model_validate(recipe))
    stages = {**dataset_runs.STAGES, TOKENIZED_ROWS.name: TOKENIZED_ROWS}
    tokenized = run_stage(TOKENIZED_ROWS, stages, branch, Run(Store(folder / "home"), Reporter())).artifact
    assert tokenized.manifest.accepted, [c for c in tokenized.manifest.checks if not c["passed"]]
    validated = built["validated_rows"].artifact
    rows = list(read_rows(validated.parts("rows")))
    served = check(tokenized, "served_prompt_equal")["description"]
    assert served.startswith(f"{len(rows)} rows rendered again from their source files"), served
    return [[(m["role"], m["content"]) for m in row["messages"]] for row in rows], validated


def stages_with(row_id: str, folder: Path) -> set[str]:
    """The stages in which `sft trace` finds a row."""
    found = trace(row_id, Store(folder / "home"))
    return {artifact["asset"].rpartition("/")[2] for artifact in found.artifacts}


def raw_ids(folder: Path, **wanted: Any) -> list[str]:
    """The ids of the raw rows that hold these values."""
    [raw] = [a for a in Store(folder / "home").all() if a.manifest.asset.endswith("/raw_rows")]
    rows = ((row["row_id"], json.loads(row["content"])) for row in read_rows(raw.parts("rows")))
    return [row_id for row_id, row in rows if wanted.items() <= row.items()]


def reasons(validated: Artifact) -> list[tuple[int, list[str], list[str]]]:
    return [
        (r["line"], r["reasons"], r["details"]) for r in read_rows([validated.file("quarantine.parquet")])
    ]


def test_labels_in_a_csv_file(tmp_path: Path) -> None:
    rows = [{"text": text(i), "category": f"c{i % 3}"} for i in range(40)]
    texts = {"prompt": "Classify: {text}\nLabel {{one}} of 3", "completion": "{category}"}
    found, _ = conversations(tmp_path, {"train.csv": rows}, text=texts)
    assert found[5] == [("user", f"Classify: {text(5)}\nLabel {{one}} of 3"), ("assistant", "c2")]
    assert len(found) == 40


def test_a_question_an_explanation_and_an_answer(tmp_path: Path) -> None:
    rows = [{"q": text(i), "why": f"because {i}", "meta": {"answer": [i, i + 1]}} for i in range(30)]
    texts = {"prompt": "{q}", "completion": "{why}\nAnswer: {meta.answer.1}"}
    found, _ = conversations(tmp_path, {"rows.jsonl": rows}, text=texts)
    assert found[3] == [("user", text(3)), ("assistant", "because 3\nAnswer: 4")]


@pytest.mark.parametrize(
    ("row", "format_"),
    [
        (lambda i: {"instruction": text(i), "input": "" if i % 2 else "x", "output": f"o{i}"}, "instruction"),
        (lambda i: {"instruction": text(i), "context": "", "response": f"o{i}"}, "dolly"),
        (
            lambda i: {"question": text(i), "response": f"o{i}", "system_prompt": "Be kind."},
            "question_response",
        ),
        (lambda i: {"prompt": text(i), "completion": f"o{i}"}, "prompt_completion"),
        (
            lambda i: {"conversations": [{"from": "human", "value": text(i)}, {"from": "gpt", "value": "o"}]},
            "sharegpt",
        ),
        (
            lambda i: {
                "messages": [{"role": "user", "content": text(i)}, {"role": "assistant", "content": "o"}]
            },
            "messages",
        ),
    ],
)
def test_the_format_is_seen(tmp_path: Path, row: Any, format_: str) -> None:
    found, validated = conversations(tmp_path, {"rows.jsonl": [row(i) for i in range(30)]}, format="auto")
    assert len(found) == 30
    assert json.loads(validated.file("shapes.json").read_text())[0]["format"] == format_


def test_dialogues_with_their_own_role_names_one_in_each_file(tmp_path: Path) -> None:
    files = {
        f"d{i:02}.json": {
            "id": i,
            "talk": [{"who": "customer", "says": text(i)}, {"who": "agent", "says": f"reply {i}"}],
        }
        for i in range(30)
    }
    columns = {"messages": "talk", "role": "who", "content": "says", "group": "id"}
    roles = {"customer": "user", "agent": "assistant"}
    found, _ = conversations(tmp_path, files, format="messages", columns=columns, roles=roles)
    assert found[7] == [("user", text(7)), ("assistant", "reply 7")] and len(found) == 30


def test_a_file_of_turns_is_a_dialogue(tmp_path: Path) -> None:
    files = {
        f"d{i:02}.jsonl": [
            {"role": "user", "content": text(i)},
            {"role": "assistant", "content": f"reply {i}"},
            {"role": "user", "content": "and then?"},
            {"role": "assistant", "content": f"then {i}"},
        ]
        for i in range(30)
    }
    found, validated = conversations(tmp_path, files, format="turns")
    assert len(found) == 30 and found[9][3] == ("assistant", "then 9")
    assert validated.manifest.counts["read"] == 120 and validated.manifest.counts["merged"] == 90
    assert validated.manifest.accepted


def test_one_turn_in_a_row_in_any_order(tmp_path: Path) -> None:
    turns = []
    for i in range(30):
        turns += [
            {"id": f"c{i}", "no": "10", "who": "agent", "text": f"last {i}", "intent": "x"},
            {"id": f"c{i}", "no": "0", "who": "agent", "text": "Welcome!", "intent": "x"},
            {"id": f"c{i}", "no": "2", "who": "customer", "text": text(i), "intent": "x"},
            {"id": f"c{i}", "no": "3", "who": "customer", "text": "please", "intent": "x"},
            {"id": f"c{i}", "no": "11", "who": "customer", "text": "bye", "intent": "x"},
        ]
    turns.sort(key=lambda t: (t["text"], t["id"]))
    turns.append({"id": "", "no": "1", "who": "agent", "text": "lost", "intent": "x"})
    found, validated = conversations(
        tmp_path,
        {"turns.tsv": turns},
        format="turns",
        columns={"dialogue": "id", "order": "no", "role": "who", "content": "text"},
        roles={"customer": "user", "agent": "assistant"},
        contract={"merge_consecutive": True, "drop_leading_assistant": True, "trim_trailing_user": True},
    )
    assert len(found) == 30
    assert [("user", f"{text(4)}\nplease"), ("assistant", "last 4")] in found
    counts = validated.manifest.counts
    assert (counts["read"], counts["merged"], counts["accepted"], counts["quarantined"]) == (151, 120, 30, 1)
    assert counts["turns_arranged"] == 90
    assert reasons(validated) == [(152, ["missing_field"], ["id"])]  # the header is line 1
    assert {r["group"] for r in read_rows(validated.parts("rows"))} == {f"c{i}" for i in range(30)}
    for turn in ("3", "11"):  # also one that was left out at the end of its dialogue
        [row_id] = raw_ids(tmp_path, id="c5", no=turn)
        assert {"raw_rows", "validated_rows", "tokenized_rows"} <= stages_with(row_id, tmp_path)


def test_trajectories_of_which_only_the_successful_ones_are_kept(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": {"n": 1.50}}}
    rows = [
        {
            "reward": i % 3 / 2,
            "messages": [
                {"role": "user", "content": text(i)},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": f"found {i}"},
                {"role": "assistant", "content": f"done {i}"},
                {"role": "user", "content": "thanks"},
            ],
        }
        for i in range(45)
    ]
    found, validated = conversations(
        tmp_path,
        {"rows.jsonl": rows},
        format="messages",
        where="reward >= 0.5",
        contract={"trim_trailing_user": True, "max_reject_rate": 0.0},
    )
    assert len(found) == 30 and all(turns[-1][0] == "assistant" for turns in found)
    assert validated.manifest.counts["not_selected"] == 15 and validated.manifest.accepted


def test_prompts_in_one_file_and_answers_in_another(tmp_path: Path) -> None:
    prompts = [{"id": i, "prompt": text(i), "note": "mine"} for i in range(32)]
    answers = [{"ref": str(i), "reply": f"answer {i}", "note": "theirs"} for i in range(30)]
    answers += [{"ref": "29", "reply": "another"}, {"ref": "99", "reply": "nobody asked"}]
    found, validated = conversations(
        tmp_path,
        {"prompts.jsonl": prompts, "answers.csv": [{"note": "", **a} for a in answers]},
        files="prompts*",
        join={"files": "answers*", "by": "id", "key": "ref"},
        columns={"completion": "reply"},
        contract={"max_reject_rate": 0.2},
    )
    assert len(found) == 29 and found[4] == [("user", text(4)), ("assistant", "answer 4")]
    assert reasons(validated) == [
        (30, ["not_joined"], ["id = 29: several rows"]),
        (31, ["not_joined"], ["id = 30: no rows"]),
        (32, ["not_joined"], ["id = 31: no rows"]),
    ]
    assert validated.manifest.counts["joined"] == 29 and validated.manifest.counts["unused_joined"] == 3


def test_the_chosen_one_of_a_preference(tmp_path: Path) -> None:
    rows = [{"prompt": text(i), "chosen": f"good {i}", "rejected": "bad"} for i in range(30)]
    found, _ = conversations(tmp_path, {"rows.jsonl": rows}, columns={"completion": "chosen"})
    assert found[2] == [("user", text(2)), ("assistant", "good 2")]


TRANSFORM = """
def best(row):
    if row["i"] % 10 == 7:
        raise KeyError("score")
    if row["i"] % 10 == 8:
        return None
    if row["i"] % 10 == 9:
        return ["no row"]
    return [
        {"prompt": row["text"], "completion": m["text"]} for m in row["replies"] if m["score"] > 3
    ]
"""


def test_a_function_makes_rows_of_scored_replies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dagster.yaml").write_text("")
    (tmp_path / "choose_replies.py").write_text(TRANSFORM)
    monkeypatch.setenv("SFT_PROJECT_ROOT", str(tmp_path))
    rows = [
        {"i": i, "text": text(i), "replies": [{"text": f"r{i} {s}", "score": s} for s in (2, 4, 5)]}
        for i in range(20)
    ]
    found, validated = conversations(
        tmp_path, {"rows.jsonl": rows}, transform="choose_replies:best", contract={"max_reject_rate": 0.3}
    )
    assert found[:2] == [[("user", text(0)), ("assistant", f"r0 {s}")] for s in (4, 5)] and len(found) == 28
    assert validated.manifest.counts["added"] == 14 and validated.manifest.counts["not_selected"] == 2
    assert len({r["row_id"] for r in read_rows(validated.parts("rows"))}) == 28
    assert reasons(validated)[:3] == [
        (8, ["not_reshaped"], ["choose_replies:best raised KeyError: 'score'"]),
        (9, ["not_selected"], ["choose_replies:best returned None"]),
        (10, ["not_reshaped"], ["choose_replies:best returned str, not a dict"]),
    ]
    [row_id] = raw_ids(tmp_path, i=4)
    assert {"raw_rows", "validated_rows", "tokenized_rows"} <= stages_with(row_id, tmp_path)
    made = next(r["row_id"] for r in read_rows(validated.parts("rows")) if r["line"] == 5)
    assert made != row_id and "raw_rows" in stages_with(made, tmp_path)
    assert "choose_replies.py" in validated.manifest.outside
