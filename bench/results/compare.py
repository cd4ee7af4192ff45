"""Compares two builds of a branch by what their files hold."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# Columns that the design renamed in its contracts; the contents are compared all the same.
RENAMED = {"lengths": "seq_lengths", "side": "split", "of_side": "of_split"}
# tokenized_rows keeps there what it needs to take rows over into the next snapshot: its own business.
PRIVATE = {"outcomes.parquet"}
# The JSON files whose numbers are results: scores, random states, the schedule, the loop's state.
NUMBERS = {"evaluation.json", "rng.json", "scheduler.json", "trainer_state.json"}
KEYS = ("row_id", "update", "block", "step")  # the first of them that a table has names its rows
DRAWN = (".png", ".html", ".md")
FINGERPRINT = re.compile(r"-[0-9a-f]{12}(?=\.json$)")
SHOWN = 200  # characters of a value in a message


@dataclass(frozen=True)
class ContentFinding:
    """One thing that was compared.

    Attributes:
        old, new: Its size in each build, in words.
        difference: The first one, None where the contents are equal.
    """

    what: str
    old: str
    new: str
    difference: str | None


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[ContentFinding]:
    """All findings of a branch.

    Args:
        old, new: What `sft run --json` printed.
    """
    findings = [_values("status", old["status"], new["status"])]
    for asset in dict.fromkeys([*old["artifacts"], *new["artifacts"]]):
        if asset not in old["artifacts"] or asset not in new["artifacts"]:
            owner = "old" if asset in old["artifacts"] else "new"
            findings.append(ContentFinding(asset, "", "", f"only the {owner} build has it"))
            continue
        one, two = Path(old["artifacts"][asset]), Path(new["artifacts"][asset])
        for name in _table_names(one):
            findings.append(_tables(f"{asset}/{name}", one / name, two / name))
        for weights in sorted(one.rglob("*.safetensors")):
            name = weights.relative_to(one)
            findings.append(_tensors(f"{asset}/{name}", weights, two / name))
        for numbers in sorted(p for p in one.rglob("*.json") if p.name in NUMBERS):
            name = numbers.relative_to(one)
            findings.append(_numbers(f"{asset}/{name}", numbers, two / name))
        if asset == "exported_model":
            findings += [_exported(asset, folder, one, two) for folder in ("adapter", "merged")]
        accepted = (_manifest(path)["accepted"] for path in (one, two))
        findings.append(_values(f"{asset} is accepted", *accepted))
    passed = [{(c["asset"], c["name"]): c["passed"] for c in build["checks"]} for build in (old, new)]
    common = [name for name in passed[0] if name in passed[1]]
    wrong = [f"{'/'.join(n)} {passed[0][n]}, {passed[1][n]}" for n in common if passed[0][n] != passed[1][n]]
    sizes = [f"{sum(build[n] for n in common)} of {len(common)} passed" for build in passed]
    findings.append(ContentFinding("checks that both have", *sizes, "; ".join(wrong) or None))
    return findings


def other_files(old: dict[str, Any], new: dict[str, Any], findings: list[ContentFinding]) -> Iterator[str]:
    """Per artifact what differs outside the compared contents, so that no difference goes unmentioned."""
    different = {f.what for f in findings if f.difference is not None}
    for asset in [a for a in old["artifacts"] if a in new["artifacts"]]:
        one, two = Path(old["artifacts"][asset]), Path(new["artifacts"][asset])
        files = [{f["path"]: f for f in _manifest(path)["files"]} for path in (one, two)]
        kept = [{path for path, f in build.items() if not f.get("volatile")} for build in files]
        versions = [_manifest(path)["data_version"] for path in (one, two)]
        if versions[0] == versions[1]:
            yield f"{asset}: same data_version {versions[0][:12]}"
        else:
            yield f"{asset}: data_version {versions[0][:12]} is now {versions[1][:12]}:"
            for path in sorted(kept[0] & kept[1]):
                if files[0][path]["sha256"] != files[1][path]["sha256"]:
                    name = str(Path(path).parent) if Path(path).name.startswith("part-") else path
                    counted = f"{asset}/{name}" in different
                    why = "its content differs, see above" if counted else _why(one / path, two / path)
                    yield f"  {path}: {why}"
            for path in sorted(kept[0] ^ kept[1]):
                owner, other = ("old", 1) if path in kept[0] else ("new", 0)
                now = " (volatile in the other)" if path in files[other] else ""
                yield f"  {path}: counts in the data_version of the {owner} build only{now}"
        # A copied manifest has its fingerprint in its name, which the code version is part of.
        volatile = [{FINGERPRINT.sub("", p) for p in files[i].keys() - kept[i]} for i in (0, 1)]
        gone, added = sorted(volatile[0] - volatile[1]), sorted(volatile[1] - volatile[0])
        if gone or added:
            yield f"{asset}: volatile files only old: {gone}, only new: {added}"
        counts = [_manifest(path)["counts"] for path in (one, two)]
        if counts[0] != counts[1]:
            differing = sorted(
                k for k in counts[0].keys() | counts[1].keys() if counts[0].get(k) != counts[1].get(k)
            )
            listed = (f"{k} {counts[0].get(k)}, {counts[1].get(k)}" for k in differing)
            yield f"{asset}: counts in the manifest (old, new): {'; '.join(listed)}"
    names = [{f"{c['asset']}/{c['name']}" for c in build["checks"]} for build in (old, new)]
    if names[0] != names[1]:
        yield f"checks only old: {sorted(names[0] - names[1])}, only new: {sorted(names[1] - names[0])}"


def _manifest(artifact: Path) -> dict[str, Any]:
    return json.loads((artifact / "manifest.json").read_text())


def _table_names(artifact: Path) -> list[str]:
    """Tables of an artifact but for volatile ones (speed); a folder of part files is one, named by it."""
    kept = (Path(f["path"]) for f in _manifest(artifact)["files"] if not f.get("volatile"))
    found = sorted(path for path in kept if path.suffix == ".parquet")
    names = (str(p.parent if p.name.startswith("part-") else p) for p in found)
    return [name for name in dict.fromkeys(names) if name not in PRIVATE]


def _values(what: str, old: Any, new: Any) -> ContentFinding:
    return ContentFinding(what, str(old), str(new), None if old == new else f"{old} is now {new}")


def _read(path: Path) -> pa.Table:
    """A file or a folder of part files, with the columns' present names."""
    parts = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    tables = [pq.ParquetFile(part).read() for part in parts]
    table = pa.concat_tables(tables, promote_options="default")
    return table.rename_columns([RENAMED.get(name, name) for name in table.column_names])


