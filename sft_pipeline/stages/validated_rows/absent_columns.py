"""Columns that a dataset file names and that no row has: misspelt, most likely, and silently null."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.row_conditions import columns_of
from sft_pipeline.stages.validated_rows.config import SourceShape
from sft_pipeline.stages.validated_rows.reshape import columns_in
from sft_pipeline.store import Artifact
from sft_pipeline.tables import parquet


def absent_columns(raw: Artifact, shapes: list[SourceShape]) -> list[str]:
    """Each such column, with the key that names it: "sources[0].where: rewrad".

    A name counts as there where it is a key anywhere in a row, so that a dotted path is judged by its first
    part. What `transform` makes is not known, and not judged.
    """
    found = []
    for source, shape in enumerate(shapes):
        partners = raw.parts(f"joined/{source}")
        named = list(_named(shape))
        there = _keys_there(raw.parts("rows"), source, {root for _, _, root in named})
        if shape.join:
            there |= _keys_there(partners, source, {root for _, _, root in named})
        found += [f"sources[{source}].{key}: {column}" for key, column, root in named if root not in there]
        if shape.join:
            theirs = {"join.key": shape.join.their_key} | {
                f"join.fields.{name}": column for name, column in shape.join.fields.items()
            }
            roots = {key: column.partition(".")[0] for key, column in theirs.items()}
            there = _keys_there(partners, source, set(roots.values()))
            found += [f"sources[{source}].{k}: {theirs[k]}" for k, root in roots.items() if root not in there]
    return found


def _named(shape: SourceShape) -> Iterator[tuple[str, str, str]]:
    """(key of the source, column, first part of its path) of all that the rows should have as they are."""
    made = {*shape.text, *(shape.join.fields if shape.join else ())}
    named = [("where", column) for column in columns_of(shape.where)] if shape.where else []
    if shape.join:
        named.append(("join.by", shape.join.by))
    if not shape.transform:
        named += [("text", column) for column in columns_in(shape.text)]
        named += [(f"columns.{field}", column) for field, column in shape.columns.items()]
    for key, column in sorted(named):
        root = column.partition(".")[0]
        if column not in made and root not in made:
            yield key, column, root


def _keys_there(parts: Iterable[Path], source: int, names: set[str]) -> set[str]:
    """Those of the names that are keys in a row of the source; reads on until all are found."""
    found: set[str] = set()
    for batch in parquet.read_batches(parts, ["source", "content"]):
        if found == names:
            break
        texts = batch.filter(pc.equal(batch.column("source"), source)).column("content")
        for name in names - found:
            if _is_key(texts, name):
                found.add(name)
    return found


def _is_key(texts: pa.StringArray, name: str) -> bool:
    """Whether a name occurs as a text of JSON, however its letters are written."""
    if pc.any(pc.match_substring(texts, json.dumps(name, ensure_ascii=False))).as_py():
        return True
    escaped = texts.filter(pc.match_substring(texts, "\\"))
    return any(f'"{name}"' in json.dumps(json.loads(t), ensure_ascii=False) for t in escaped.to_pylist())
