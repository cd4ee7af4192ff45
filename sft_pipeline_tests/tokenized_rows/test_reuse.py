"""Cost follows the change: rows tokenized before are reused by their content, and no others."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.stage import Build, Built, Check
from sft_pipeline.stages.tokenized_rows import build as stage_build
from sft_pipeline.stages.tokenized_rows import row_cache, served_prompts, tokenizer_skew
from sft_pipeline.stages.tokenized_rows.config import TemplateConfig, TokenizedRowsConfig, TokensConfig
from sft_pipeline.stages.tokenized_rows.outcomes import RowOutcome, mask_of, span_weights_of, to_outcomes
from sft_pipeline.stages.tokenized_rows.row_cache import TokenGroups
from sft_pipeline.stages.tokenized_rows.word_cache import WordCache
from sft_pipeline.store.manifest import data_version, list_files
from sft_pipeline.tables.parquet import read_rows
from sft_pipeline.tables.schemas import IGNORE_LABEL
from sft_pipeline.text.auto_tokenizer import AutoTokenizerReply
from sft_pipeline_tests.text.tiny import CHATML, save_tokenizer
from sft_pipeline_tests.tokenized_rows.rows import FakeArtifact, row, split_artifact

LONG = row(("user", "who"), ("assistant", "user " * 90), row_id="a" * 32)
FORGED = row(("user", "hi<|im_end|>"), ("assistant", "no"), row_id="f" * 32)


def numbered(count: int, start: int = 0) -> list[dict]:
    return [
        row(
            ("user", f"who may read report {i}"),
            ("assistant", f"user {i}é" if i % 5 == 0 else f"user {i}"),
            row_id=f"{i:032x}",
        )
        for i in range(start, start + count)
    ]


class RecordingReporter(Reporter):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def log(self, message: str, level: str = "info") -> None:
        self.lines.append(message)


def run(
    tmp_path: Path, name: str, earlier: tuple = (), supervise: str = "completion", **splits
) -> tuple[Built, FakeArtifact, RecordingReporter]:
    folder = tmp_path / "tokenizer"
    if not folder.exists():
        save_tokenizer(folder, CHATML)
    tokens = TokensConfig(max_length=100, overflow="split", supervise=supervise)
    config = TokenizedRowsConfig(
        tokenizer=str(folder), revision=None, template=TemplateConfig(), tokens=tokens
    )
    out, report = tmp_path / name, RecordingReporter()
    out.mkdir()
    inputs = {"grouped_split": split_artifact(tmp_path / f"split-{name}", **splits)}
    built = stage_build.build(
        Build(
            config=config,
            inputs=inputs,
            out=out,
            work=tmp_path / f"work-{name}",
            report=report,
            earlier=earlier,
        )
    )
    (out / "config.json").unlink(missing_ok=True)
    return built, FakeArtifact(out), report


def version(built: Built, artifact: FakeArtifact) -> str:
    return data_version(list_files(artifact.path, built.volatile))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The fast encoder and comparisons on a few dozen rows."""
    monkeypatch.setattr(stage_build, "COMPARED", 8)
    monkeypatch.setattr(stage_build, "BATCH", 16)


def test_only_changed_rows_are_tokenized_and_the_bytes_are_those_of_a_cold_build(tmp_path):
    before = [*numbered(60), LONG, FORGED]
    _, old, _ = run(tmp_path, "old", train=before, validation=numbered(5, 100), test=numbered(5, 200))
    after = [dict(r) for r in reversed(before)]  # elsewhere, under other names and groups
    for i, r in enumerate(after):
        r |= {"row_id": f"{i + 5000:032x}", "group": f"g{i}", "line": i, "file": "other.jsonl"}
    edited = row(("user", "who may read report 7"), ("assistant", "nobody"), row_id=after[10]["row_id"])
    after[10] = edited  # an edited row under an old name
    splits = {"train": after + numbered(2, 300), "validation": numbered(5, 100), "test": numbered(4, 201)}
    built, warm, _ = run(tmp_path, "warm", (old,), **splits)
    cold_built, cold, _ = run(tmp_path, "cold", **splits)
    assert (built.counts["rows_tokenized"], built.counts["rows_reused"]) == (3, 70)
    assert cold_built.counts["rows_reused"] == 0
    assert version(built, warm) == version(cold_built, cold)
    how = ("rows_tokenized", "rows_reused", "by_columns", "by_rows", "compared")
    counts = {k: v for k, v in built.counts.items() if k not in how}
    assert counts == {k: cold_built.counts[k] for k in counts}
    assert counts["split"] == 1 and counts["rows_rejected"] == 1
    assert [r["row_id"] for r in read_rows([warm.file("rejects.parquet")])] == [after[0]["row_id"]]
    assert all(c.passed for c in built.checks if c.name not in ("reject_rate",))


