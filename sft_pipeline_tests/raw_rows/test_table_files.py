"""Rows of Parquet files, Arrow files and `datasets`: what the columns hold, as the source row had it."""

import datetime
import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json, Value

from sft_pipeline.errors import InputError
from sft_pipeline.stages.raw_rows.decode import Reject, Row
from sft_pipeline.stages.raw_rows.readers import read_file
from sft_pipeline.stages.raw_rows.table_files import read_hub
from sft_pipeline.tables.strict_json import canonical
from sft_pipeline_tests.raw_rows.test_find import find
from sft_pipeline_tests.raw_rows.test_readers import ROWS, contents, one_by_one, put, read


def write(path: Path, table: pa.Table) -> Path:
    """As Parquet, or as an Arrow file or stream by the ending."""
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=7)
        return path
    new = pa.ipc.new_stream if ".stream" in path.suffixes else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as stream, new(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


def texts(path: Path) -> list[str]:
    return [r.content.decode() for r in read(path) if isinstance(r, Row)]


def json_array(values: Sequence[str | None]) -> pa.Array:
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(values, pa.string()))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.stream.arrow"])
def test_each_file_of_a_table_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, pa.Table.from_pylist(ROWS * 30))
    assert contents(path) == ROWS * 30
    found = read(path)
    assert [r.line for r in found] == list(range(1, len(ROWS) * 30 + 1))
    assert found[0].row_id == hashlib.sha256(canonical(ROWS[0])).hexdigest()[:32]
    seen: list[int] = []
    list(read_file(find(path).files[0], seen.append))
    assert path.stat().st_size - 1500 <= sum(seen) <= path.stat().st_size


def test_columns_keep_their_order(tmp_path: Path) -> None:
    table = pa.table({"tools": [[{"name": "f", "arguments": {"when": "Friday", "guests": 4}}]], "a": [1.0]})
    expected = '{"tools":[{"name":"f","arguments":{"when":"Friday","guests":4}}],"a":1.0}'
    assert texts(write(tmp_path / "rows.parquet", table)) == [expected]


MESSAGES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Go."}, {"role": "assistant", "tool_calls": [c]}], "note": None}
    for c in (
        {"name": "turn", "arguments": {"side": "left"}},
        {"name": "go", "arguments": {"rate": 3}},
        {"name": "look", "arguments": {"at": [{"x": 1}, {"y": None, "x": 2}, None]}},
        {"name": "stop"},
    )
]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_null_that_fills_a_struct_is_absent(tmp_path: Path, name: str) -> None:
    table = pa.Table.from_pylist(MESSAGES)
    assert table.to_pylist()[0]["messages"][1]["tool_calls"][0]["arguments"] == {
        "side": "left",
        "rate": None,
        "at": None,
    }
    found = contents(write(tmp_path / name, table))
    expected = json.loads(json.dumps(MESSAGES))
    del expected[2]["messages"][1]["tool_calls"][0]["arguments"]["at"][1]["y"]  # it cannot be told apart
    assert found == expected  # with a column that is null, and an element of a list


def test_maps_are_objects_and_keep_their_nulls(tmp_path: Path) -> None:
    structs = pa.map_(pa.string(), pa.struct([("x", pa.int8())]))
    pairs = pa.array([[("b", {"x": 1}), ("a", None)], None], structs)
    numbered = pa.array([[(1, "x")], []], pa.map_(pa.int8(), pa.string()))
    table = pa.table({"arguments": pairs, "numbered": numbered})
    assert texts(write(tmp_path / "rows.parquet", table)) == [
        '{"arguments":{"b":{"x":1},"a":null},"numbered":[[1,"x"]]}',
        '{"arguments":null,"numbered":[]}',
    ]
    twice = pa.table({"arguments": pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int8()))})
    assert [r.reason for r in read(write(tmp_path / "twice.arrow", twice)) if isinstance(r, Reject)] == [
        "duplicate_key"
    ]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_json_columns_give_what_they_hold_as_it_is_spelled(tmp_path: Path, name: str) -> None:
    values = ['[{"name": "f", "b": 1.50}]', '"text"', None, "null", '{"id": 18446744073709551616}']
    arguments = json_array(['{"z": 1,\n "y": [2e3]}', None, "null", "[]", "1"])
    calls = pa.StructArray.from_arrays([arguments], ["args"])
    listed = pa.ListArray.from_arrays([0, 2, 2, 2, 2, 2], json_array(["[1]", None]))
    table = pa.table({"tools": json_array(values), "call": calls, "of": listed})
    assert texts(write(tmp_path / name, table)) == [
        '{"tools":[{"name": "f", "b": 1.50}],"call":{"args":{"z": 1,\n "y": [2e3]}},"of":[[1],null]}',
        '{"tools":"text","call":{},"of":[]}',
        '{"tools":null,"call":{"args":null},"of":[]}',
        '{"tools":null,"call":{"args":[]},"of":[]}',
        '{"tools":{"id": 18446744073709551616},"call":{"args":1},"of":[]}',
    ]


def test_a_json_column_that_holds_no_json_is_a_reject(tmp_path: Path) -> None:
    values = ['{"a": 1}', '{"a": 1', '1, "role": "system"', '{"a": NaN}', '{"a": 1, "a": 2}', ""]
    found = read(write(tmp_path / "rows.arrow", pa.table({"tools": json_array(values)})))
    assert [r.reason if isinstance(r, Reject) else "row" for r in found] == [
        "row",
        "invalid_json",
        "invalid_json",
        "not_finite",
        "duplicate_key",
        "invalid_json",
    ]
    assert [r.line for r in found] == [1, 2, 3, 4, 5, 6]
    assert isinstance(found[1], Reject) and found[1].raw == "{'tools': '{\"a\": 1'}"


