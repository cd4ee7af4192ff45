"""Which exported models an alias of MLflow's registry names, `champion` or any other."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.secret_text import public_address
from sft_pipeline.store import Store
from sft_pipeline.tracking.server import address, connect, described


@dataclass(frozen=True)
class RegistryAliases:
    """What the registry says.

    Attributes:
        names: {fingerprint of an export: its aliases}.
        problem: Why it could not be asked; then nothing is known.
        elsewhere: Exports that were registered with another server, which was not asked.
    """

    names: dict[str, list[str]] = field(default_factory=dict)
    problem: str | None = None
    elsewhere: frozenset[str] = frozenset()


def registry_aliases(store: Store) -> RegistryAliases:
    """Asks the registry, if anything was ever registered from this store."""
    uri = address()
    noted = dict(_registrations(store))
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.is_file():
        # Asking would make an empty one.
        if not noted:
            return RegistryAliases()
        return RegistryAliases(problem=f"MLflow's database {database} is gone: correct MLFLOW_TRACKING_URI")
    try:
        names = _aliases(connect())
    except InputError as error:
        return RegistryAliases(problem=str(error))
    except Exception as error:
        return RegistryAliases(problem=described(error))
    here = public_address(uri)
    return RegistryAliases(names, None, frozenset(f for f, server in noted.items() if server != here))


def _registrations(store: Store) -> Iterator[tuple[str, str | None]]:
    """(fingerprint, server without secrets) of every registration; None where the note cannot be read."""
    for path in sorted((store.home / "registered").glob("*.json")):
        try:
            yield path.stem, json.loads(path.read_bytes())["tracking_uri"]
        except (OSError, ValueError, LookupError, TypeError):
            yield path.stem, None


def _aliases(client: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    token = None
    while True:
        page = client.search_registered_models(max_results=100, page_token=token)
        for model in page:
            for alias, number in sorted(model.aliases.items()):
                version = client.get_model_version(model.name, str(number))
                if fingerprint := _fingerprint(version):
                    found.setdefault(fingerprint, []).append(alias)
        token = page.token
        if not token:
            return found


def _fingerprint(version: Any) -> str | None:
    """Of the export behind a version; by its folder where somebody removed the tag."""
    named = version.tags.get("sft.fingerprint") or os.path.basename(version.tags.get("sft.path", ""))
    return named or None
