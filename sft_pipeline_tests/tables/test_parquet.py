"""Parquet parts: bytes depend on the rows alone, memory is bounded, no rows still make a schema."""

import errno
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_pipeline.tables import parquet
from sft_pipeline.tables.parquet import (
    FileWriter,
    PartWriter,
    count_reasons,
    count_rows,
    read_batches,
    read_rows,
)
from sft_pipeline.tables.schemas import REJECTS

SCHEMA = pa.schema([("a", pa.int64()), ("b", pa.list_(pa.string()))])
TABLE = pa.table({"a": range(1000), "b": [[str(i)] * (i % 3) for i in range(1000)]}, schema=SCHEMA)


@pytest.mark.parametrize("step", [1, 7, 300, 1000])
def test_parts_do_not_depend_on_how_rows_are_handed_over(tmp_path: Path, step: int) -> None:
    for name, size in (("one", 64), ("other", step)):
        with PartWriter(tmp_path / name, SCHEMA, rows_per_part=300, row_group=100) as writer:
            for start in range(0, 1000, size):
                writer.write(TABLE.slice(start, size))
    assert [p.name for p in writer.paths] == [f"part-0000{i}.parquet" for i in range(4)]
    for path in writer.paths:
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()
    assert count_rows(writer.paths) == writer.rows == 1000
    assert pa.Table.from_batches(read_batches(writer.paths)).equals(TABLE)
    assert [b.num_rows for b in read_batches(writer.paths, ["a"], batch_rows=200)] == [200, 100] * 3 + [100]


def test_huge_rows_end_a_row_group_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 10_000)
    with FileWriter(tmp_path / "x.parquet", REJECTS) as writer:
        writer.append([{"row_id": str(i), "raw": "x" * 4_000} for i in range(10)])
    metadata = pq.read_metadata(tmp_path / "x.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [3, 3, 3, 1]


def test_without_rows_there_is_one_empty_part(tmp_path: Path) -> None:
    with PartWriter(tmp_path / "rows", SCHEMA) as writer:
        pass
    assert count_rows(writer.paths) == 0 and pq.read_schema(writer.paths[0]) == SCHEMA
    assert list(read_rows(writer.paths)) == []


def test_reasons_are_counted(tmp_path: Path) -> None:
    with FileWriter(tmp_path / "rejects.parquet", REJECTS) as writer:
        writer.append(
            [
                {"row_id": "1", "reasons": ["b", "a"]},
                {"row_id": "2", "reasons": ["b"]},
                {"row_id": "3", "reasons": ["c"]},
            ]
        )
    assert list(count_reasons([tmp_path / "rejects.parquet"]).items()) == [("b", 2), ("a", 1), ("c", 1)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_raises_no_space_left(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        with FileWriter(tmp_path / "x.parquet", REJECTS) as writer:
            writer.append([{"row_id": str(i) * 100_000} for i in range(50)])
    assert error.value.errno == errno.ENOSPC
