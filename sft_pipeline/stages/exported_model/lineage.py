"""`lineage/`: the manifests behind an export, without machine paths; no exported file may hold one."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_pipeline.portable_paths import machine_folders, portable
from sft_pipeline.stages.stage import Check, table
from sft_pipeline.store import Artifact, Manifest
from sft_pipeline.store.files import write_json
from sft_pipeline.store.manifest import MANIFEST_NAME

# Suffixes of files that are, or may hold, weights in another format than safetensors.
UNSAFE = (
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".npy",
    ".npz",
    ".joblib",
)
# Where any absolute path is a mistake. Vocabularies, samples and templates hold path-like text of their own;
# there, as everywhere, this machine's own folders count.
_SETTINGS = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json")
_ROOTS = rb"home|root|Users|tmp|mnt|opt|srv|var|data|work|workspace|private|media|scratch"
_ABSOLUTE = re.compile(rb"(?<![\w.:/~<*-])/(?:" + _ROOTS + rb")/[\w.@+-]+|\b[A-Za-z]:\\\\?\w")


def upstream(inputs: list[Artifact]) -> dict[str, Manifest]:
    """{fingerprint: manifest} of the inputs and all they were made from, the earliest stage first."""
    found: dict[str, Manifest] = {}

    def visit(path: Path) -> None:
        manifest = Manifest.read(path / MANIFEST_NAME)
        for entry in manifest.inputs.values():
            folder = path.parent / entry.fingerprint
            if entry.fingerprint not in found and (folder / MANIFEST_NAME).is_file():
                visit(folder)
        found[manifest.fingerprint] = manifest

    for artifact in inputs:
        if artifact.path.name not in found:
            visit(artifact.path)
    return found


def write_lineage(manifests: dict[str, Manifest], folder: Path) -> None:
    """Copies the manifests as `<stage>-<fingerprint>.json`, and writes an index, chain.json."""
    chain: list[dict[str, Any]] = []
    sources: dict[str, str] = {}
    for fingerprint, manifest in manifests.items():
        stage = manifest.asset.rpartition("/")[2]
        name = f"{stage}-{fingerprint[:12]}.json"
        write_json(folder / name, portable(manifest.to_json()))
        chain.append(
            {
                "manifest": name,
                "asset": manifest.asset,
                "partition": manifest.partition,
                "fingerprint": fingerprint,
                "data_version": manifest.data_version,
                "inputs": {k: v.fingerprint for k, v in manifest.inputs.items()},
            }
        )
        if stage == "raw_rows":
            sources |= manifest.outside
    write_json(folder / "chain.json", {"chain": chain, "source_files": portable(sources)})


def machine_paths(folder: Path) -> Iterator[dict[str, Any]]:
    """Every machine path in the files below `folder`: file, line and the text around it."""
    own = re.compile(b"|".join(re.escape(f.encode()) + rb"(?=[/\"'\s\\]|$)" for f in machine_folders()))
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = _safetensors_header(path) if path.suffix == ".safetensors" else path.read_bytes()
        patterns = [own, _ABSOLUTE] if path.name in _SETTINGS else [own]
        seen: set[int] = set()
        for match in (m for pattern in patterns for m in pattern.finditer(data)):
            line = data.count(b"\n", 0, match.start()) + 1
            if line not in seen:
                seen.add(line)
                around = data[max(0, match.start() - 40) : match.end() + 40].decode("utf-8", "replace")
                yield {"file": path.relative_to(folder).as_posix(), "line": line, "text": around}


def _safetensors_header(path: Path) -> bytes:
    """The JSON header of a safetensors file: tensor names, and whatever metadata was put beside them."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return stream.read(min(size, 100_000_000))


def safetensors_only(folder: Path) -> Check:
    """Blocking: there are weights, and none in a format that can run code or hide weights."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    unsafe = [p.relative_to(folder).as_posix() for p in files if p.suffix.lower() in UNSAFE]
    weights = [p.relative_to(folder).as_posix() for p in files if p.suffix == ".safetensors"]
    description = (
        f"in a format that can run code or hide weights: {', '.join(unsafe)}"
        if unsafe
        else f"weights are in {', '.join(weights)}"
    )
    return Check("safetensors_only", bool(weights) and not unsafe, description)


def no_machine_paths(folder: Path) -> Check:
    """Blocking: no exported file names a folder of this machine."""
    found = list(machine_paths(folder))
    if not found:
        return Check("no_machine_paths", True, "no exported file names a folder of this machine")
    first = found[0]
    description = (
        f"{len(found)} places name a folder of this machine, "
        f"first {first['file']} line {first['line']}: {first['text']}"
    )
    return Check("no_machine_paths", False, description, {"places": table(found[:20])})
