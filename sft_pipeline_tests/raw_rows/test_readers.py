"""Every file format gives the same rows; what cannot be decoded is kept with its place and bytes."""

import bz2
import gzip
import hashlib
import json
import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from sft_pipeline.errors import InputError
from sft_pipeline.stages.raw_rows import json_document, readers, streams
from sft_pipeline.stages.raw_rows.config import RawSource
from sft_pipeline.stages.raw_rows.decode import Reject, Row, Rows, decode_line, decode_lines, decode_strictly
from sft_pipeline.stages.raw_rows.find import find_files
from sft_pipeline.stages.raw_rows.readers import read_file
from sft_pipeline.tables.strict_json import canonical

ROWS = [
    {
        "prompt": f"Is key {i} stale?",
        "completion": f'Ask the owner of {i} — no, é, 漢字, \u2028, “quotes” "and" commas,',
    }
    for i in range(50)
]
JSONL = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS).encode()


def read(path: Path | str) -> list[Row | Reject]:
    files = find_files(RawSource(path=str(path), static=True), "").files
    return one_by_one(found for file in files for found in read_file(file))


def one_by_one(found: Iterable[Rows | Reject]) -> list[Row | Reject]:
    return [row for some in found for row in ([some] if isinstance(some, Reject) else map(Row, *some))]


def contents(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(r.content) for r in read(path) if isinstance(r, Row)]


def put(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def short_id(value: str | bytes) -> str:
    """Compressed data holds the time, and a test's name may not."""
    return value if isinstance(value, str) and len(value) < 60 else ""


def as_csv(delimiter: str) -> str:
    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    return "\ufeff" + "".join(
        delimiter.join(map(quoted, line)) + "\r\n"
        for line in [("prompt", "completion"), *((r["prompt"], r["completion"]) for r in ROWS)]
    )


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.jsonl", JSONL),
        ("rows.JSONL", b"\xef\xbb\xbf" + JSONL.replace(b"\n", b"\r\n\n")),
        ("rows.jsonl.gz", gzip.compress(JSONL)),
        ("rows.jsonl.gz", gzip.compress(JSONL[:700]) + gzip.compress(JSONL[700:])),
        ("rows.jsonl.zst", zstandard.compress(JSONL)),
        ("rows.jsonl.zst", zstandard.compress(JSONL[:700]) + zstandard.compress(JSONL[700:])),
        ("rows.jsonl.bz2", bz2.compress(JSONL)),
        ("rows.jsonl.bz2", bz2.compress(JSONL[:700]) + bz2.compress(JSONL[700:])),
        ("rows.jsonl.xz", lzma.compress(JSONL)),
        ("rows.jsonl.xz", lzma.compress(JSONL[:700]) + bytes(8) + lzma.compress(JSONL[700:]) + bytes(4)),
        ("rows.ndjson", JSONL),
        ("rows.ndjson.xz", lzma.compress(JSONL)),
        ("rows.jsonlines", JSONL),
        ("rows.jsonlines.gz", gzip.compress(JSONL)),
        ("rows.json", json.dumps(ROWS)),
        ("rows.json", json.dumps(ROWS, indent=2, ensure_ascii=False)),
        ("rows.json", json.dumps({"version": 3, "tags": ["a"], "rows": ROWS, "end": {"a": [1]}}, indent=1)),
        ("rows.json", json.dumps({"rows": ROWS})),
        ("rows.json", JSONL),
        ("rows.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("rows.csv", as_csv(",")),
        ("rows.csv.gz", gzip.compress(as_csv(",").encode())),
        ("rows.tsv", as_csv("\t")),
    ],
    ids=short_id,
)
def test_each_format_gives_the_same_rows(tmp_path: Path, name: str, data: bytes | str) -> None:
    assert contents(put(tmp_path, name, data)) == ROWS


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "\xff\xfe"}', "invalid_utf8"),
        (b'{"a": "\\ud800"}', "invalid_unicode"),
        (b'{"a": 1', "invalid_json"),
        (b"{'a': 1}", "invalid_json"),
        (b"hello", "invalid_json"),
        (b'{"a": 1} {"b": 2}', "invalid_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"[1, 2]", "not_an_object"),
        (b"null", "not_an_object"),
        (b'{"a": NaN}', "not_finite"),
        (b'{"a": -Infinity}', "not_finite"),
        (b'{"a": 1e999}', "not_finite"),
        (b'{"a": 1, "a": 2}', "duplicate_key"),
        (b'{"a": {"b": 1, "b": 1}}', "duplicate_key"),
        (b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}", "too_deep"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_deep"),
        (b'{"a": 1, "\\u0061": 2}', "duplicate_key"),
        (b'{"a": "\\u0022", "b": "\\u0022", "b": 2}', "duplicate_key"),
        (b'\xef\xbb\xbf\xef\xbb\xbf{"a": 1}', "invalid_json"),
        (b'{"a": 01}', "invalid_json"),
    ],
)
def test_a_line_that_is_no_row_is_kept_with_its_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    path = put(tmp_path, "rows.jsonl", JSONL + b"\n" + line + b"\n" + JSONL)
    found = read(path)
    rejects = [r for r in found if isinstance(r, Reject)]
    assert len(found) == 101
    assert [(r.reason, r.line) for r in rejects] == [(reason, 52)]
    assert rejects[0].raw == line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "backslashreplace")