def _tables(what: str, old: Path, new: Path) -> ContentFinding:
    """Row by row, in the order of the files."""
    one = _read(old)
    if not new.exists():
        return ContentFinding(what, f"{len(one):,} rows", "", "the new build has none")
    two = _read(new)
    missing = [name for name in one.column_names if name not in two.column_names]
    difference = f"the new build has no column {', '.join(missing)}" if missing else _first_row(one, two)
    if difference is None and len(one) != len(two):
        difference = "the rows that both have are equal; the longer table has further ones at its end"
    return ContentFinding(what, f"{len(one):,} rows", f"{len(two):,} rows", difference)


def _first_row(old: pa.Table, new: pa.Table) -> str | None:
    """The first row that differs, by number and by name, and both values of the first such column."""
    first: tuple[int, str, Any, Any] | None = None
    for name in old.column_names:
        one, two = old[name], new[name]
        if one.type == two.type and one.equals(two):
            continue
        pairs = zip(one.to_pylist(), two.to_pylist())  # not strict: the lengths are reported by the caller
        # repr, so that not-a-number equals itself and 1 is not 1.0
        found = next((i for i, (a, b) in enumerate(pairs) if a != b and repr(a) != repr(b)), None)
        if found is not None and (first is None or found < first[0]):
            first = (found, name, one[found].as_py(), two[found].as_py())
    if first is None:
        return None
    number, column, a, b = first
    key = next((k for k in KEYS if k in old.column_names), old.column_names[0])
    where = f"row {number} ({key} {old[key][number].as_py()}), column {column}"
    if isinstance(a, list) and isinstance(b, list):
        at = next(i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y)
        where += f" at {at} (lengths {len(a)}, {len(b)})"
        a, b = a[at : at + 8], b[at : at + 8]
    return f"{where}: {str(a)[:SHOWN]!r} is now {str(b)[:SHOWN]!r}"


