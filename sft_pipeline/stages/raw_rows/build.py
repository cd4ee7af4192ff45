"""Builds raw_rows: every file of the snapshot read as it is, with the source, file and line of each row.

Where a source has a `limit`, or weights differ, rows are sampled. They are ranked by a hash of (seed,
row_id), so that a row's chance does not depend on its position, and a row that was sampled stays sampled when
other rows come or go.

The digests that the artifact records are those of the bytes that were read: a file that changes meanwhile is
an error.
"""

import hashlib
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sft_pipeline.errors import InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.raw_rows.config import RawRowsConfig
from sft_pipeline.stages.raw_rows.decode import Reject, Rows
from sft_pipeline.stages.raw_rows.find import Found, find_files
from sft_pipeline.stages.raw_rows.locate import (
    check_hub_unchanged,
    check_snapshot,
    commit_of,
    hub_names,
    is_hub,
    source_digests,
)
from sft_pipeline.stages.raw_rows.readers import read_file
from sft_pipeline.stages.raw_rows.streams import SourceFile
from sft_pipeline.stages.raw_rows.table_files import BINARY_VALUES, read_hub
from sft_pipeline.stages.stage import Build, Built, Check, Evidence, number, table
from sft_pipeline.tables import parquet
from sft_pipeline.tables.schemas import RAW_ROWS, REJECTS

FLUSH_ROWS = 4_096
FLUSH_BYTES = 16 << 20  # a batch ends early here, so that rows of megabytes do not pile up
SEED = b"sft-sample-v1"


def build(b: Build) -> Built:
    """Reads the sources of `b.snapshot`, samples them where configured, and writes rows/ and rejects.parquet.

    Raises:
        InputError: There is no such snapshot, it has no row, a file cannot be read as a whole, or changed
            while it was read.
    """
    config: RawRowsConfig = b.config
    sources = config.sources
    check_snapshot(sources, b.snapshot)
    sampled = any(s.limit is not None for s in sources) or len({s.weight for s in sources}) > 1
    spool = b.work / "spool"
    shutil.rmtree(spool, ignore_errors=True)
    found = [Found() if is_hub(s.path) else find_files(s, b.snapshot) for s in sources]
    recorded = b.outside or source_digests(sources, b.snapshot)
    _check_recorded(config, found, recorded)
    not_data = {name: rule for each in found for name, rule in each.not_data.items()}
    if not_data:
        b.report.log(f"{len(not_data)} files are not data: {', '.join(list(not_data)[:5])}")
    reading = _Reading(config, found, recorded, b.report)
    ranks: list[np.ndarray] = []
    joined = 0
    with parquet.FileWriter(b.out / "rejects.parquet", REJECTS) as rejects:
        if not sampled:
            with parquet.PartWriter(b.out / "rows", RAW_ROWS) as rows:
                for i in range(len(sources)):
                    ranks.append(_write_rows(i, reading.source(i), rows, rejects))
        else:
            # Which rows are taken is known when all have been read, so they wait on the disk until then.
            for i in range(len(sources)):
                with parquet.PartWriter(spool / str(i), RAW_ROWS) as rows:
                    ranks.append(_write_rows(i, reading.source(i), rows, rejects, ranked=True))
        for i in (i for i, source in enumerate(sources) if source.join):
            with parquet.PartWriter(b.out / "joined" / str(i), RAW_ROWS) as rows:
                joined += len(_write_rows(i, reading.joined(i), rows, rejects))
    read = [len(r) for r in ranks]
    kept = read
    if sampled:
        kept = sample_sizes(read, [s.limit for s in sources], [s.weight for s in sources])
        with parquet.PartWriter(b.out / "rows", RAW_ROWS) as rows:
            for i, source in enumerate(sources):
                taken, start = smallest(ranks[i], kept[i]), 0
                for batch in parquet.read_batches(sorted((spool / str(i)).glob("*.parquet"))):
                    rows.write(batch.filter(pa.array(taken[start : start + batch.num_rows])))
                    start += batch.num_rows
                b.report.log(
                    f"{source.path}: {kept[i]:,} of {read[i]:,} rows taken (limit {source.limit}, "
                    f"weight {source.weight:g})"
                )
        shutil.rmtree(spool)
    bad = parquet.count_rows([b.out / "rejects.parquet"])
    if not sum(read) and not bad:
        raise InputError(
            f"snapshot {b.snapshot} is empty: no rows in {', '.join(s.path for s in sources)}. Add rows, or "
            "remove the snapshot's folder"
        )
    counts = {
        "read": sum(read) + joined + bad,
        "rows": sum(kept),
        "rejects": bad,
        "sampled_out": sum(read) - sum(kept),
        "files": sum(len(each.files) for each in found),
        "bytes": reading.total,
        "not_data": len(not_data),
        BINARY_VALUES: reading.counts[BINARY_VALUES],
    }
    if any(s.join for s in sources):
        counts["joined_rows"] = joined
    evidence = _evidence(config, counts, read, kept)
    if not_data:
        evidence["files_not_data"] = table([{"file": name, "why": why} for name, why in not_data.items()])
    return Built(counts=counts, checks=_checks(b.out, counts), evidence=evidence)