def test_the_row_id_is_the_hash_of_the_canonical_content() -> None:
    one, other = (
        decode_line(1, b'{"b": 1.50, "a": "\\u00e9"}'),
        decode_line(9, '{"a":"é","b":1.5}'.encode()),
    )
    assert one.row_id == other.row_id == hashlib.sha256('{"a":"é","b":1.5}'.encode()).hexdigest()[:32]


def test_the_content_is_the_row_as_written_and_its_id_does_not_depend_on_that(tmp_path: Path) -> None:
    value = {"b": [1.5, 1e20, -0.0, 10**15, None, True], "a": "é\u2028\x7f\x01/", "": {}}
    huge = {**value, "id": 2**64, "x": 1e20}  # orjson cannot hold it
    for row in (value, huge):
        texts = [
            json.dumps(row),
            json.dumps(row, ensure_ascii=False, sort_keys=True),
            json.dumps(row, separators=(",", ":")),
            json.dumps(row).replace("1e+20", "1E20"),
            json.dumps(row).replace("e+20", "000.0e17"),
            json.dumps(row).replace("1.5", "1.50"),
        ]
        for decode in (decode_line, decode_strictly):
            found = [decode(1, text.encode()) for text in texts]
            assert [r.content.decode() for r in found if isinstance(r, Row)] == texts
            assert {r.row_id for r in found} == {hashlib.sha256(canonical(row)).hexdigest()[:32]}
        document = "[" + ",\n  ".join(texts) + "]"
        found = read(put(tmp_path, "rows.json", "\ufeff" + document))
        assert [r.content.decode() for r in found if isinstance(r, Row)] == texts
        assert len({r.row_id for r in found}) == 1


def test_white_space_and_a_mark_around_a_row_are_not_part_of_it(tmp_path: Path) -> None:
    line = b'{"tools": [{"when" : 1.50,"guests": 4}]}'
    text = b"\xef\xbb\xbf  " + line + b" \r\n\t" + line + b"\n" + b'{"b": 2, "a": 1}'
    found = read(put(tmp_path, "rows.jsonl", text))
    assert [r.content for r in found if isinstance(r, Row)] == [line, line, b'{"b": 2, "a": 1}']
    whole = read(put(tmp_path, "rows.json", b"\xef\xbb\xbf\n{\n" + line[1:] + b"\n"))
    assert [r.content for r in whole if isinstance(r, Row)] == [b"{\n" + line[1:]]


def test_a_csv_row_keeps_the_order_of_its_columns(tmp_path: Path) -> None:
    (row,) = read(put(tmp_path, "rows.csv", 'prompt,completion,about\nq,"a ""b""",é\n'))
    assert (
        isinstance(row, Row) and row.content == '{"prompt":"q","completion":"a \\"b\\"","about":"é"}'.encode()
    )
    assert row.row_id == hashlib.sha256(canonical(json.loads(row.content))).hexdigest()[:32]


JSON_NUMBERS = st.one_of(
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(
        [
            "1e400",
            "-0",
            "-0.0",
            "1E5",
            "01",
            "1.",
            "-",
            "0.1" + "0" * 30 + "7",
            "9" * 19,
            "-" + "9" * 19,
            "9" * 20,
            "1e-400",
            "1" + "0" * 30 + ".0",
            "NaN",
            "-Infinity",
        ]
    ),
).map(str)
JSON_STRINGS = st.text(max_size=6).map(json.dumps) | st.sampled_from(
    [
        '"a"',
        '"b"',
        '"\\u0061"',
        '"\\u0022"',
        '"\\\\u0022"',
        '"\\""',
        '"\\ud83d\\ude00"',
        '"\\ud83d"',
        '"\ud83d"',
        '"\x7f"',
        '"\t"',
        '"\\/"',
        '"é"',
        '"{[{["',
        '"\\x"',
        '"\u2028"',
        '""',
        '"',
    ]
)


