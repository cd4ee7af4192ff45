"""Two exported models compared by what was recorded of them."""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sft_pipeline.inventory.listing import evaluation_of, scores_of
from sft_pipeline.lineage.walk import Chain, walk
from sft_pipeline.portable_paths import may_be_portable
from sft_pipeline.store import Artifact, Store

# {stage: (beginnings of the keys of its configuration that are compared, their section in the YAML file)}.
# What several stages record is taken from the first; what is derived from another key is left out.
CONFIGURED_BY: dict[str, tuple[tuple[str, ...], str]] = {
    "raw_rows": (("",), ""),
    "validated_rows": (("contract", "shapes"), ""),
    "grouped_split": (("",), "split."),
    "tokenized_rows": (("template", "tokens"), ""),
    "packed_shards": (("packing",), ""),
    "trained_checkpoints": (("",), ""),
    "evaluation": (("",), ""),
    "exported_model": (("export",), ""),
    "sanity_check": (("sanity",), ""),
}
ROW_STAGES = ("tokenized_rows", "grouped_split")


@dataclass(frozen=True)
class ComparedModel:
    """A model and what is behind it.

    Attributes:
        stages: The artifacts behind it that are at hand, by stage: those that it was itself made from, not
            those of a base that is an export too.
    """

    export: Artifact
    chain: Chain
    stages: Mapping[str, Artifact]

    @classmethod
    def of(cls, export: Artifact, store: Store) -> "ComparedModel":
        chain = walk(export.path, store)
        stages: dict[str, Artifact] = {}
        for node in reversed(chain.nodes):
            if node.path is not None:
                stages[node.stage] = Artifact(node.path)
        return cls(export, chain, stages)

    def about(self, store: Store) -> dict[str, Any]:
        m = self.export.manifest
        return {
            "recipe": m.asset.rpartition("/")[0],
            "snapshot": m.partition,
            "fingerprint": m.fingerprint,
            "path": str(self.export.path),
            "created_at": m.created_at,
            "step": m.counts.get("step"),
            **scores_of(self.export, store),
        }

    def manifests(self) -> dict[str, Any]:
        """{stage: manifest}, also where only the copy in the export is at hand."""
        return {n.stage: n.manifest for n in reversed(self.chain.nodes) if n.manifest is not None}


def compare(a: Artifact, b: Artifact, store: Store) -> dict[str, Any]:
    """Everything that differs, as plain values; `rows` is null where the rows are not at hand.

    Raises:
        InputError: A manifest cannot be read.
    """
    one, two = ComparedModel.of(a, store), ComparedModel.of(b, store)
    first, second = one.manifests(), two.manifests()
    rows, why = _rows(one, two)
    return {
        "a": one.about(store),
        "b": two.about(store),
        "rows": rows,
        "rows_unknown": why,
        "template": _template(one, two),
        "recipe": list(_differences(_configuration(first), _configuration(second))),
        "packages": list(_differences(_packages(first), _packages(second))),
        "code": list(
            _differences(
                {s: m.code_version for s, m in first.items()}, {s: m.code_version for s, m in second.items()}
            )
        ),
        "outside": list(_differences(_outside(first), _outside(second))),
        "metrics": _metrics(one, two, store),
    }


def _rows(one: ComparedModel, two: ComparedModel) -> tuple[dict[str, Any] | None, str | None]:
    from sft_pipeline.inventory.rows import compare_rows

    for model in (one, two):
        missing = [name for name in ROW_STAGES if name not in model.stages]
        if missing:
            m = model.export.manifest
            return None, (
                f"{', '.join(missing)} of {m.asset} {m.partition} ({m.fingerprint[:12]}) is not in this store"
            )
    try:
        return compare_rows(one.stages, two.stages).to_json(), None
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        return None, f"the rows cannot be read ({error}); `sft fsck` names what is damaged"


