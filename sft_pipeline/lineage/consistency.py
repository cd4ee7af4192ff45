"""Whether the parts of a manifest fit each other, its files, and the manifests of what it was made from.

A hash shows that bytes are those that were recorded. It shows nothing where somebody changed a record and
hashed it again, so what is recorded twice is compared here, and what follows from other parts is computed
again.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_pipeline.stages.graph import STAGES
from sft_pipeline.store import InputEntry, Manifest
from sft_pipeline.store.files import sha256_json
from sft_pipeline.store.manifest import data_version, recorded_fingerprint

# stage -> {count: the folder or file whose Parquet rows it counts}
ROW_COUNTS: dict[str, dict[str, str]] = {
    "raw_rows": {"rows": "rows", "rejects": "rejects.parquet"},
    "validated_rows": {"accepted": "rows", "quarantined": "quarantine.parquet"},
    "grouped_split": {
        "train": "train",
        "validation": "validation",
        "test": "test",
        "rejects": "rejects.parquet",
    },
    "tokenized_rows": {
        "train": "train",
        "validation": "validation",
        "test": "test",
        "rows_rejected": "rejects.parquet",
    },
    "packed_shards": {"blocks": "train", "validation_blocks": "validation"},
}


def manifest_problems(manifest: Manifest, written: Mapping[str, Any]) -> Iterator[str]:
    """What of a manifest does not follow from its other parts.

    Args:
        written: The JSON that the manifest was read from.
    """
    if data_version(manifest.files) != manifest.data_version:
        yield "its data version is not that of the files it lists"
    if has_all_parts(manifest, written) and recorded_fingerprint(manifest) != manifest.fingerprint:
        yield (
            "its fingerprint does not follow from the parts it records (asset, snapshot, code, "
            "configuration, inputs, outside files, packages, blocking checks)"
        )
    for place, whole, part in differing(manifest.config, manifest.identity or {}):
        yield f"its configuration says {place} = {whole!r}, what its fingerprint is made of says {part!r}"
    failed = [check["name"] for check in manifest.checks if check["blocking"] and not check["passed"]]
    if manifest.accepted and failed:
        yield f"it is recorded as accepted, although the blocking check {failed[0]} failed"
    elif not manifest.accepted and not failed:
        yield "it is recorded as not accepted, although no blocking check failed"
    paths = [entry.path for entry in manifest.files]
    yield from (f"it lists {path} twice" for path in sorted({p for p in paths if paths.count(p) > 1}))
    for name, entry in manifest.inputs.items():
        if entry.asset.rpartition("/")[2] != name:
            yield f"its input {name} is recorded as the asset {entry.asset}"
        if entry.partition != manifest.partition:
            yield f"its input {name} is of the snapshot {entry.partition}, itself of {manifest.partition}"
    stage = manifest.asset.rpartition("/")[2]
    if stage in STAGES and (absent := sorted(set(STAGES[stage].inputs) - manifest.inputs.keys())):
        yield f"it records no input {absent[0]}, which every {stage} is made from"
    weights = [e.path for e in manifest.files if e.volatile and e.path.endswith(".safetensors")]
    yield from (f"it leaves {path} out of its data version, as if weights might differ" for path in weights)
    for entry in manifest.reused_from:
        if entry.asset.rpartition("/")[2] != manifest.asset.rpartition("/")[2]:
            yield f"it took rows over from {entry.asset}, which is another stage"


def has_all_parts(manifest: Manifest, written: Mapping[str, Any]) -> bool:
    """Whether all parts of the fingerprint are recorded as they were.

    Earlier versions left some out, and the copy in an export leaves out folders of the machine, after which
    its seal no longer fits.
    """
    sealed = {k: v for k, v in written.items() if k != "manifest_sha256"}
    return "identity" in manifest.model_fields_set and sha256_json(sealed) == written.get("manifest_sha256")


def differing(
    whole: Mapping[str, object], part: Mapping[str, object], place: str = ""
) -> Iterator[tuple[str, object, object]]:
    """Values that two nested mappings give differently: (dotted key, in `whole`, in `part`).

    What only one of them has, or `whole` leaves to be derived (null), is passed over.
    """
    for key in sorted(whole.keys() & part.keys()):
        a, b = whole[key], part[key]
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differing(a, b, f"{place}{key}.")
        elif a != b and a is not None:
            yield f"{place}{key}", a, b


def count_problems(manifest: Manifest, folder: Path) -> Iterator[str]:
    """Counts that differ from the number of rows in the Parquet files."""
    for name, where in ROW_COUNTS.get(manifest.asset.rpartition("/")[2], {}).items():
        recorded = manifest.counts.get(name)
        if recorded is None:
            continue
        path = folder / where
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        try:
            rows = sum(pq.read_metadata(file).num_rows for file in files if file.is_file())
        except (OSError, pa.ArrowException):
            continue  # a damaged file, which is named by its hash
        if rows != recorded:
            yield f"it counts {name} = {recorded:,}, {where} holds {rows:,} rows"


def entry_problems(consumer: Manifest, name: str, entry: InputEntry, upstream: Manifest) -> Iterator[str]:
    """What a consumer recorded of an input, compared with what that artifact's manifest says of itself."""
    for field in ("asset", "partition", "data_version"):
        recorded, own = getattr(entry, field), getattr(upstream, field)
        if recorded != own:
            word, shown = (
                ("data version", (recorded[:12], own[:12]))
                if field == "data_version"
                else (field, (recorded, own))
            )
            yield (
                f"{consumer.asset} was made from {name} with the {word} {shown[0]}, this one has {shown[1]}"
            )
    if not upstream.accepted and entry.role != "rows":
        yield f"{upstream.asset} is not accepted, but {consumer.asset} was made from it"