def _json_texts(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.tuples(JSON_STRINGS, inner).map(": ".join)
    return st.lists(inner, max_size=4).map(lambda xs: f"[{', '.join(xs)}]") | st.lists(pairs, max_size=4).map(
        lambda xs: f"{{{', '.join(xs)}}}"
    )


JSON_TEXTS = st.recursive(
    JSON_NUMBERS | JSON_STRINGS | st.sampled_from(["null", "true", "false", "nul"]),
    _json_texts,
    max_leaves=12,
)
OBJECTS = st.lists(st.tuples(JSON_STRINGS, JSON_TEXTS).map(":".join), max_size=4).map(
    lambda xs: f"{{{','.join(xs)}}}"
)
MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, 200),
        st.sampled_from(
            [
                b"",
                b'"',
                b"\\",
                b"{",
                b"}",
                b"[",
                b",",
                b":",
                b"\xff",
                b"\xed\xa0\x80",
                b"\x00",
                b"\r",
                b"\x0c",
                b" ",
                b"\xef\xbb\xbf",
                b"0" * 20,
                b"e9",
                b"-",
            ]
        ),
    ),
    max_size=2,
)


def _mutated(text: str, mutations: list[tuple[int, bytes]]) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    for place, piece in mutations:
        data = data[:place] + piece + data[place + (place % 2) :]
    return data.replace(b"\n", b" ")


LINES = st.builds(_mutated, OBJECTS | JSON_TEXTS, st.just([]) | MUTATIONS)


@given(lines=st.lists(LINES, max_size=4))
@example(lines=[b'{"a": 1}\r', b"", b" ", b'\xef\xbb\xbf{"a": 1}', b'{"a": ' + b"[" * 99 + b"]" * 99 + b"}"])
@example(lines=[b'{"a": ' + b"[" * n + b"]" * n + b"}" for n in (99, 100, 253, 254, 1020, 1030)])
def test_the_fast_way_gives_what_the_strict_one_gives(lines: list[bytes]) -> None:
    stripped = [(number, line.strip()) for number, line in enumerate(lines, 7)]
    expected = [decode_strictly(number, data) for number, data in stripped if data]
    assert one_by_one(decode_lines(7, b"".join(line + b"\n" for line in lines))) == expected
    assert [decode_line(number, data) for number, data in stripped if data] == expected


def test_a_broken_csv_record_costs_its_first_line_only(tmp_path: Path) -> None:
    text = 'prompt,completion\na,b\nragged\nc,d,e\n"open,quote\nf,g\n\nh,"i\nj"\n"x" y,z\nk,l\n'
    found = read(put(tmp_path, "rows.csv", text))
    assert [(r.line, r.reason) for r in found if isinstance(r, Reject)] == [
        (3, "ragged_row"),
        (4, "ragged_row"),
        (5, "invalid_csv"),
        (10, "invalid_csv"),
    ]
    assert [(r.line, json.loads(r.content)["prompt"]) for r in found if isinstance(r, Row)] == [
        (2, "a"),
        (6, "f"),
        (8, "h"),
        (11, "k"),
    ]


def test_an_open_quote_at_the_end_does_not_swallow_the_file(tmp_path: Path) -> None:
    found = read(put(tmp_path, "rows.csv", 'p,c\n"open,1\n' + "a,b\n" * 500))
    assert sum(isinstance(r, Row) for r in found) == 500 and sum(isinstance(r, Reject) for r in found) == 1


def test_broken_elements_of_a_json_array_are_rejects(tmp_path: Path) -> None:
    text = (
        '[\n{"a": 1},\n{"a": NaN},\n{"a": tru},\n5,\n{"a": "\\ud800"},\n{"a": {"b": [1, "]"}]},\n{"a": 2}\n]'
    )
    found = read(put(tmp_path, "rows.json", text))
    assert [(r.line, r.reason if isinstance(r, Reject) else "row") for r in found] == [
        (2, "row"),
        (3, "not_finite"),
        (4, "invalid_json"),
        (5, "not_an_object"),
        (6, "invalid_unicode"),
        (7, "invalid_json"),
        (8, "row"),
    ]
    found = read(put(tmp_path, "bytes.json", b'[{"a": "\xff"}, {"a": "ok"}]'))
    assert [r.reason if isinstance(r, Reject) else "row" for r in found] == ["invalid_utf8", "row"]
    assert isinstance(found[0], Reject) and "\\xff" in found[0].raw