def _template(one: ComparedModel, two: ComparedModel) -> dict[str, Any]:
    """The chat template of both, and its lines that differ."""
    texts: list[str | None] = []
    for model in (one, two):
        tokenized = model.stages.get("tokenized_rows")
        try:
            data = json.loads(tokenized.file("formatting.json").read_bytes()) if tokenized else {}
            texts.append(data.get("chat_template"))
        except (OSError, ValueError):
            texts.append(None)
    a, b = texts
    if a is None or b is None:
        return {"same": None, "lines": []}
    # Templates are often one line: cut before each tag, so that a difference is seen.
    lines = difflib.unified_diff(_tags_on_lines(a), _tags_on_lines(b), "a", "b", lineterm="", n=1)
    return {"same": a == b, "lines": list(lines)[2:]}


def _tags_on_lines(template: str) -> list[str]:
    return template.replace("{%", "\n{%").replace("{{", "\n{{").strip("\n").splitlines()


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """{key, a, b} of what differs; null for what one of them does not have."""
    for key in dict.fromkeys((*a, *b)):
        if not _same(a.get(key), b.get(key)):
            yield {"key": key, "a": a.get(key), "b": b.get(key)}


def _same(a: Any, b: Any) -> bool:
    """Equal, or one of them as an export carries it, without the folders of the machine."""
    if isinstance(a, str) and isinstance(b, str):
        return a == b or may_be_portable(a, b) or may_be_portable(b, a)
    return bool(a == b)


def _configuration(manifests: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted key: value} of the recipe and the dataset, as the stages recorded it."""
    found: dict[str, Any] = {}
    for stage, (beginnings, section) in CONFIGURED_BY.items():
        if stage in manifests:
            for key, value in _flat(manifests[stage].config):
                if key.startswith(beginnings):
                    found.setdefault(f"{section}{key}", value)
    return found


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value): also into lists of mappings, such as sources and graders."""
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{name}.")
        elif isinstance(inner, list) and inner and all(isinstance(item, dict) for item in inner):
            for number, item in enumerate(inner):
                yield from _flat(item, f"{prefix}{name}[{number}].")
        else:
            yield f"{prefix}{name}", inner


def _packages(manifests: Mapping[str, Any]) -> dict[str, str | None]:
    """Versions at the training, or else at the export, and all that shaped an artifact."""
    found: dict[str, str | None] = {}
    for stage in ("exported_model", "trained_checkpoints"):
        if stage in manifests:
            found.update(manifests[stage].environment.get("packages") or {})
    for manifest in manifests.values():
        for name, version in manifest.packages.items():
            found.setdefault(name, version)
    return found


def _outside(manifests: Mapping[str, Any]) -> dict[str, str]:
    """Digests of base model, tokenizer, templates and graders; source files differ with every snapshot."""
    return {
        name: digest
        for stage, manifest in manifests.items()
        if stage != "raw_rows"
        for name, digest in manifest.outside.items()
    }


def _metrics(one: ComparedModel, two: ComparedModel, store: Store) -> dict[str, Any]:
    """Scores side by side, and whether they were measured on the same test rows."""
    scores = [scores_of(model.export, store)["scores"] for model in (one, two)]
    names = dict.fromkeys(
        name for found in scores if found for who in ("base", "tuned") for name in found[who]
    )
    values = {
        name: {
            side: {who: (found or {}).get(who, {}).get(name) for who in ("base", "tuned")}
            for side, found in zip(("a", "b"), scores)
        }
        for name in names
    }
    return {"scores": values, "test_rows": _test_rows(one, two, store)}


def _test_rows(one: ComparedModel, two: ComparedModel, store: Store) -> dict[str, int] | None:
    """How many test rows each was judged on, and how many are the same."""
    import pyarrow.parquet as pq

    ids: list[set[str]] = []
    for model in (one, two):
        evaluation = evaluation_of(model.export.manifest, store)
        if evaluation is None:
            return None
        try:
            table = pq.read_table(evaluation.file("samples.parquet"), columns=["side", "row_id"])
        except (OSError, ValueError):
            return None
        pairs = zip(table["side"].to_pylist(), table["row_id"].to_pylist())
        ids.append({row_id for side, row_id in pairs if side == "test"})
    return {"a": len(ids[0]), "b": len(ids[1]), "shared": len(ids[0] & ids[1])}
