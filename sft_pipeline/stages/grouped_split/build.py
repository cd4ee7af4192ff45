"""Builds grouped_split: train, validation and test by group, with near-duplicates kept apart."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages import charts, tables
from sft_pipeline.stages.grouped_split.config import SplitConfig
from sft_pipeline.stages.grouped_split.leakage import Straddling, leaked, straddling
from sft_pipeline.stages.grouped_split.near_duplicates import ShingleSets
from sft_pipeline.stages.grouped_split.shingles import texts_of
from sft_pipeline.stages.grouped_split.split import SIDES, Sides, first_times, overlap
from sft_pipeline.stages.grouped_split.summary import SideSummary, summarize
from sft_pipeline.stages.stage import Build, Built, Check, Evidence, number, plot, table
from sft_pipeline.stages.validated_rows.rows import ROWS
from sft_pipeline.store.files import write_json

NEAR_DUPLICATE = "near_duplicate_of_held_out"
EXCERPT = pa.schema([(name, pa.string()) for name in ("row_id", "group", "side", "text")])
PAIRS = pa.schema(
    [("similarity", pa.float64()), *((f"{of}{f.name}", f.type) for of in ("", "of_") for f in EXCERPT)]
)
SHOWN_TEXT = 500


def build(b: Build) -> Built:
    """Deals the groups to sides, drops near-duplicates of held-out rows, and writes the sides, rejects and split.json."""
    config: SplitConfig = b.config
    parts = b.inputs["validated_rows"].parts("rows")
    total = tables.count_rows(parts)
    sides = Sides(
        config, first_times(tables.read_batches(parts, ["group", "time"])) if config.time_cutoff else None
    )
    near = config.near_duplicates
    b.report.log(
        f"dealing {total:,} rows to sides"
        + (f" and searching near-duplicates at {near.threshold:g}" if near else "")
    )
    side = np.concatenate(
        [
            np.zeros(0, np.int8),
            *(sides.of_rows(batch.column("group")) for batch in tables.read_batches(parts, ["group"])),
        ]
    )
    found = Straddling(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    if near:
        sets = ShingleSets(_texts(b, parts, total, "shingle"), b.work / "sets")
        found = straddling(sets, side, near.threshold)
        del sets
    dropped = np.zeros(total, bool)
    if near and near.action == "drop_from_train":
        dropped[found.row] = True
    _write(b, parts, side, dropped, found)
    written = {name: sorted((b.out / name).glob("*.parquet")) for name in SIDES}
    summaries = {name: summarize(paths) for name, paths in written.items()}
    leaks = _leaks(b, config, written, summaries)
    shutil.rmtree(b.work / "sets", ignore_errors=True)
    counts = {
        "read": total,
        **{name: s.rows for name, s in summaries.items()},
        "rejects": tables.count_rows([b.out / "rejects.parquet"]),
        "near_duplicates": len(found.row),
        **{f"{name}_groups": len(s.groups) for name, s in summaries.items()},
    }
    shared = overlap([s.groups for s in summaries.values()])
    _write_summary(b.out, config, counts, summaries, leaks, shared)
    pairs = _worst_pairs(b.out)
    return Built(
        counts=counts,
        checks=_checks(config, counts, summaries, leaks, shared, pairs, sides),
        volatile=("plots/",),
        evidence=_evidence(b.out, counts, summaries, pairs),
    )


def _texts(b: Build, paths: list[Path], total: int, name: str) -> Iterator[pa.Array]:
    done = 0
    for batch in tables.read_batches(paths, ["messages"]):
        yield texts_of(batch.column("messages"))
        done += batch.num_rows
        b.report.progress(name, done, total, "rows")


def _write(b: Build, parts: list[Path], side: np.ndarray, dropped: np.ndarray, found: Straddling) -> None:
    """Writes the three sides, rejects.parquet and near_duplicates.parquet, in the order of the rows."""
    shown = np.unique(np.concatenate([found.row, found.near]))
    excerpts = [pa.RecordBatch.from_pylist([], schema=EXCERPT)]
    train, validation, test = (tables.PartWriter(b.out / name, ROWS) for name in SIDES)
    done = 0
    with train, validation, test, tables.FileWriter(b.out / "rejects.parquet", tables.REJECTS) as rejects:
        for batch in tables.read_batches(parts):
            here = slice(done, done + batch.num_rows)
            for i, writer in enumerate((train, validation, test)):
                writer.write(batch.filter(pa.array((side[here] == i) & ~dropped[here])))
            rejects.append([_reject(row) for row in batch.filter(pa.array(dropped[here])).to_pylist()])
            excerpts.append(
                _excerpt(
                    batch,
                    shown[np.searchsorted(shown, done) : np.searchsorted(shown, here.stop)] - done,
                    side[here],
                )
            )
            done = here.stop
            b.report.progress("write", done, len(side), "rows")
    rows = pa.Table.from_batches(excerpts)
    one, other = (rows.take(pa.array(np.searchsorted(shown, x))) for x in (found.row, found.near))
    with tables.FileWriter(b.out / "near_duplicates.parquet", PAIRS) as pairs:
        columns = {f.name: one[f.name] for f in EXCERPT} | {f"of_{f.name}": other[f.name] for f in EXCERPT}
        pairs.write(pa.table({**columns, "similarity": found.similarity}).select(PAIRS.names))


def _excerpt(batch: pa.RecordBatch, at: np.ndarray, side: np.ndarray) -> pa.RecordBatch:
    """Some rows of a batch, as the list of pairs shows them."""
    taken = batch.take(pa.array(at))
    texts = pc.utf8_slice_codeunits(texts_of(taken.column("messages")), 0, SHOWN_TEXT)
    names = pa.array([SIDES[s] for s in side[at]], pa.string())
    return pa.RecordBatch.from_arrays(
        [taken.column("row_id"), taken.column("group"), names, texts], schema=EXCERPT
    )


def _reject(row: dict[str, Any]) -> dict[str, Any]:
    raw = json.dumps({k: row[k] for k in ("group", "messages", "tools")}, ensure_ascii=False, sort_keys=True)
    return {
        **{k: row[k] for k in ("row_id", "source", "file", "line")},
        "reasons": [NEAR_DUPLICATE],
        "raw": raw,
    }


def _leaks(
    b: Build, config: SplitConfig, written: dict[str, list[Path]], summaries: dict[str, SideSummary]
) -> dict[str, int] | None:
    """Held-out rows that still have a near-duplicate elsewhere, searched anew in the files that were written."""
    if config.near_duplicates is None:
        return None
    side = np.repeat(np.arange(len(SIDES), dtype=np.int8), [s.rows for s in summaries.values()])
    sets = ShingleSets(
        _texts(b, [p for paths in written.values() for p in paths], len(side), "verify"), b.work / "sets"
    )
    return leaked(sets, side, config.near_duplicates.threshold)


def _leakage(counts: dict[str, int], leaks: dict[str, int] | None) -> float | None:
    """The fraction of held-out rows with a near-duplicate on another side."""
    return None if leaks is None else sum(leaks.values()) / max(1, counts["validation"] + counts["test"])


def _write_summary(
    out: Path,
    config: SplitConfig,
    counts: dict[str, int],
    summaries: dict[str, SideSummary],
    leaks: dict[str, int] | None,
    shared: list[str],
) -> None:
    labels = [s.labels for s in summaries.values() if s.labels is not None]
    write_json(
        out / "split.json",
        {
            "salt": config.salt,
            "fractions": {"validation": config.validation, "test": config.test},
            "fixed_groups": config.groups.model_dump(mode="json"),
            "time_cutoff": config.time_cutoff,
            "counts": counts,
            "sides": {name: s.to_json() for name, s in summaries.items()},
            "labels": {n: dict(sorted((s.labels or {}).items())) for n, s in summaries.items()} if len(labels) == len(SIDES) else None,
            "group_overlap": len(shared),
            "near_duplicates": None if config.near_duplicates is None else {
                **config.near_duplicates.model_dump(mode="json"), "found": counts["near_duplicates"], "dropped": counts["rejects"],
                "left": leaks, "leakage": _leakage(counts, leaks),
            },
        },
    )  # fmt: skip


def _worst_pairs(out: Path, count: int = 10) -> list[dict[str, Any]]:
    """The most similar pairs, side by side."""
    pairs = [
        {**p, "row_id": p["row_id"], "similarity": round(p["similarity"], 3)}
        for p in tables.read_rows([out / "near_duplicates.parquet"])
    ]
    pairs.sort(key=lambda p: (-p["similarity"], p["row_id"]))
    return [
        {
            k: str(p[k])[:200] if "text" in k else p[k]
            for k in ("similarity", "side", "row_id", "text", "of_side", "of_row_id", "of_text")
        }
        for p in pairs[:count]
    ]


def _checks(
    config: SplitConfig, counts: dict[str, int], summaries: dict[str, SideSummary], leaks: dict[str, int] | None, shared: list[str],
    pairs: list[dict[str, Any]], sides: Sides,
) -> tuple[Check, ...]:  # fmt: skip
    wanted = {
        "train": True,
        "validation": bool(config.validation or config.groups.validation),
        "test": bool(config.test or config.groups.test or config.time_cutoff),
    }
    empty = [name for name, needed in wanted.items() if needed and not counts[name]]
    kept = sum(counts[name] for name in SIDES)
    by_side = table(
        [{"side": name, "rows": s.rows, "groups": len(s.groups)} for name, s in summaries.items()]
    )
    remedy = (
        ". Add groups, give them by hand with split.groups, raise the fraction, or set the side's fraction to 0"
        if empty
        else ""
    )
    return (
        Check(
            "group_overlap", not shared, f"{len(shared)} groups are on two sides{': ' + ', '.join(shared[:5]) if shared else ''}", {"groups": number(len(shared))}
        ),
        _leakage_check(config, counts, leaks, pairs),
        Check("sides_not_empty", not empty, (f"no rows in {', '.join(empty)}" if empty else "every side has its rows") + remedy, {"sides": by_side}),
        Check(
            "counts_add_up", kept + counts["rejects"] == counts["read"], f"{kept:,} on the three sides + {counts['rejects']:,} rejects = {kept + counts['rejects']:,} of {counts['read']:,} read"
        ),
        Check(
            "fixed_groups_found", not sides.fixed_missing,
            f"{len(sides.fixed_missing)} groups of split.groups are not in the data{': ' + ', '.join(sides.fixed_missing[:5]) if sides.fixed_missing else ''}",
        ),
    )  # fmt: skip


def _leakage_check(
    config: SplitConfig, counts: dict[str, int], leaks: dict[str, int] | None, pairs: list[dict[str, Any]]
) -> Check:
    near, leakage = config.near_duplicates, _leakage(counts, leaks)
    if near is None or leaks is None or leakage is None:
        return Check(
            "near_duplicate_leakage",
            True,
            "the search for near-duplicates is switched off (near_duplicates: null)",
        )
    bound = (
        near.max_leakage
        if near.max_leakage is not None
        else (0.0 if near.action == "drop_from_train" else 1.0)
    )
    evidence: dict[str, Evidence] = {
        "leakage": number(leakage),
        "bound": number(bound),
        "dropped": number(counts["rejects"]),
        "found": number(counts["near_duplicates"]),
    }
    if pairs:
        evidence["worst_pairs"] = table(pairs)
    done = (
        f"{counts['rejects']:,} rows were dropped"
        if near.action == "drop_from_train"
        else f"{counts['near_duplicates']:,} rows straddle and were only reported"
    )
    return Check(
        "near_duplicate_leakage",
        leakage <= bound,
        f"{leakage:.2%} of the held-out rows have a near-duplicate (similarity {near.threshold:g} or more) left on another side, at most {bound:.2%} may; {done}",
        evidence,
    )


def _evidence(
    out: Path, counts: dict[str, int], summaries: dict[str, SideSummary], pairs: list[dict[str, Any]]
) -> dict[str, Evidence]:
    charts.bars(
        out / "plots" / "sides.png", SIDES,
        {"rows": [s.rows for s in summaries.values()], "groups": [len(s.groups) for s in summaries.values()]}, title="Rows and groups per side", y="number",
    )  # fmt: skip
    charts.histogram(
        out / "plots" / "lengths.png",
        {n: s.characters for n, s in summaries.items() if s.rows},
        title="Characters per row",
        x="characters",
    )
    sides = []
    for name, summary in summaries.items():
        data = summary.to_json()
        characters = data["characters"] or {"mean": 0, "median": 0, "p95": 0, "max": 0}
        sides.append(
            {
                "side": name,
                "rows": data["rows"],
                "groups": data["groups"],
                "replies": data["turns"],
                **{f"characters {k}": v for k, v in characters.items()},
            }
        )
    return {
        "row_count": number(sum(counts[name] for name in SIDES)),
        "column_schema": Evidence("schema", {f.name: str(f.type) for f in ROWS}),
        "sides": table(sides),
        **{f"{name}_rows": number(counts[name]) for name in SIDES},
        "near_duplicates_dropped": number(counts["rejects"]),
        "near_duplicates": table(pairs),
        "rows_and_groups": plot("plots/sides.png"),
        "lengths": plot("plots/lengths.png"),
    }
