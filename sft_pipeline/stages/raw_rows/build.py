"""Builds raw_rows: every file of the snapshot read as it is, with the place of each row kept."""

import shutil
from array import array
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sft_pipeline.errors import InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.raw_rows.config import RawRowsConfig
from sft_pipeline.stages.raw_rows.decode import Bad, Rows, gather
from sft_pipeline.stages.raw_rows.hub import is_hub, read_hub
from sft_pipeline.stages.raw_rows.locate import check_snapshot, find_files
from sft_pipeline.stages.raw_rows.readers import read_file
from sft_pipeline.stages.raw_rows.sample import chosen, rank, sizes
from sft_pipeline.stages.raw_rows.streams import SourceFile
from sft_pipeline.stages.stage import Build, Built, Check, Evidence, number, table
from sft_pipeline.tables import parquet
from sft_pipeline.tables.schemas import REJECTS

ROWS = pa.schema(
    [
        ("row_id", pa.string()),
        ("source", pa.int32()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("content", pa.string()),
    ]
)
FLUSH_ROWS = 4_096
FLUSH_BYTES = 16 << 20


def build(b: Build) -> Built:
    """Reads the sources of `b.snapshot`, samples them where configured, and writes rows/ and rejects.parquet."""
    config: RawRowsConfig = b.config
    check_snapshot(config.sources, b.snapshot)
    sampled = any(s.limit is not None for s in config.sources) or len({s.weight for s in config.sources}) > 1
    spool = b.work / "spool"
    shutil.rmtree(spool, ignore_errors=True)
    files = {
        i: find_files(config.sources, i, b.snapshot)
        for i, s in enumerate(config.sources)
        if not is_hub(s.path)
    }
    reading = _Reading(b.report, total=sum(f.bytes for found in files.values() for f in found))
    read: list[int] = []
    ranks: list[np.ndarray] = []
    with parquet.FileWriter(b.out / "rejects.parquet", REJECTS) as rejects:
        if not sampled:
            with parquet.PartWriter(b.out / "rows", ROWS) as rows:
                for i in range(len(config.sources)):
                    read.append(
                        len(_read_source(config, i, files.get(i, []), rows, rejects, reading, ranked=False))
                    )
        else:
            for i in range(len(config.sources)):
                with parquet.PartWriter(spool / str(i), ROWS) as rows:
                    ranks.append(
                        _read_source(config, i, files.get(i, []), rows, rejects, reading, ranked=True)
                    )
            read = [len(r) for r in ranks]
    kept = read
    if sampled:
        kept = sizes(read, [s.limit for s in config.sources], [s.weight for s in config.sources])
        with parquet.PartWriter(b.out / "rows", ROWS) as rows:
            for i in range(len(config.sources)):
                _copy_chosen(sorted((spool / str(i)).glob("*.parquet")), chosen(ranks[i], kept[i]), rows)
        shutil.rmtree(spool)
        for i, source in enumerate(config.sources):
            b.report.log(
                f"{source.path}: {kept[i]:,} of {read[i]:,} rows taken (limit {source.limit}, weight {source.weight:g})"
            )
    bad = parquet.count_rows([b.out / "rejects.parquet"])
    if not sum(read) and not bad:
        raise InputError(
            f"snapshot {b.snapshot} is empty: no rows in {', '.join(s.path for s in config.sources)}. Add rows, or remove the snapshot's folder"
        )
    counts = {
        "read": sum(read) + bad,
        "rows": sum(kept),
        "rejects": bad,
        "sampled_out": sum(read) - sum(kept),
        "files": sum(len(f) for f in files.values()),
        "bytes": reading.total,
    }
    return Built(counts=counts, checks=_checks(b.out, counts), evidence=_evidence(config, counts, read, kept))


class _Reading:
    """Progress by bytes."""

    def __init__(self, report: Reporter, total: int) -> None:
        self.total, self._report, self._done, self._told = total, report, 0, 0

    def advance(self, count: int) -> None:
        self._done += count
        if self._done - self._told > 4 << 20 or self._done >= self.total:
            self._told = self._done
            self._report.progress("read", min(self._done, self.total), self.total, "bytes")


def _rows_of(
    config: RawRowsConfig, source: int, files: list[SourceFile], reading: _Reading
) -> Iterator[tuple[str, Rows | Bad]]:
    if is_hub(path := config.sources[source].path):
        for found in gather(read_hub(path)):
            yield path, found
    for file in files:
        for found in read_file(file, reading.advance):
            yield file.name, found


def _read_source(
    config: RawRowsConfig,
    source: int,
    files: list[SourceFile],
    rows: parquet.PartWriter,
    rejects: parquet.FileWriter,
    reading: _Reading,
    *,
    ranked: bool,
) -> np.ndarray:
    """Writes one source's rows and rejects. Returns a rank per row (zeros unless `ranked`)."""
    ranks = array("Q")
    good, rejected = _Batch(source), _Rejected(source)
    for name, found in _rows_of(config, source, files, reading):
        if isinstance(found, Bad):
            rejected.add(name, found)
            if rejected.is_full():
                rejects.append(rejected.take())
            continue
        good.add(name, found)
        ranks.extend(map(rank, found.row_ids) if ranked else repeat(0, len(found.row_ids)))
        if good.is_full():
            rows.write(good.take())
    rows.write(good.take())
    rejects.append(rejected.take())
    return np.frombuffer(ranks, dtype=np.uint64) if ranks else np.zeros(0, np.uint64)


class _Batch:
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
        return pa.RecordBatch.from_arrays(columns, schema=ROWS)


class _Rejected:
    """Rejects of one source on their way into a file."""

    def __init__(self, source: int) -> None:
        self._source = source
        self._rows: list[dict[str, Any]] = []
        self._characters = 0

    def add(self, name: str, row: Bad) -> None:
        place = {"row_id": row.row_id, "source": self._source, "file": name, "line": row.line}
        self._rows.append({**place, "reasons": [str(row.reason)], "raw": row.raw})
        self._characters += len(row.raw)

    def is_full(self) -> bool:
        return len(self._rows) >= FLUSH_ROWS or self._characters > FLUSH_BYTES

    def take(self) -> list[dict[str, Any]]:
        rows, self._rows, self._characters = self._rows, [], 0
        return rows


def _copy_chosen(paths: list[Path], mask: np.ndarray, rows: parquet.PartWriter) -> None:
    start = 0
    for batch in parquet.read_batches(paths):
        rows.write(batch.filter(pa.array(mask[start : start + batch.num_rows])))
        start += batch.num_rows


def _checks(out: Path, counts: dict[str, int]) -> tuple[Check, ...]:
    offenders = parquet.first_offenders(out / "rejects.parquet")
    evidence: dict[str, Evidence] = {"rejects": number(counts["rejects"])}
    if offenders:
        reasons = parquet.count_reasons([out / "rejects.parquet"])
        evidence |= {
            "reasons": table([{"reason": k, "rows": v} for k, v in reasons.items()]),
            "first": table(list(offenders)),
        }
    where = f"; the first is {offenders[0]['where']} ({offenders[0]['reasons']})" if offenders else ""
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
        "sources": table(sources),
        "column_schema": Evidence("schema", {f.name: str(f.type) for f in ROWS}),
    }