def _check_recorded(config: RawRowsConfig, found: list[Found], recorded: Mapping[str, str]) -> None:
    """Raises:
    InputError: A file came, went, or gave another order to the files, since the digests were recorded.
    """
    of_hub = {name for s in config.sources if is_hub(s.path) for name in hub_names(s.path)}
    here = {f.given for each in found for f in (*each.files, *each.joined, *each.order)}
    if moved := sorted(here ^ (recorded.keys() - of_hub)):
        raise InputError(
            f"{moved[0]} came or went while its snapshot was read: run again when it is complete"
        )
    for file in (f for each in found for f in each.order):
        if file.digest() != recorded[file.given]:
            raise file.changed()


class _Reading:
    """Reads the sources against their recorded digests, and reports how far it is.

    Attributes:
        total: Bytes of all files.
        counts: What was written otherwise than it stands in the files.
    """

    def __init__(
        self, config: RawRowsConfig, found: list[Found], recorded: Mapping[str, str], report: Reporter
    ) -> None:
        self._sources, self._recorded, self._report = config.sources, recorded, report
        self._files, self._joined = (
            [[replace(f, sha256=recorded[f.given]) for f in files] for files in those]
            for those in ([each.files for each in found], [each.joined for each in found])
        )
        self.total = sum(f.bytes for files in (*self._files, *self._joined) for f in files)
        self.counts: Counter[str] = Counter()
        self._done = self._reported = self._rows = 0

    def source(self, number: int) -> Iterator[tuple[str, Rows | Reject]]:
        """(file, rows or reject) of one source."""
        if is_hub(path := self._sources[number].path):
            for one in read_hub(path, self.counts, commit_of(path, self._recorded)):
                self._rows += len(one.lines) if isinstance(one, Rows) else 1
                self._report.progress("read", self._rows, None, "rows")
                yield path, one
            check_hub_unchanged(path, self._recorded)
        yield from self._read(self._files[number], self._sources[number].row_fields)

    def joined(self, number: int) -> Iterator[tuple[str, Rows | Reject]]:
        """(file, rows or reject) of what is joined to one source."""
        yield from self._read(self._joined[number], ())

    def _read(
        self, files: Sequence[SourceFile], row_fields: Sequence[str]
    ) -> Iterator[tuple[str, Rows | Reject]]:
        for file in files:
            for one in read_file(file, self._advance, self.counts, row_fields):
                yield file.name, one

    def _advance(self, count: int) -> None:
        self._done += count
        if self._done - self._reported > 4 << 20 or self._done >= self.total:
            self._reported = self._done
            self._report.progress("read", min(self._done, self.total), self.total, "bytes")


def _write_rows(
    source: int,
    found: Iterator[tuple[str, Rows | Reject]],
    rows: parquet.PartWriter,
    rejects: parquet.FileWriter,
    *,
    ranked: bool = False,
) -> np.ndarray:
    """Writes rows and rejects of one source. Returns a rank per row (zeros unless `ranked`)."""
    ranks = array("Q")
    batch = _RowBatch(source)
    rejected: list[dict[str, Any]] = []
    characters = 0
    for name, one in found:
        if isinstance(one, Rows):
            batch.add(name, one)
            ranks.extend(map(rank, one.row_ids) if ranked else repeat(0, len(one.row_ids)))
            if batch.is_full():
                rows.write(batch.take())
            continue
        place = {"row_id": one.row_id, "source": source, "file": name, "line": one.line}
        rejected.append({**place, "reasons": [str(one.reason)], "raw": one.raw})
        characters += len(one.raw)
        if len(rejected) >= FLUSH_ROWS or characters > FLUSH_BYTES:
            rejects.append(rejected)
            rejected, characters = [], 0
    rows.write(batch.take())
    rejects.append(rejected)
    return np.frombuffer(ranks, dtype=np.uint64) if ranks else np.zeros(0, np.uint64)


