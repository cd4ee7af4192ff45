"""Where a group or row is: source lines, splits, blocks and updates, and the models trained on it."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from sft_pipeline.errors import InputError
from sft_pipeline.lineage.walk import walk
from sft_pipeline.reporting import Reporter
from sft_pipeline.store import Artifact, Store

SPLITS = ("train", "validation", "test")
ROW_STAGES = {
    "raw_rows": ("rows",),
    "validated_rows": ("rows",),
    "grouped_split": SPLITS,
    "tokenized_rows": SPLITS,
}
_PART = r"/\d+$"
REJECT_FILES = ("rejects.parquet", "quarantine.parquet")


@dataclass
class Trace:
    """Where `key` was found. Entries are flat dicts with asset, partition, fingerprint and path.

    Attributes:
        row_ids: The rows of the group, or the row itself.
        sources: source file and line: row_id, file, line.
        artifacts: side, which is the split (null where there are none), rows, note (such as why it was
            rejected).
        blocks: side, block, row_ids, updates (numbers from 1; training split only).
        models: Exported models whose chosen checkpoint was trained on one of the blocks: step, updates.
    """

    key: str
    row_ids: list[str] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)

    @property
    def found(self) -> bool:
        return bool(self.artifacts)

    def add(self, artifact: Artifact, split: str | None, rows: int, note: str | None) -> None:
        """Records that an artifact holds rows."""
        self.artifacts.append({**_about(artifact), "side": split, "rows": rows, "note": note})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def trace(key: str, store: Store | None = None, report: Reporter | None = None) -> Trace:
    """Looks for a group key or a row_id in every artifact of the store.

    Held-out rows are found in artifacts, though in no block of the training split and therefore in no model.
    A block that comes only after the chosen checkpoint's step did not train it either.
    """
    store, report = store or Store(), report or Reporter()
    by_stage: dict[str, list[Artifact]] = {}

    def unreadable(error: Exception) -> None:
        report.log(f"not looked into: {error}", "warning")

    for artifact in store.all(unreadable):
        by_stage.setdefault(artifact.manifest.asset.rpartition("/")[2], []).append(artifact)
    found = Trace(key)
    ids = _row_ids(key, by_stage, unreadable)
    todo = sum(len(a) for a in by_stage.values())
    done = 0
    for stage, folders in ROW_STAGES.items():
        for artifact in by_stage.get(stage, []):
            with _skipping_damaged(artifact, unreadable):
                for folder in folders:
                    _trace_rows(artifact, stage, folder, ids, found)
                _trace_rejects(artifact, ids, found)
            report.progress("tracing", done := done + 1, todo, "artifacts")
    found.row_ids = (
        sorted(ids & {s["row_id"] for s in found.sources}) or sorted(ids) if found.artifacts else []
    )
    for artifact in by_stage.get("packed_shards", []):
        with _skipping_damaged(artifact, unreadable):
            _trace_blocks(artifact, ids, found)
        report.progress("tracing", done := done + 1, todo, "artifacts")
    for artifact in by_stage.get("exported_model", []):
        _trace_model(artifact, store, found)
        report.progress("tracing", done := done + 1, todo, "artifacts")
    report.progress("tracing", todo, todo, "artifacts")
    return found


def _about(artifact: Artifact) -> dict[str, Any]:
    m = artifact.manifest
    return {
        "asset": m.asset,
        "partition": m.partition,
        "fingerprint": m.fingerprint,
        "path": str(artifact.path),
    }


@contextmanager
def _skipping_damaged(artifact: Artifact, unreadable: Callable[[Exception], None]) -> Iterator[None]:
    """A damaged file hides what one artifact holds, not what the others do."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        unreadable(InputError(f"{artifact.path} ({artifact.manifest.asset}): {error}"))


def _row_ids(
    key: str, by_stage: dict[str, list[Artifact]], unreadable: Callable[[Exception], None]
) -> set[str]:
    """The key itself, the rows of the group of that name, and the rows that they were made of or that were
    made of them."""
    ids = {key}
    for artifact in by_stage.get("validated_rows", []):
        with _skipping_damaged(artifact, unreadable):
            for batch in _scan(artifact.parts("rows"), ["row_id"], ds.field("group") == key):
                ids.update(batch.column(0).to_pylist())
            ids.update(_quarantined(artifact.file("quarantine.parquet"), key))
    for artifact in by_stage.get("validated_rows", []):
        with _skipping_damaged(artifact, unreadable):
            known = sorted(ids)
            linked = ds.field("row_id").isin(known) | ds.field("made_of").isin(known)
            for batch in _scan(artifact.parts("made"), ["row_id", "made_of"], linked):
                ids.update(*(column.to_pylist() for column in batch.columns))
    return ids