def test_rows_are_taken_from_several_earlier_builds(tmp_path):
    _, one, _ = run(tmp_path, "one", train=numbered(20))
    _, two, _ = run(tmp_path, "two", train=numbered(20, 20))
    built, _, _ = run(tmp_path, "three", (two, one), train=numbered(41))
    assert (built.counts["rows_tokenized"], built.counts["rows_reused"]) == (1, 40)


@pytest.mark.parametrize(
    "reply", [AutoTokenizerReply(unavailable="the process that loads it ended with exit status -9"), None]
)
def test_only_a_comparison_of_rows_with_autotokenizer_is_taken_over(tmp_path, monkeypatch, reply):
    def build(name: str, earlier: tuple, rows: list[dict]) -> tuple[Check, FakeArtifact]:
        built, artifact, _ = run(tmp_path, name, earlier, train=rows)
        check = next(c for c in built.checks if c.name == "tokenizer_skew")
        entry = {"name": check.name, "passed": check.passed, "description": check.description}
        artifact.file("checks.json").write_text(json.dumps([entry]))
        return check, artifact

    with monkeypatch.context() as patch:  # nothing is compared: no reply, or no row
        if reply:
            patch.setattr(served_prompts, "ask_auto_tokenizer", lambda asked: [reply] * len(asked))
        unproven, old = build("old", (), numbered(3) if reply else [])
    assert unproven.passed is (reply is None) and "compared" not in unproven.description
    compared, old = build("compared", (old,), numbered(6))
    assert compared.passed and compared.description.startswith("6 rows compared" if not reply else "3 rows")
    monkeypatch.setattr(served_prompts, "ask_auto_tokenizer", None)  # is not asked again
    first, old = build("first", (old,), numbered(7))
    second, _ = build("second", (old,), numbered(8))
    assert first.description == second.description == compared.description + tokenizer_skew._EARLIER


def test_the_fast_and_the_reference_encoder_write_the_same_bytes_and_count_their_rows(tmp_path, monkeypatch):
    fast_built, fast, _ = run(tmp_path, "fast", train=[*numbered(60), LONG, FORGED])
    assert fast_built.counts["by_columns"] > 40 and fast_built.counts["compared"] >= 8
    monkeypatch.setattr(stage_build, "COMPARED", 1000)
    slow_built, slow, _ = run(tmp_path, "slow", train=[*numbered(60), LONG, FORGED])
    assert slow_built.counts["by_columns"] == 0 and slow_built.counts["by_rows"] == 62
    assert version(fast_built, fast) == version(slow_built, slow)


def test_when_the_fast_encoder_differs_the_reference_encodes_all_rows(tmp_path, monkeypatch):
    exact, splits = WordCache._encode, {"train": [*numbered(60), LONG, FORGED]}
    good_built, good, _ = run(tmp_path, "good", **splits)

    def ids_of_single_bytes(self: WordCache, texts: list[str]) -> list[bytes]:
        """They decode to the text, but are not the ids of the tokenizer."""
        return [
            b"".join(exact(self, list(text))) if text.isascii() else ids
            for text, ids in zip(texts, exact(self, texts))
        ]

    monkeypatch.setattr(WordCache, "_encode", ids_of_single_bytes)
    built, artifact, report = run(tmp_path, "erring", **splits)
    assert version(built, artifact) == version(good_built, good)
    assert built.counts["by_columns"] == 0 and any(
        "differs from the reference" in line for line in report.lines
    )
    assert "differs from the reference" in str(built.evidence["encoding"].value)


def test_few_new_rows_go_row_by_row(tmp_path):
    _, old, _ = run(tmp_path, "old", train=[*numbered(60), LONG])
    built, _, _ = run(tmp_path, "few", (old,), train=[*numbered(75), LONG])
    assert (built.counts["by_columns"], built.counts["by_rows"]) == (0, 15)
    built, warm, _ = run(tmp_path, "more", (old,), train=[*numbered(90), LONG])
    assert built.counts["by_columns"] >= 29 and built.counts["compared"] >= 8
    cold_built, cold, _ = run(tmp_path, "cold", train=[*numbered(90), LONG])
    assert version(built, warm) == version(cold_built, cold)


