"""The manifests behind an export: found beside the inputs in the store, and copied into `lineage/`."""

from pathlib import Path

from sft_pipeline.stages.exported_model.portable import portable
from sft_pipeline.store import Artifact, Manifest
from sft_pipeline.store.files import write_json
from sft_pipeline.store.manifest import MANIFEST_NAME


def upstream(inputs: list[Artifact]) -> dict[str, Manifest]:
    """{fingerprint: manifest} of the inputs and of everything that they were made from, the earliest stage first."""
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


def by_stage(manifests: dict[str, Manifest]) -> dict[str, Manifest]:
    """{stage name: manifest}; of two of one stage (one of them behind an older artifact) the one read last."""
    return {m.asset.rpartition("/")[2]: m for m in manifests.values()}


def write_lineage(manifests: dict[str, Manifest], folder: Path) -> None:
    """Copies the manifests as `<stage>-<fingerprint>.json` without machine paths, and writes an index, chain.json."""
    chain = []
    for fingerprint, manifest in manifests.items():
        name = f"{manifest.asset.rpartition('/')[2]}-{fingerprint[:12]}.json"
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
    sources = {
        k: v for m in manifests.values() if m.asset.endswith("/raw_rows") for k, v in m.outside.items()
    }
    write_json(folder / "chain.json", {"chain": chain, "source_files": portable(sources)})
