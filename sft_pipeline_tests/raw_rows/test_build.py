"""raw_rows as a stage: snapshots, sampling, counts, provenance."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_pipeline.errors import InputError
from sft_pipeline.project import project_path
from sft_pipeline.stages.raw_rows.asset import STAGE
from sft_pipeline.stages.raw_rows.build import sample_sizes
from sft_pipeline.stages.raw_rows.locate import snapshots, source_digests
from sft_pipeline.store.files import sha256_file
from sft_pipeline_tests.command import ROOT
from sft_pipeline_tests.dataset_runs import check, dataset, project, rows, run, write_jsonl
from sft_pipeline_tests.raw_rows.broken_lines import broken_lines

__all__ = ["project"]
MANY = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(400)]


def test_snapshots_are_the_subfolders_that_all_moving_sources_share(project: Path) -> None:
    for name in ("a/2026-01", "a/2026-02", "a/2026-03", "a/.tmp", "b/2026-02", "b/2026-03"):
        write_jsonl(project / name / "rows.jsonl", [{"from": name}])
    write_jsonl(project / "rules.jsonl", [{"from": "rules"}])
    config = dataset({"path": "a", "static": False}, {"path": "b/", "static": False}, {"path": "rules.jsonl"})
    assert snapshots(config.sources) == ["2026-02", "2026-03"]
    built = run(config, project / "home", STAGE, "2026-02")["raw_rows"].artifact
    assert [(r["source"], r["file"], r["line"], json.loads(r["content"])) for r in rows(built, "rows")] == [
        (0, "rows.jsonl", 1, {"from": "a/2026-02"}),
        (1, "rows.jsonl", 1, {"from": "b/2026-02"}),
        (2, "rules.jsonl", 1, {"from": "rules"}),
    ]
    digests = source_digests(config.sources, "2026-02")
    assert list(digests) == ["a/2026-02/rows.jsonl", "b/2026-02/rows.jsonl", "rules.jsonl"]
    assert all(sha256_file(project_path(name)) == digest for name, digest in digests.items())
    assert built.manifest.outside == digests


def test_an_unknown_snapshot_is_answered_with_the_newest(project: Path) -> None:
    for name in ("s/1", "s/2", "s/3", "s/4"):
        write_jsonl(project / name / "rows.jsonl", [{}])
    with pytest.raises(InputError, match=r"no folder 9 in s\. Newest: 4, 3, 2"):
        run(dataset({"path": "s", "static": False}), project / "home", STAGE, "9")
    write_jsonl(project / "flat" / "rows.jsonl", [{}])
    with pytest.raises(InputError, match="set `static: true`"):
        run(dataset({"path": "flat", "static": False}), project / "home", STAGE, "1")
    with pytest.raises(InputError, match="set `static: true`"):
        snapshots(dataset({"path": "flat/rows.jsonl", "static": False}).sources)
    with pytest.raises(InputError, match="does not exist"):
        snapshots(dataset({"path": "gone", "static": False}).sources)


def test_static_sources_have_one_snapshot_named_after_their_content(project: Path) -> None:
    path = write_jsonl(project / "rows.jsonl", MANY)
    (first,) = snapshots(dataset(path).sources)
    assert first.startswith("static-") and len(first) == len("static-") + 12
    write_jsonl(path, MANY[1:])
    (second,) = snapshots(dataset(path).sources)
    assert first != second
    with pytest.raises(InputError, match=f"their content is the snapshot {second}"):
        run(dataset(path), project / "home", STAGE, first)


@pytest.mark.parametrize("lines", ["", "\n \n"])
def test_an_empty_snapshot_is_one_clear_error(project: Path, lines: str) -> None:
    (project / "s" / "1").mkdir(parents=True)
    config = dataset({"path": "s", "static": False})
    with pytest.raises(InputError, match="no file to read"):
        run(config, project / "home", STAGE, "1")
    (project / "s" / "1" / "rows.jsonl").write_text(lines)
    with pytest.raises(InputError, match="snapshot 1 is empty"):
        run(config, project / "home", STAGE, "1")
    assert not list((project / "home" / "objects").glob("*"))


def test_a_snapshot_of_rejects_only_is_built_and_not_accepted(project: Path) -> None:
    (project / "rows.jsonl").write_text("no\nno\n")
    built = run(dataset(project / "rows.jsonl"), project / "home", STAGE)["raw_rows"]
    assert not built.artifact.manifest.accepted and not check(built, "has_rows")["passed"]
    assert "rows.jsonl:1 (invalid_json)" in check(built, "undecodable_rows")["description"]
    assert built.artifact.manifest.counts == {
        "read": 2,
        "rows": 0,
        "rejects": 2,
        "sampled_out": 0,
        "files": 1,
        "bytes": 6,
        "not_data": 0,
        "binary_values": 0,
    }


def test_a_line_of_five_megabytes_passes(project: Path) -> None:
    path = write_jsonl(project / "rows.jsonl", [*MANY, {"prompt": "x" * 5_000_000}])
    built = run(dataset(path), project / "home", STAGE)["raw_rows"].artifact
    assert built.manifest.accepted and len(rows(built, "rows")[-1]["content"]) > 5_000_000


def test_limit_takes_a_sample_that_is_stable_under_growth(project: Path) -> None:
    path = write_jsonl(project / "rows.jsonl", MANY)
    limited = dataset({"path": str(path), "limit": 100})
    first = run(limited, project / "home", STAGE)["raw_rows"].artifact
    taken = rows(first, "rows")
    assert len(taken) == 100 and [r["line"] for r in taken] == sorted(r["line"] for r in taken)
    assert first.manifest.counts["sampled_out"] == 300
    write_jsonl(path, [{"prompt": "new", "completion": str(i)} for i in range(4)] + MANY)
    again = {r["row_id"] for r in rows(run(limited, project / "home", STAGE)["raw_rows"].artifact, "rows")}
    assert len({r["row_id"] for r in taken} & again) >= 96


def test_weights_are_the_shares_of_the_mixture(project: Path) -> None:
    one = write_jsonl(project / "one.jsonl", MANY)
    two = write_jsonl(
        project / "two.jsonl", [{"prompt": f"other {i}", "completion": "x"} for i in range(100)]
    )
    built = run(dataset({"path": str(one), "weight": 0.5}, {"path": str(two)}), project / "home", STAGE)[
        "raw_rows"
    ].artifact
    assert [sum(r["source"] == i for r in rows(built, "rows")) for i in (0, 1)] == [50, 100]
    assert built.manifest.counts == {**built.manifest.counts, "read": 500, "rows": 150, "sampled_out": 350}


def test_sizes_of_a_mixture() -> None:
    assert sample_sizes([10, 1000], [None, None], [1, 1]) == [10, 1000]
    assert sample_sizes([10, 1000], [None, 20], [1, 1]) == [10, 20]
    assert sample_sizes([100, 1000], [None, None], [3, 1]) == [100, 33]
    assert sample_sizes([100, 1000, 0], [None, None, None], [0.1, 0.3, 5]) == [100, 300, 0]
    assert sample_sizes([0, 0], [None, None], [1, 2]) == [0, 0]


def test_built_twice_it_has_the_same_data_version(project: Path) -> None:
    path = write_jsonl(project / "rows.jsonl", MANY)
    config = dataset({"path": str(path), "limit": 300})
    versions = {
        run(config, project / home)["grouped_split"].artifact.manifest.data_version for home in ("one", "two")
    }
    assert len(versions) == 1


PIECES = st.sampled_from(
    [
        b'{"prompt": "a", "completion": "b"}',
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"\\",
        b",",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\x00",
        b"\r",
        b"\n",
        b"\n\n",
        b'{"a": NaN}',
        b'"\\ud83d"',
        b'{"a": {"a": 1, "a": 2}}',
        b"null",
        b" ",
        b"<|im_end|>",
        b'{"prompt": null}',
        b"\xed\xa0\x80",
        b"\t",
        b"1e400",
    ]
)


def test_every_one_of_ten_thousand_broken_lines_is_a_row_or_a_reject_with_its_bytes(project: Path) -> None:
    lines = broken_lines(10_000, seed=7)
    lines[0] = b"\xef\xbb\xbf" + lines[0]
    (project / "rows.jsonl").write_bytes(b"\n".join(lines))
    whole = {"validation": 0, "test": 0, "near_duplicates": None}
    config = dataset(project / "rows.jsonl", contract={"max_reject_rate": 1}, split=whole)
    built = {name: o.artifact for name, o in run(config, project / "home").items()}
    raw, validated, split = (
        built[n].manifest.counts for n in ("raw_rows", "validated_rows", "grouped_split")
    )
    written = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    assert raw["read"] == raw["rows"] + raw["rejects"] == len(written)
    assert validated["read"] == validated["accepted"] + validated["quarantined"] == len(written)
    assert split["read"] == split["train"] + split["rejects"] == validated["accepted"]
    decoded = rows(built["raw_rows"], "rows")
    rejects = rows(built["raw_rows"], "rejects.parquet")
    assert sorted(r["line"] for r in [*decoded, *rejects]) == list(written)
    for reject in rejects:
        data = written[reject["line"]].removeprefix(b"\xef\xbb\xbf")
        assert reject["raw"] == data.decode("utf-8", "backslashreplace") and len(reject["reasons"]) == 1
    assert {r["reasons"][0] for r in rejects} == {
        "invalid_utf8",
        "invalid_unicode",
        "invalid_json",
        "not_an_object",
        "not_finite",
        "duplicate_key",
        "too_deep",
    }
    contents = {r["line"]: r["content"] for r in decoded}
    for line, content in contents.items():
        assert content.encode() == written[line].removeprefix(b"\xef\xbb\xbf").strip()
    accepted, quarantined = (
        rows(built["validated_rows"], "rows"),
        rows(built["validated_rows"], "quarantine.parquet"),
    )
    assert quarantined[: len(rejects)] == rejects
    of_rows = quarantined[len(rejects) :]
    assert sorted(r["line"] for r in [*accepted, *of_rows]) == list(contents)
    assert all(r["raw"] == contents[r["line"]] and r["reasons"] for r in of_rows)


READ_BOTH = """
import resource, sys
from pathlib import Path
from sft_pipeline_tests.dataset_runs import VALIDATED_ROWS, dataset, run

