"""What `sft inspect` shows is what lies in the artifacts."""

import io
import json

import pytest
from rich.console import Console

from sft_pipeline.errors import InputError
from sft_pipeline.inspection import html_page, inspect_rows, print_inspection
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.packed_shards.build import build as pack
from sft_pipeline.stages.packed_shards.config import PackedShardsConfig, PackingConfig
from sft_pipeline.stages.stage import Build
from sft_pipeline.stages.tokenized_rows.build import build as tokenize
from sft_pipeline.stages.tokenized_rows.config import TemplateConfig, TokenizedRowsConfig, TokensConfig
from sft_pipeline_tests.tokenized_rows.tiny import FakeArtifact, row, save_tokenizer, split_artifact

ROWS = [
    row(("user", f"<b>who</b> may read {i}"), ("assistant", f"user\n {i}"), row_id=f"{i:032x}")
    for i in range(40)
]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspection")
    split = split_artifact(
        folder / "split",
        train=[*ROWS, row(("user", "a<|pad|>"), ("assistant", "b"), row_id="f" * 32)],
        test=ROWS[:2],
    )
    config = TokenizedRowsConfig(
        tokenizer=str(save_tokenizer(folder / "tok")),
        revision=None,
        template=TemplateConfig(),
        tokens=TokensConfig(max_length=256),
    )
    packing = PackedShardsConfig(
        packing=PackingConfig(), max_length=256, blocks_per_update=4, epochs=1, seed=0
    )
    made = {}
    for name, build, cfg, inputs in (
        ("tokenized", tokenize, config, lambda: {"grouped_split": split}),
        ("packed", pack, packing, lambda: {"tokenized_rows": made["tokenized"]}),
    ):
        out = folder / name
        out.mkdir()
        build(Build(config=cfg, inputs=inputs(), out=out, work=folder / "work", report=Reporter()))
        (out / "config.json").write_text(json.dumps(cfg.model_dump(mode="json")))
        made[name] = FakeArtifact(out)
    return made["tokenized"], made["packed"]


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
        assert (
            r["row_id"] in [s["row_id"] for s in block["segments"]]
            and sum(s["length"] for s in block["segments"]) == block["length"] <= 256
        )


def test_a_row_is_found_by_the_beginning_of_its_id_on_any_side(artifacts):
    found = inspect_rows(*artifacts, row=ROWS[1]["row_id"], n=5)
    assert [(r.side, r.row_id) for r in found.rows] == [
        ("train", ROWS[1]["row_id"]),
        ("test", ROWS[1]["row_id"]),
    ]
    assert found.rows[1].block is None


def test_a_rejected_row_says_why(artifacts):
    with pytest.raises(InputError, match="control_token_in_text"):
        inspect_rows(*artifacts, row="f" * 32)
    with pytest.raises(InputError, match="no tokenized row"):
        inspect_rows(*artifacts, row="abc")


def test_the_terminal_shows_rows_and_blocks(artifacts):
    stream = io.StringIO()
    print_inspection(inspect_rows(*artifacts, n=2), Console(file=stream, width=120))
    assert (
        ROWS[0]["row_id"] in stream.getvalue()
        and "user" in stream.getvalue()
        and "examples" in stream.getvalue()
    )


def test_the_page_is_self_contained_and_escapes_rows(artifacts):
    page = html_page(inspect_rows(*artifacts, n=2))
    assert (
        "<b>" not in page
        and "http" not in page
        and 'class="segment' in page
        and "position 0" in page
        and "supervised" in page
    )


def test_rows_can_be_shown_without_blocks(artifacts):
    result = inspect_rows(artifacts[0], None, n=1).to_json()
    assert result["blocks"] == [] and result["rows"][0]["block"] is None
