"""`sft init` and `sft preview`: files that run to packed_shards as they were written, and what is unsure."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_pipeline.cli.console import Terminal
from sft_pipeline.cli.preview import show_preview
from sft_pipeline.preview.guess import guess
from sft_pipeline_tests.command import ROOT, sft

SHARED = ROOT.parent / "shared" / "data"
REAL = {
    "gsm8k": ("gsm8k", "numbers"),
    "banking77": ("banking77", "labels"),
    "multidogo/fastfood": ("fastfood", "labels"),
    "oasst": ("oasst", "conversations"),
    "llamafactory_demos/alpaca_en_demo.json": ("alpaca", "conversations"),
    "llamafactory_demos/glaive_toolcall_en_demo.json": ("glaive", "conversations with tools"),
    "llamafactory_demos/v1_sft_demo.jsonl": ("v1", "conversations"),
    "fastchat": ("fastchat", "conversations"),
}


def init(folder: Path, data: Path, name: str = "mine", **options: Any) -> Any:
    return sft("init", str(data), "--name", name, "--into", str(folder / "config"), "--json", **options)


@pytest.mark.parametrize("place", REAL)
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
def test_real_data_run_to_packed_shards_unedited(tmp_path: Path, place: str) -> None:
    name, task = REAL[place]
    made = init(tmp_path, SHARED / place, name, home=tmp_path / "home")
    assert made.code == 0, made.stderr
    assert made.json["guessed"]["task"] == task
    config = tmp_path / "config"
    ran = sft(
        "run", f"{name}_lora", "--until", "packed_shards", "--json", home=tmp_path / "home", config=config
    )
    assert ran.code == 0 and ran.json["status"] == "materialized", ran.stderr
    looked = sft("preview", name, "--json", home=tmp_path / "home", config=config)
    assert looked.code == 0 and looked.json["rows"] and looked.json["accepted"] > 0


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_files_are_written_with_comments_and_never_overwritten(tmp_path: Path) -> None:
    data = write_csv(
        tmp_path / "my data" / "Tickets 2.csv", [{"text": f"t {i}", "label": "ab"[i % 2]} for i in range(40)]
    )
    made = sft("init", str(data), "--into", str(tmp_path / "config"), "--json", home=tmp_path / "home")
    assert made.code == 0, made.stderr
    dataset, recipe = Path(made.json["dataset"]), Path(made.json["recipe"])
    assert dataset.name == "tickets_2.yaml" and "  # " in recipe.read_text()
    assert yaml.safe_load(dataset.read_text())["sources"][0]["columns"] == {
        "prompt": "text",
        "completion": "label",
    }
    graders = yaml.safe_load(recipe.read_text())["evaluation"]["graders"]
    assert graders == [{"name": "exact", "kind": "exact_match"}]
    again = sft("init", str(data), "--into", str(tmp_path / "config"), home=tmp_path / "home")
    assert again.code == 2 and "is there already" in again.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no rows"),
        (b'{"a": 1}\n', "no prompt and reply could be told among the columns a"),
        (b"not json\n", "no rows"),
        (b'{"prompt": "", "completion": ""}\n', "no row fits the guess"),
    ],
)
def test_data_that_cannot_be_guessed(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    made = sft("init", str(tmp_path / "data.jsonl"), "--into", str(tmp_path / "c"), home=tmp_path / "home")
    assert made.code == 2 and said in made.stderr and not (tmp_path / "c").exists()


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    made = sft("init", str(tmp_path / "nowhere"), home=tmp_path / "home")
    assert made.code == 2 and "no such file or folder" in made.stderr


def test_snapshots_are_seen(tmp_path: Path) -> None:
    for snapshot in ("2026-01-01", "2026-02-01"):
        rows = [{"prompt": f"p {i} {snapshot}", "completion": f"c {i}"} for i in range(20)]
        write_csv(tmp_path / "data" / snapshot / "rows.csv", rows)
    made = init(tmp_path, tmp_path / "data", home=tmp_path / "home")
    assert "static" not in made.json["guessed"]["source"]
    assert made.json["preview"]["snapshot"] == "2026-02-01"


def test_a_preview_says_why_rows_would_be_rejected(tmp_path: Path) -> None:
    rows = [{"question": f"q {i}", "answer": f"a {i}", "n": i} for i in range(30)] + [{"question": "x"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    made = init(tmp_path, tmp_path / "rows.jsonl", home=tmp_path / "home")
    config, home = tmp_path / "config", tmp_path / "home"
    looked = sft("preview", "mine", "--json", home=home, config=config)
    assert looked.json["accepted"] == 30 and looked.json["whole"] and made.code == 0
    assert looked.json["reasons"] == {"invalid_json": 1, "missing_field": 1}
    assert [r["details"] for r in looked.json["rejected"]] == [[""], ["completion"]]
    stream = io.StringIO()
    show_preview(looked.json, Terminal(file=stream, width=200))
    assert "missing_field (completion)" in stream.getvalue()
    assert "columns that nothing reads: n (30)" in stream.getvalue()
    assert not (home / "objects").exists(), "nothing is built"


def test_a_preview_names_columns_that_are_not_there(tmp_path: Path) -> None:
    rows = [{"question": f"q {i}", "answer": f"a {i}"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = init(tmp_path, tmp_path / "rows.jsonl", home=tmp_path / "home")
    path = Path(made.json["dataset"])
    document = yaml.safe_load(path.read_text())
    document["sources"][0]["where"] = 'lang != "de"'
    path.write_text(yaml.safe_dump(document))
    looked = sft("preview", "mine", "--json", home=tmp_path / "home", config=tmp_path / "config")
    assert looked.json["absent"] == ["sources[0].where: lang"] and looked.json["accepted"] == 30


def turn(**keys: Any) -> dict[str, Any]:
    return keys


@pytest.mark.parametrize(
    ("row", "source"),
    [
        (
            lambda i: {"chat": [turn(speaker="customer", text=f"c{i}"), turn(speaker="agent", text="a")]},
            {
                "format": "messages",
                "columns": {"messages": "chat", "role": "speaker", "content": "text"},
                "roles": {"customer": "user", "agent": "assistant"},
            },
        ),
        (
            lambda i: {
                "dialogueId": i // 4,
                "turn": i % 4,
                "sender": ("bot", "user")[i % 2],
                "body": f"b{i}",
            },
            {
                "format": "turns",
                "columns": {"role": "sender", "content": "body", "dialogue": "dialogueId", "order": "turn"},
            },
        ),
        (
            lambda i: {"ticketId": f"t{i // 3}", "userQuery": f"q {i}", "botReply": f"r {i}"},
            {
                "format": "prompt_completion",
                "columns": {"prompt": "userQuery", "completion": "botReply", "group": "ticketId"},
            },
        ),
        (
            lambda i: {"context": f"c {i}", "question": f"q {i}", "answer": f"a {i}"},
            {
                "format": "prompt_completion",
                "columns": {"completion": "answer"},
                "text": {"prompt": "{context}\n\n{question}"},
            },
        ),
    ],
)
def test_what_is_guessed(row: Any, source: dict[str, Any]) -> None:
    assert guess([row(i) for i in range(40)]).source == source