def test_json_elements_larger_than_the_read_buffer(tmp_path: Path) -> None:
    rows = [{"a": "é" * n + '"\\]}{[,'} for n in (3_000_000, 5, 1_500_000, 1 << 20)]
    assert contents(put(tmp_path, "rows.json", json.dumps(rows, ensure_ascii=False))) == rows
    assert (
        contents(
            put(
                tmp_path,
                "object.json",
                json.dumps({"first": "x" * 2_000_000, "rows": rows}, ensure_ascii=False),
            )
        )
        == rows
    )


def test_an_object_of_messages_is_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    assert contents(put(tmp_path, "row.json", json.dumps(row, indent=2))) == [row]
    assert contents(put(tmp_path, "row.json", json.dumps(ROWS[0]))) == [ROWS[0]]
    with_tools = {"tools": [{"name": "f"}], **row}
    assert contents(put(tmp_path, "row.json", json.dumps(with_tools, indent=2))) == [with_tools]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("rows.jsonl.gz", gzip.compress(JSONL)[:-20], "truncated gzip file after line"),
        ("rows.jsonl.gz", b"", "truncated gzip"),
        ("rows.jsonl.gz", JSONL, "corrupt gzip file after line 0"),
        ("rows.jsonl.zst", zstandard.compress(JSONL)[:-20], "truncated zstd file after line"),
        ("rows.jsonl.bz2", bz2.compress(JSONL)[:-20], "truncated bz2 file after line"),
        ("rows.jsonl.xz", lzma.compress(JSONL)[:-20], "truncated xz file after line"),
        ("rows.jsonl.xz", JSONL, "corrupt xz file after line 0"),
        ("rows.jsonl.xz", lzma.compress(JSONL) + b"and more of it", "corrupt xz file after line"),
        ("rows.jsonl.gz", gzip.compress(JSONL) + b"more", "corrupt gzip file after line"),
        ("rows.json", json.dumps(ROWS)[:-1], "truncated or broken: expected ']'"),
        ("rows.json", json.dumps(ROWS)[:-9], "truncated in the element"),
        ("rows.json", '{"one": [{"a": 1}], "two": [{"b": 1}]}', "second list of objects, 'two'"),
        ("rows.json", "[1] [2]", "has more text after its end"),
        ("rows.json", "hello", "neither a JSON array nor an object"),
        ("rows.json", "", "is empty"),
        ("rows.csv", "a,b,a\n1,2,3\n", "names 'a' twice"),
        ("rows.jsonl", JSONL.decode().encode("utf-16"), "is UTF-16"),
    ],
    ids=short_id,
)
def test_a_file_that_does_not_hold_together_is_one_clear_error(
    tmp_path: Path, name: str, data: bytes | str, message: str
) -> None:
    path = put(tmp_path, name, data)
    with pytest.raises(InputError, match=message) as error:
        read(path)
    assert name in str(error.value)


def test_a_line_above_the_cap_is_never_in_memory_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (streams, readers, json_document):
        monkeypatch.setattr(module, "MAX_LINE", 10_000)
    long = b'{"a": "' + b"x" * 50_000 + b'"}'
    for end in (10_000, 10_001):  # the longest line that is read, and the shortest that is not
        line = b'{"a": "' + b"x" * (end - 9) + b'"}'
        found = read(put(tmp_path, "rows.jsonl", b'{"a": 1}\n' + line + b"\n" + line))
        assert [isinstance(r, Reject) for r in found] == [False] + [end == 10_001] * 2
    found = read(put(tmp_path, "rows.jsonl", b'{"a": 1}\n' + long + b"\n" + b'{"a": 2}\n'))
    assert [(r.line, r.reason if isinstance(r, Reject) else "row") for r in found] == [
        (1, "row"),
        (2, "line_too_long"),
        (3, "row"),
    ]
    assert isinstance(found[1], Reject) and str(len(long) + 1) in found[1].raw and len(found[1].raw) < 5_000
    assert hashlib.sha256(long + b"\n").hexdigest() in found[1].raw
    with pytest.raises(InputError, match="never closes"):
        read(put(tmp_path, "rows.json", "[" + long.decode()[:-2] + "]"))


def test_progress_is_the_bytes_of_the_file(tmp_path: Path) -> None:
    for name, data in (
        ("a.jsonl", JSONL),
        ("b.jsonl.gz", gzip.compress(JSONL)),
        ("c.json", json.dumps(ROWS).encode()),
    ):
        path = put(tmp_path, name, data)
        file = find_files(RawSource(path=str(path), static=True), "").files[0]
        seen: list[int] = []
        list(read_file(file, seen.append))
        assert sum(seen) == len(data)