def _quarantined(path: Path, key: str) -> Iterator[str]:
    """The ids of quarantined rows that have the key in a field of their own, as their group, say."""
    for batch in _scan([path], ["row_id", "raw"], pc.match_substring(ds.field("raw"), key)):
        for row_id, raw in zip(*(column.to_pylist() for column in batch.columns)):
            with suppress(ValueError, RecursionError):
                row = json.loads(raw)
                if isinstance(row, dict) and key in (
                    str(v) for v in row.values() if isinstance(v, str | int)
                ):
                    yield row_id


def _row_id() -> ds.Expression:
    """The row's id without the "/1", "/2", ... that tokenized_rows appends to the parts of a row it split."""
    return pc.replace_substring_regex(ds.field("row_id"), pattern=_PART, replacement="")


def _scan(parts: Sequence[Path], columns: list[str], condition: ds.Expression) -> Iterator[pa.RecordBatch]:
    if parts:
        dataset = ds.dataset([str(p) for p in parts], format="parquet")
        yield from dataset.to_batches(columns=columns, filter=condition)


def _trace_rows(artifact: Artifact, stage: str, folder: str, ids: set[str], found: Trace) -> None:
    columns = ["row_id", "file", "line"] if stage == "raw_rows" else ["row_id"]
    wanted = _row_id().isin(sorted(ids))
    rows = [r for b in _scan(artifact.parts(folder), columns, wanted) for r in b.to_pylist()]
    if not rows:
        return
    found.add(artifact, None if folder == "rows" else folder, len(rows), None)
    if stage == "raw_rows":
        known = {(s["file"], s["line"], s["row_id"]) for s in found.sources}
        found.sources += [
            {**_about(artifact), "row_id": r["row_id"], "file": r["file"], "line": r["line"]}
            for r in rows
            if (r["file"], r["line"], r["row_id"]) not in known
        ]


def _trace_rejects(artifact: Artifact, ids: set[str], found: Trace) -> None:
    for name in REJECT_FILES:
        path = artifact.file(name)
        if not path.is_file():
            continue
        wanted = _row_id().isin(sorted(ids))
        rows = [r for b in _scan([path], ["row_id", "reasons"], wanted) for r in b.to_pylist()]
        if rows:
            reasons = sorted({reason for r in rows for reason in r["reasons"]})
            found.add(artifact, None, len(rows), f"in {name}: {', '.join(reasons)}")


def _trace_blocks(artifact: Artifact, ids: set[str], found: Trace) -> None:
    wanted = pa.array(sorted(ids))
    for split in ("train", "validation"):
        held: dict[int, list[str]] = {}
        for part in artifact.parts(split):
            with pq.ParquetFile(part) as file:
                for batch in file.iter_batches(columns=["block", "row_ids"]):
                    lists = batch.column("row_ids")
                    hit = pc.is_in(
                        pc.replace_substring_regex(lists.flatten(), pattern=_PART, replacement=""), wanted
                    )
                    for at, row_id in zip(
                        lists.value_parent_indices().filter(hit).to_pylist(),
                        lists.flatten().filter(hit).to_pylist(),
                    ):
                        held.setdefault(batch.column("block")[at].as_py(), []).append(row_id)
        if not held:
            continue
        updates: dict[int, list[int]] = {}
        if split == "train":
            in_plan = ds.field("block").isin(sorted(held))
            for batch in _scan([artifact.file("plan.parquet")], ["update", "block"], in_plan):
                for row in batch.to_pylist():
                    updates.setdefault(row["block"], []).append(row["update"])
        found.add(artifact, split, sum(map(len, held.values())), f"{len(held)} blocks")
        found.blocks += [
            {
                **_about(artifact),
                "side": split,
                "block": b,
                "row_ids": rows,
                "updates": sorted(updates.get(b, [])),
            }
            for b, rows in sorted(held.items())
        ]


def _trace_model(artifact: Artifact, store: Store, found: Trace) -> None:
    """Adds an exported model if a block of its own packed_shards was in an update before its checkpoint."""
    chain = walk(artifact.path, store)
    packed = {n.fingerprint for n in chain.by_stage("packed_shards")}
    step = artifact.manifest.counts.get("step")
    learned = sorted(
        {
            u
            for b in found.blocks
            if b["fingerprint"] in packed and b["side"] == "train"
            for u in b["updates"]
            if step is None or u <= step
        }
    )
    if learned:
        found.models.append(
            {**_about(artifact), "step": step, "updates": learned, "accepted": artifact.manifest.accepted}
        )
