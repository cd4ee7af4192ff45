"""report.json: the evidence of a build for people, kept with the artifact for whoever reuses it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft_pipeline.stages.stage import Built, Evidence
from sft_pipeline.store import Artifact
from sft_pipeline.store.files import write_json

REPORT = "report.json"


def write_report(out: Path, evidence: Mapping[str, Evidence], built: Built) -> None:
    write_json(
        out / REPORT,
        {
            "evidence": {k: asdict(v) for k, v in evidence.items()},
            "checks": {c.name: {k: asdict(v) for k, v in c.evidence.items()} for c in built.checks},
        },
    )


def read_report(artifact: Artifact) -> dict[str, Any]:
    """{"evidence": {name: Evidence}, "checks": {check name: {name: Evidence}}}"""
    data = json.loads(artifact.file(REPORT).read_text(encoding="utf-8"))

    def evidence(entries: dict[str, Any]) -> dict[str, Evidence]:
        return {name: Evidence(**entry) for name, entry in entries.items()}

    return {
        "evidence": evidence(data["evidence"]),
        "checks": {name: evidence(entries) for name, entries in data["checks"].items()},
    }


def checks_of(artifact: Artifact, asset: str) -> list[dict[str, Any]]:
    """The artifact's checks in the form of the command line's JSON."""
    return [{"asset": asset, **c} for c in artifact.manifest.checks]


def failed_blocking(artifacts: Sequence[Artifact]) -> list[str]:
    """The blocking checks that failed, one line each: asset, check and its description."""
    return [
        f"{a.manifest.asset}: {c['name']}: {c['description']}"
        for a in artifacts
        for c in a.manifest.checks
        if c["blocking"] and not c["passed"]
    ]
