"""What `sft inspect` shows is what lies in the artifacts."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from sft_pipeline.errors import InputError
from sft_pipeline.inspection import Inspection, html_page, inspect_rows, print_inspection
from sft_pipeline.inspection.read import token_texts
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.packed_shards.build import build as pack
from sft_pipeline.stages.packed_shards.config import PackedShardsConfig, PackingConfig
from sft_pipeline.stages.stage import Build
from sft_pipeline.stages.tokenized_rows.build import build as tokenize
from sft_pipeline.stages.tokenized_rows.config import TemplateConfig, TokenizedRowsConfig, TokensConfig
from sft_pipeline_tests.text.tiny import save_tokenizer, tiny_tokenizer
from sft_pipeline_tests.tokenized_rows.rows import FakeArtifact, row, split_artifact

EVIL = '<script>alert(1)</script> & "quoted" \x1b[31mred \u202eturned café 日本 🙂'
ROWS = [
    row(("user", f"<b>who</b> may read {i}"), ("assistant", f"user\n {i}"), row_id=f"{i:032x}")
    for i in range(40)
]
LONG = row(("user", "who may read the report " * 4), ("assistant", "rotate the key " * 12), row_id="e" * 32)


def make(folder: Path, train: list, *, strategy: str = "bfd", **tokens) -> tuple[FakeArtifact, FakeArtifact]:
    """The tokenized rows and the packed shards of some rows."""
    split = split_artifact(folder / "split", train=train, test=ROWS[:2])
    tokens = {"max_length": 256, **tokens}
    config = TokenizedRowsConfig(
        tokenizer=str(save_tokenizer(folder / "tok")),
        revision=None,
        template=TemplateConfig(),
        tokens=TokensConfig(**tokens),
    )
    packing = PackedShardsConfig(
        packing=PackingConfig(strategy=strategy),
        max_length=tokens["max_length"],
        blocks_per_update=4,
        epochs=1,
        seed=0,
    )
    inputs = {"grouped_split": split}
    for name, build, cfg in (("tokenized_rows", tokenize, config), ("packed_shards", pack, packing)):
        out = folder / name
        out.mkdir()
        build(Build(config=cfg, inputs=inputs, out=out, work=folder / "work", report=Reporter()))
        (out / "config.json").write_text(json.dumps(cfg.model_dump(mode="json")))
        inputs[name] = FakeArtifact(out)
    return inputs["tokenized_rows"], inputs["packed_shards"]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    rejected = row(("user", "a<|pad|>"), ("assistant", "b"), row_id="f" * 32)
    return make(tmp_path_factory.mktemp("inspection"), [*ROWS, rejected])


def printed(inspection: Inspection) -> str:
    stream = io.StringIO()
    print_inspection(inspection, Console(file=stream, width=160))
    return stream.getvalue()


def test_the_json_has_tokens_and_labels_of_equal_length(artifacts):
    result = inspect_rows(*artifacts, n=3).to_json()
    assert len(result["rows"]) == 3
    for r, given in zip(result["rows"], ROWS, strict=False):
        assert r["row_id"] == given["row_id"] and r["side"] == "train"
        assert len(r["tokens"]) == len(r["labels"]) == len(r["input_ids"]) == len(r["position_ids"])
        assert (
            "".join(t for t, label in zip(r["tokens"], r["labels"], strict=True) if label != -100)
            == given["messages"][-1]["content"] + "<|im_end|>"
        )
        block = next(b for b in result["blocks"] if b["block"] == r["block"])
        assert r["row_id"] in [s["row_id"] for s in block["segments"]]
        assert sum(s["length"] for s in block["segments"]) == block["length"] <= 256


def test_position_ids_restart_at_every_example_of_a_block(artifacts):
    block = inspect_rows(*artifacts, n=1).blocks[0]
    assert len(block.segments) > 1
    assert all((s.first_position, s.last_position) == (0, s.length - 1) for s in block.segments)


def test_each_row_is_shown_with_its_own_block_and_each_block_once(artifacts):
    found = inspect_rows(*artifacts, n=40)
    holds = {b.block: [s.row_id for s in b.segments] for b in found.blocks}
    assert len(holds) == len(found.blocks)
    assert all(r.row_id in holds[r.block] for r in found.rows)
    assert sorted(i for ids in holds.values() for i in ids) == sorted(r["row_id"] for r in ROWS)


def test_a_row_is_found_by_the_beginning_of_its_id_in_any_split(artifacts):
    found = inspect_rows(*artifacts, row=ROWS[1]["row_id"], n=5)
    assert [(r.split, r.row_id) for r in found.rows] == [
        ("train", ROWS[1]["row_id"]),
        ("test", ROWS[1]["row_id"]),
    ]
    assert found.rows[1].block is None


def test_a_rejected_row_says_why(artifacts):
    with pytest.raises(InputError, match="control_token_in_text"):
        inspect_rows(*artifacts, row="f" * 32)
    with pytest.raises(InputError, match="no tokenized row"):
        inspect_rows(*artifacts, row="abc")


def test_the_terminal_shows_rows_and_blocks_and_needs_no_colour(artifacts):
    text = printed(inspect_rows(*artifacts, n=2))
    assert ROWS[0]["row_id"] in text and "examples" in text and "positions 0 to" in text
    assert "▌supervised▐" in text and "0<|im_end|>▐" in text and text.count("▌") == text.count("▐")


def test_the_page_needs_nothing_else_and_explains_itself(artifacts):
    found = inspect_rows(*artifacts, n=2)
    page = html_page(found)
    assert not any(word in page for word in ("http", "src=", "@import", "url("))
    assert 'class="legend"' in page and "supervised: carries loss" in page and "control token" in page
    first = found.rows[0]
    assert f'data-tip="id {first.input_ids[0]} · position 0 · no loss"' in page
    last = max(i for i, label in enumerate(first.labels) if label != -100)
    assert f"id {first.input_ids[last]} · position {last} · label {first.labels[last]}" in page
    for segment in found.blocks[0].segments:
        assert page.count(segment.row_id) >= 2 and f"positions 0 to {segment.length - 1}" in page


def test_text_of_rows_can_do_nothing_to_the_page_or_the_terminal(tmp_path):
    evil = row(("user", EVIL), ("assistant", EVIL), row_id="a" * 32) | {"group": '"><script>'}
    found = inspect_rows(*make(tmp_path, [evil]), n=1)
    assert EVIL in "".join(found.rows[0].tokens)
    page, text = html_page(found), printed(found)
    assert page.count("<script>") == 1 and "&lt;" in page and "group &#34;&gt;&lt;script" in page
    for shown in (page, text):
        assert "\x1b" not in shown and "\u202e" not in shown and "⟨U+001B⟩" in shown and "⟨U+202E⟩" in shown
        assert "🙂" in shown and "\N{REPLACEMENT CHARACTER}" not in shown


@pytest.mark.parametrize(
    ("overflow", "mark"),
    [
        ("truncate_prompt", "the prompt is shorter by"),
        ("truncate_answer", "of the answer left out"),
        ("split", "in the next part"),
    ],
)
def test_a_row_that_was_cut_shows_where(tmp_path, overflow, mark):
    whole = row(("user", "who"), ("assistant", "the key"), row_id="b" * 32)
    found = inspect_rows(
        *make(tmp_path, [LONG, whole], overflow=overflow, max_length=64, strategy="none"), n=9
    )
    page, text = html_page(found), printed(found)
    assert mark in page and mark in text and "✂" in text
    cut = {r.row_id: bool(r.cut_before or r.cut_after) for r in found.rows}
    assert cut.pop("b" * 32) is False and cut and all(cut.values())
    if overflow == "split":
        parts = [r for r in found.rows if r.row_id.startswith("e")]
        assert [r.row_id for r in parts][:2] == ["e" * 32, "e" * 32 + "/1"]
        assert not parts[0].cut_before and "part 2" in parts[1].cut_before and not parts[-1].cut_after


def test_an_uncut_page_has_no_scissors(artifacts):
    assert "✂" not in html_page(inspect_rows(*artifacts, n=5))


def test_a_character_of_several_tokens_belongs_to_its_last_one():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.ids("é🙂 日")
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == "é🙂 日" and [t for t in texts if t] == ["é", "🙂", " ", "日"]
    assert "".join(token_texts(tokenizer, ids[:-1])).endswith("\N{REPLACEMENT CHARACTER}")


def test_rows_can_be_shown_without_blocks(artifacts):
    result = inspect_rows(artifacts[0], None, n=1).to_json()
    assert result["blocks"] == [] and result["rows"][0]["block"] is None