class _RowBatch:
    """Rows of one source on their way into a file, as columns."""

    def __init__(self, source: int) -> None:
        self._source = source
        self._clear()

    def _clear(self) -> None:
        self._lines = array("q")
        self._names: list[str] = []
        self._ids: list[str] = []
        self._contents: list[bytes] = []
        self._bytes = 0

    def add(self, name: str, rows: Rows) -> None:
        self._lines.extend(rows.lines)
        self._names += [name] * len(rows.lines)
        self._ids += rows.row_ids
        self._contents += rows.contents
        self._bytes += sum(map(len, rows.contents))

    def is_full(self) -> bool:
        return len(self._ids) >= FLUSH_ROWS or self._bytes > FLUSH_BYTES

    def take(self) -> pa.RecordBatch:
        columns = [
            pa.array(self._ids, pa.string()),
            pa.array(np.full(len(self._ids), self._source, np.int32)),
            pa.array(self._names, pa.string()),
            pa.array(np.array(self._lines, np.int64)),
            pa.array(self._contents, pa.string()),
        ]
        self._clear()
        return pa.RecordBatch.from_arrays(columns, schema=RAW_ROWS)


def rank(row_id: str) -> int:
    """A pseudo-random number below 2**64 that depends on the row's content only."""
    return int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8, key=SEED).digest(), "big")


def sample_sizes(rows: Sequence[int], limits: Sequence[int | None], weights: Sequence[float]) -> list[int]:
    """How many rows of each source are taken.

    First the limits. Then, where weights differ, as many rows as possible such that the shares are
    proportional to the weights (rounded down, at least one) and none is taken twice. Sources without rows do
    not count.
    """
    available = [n if limit is None else min(n, limit) for n, limit in zip(rows, limits)]
    if len(set(weights)) == 1:
        return available
    scale = min((n / w for n, w in zip(available, weights) if n), default=0.0)
    # The source that limits the mixture must come out whole in spite of rounding.
    return [min(n, max(1, int(scale * w + 1e-9))) if n else 0 for n, w in zip(available, weights)]


def smallest(ranks: np.ndarray, count: int) -> np.ndarray:
    """The `count` smallest of `ranks` (uint64), ties by position: a mask in the order of the rows."""
    mask = np.zeros(len(ranks), dtype=bool)
    mask[np.argsort(ranks, kind="stable")[:count]] = True
    return mask


def _checks(out: Path, counts: dict[str, int]) -> tuple[Check, ...]:
    offenders = parquet.first_offenders(out / "rejects.parquet")
    evidence: dict[str, Evidence] = {"rejects": number(counts["rejects"])}
    where = ""
    if offenders:
        reasons = parquet.count_reasons([out / "rejects.parquet"])
        evidence |= {
            "reasons": table([{"reason": k, "rows": v} for k, v in reasons.items()]),
            "first": table(list(offenders)),
        }
        where = f"; the first is {offenders[0]['where']} ({offenders[0]['reasons']})"
    return (
        Check(
            "undecodable_rows",
            not counts["rejects"],
            f"{counts['rejects']:,} of {counts['read']:,} rows could not be decoded{where}",
            evidence,
        ),
        Check(
            "has_rows",
            counts["rows"] > 0,
            f"{counts['rows']:,} rows were read",
            {"rows": number(counts["rows"])},
        ),
    )


def _evidence(
    config: RawRowsConfig, counts: dict[str, int], read: list[int], kept: list[int]
) -> dict[str, Evidence]:
    sources = [
        {"source": i, "path": s.path, "decoded": n, "taken": k, "limit": s.limit or "", "weight": s.weight}
        for i, (s, n, k) in enumerate(zip(config.sources, read, kept))
    ]
    return {
        "row_count": number(counts["rows"]),
        "rejects": number(counts["rejects"]),
        "bytes": number(counts["bytes"]),
        "not_data": number(counts["not_data"]),
        BINARY_VALUES: number(counts[BINARY_VALUES]),
        "sources": table(sources),
        "column_schema": Evidence("schema", {f.name: str(f.type) for f in RAW_ROWS}),
    }