folder = Path(sys.argv[1])
for name in ("small.jsonl", "large.jsonl"):
    run(dataset(folder / name, contract={"max_reject_rate": 1}), folder / "home", VALIDATED_ROWS)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


def test_memory_does_not_grow_with_the_file(project: Path) -> None:
    """Peak memory of reading and validating 10,000 broken lines, then of eight times as many."""
    lines = b"\n".join(broken_lines(10_000, seed=8)) + b"\n"
    (project / "small.jsonl").write_bytes(lines)
    with (project / "large.jsonl").open("wb") as stream:
        for _ in range(8):
            stream.write(lines)
    ran = subprocess.run(
        [sys.executable, "-c", READ_BOTH, str(project)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    small, large = map(int, ran.stdout.split())
    assert large < small + 250, f"{small} MB, then {large} MB for eight times the rows"


@settings(max_examples=100, suppress_health_check=list(HealthCheck), deadline=None)
@given(name=st.sampled_from(["rows.json", "rows.csv", "rows.tsv"]), pieces=st.lists(PIECES, max_size=25))
def test_no_file_is_a_crash(project: Path, name: str, pieces: list[bytes]) -> None:
    (project / name).write_bytes(b"".join(pieces))
    try:
        built = run(dataset(project / name), project / "home", STAGE)["raw_rows"].artifact
    except InputError as error:
        assert name in str(error) or "is empty" in str(error)
    else:
        counts = built.manifest.counts
        assert counts["read"] == counts["rows"] + counts["rejects"]