def test_json_columns_of_datasets(tmp_path: Path) -> None:
    calls = [{"when": "Friday", "guests": 4}, {"side": "left"}]
    features = Features({"q": Value("string"), "call": Json()})
    saved = Dataset.from_dict({"q": ["a", "b"], "call": calls}, features)
    saved.save_to_disk(tmp_path / "saved")
    (tmp_path / "ds").mkdir()
    saved.to_parquet(tmp_path / "ds" / "train.parquet")
    expected = ['{"q":"a","call":{"when":"Friday","guests":4}}', '{"q":"b","call":{"side":"left"}}']
    assert texts(tmp_path / "saved") == texts(tmp_path / "ds" / "train.parquet") == expected
    streamed = one_by_one(read_hub(f"hf://{tmp_path}/ds@v1", Counter()))
    assert [r.content.decode() for r in streamed if isinstance(r, Row)] == expected


def test_binary_data_is_described_and_counted(tmp_path: Path) -> None:
    image = b"\xff\xd8picture"
    described = {"bytes": len(image), "sha256": hashlib.sha256(image).hexdigest()}
    row = {"q": "a", "image": {"bytes": image, "path": None}, "raw": image}
    table = pa.Table.from_pylist([row, {"q": "b"}])
    table = table.append_column("fixed", pa.array([b"ab", None], pa.binary(2)))
    path = write(tmp_path / "rows.parquet", table)
    counts: Counter[str] = Counter()
    found = one_by_one(read_file(find(path).files[0], counts=counts))
    assert [json.loads(r.content) for r in found if isinstance(r, Row)] == [
        {
            "q": "a",
            "image": {"bytes": described},
            "raw": described,
            "fixed": {"bytes": 2, "sha256": hashlib.sha256(b"ab").hexdigest()},
        },
        {"q": "b", "image": None, "raw": None, "fixed": None},
    ]
    assert counts == {"binary_values": 3}


def test_other_types_become_text_or_null(tmp_path: Path) -> None:
    number = uuid.UUID(int=7)
    table = pa.table(
        {
            "at": pa.array([0], pa.timestamp("s")),
            "took": pa.array([90], pa.duration("s")),
            "score": [float("nan")],
            "scores": [[1.0, float("inf")]],
            "id": pa.array([number.bytes], pa.uuid()),
            "day": [datetime.date(2026, 5, 20)],
            "kind": pa.array(["x"]).dictionary_encode(),
        }
    )
    assert contents(write(tmp_path / "rows.parquet", table)) == [
        {
            "at": "1970-01-01T00:00:00",
            "took": "0:01:30",
            "score": None,
            "scores": [1.0, None],
            "id": str(number),
            "day": "2026-05-20",
            "kind": "x",
        }
    ]
    interval = pa.table({"q": ["a"], "every": pa.array([pa.MonthDayNano([1, 2, 3])])})
    assert [r.reason for r in read(write(tmp_path / "odd.arrow", interval)) if isinstance(r, Reject)] == [
        "unsupported_value"
    ]


def test_broken_text_costs_its_row(tmp_path: Path) -> None:
    broken = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    found = read(write(tmp_path / "rows.arrow", pa.table({"q": broken})))
    assert [r.reason if isinstance(r, Reject) else "row" for r in found] == ["row", "invalid_utf8", "row"]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_columns_of_the_same_name_are_refused(tmp_path: Path, name: str) -> None:
    one = pa.array([1])
    table = pa.Table.from_arrays([one, one], names=["a", "a"])
    with pytest.raises(InputError, match=f"{name}: two columns are named 'a'"):
        read(write(tmp_path / name, table))
    inner = pa.StructArray.from_arrays([one, one], names=["b", "b"])
    with pytest.raises(InputError, match=f"{name}: two columns are named 'b'"):
        read(write(tmp_path / name, pa.table({"a": pa.ListArray.from_arrays([0, 1], inner)})))


def test_a_table_that_does_not_hold_together_is_one_clear_error(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    stream = write(tmp_path / "rows.stream.arrow", table).read_bytes()
    file = write(tmp_path / "rows.arrow", table).read_bytes()
    for data, kind in (
        (b"PAR1 nonsense", "Parquet"),
        (stream[:-8], "Arrow"),  # cut between two batches
        (stream[:-40], "Arrow"),
        (stream + stream, "Arrow"),
        (file[:-20], "Arrow"),
        (b"nonsense", "Arrow"),
        (b"", "Arrow"),
    ):
        path = put(tmp_path, "broken.parquet" if kind == "Parquet" else "broken.arrow", data)
        message = f"{path}: not a readable {kind} file after row .*: copy it again"
        with pytest.raises(InputError, match=message):
            read(path)


def test_a_local_hub_folder_is_read_through_datasets(tmp_path: Path) -> None:
    put(tmp_path, "ds/train.jsonl", "".join(json.dumps(r) + "\n" for r in ROWS))
    rows = one_by_one(read_hub(f"hf://{tmp_path}/ds@v1", Counter()))
    assert [json.loads(r.content) for r in rows if isinstance(r, Row)] == ROWS
    with pytest.raises(InputError, match="no split test"):
        list(read_hub(f"hf://{tmp_path}/ds@v1?split=test", Counter()))
    with pytest.raises(InputError, match="add the revision"):
        list(read_hub(f"hf://{tmp_path}/ds", Counter()))