def _tensors(what: str, old: Path, new: Path) -> ContentFinding:
    """Tensor by tensor, bit for bit."""
    one = _load(old)
    if not new.is_file():
        return ContentFinding(what, f"{len(one)} tensors", "", "the new build has none")
    two = _load(new)
    wrong = [name for name in dict.fromkeys([*one, *two]) if one.get(name) != two.get(name)]
    difference = f"{len(wrong)} tensors differ, the first is {wrong[0]}" if wrong else None
    return ContentFinding(what, f"{len(one)} tensors", f"{len(two)} tensors", difference)


def _load(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of each tensor, free of any library.

    The format: https://github.com/huggingface/safetensors#format
    """
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        name: (
            t["dtype"],
            tuple(t["shape"]),
            raw[start + t["data_offsets"][0] : start + t["data_offsets"][1]],
        )
        for name, t in header.items()
    }


def _numbers(what: str, old: Path, new: Path) -> ContentFinding:
    """Every number and truth value below every key; words may be put otherwise."""
    one = dict(_leaves(json.loads(old.read_text())))
    if not new.is_file():
        return ContentFinding(what, f"{len(one)} values", "", "the new build has none")
    two = dict(_leaves(json.loads(new.read_text())))
    wrong = [key for key in one if key not in two or repr(one[key]) != repr(two[key])]
    difference = f"{wrong[0]}: {one[wrong[0]]} is now {two.get(wrong[0])}" if wrong else None
    return ContentFinding(what, f"{len(one)} values", f"{len(two)} values", difference)


def _leaves(value: Any, path: str = "", words: bool = False) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{path}.{key}".lstrip("."), words)
    elif words or not isinstance(value, str):
        yield path, value


def _exported(asset: str, folder: str, old: Path, new: Path) -> ContentFinding:
    """Byte by byte: configurations, tokenizer, template. The weights have their own, a card is words."""
    one, two = (
        {
            str(p.relative_to(build / folder)): p.read_bytes()
            for p in sorted((build / folder).rglob("*"))
            if p.is_file()
        }
        for build in (old, new)
    )
    names = [n for n in dict.fromkeys([*one, *two]) if not n.endswith((".safetensors", *DRAWN))]
    wrong = [name for name in names if one.get(name) != two.get(name)]
    sizes = [f"{sum(name in build for name in names)} files" for build in (one, two)]
    return ContentFinding(f"{asset}/{folder}, beside the weights", *sizes, ", ".join(wrong) or None)


def _why(old: Path, new: Path) -> str:
    """Why the bytes of a file differ, as far as its kind tells."""
    if old.suffix == ".parquet":
        one, two = pq.read_schema(old), pq.read_schema(new)
        renamed = [f"{a} is {b}" for a, b in RENAMED.items() if a in one.names and b in two.names]
        changed = sorted(set(one.names) ^ set(two.names))
        if renamed or changed:
            return f"columns: {', '.join(renamed or changed)}; the contents are equal, see above"
        if old.name in PRIVATE:
            return "not compared: only the next snapshot's build reads it"
        return "the contents are equal, see above; encoding, row groups or metadata differ"
    if old.suffix == ".json":
        one, two = (dict(_leaves(json.loads(p.read_text()), words=True)) for p in (old, new))
        keys = sorted(k for k in one.keys() | two.keys() if one.get(k) != two.get(k))
        return f"{len(keys)} keys, " + "; ".join(f"{k}: {one.get(k)} is now {two.get(k)}" for k in keys[:3])
    if old.suffix == ".md":
        lines = zip_longest(old.read_text().splitlines(), new.read_text().splitlines(), fillvalue="")
        return "words, first " + next(f"{a!r} is now {b!r}"[:SHOWN] for a, b in lines if a != b)
    return "a plot or a page" if old.suffix in DRAWN else "not looked into"