TOKEN_WEIGHTS = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.25])


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.lists(st.lists(TOKEN_WEIGHTS, min_size=1, max_size=9), max_size=3), max_size=6))
def test_spans_record_the_mask_and_the_weights_of_each_row(rows):
    """Rows of examples of tokens, each with its weight; 0: not supervised."""
    examples = [weights for row in rows for weights in row]
    flat = np.array([weight for weights in examples for weight in weights], dtype=np.float32)
    labels = [[7 if weight else IGNORE_LABEL for weight in weights] for weights in examples]
    given_weights = [weights if 0.25 in weights else None for weights in examples]
    batch = pa.RecordBatch.from_arrays(
        [
            pa.array(list(map(len, examples)), pa.int32()),
            pa.array(labels, pa.list_(pa.int32())),
            pa.array(given_weights, pa.list_(pa.float32())),
        ],
        ["length", "labels", "weights"],
    )
    keys = pa.array([b"k" * 16] * len(rows), pa.binary(16))
    written = to_outcomes(
        keys, [RowOutcome(n) for n in range(4)], np.array([len(r) for r in rows], np.int64), batch
    )
    starts = np.cumsum([0, *(sum(map(len, row)) for row in rows)])
    spans = written.column("spans")
    assert mask_of(spans, starts).tolist() == (flat > 0).tolist()
    weights = span_weights_of(spans, written.column("span_weights"), starts)
    assert (weights is None) == (0.25 not in flat)
    assert weights is None or weights.tolist() == flat.tolist()
    for of_row, given_row in zip(spans.to_pylist(), rows, strict=True):
        ends = zip(of_row[::2], of_row[1::2], strict=True)
        assert all(0 <= a < b <= sum(map(len, given_row)) for a, b in ends)


@pytest.mark.parametrize("held", [0, 3_000, 1 << 20])
def test_token_groups_give_ids_in_any_order_within_a_memory_bound(tmp_path, monkeypatch, held):
    monkeypatch.setattr(row_cache, "HELD_BYTES", held)
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 20, 300)
    ids = [rng.integers(0, 1000, n).tolist() for n in lengths]
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, half in zip(paths, (ids[:130], ids[130:]), strict=True):
        pq.write_table(pa.table({"input_ids": pa.array(half, pa.list_(pa.int32()))}), path, row_group_size=40)
    wanted = rng.permutation(np.repeat(np.arange(300), rng.integers(0, 3, 300)))
    times = np.bincount(wanted, minlength=300)
    scratch = tmp_path / "scratch"
    groups = TokenGroups(paths, lengths.astype(np.int32), times, scratch)
    for these in np.array_split(wanted, 7):
        places, holes = np.cumsum([0, *lengths[these] + rng.integers(0, 2, len(these))])[:-1], -1
        to = np.full(lengths[these].sum() + len(these), holes, np.int32)
        groups.copy(these, to, places)
        for e, place in zip(these, places, strict=True):
            assert to[place : place + lengths[e]].tolist() == ids[e]
        assert np.count_nonzero(to != holes) == lengths[these].sum()
    assert not groups.held and not list(scratch.glob("*"))  # all that was wanted was taken


WEIGHTS = st.lists(st.sampled_from([None, 0, 0.25, 1, 2]), min_size=4, max_size=4)


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(WEIGHTS, min_size=1, max_size=6), seen=st.integers(0, 6))
def test_weights_of_reused_rows_are_those_of_a_cold_build(tmp_path_factory, weights, seen):
    tmp_path = tmp_path_factory.mktemp("weights")
    rows = [
        row(
            ("user", f"who may read {i}"),
            ("assistant", "user " * 5),
            ("user", "user"),
            ("assistant", "user " * (40 if i % 2 else 3) + str(i)),
            weights=[*of_row[:3], of_row[3] or 0.5],
            row_id=f"{i:032x}",
        )
        for i, of_row in enumerate(weights)
    ]
    _, before, _ = run(tmp_path, "before", supervise="assistant", train=[*rows[:seen], *numbered(3)])
    cold, first, _ = run(tmp_path, "cold", supervise="assistant", train=[*numbered(3), *rows])
    warm, second, _ = run(tmp_path, "warm", (before,), supervise="assistant", train=[*numbered(3), *rows])
    assert warm.counts["rows_reused"] == 3 + min(seen, len(rows))
    assert version(warm, second) == version(cold, first)
    assert all(c.passed for c in cold.checks if c.name == "mask_certificate")
    found = {r["row_id"]: r for r in read_rows(second.parts("train"))}
    for i, of_row in enumerate(weights):
        wanted = {w for w in (of_row[1], of_row[3] or 0.5) if w != 0}
        given = found[f"{i:032x}"]["weights"]
        assert ({*given} - {0}) <= {1.0 if w is None else w for w in wanted} if given else wanted <= {None, 1}
