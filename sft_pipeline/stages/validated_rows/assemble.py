"""Rows that are made of several: joined with a second file, or dialogues of which each row is one turn.

What waits for its partners lies in SQLite tables on the disk, so that memory does not grow with the data.
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.validated_rows.config import SourceShape
from sft_pipeline.stages.validated_rows.formats import look_up
from sft_pipeline.stages.validated_rows.normalized_row import MISSING
from sft_pipeline.stages.validated_rows.reshape import CannotReshape, Reshaper
from sft_pipeline.store import Artifact
from sft_pipeline.tables import literal_json, parquet
from sft_pipeline.tables.reasons import RejectReason
from sft_pipeline.tables.schemas import RAW_ROWS, digest

BATCH_ROWS = 4_096
BATCH_BYTES = 16 << 20

Made = Callable[[str, list[str]], None]
"""Told of a row's id, and of the ids of the rows it was made of."""

Rejected = Callable[[dict[str, Any], RejectReason, str], None]
"""Told of a row (row_id, source, file, line, content), the reason and what of it."""


class Assembler:
    """Assembles the rows of those sources that need it, and passes on the others.

    Args:
        raw: raw_rows.
        work: An empty folder.
        rejected: Told of the rows that find no partner or have no place in a dialogue.
        made: Told of what a dialogue was made of.

    Attributes:
        counts: merged (rows that became part of a row before them), joined (rows that got fields),
            unused_joined (rows of second files that nobody asked for), added (rows that `transform` made
            beyond one).
        unused: Rows by the column of a second file that their own column of that name hides.
    """

    def __init__(
        self,
        raw: Artifact,
        shapes: list[SourceShape],
        work: Path,
        rejected: Rejected,
        made: Made = lambda row_id, ids: None,
    ) -> None:
        self._raw, self._shapes, self._work, self._rejected, self._made = raw, shapes, work, rejected, made
        self.counts: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Batches with the columns of raw_rows' rows/; those that were assembled follow the others."""
        needed = [i for i, s in enumerate(self._shapes) if needs_assembly(s)]
        for batch in parquet.read_batches(self._raw.parts("rows")):
            if needed:
                batch = batch.filter(
                    pc.invert(pc.is_in(batch.column("source"), pa.array(needed, pa.int32())))
                )
            if batch.num_rows:
                yield batch
        for source in needed:
            rows = self._rows(source)
            if self._shapes[source].join:
                rows = self._joined(source, rows)
            if self._shapes[source].format == "turns":
                rows = self._dialogues(source, rows)
            yield from _batches(rows)

    def _rows(self, source: int) -> Iterator[dict[str, Any]]:
        for batch in parquet.read_batches(self._raw.parts("rows")):
            chosen = batch.filter(pc.equal(batch.column("source"), source))
            yield from chosen.to_pylist()

    # -- a second file -----------------------------------------------------------------------------

    def _joined(self, source: int, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows with the fields of their partners."""
        join = self._shapes[source].join
        assert join is not None
        with closing(_database(self._work / f"joined-{source}.db")) as database:
            database.execute("CREATE TABLE theirs (key TEXT, content TEXT)")
            for batch in parquet.read_batches(self._raw.parts(f"joined/{source}"), ["content"]):
                theirs = [literal_json.loads(c) for c in batch.column(0).to_pylist()]
                keyed = [(key_of(look_up(t, join.their_key)), t) for t in theirs]
                database.executemany(
                    "INSERT INTO theirs VALUES (?, ?)",
                    [(k, literal_json.dumps(t, ensure_ascii=False)) for k, t in keyed if k],
                )
                self.counts["unused_joined"] += len(theirs)
            database.execute("CREATE INDEX by_key ON theirs (key)")
            asked: set[str] = set()
            for row in rows:
                own = literal_json.loads(row["content"])
                key = key_of(look_up(own, join.by))
                found = database.execute(
                    "SELECT content FROM theirs WHERE key = ? LIMIT 2", (key,)
                ).fetchall()
                if len(found) == 1 or (not found and not join.required):
                    if found:
                        theirs = literal_json.loads(found[0][0])
                        got = joined_fields(theirs, join.fields, join.their_key)
                        kept = [] if join.fields else sorted(got.keys() & own.keys())
                        self.unused.update(f"{name} of the joined file" for name in kept)
                        own |= {name: value for name, value in got.items() if name not in kept}
                        row["content"] = literal_json.dumps(own, ensure_ascii=False)
                        self.counts["joined"] += 1
                        if key not in asked:
                            asked.add(key or "")
                            self.counts["unused_joined"] -= 1
                    yield row
                    continue
                what = f"{join.by} = {key}" if key else f"no {join.by}"
                self._rejected(row, RejectReason.NOT_JOINED, f"{what}: {'several' if found else 'no'} rows")

    # -- turns -------------------------------------------------------------------------------------

    def _dialogues(self, source: int, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One row for each dialogue, in the order of their first turns: {"messages": [turn, ...],
        "dialogue": its name}. Its place is that of its first turn."""
        shape = self._shapes[source]
        reshaper = Reshaper(shape, f"sources[{source}]")
        with closing(_database(self._work / f"turns-{source}.db")) as database:
            database.execute(
                "CREATE TABLE turns (dialogue TEXT, number REAL, word TEXT, seq INTEGER PRIMARY KEY, "
                "row_id TEXT, raw_id TEXT, file TEXT, line INTEGER, content TEXT)"
            )
            for row in rows:
                try:
                    own = list(reshaper(row["row_id"], literal_json.loads(row["content"])))
                    self.counts["added"] += len(own) - 1
                    turns = [
                        (row_id, turn, *place_of(turn, row["file"], shape.columns)) for row_id, turn in own
                    ]
                except CannotReshape as error:
                    self._rejected(row, error.reason, error.detail)
                    continue
                for row_id, turn, dialogue, (number, word) in turns:
                    content = literal_json.dumps(turn, ensure_ascii=False)
                    database.execute(
                        "INSERT INTO turns (dialogue, number, word, row_id, raw_id, file, line, content) "
                        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                        (dialogue, number, word, row_id, row["row_id"], row["file"], row["line"], content),
                    )
            database.execute("CREATE INDEX by_dialogue ON turns (dialogue)")
            ordered = database.execute(
                "SELECT dialogue, row_id, raw_id, file, line, content FROM turns "
                "JOIN (SELECT dialogue, MIN(seq) AS first FROM turns GROUP BY dialogue) USING (dialogue) "
                "ORDER BY first, number, word, seq"
            )
            for dialogue, group in groupby(ordered, key=lambda turn: turn[0]):
                said = list(group)
                self.counts["merged"] += len(said) - 1
                messages, name = ",".join(content for *_, content in said), json.dumps(dialogue)
                made = digest("".join(row_id for _, row_id, *_ in said).encode()).hex()
                self._made(made, [raw_id for _, _, raw_id, *_ in said])
                yield {
                    "row_id": made,
                    "source": source,
                    "file": said[0][3],
                    "line": said[0][4],
                    "content": f'{{"messages":[{messages}],"dialogue":{name}}}',
                }


def needs_assembly(shape: SourceShape) -> bool:
    return shape.join is not None or shape.format == "turns"


def assembled_shape(shape: SourceShape) -> SourceShape:
    """The shape of the rows after they were assembled."""
    if shape.format != "turns":
        return shape
    group = f"messages.0.{shape.columns['group']}" if "group" in shape.columns else "dialogue"
    changed = {"format": "messages", "columns": {**shape.columns, "group": group}}
    return shape.model_copy(update={**changed, "where": None, "transform": None, "text": {}})


def place_of(
    turn: dict[str, Any], file: str, columns: dict[str, str]
) -> tuple[str, tuple[float | None, str | None]]:
    """(dialogue, (number, word) by which it is ordered in it).

    Without a column for the dialogue, a file is one; without one for the order, the rows' order counts.

    Raises:
        CannotReshape: A column that is named is empty here.
    """
    dialogue: str | None = file
    if "dialogue" in columns or "dialogue" in turn:
        name = columns.get("dialogue", "dialogue")
        dialogue = key_of(look_up(turn, name))
        if dialogue is None:
            raise CannotReshape(RejectReason.MISSING_FIELD, name)
    assert dialogue is not None
    if "order" not in columns:
        return dialogue, (None, None)
    word = key_of(look_up(turn, columns["order"]))
    if word is None:
        raise CannotReshape(RejectReason.MISSING_FIELD, columns["order"])
    try:
        return dialogue, (float(word), None)
    except ValueError:
        return dialogue, (None, word)


def joined_fields(theirs: dict[str, Any], fields: dict[str, str], key: str) -> dict[str, Any]:
    """What a row gets from its partner."""
    if not fields:
        return {name: value for name, value in theirs.items() if name != key}
    found = {name: look_up(theirs, column) for name, column in fields.items()}
    return {name: value for name, value in found.items() if value is not MISSING}


def key_of(value: Any) -> str | None:
    """A key as text, so that 12 of a JSON file is "12" of a CSV file; None where there is none."""
    if value is MISSING or value is None or isinstance(value, dict | list | bool):
        return None
    return str(value).strip() or None


def _database(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode = OFF")  # it is made again if this process dies
    database.execute("PRAGMA synchronous = OFF")
    database.execute("BEGIN")
    return database


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    waiting: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        waiting.append(row)
        size += len(row["content"])
        if len(waiting) == BATCH_ROWS or size > BATCH_BYTES:
            yield pa.RecordBatch.from_pylist(waiting, schema=RAW_ROWS)
            waiting, size = [], 0
    if waiting:
        yield pa.RecordBatch.from_pylist(waiting, schema=RAW_ROWS)
