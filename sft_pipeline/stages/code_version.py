"""The code version of a stage: a hash of the source of its room and of the shared modules it imports.

Never the git commit: a changed comment in another stage must not invalidate this one.
"""

import hashlib
import re
from functools import cache, lru_cache
from pathlib import Path

from sft_pipeline.project import PACKAGE_DIR

# Modules that move artifacts about and cannot change what is in one.
PLUMBING = (
    "sft_pipeline.stages.stage",
    "sft_pipeline.stages.run",
    "sft_pipeline.stages.code_version",
    "sft_pipeline.stages.workers",
    "sft_pipeline.stages.painter",
    "sft_pipeline.stages.standby",
    "sft_pipeline.store",
    "sft_pipeline.reporting",
    "sft_pipeline.errors",
    "sft_pipeline.project",
    "sft_pipeline.external_files",
    "sft_pipeline.launch",
    "sft_pipeline.plots",
    "sft_pipeline.tracking",
    "sft_pipeline.config",
    "sft_pipeline.lineage",
)


@lru_cache
def code_version(stage_name: str) -> str:
    """The first 16 hex digits of the SHA-256 over (module name, source) of everything the stage is made of."""
    room = PACKAGE_DIR / "stages" / stage_name
    todo = [_module_name(p) for p in sorted(room.rglob("*.py"))]
    seen: dict[str, bytes] = {}
    while todo:
        module = todo.pop()
        path = _module_path(module)
        if module in seen or path is None or module.startswith(PLUMBING):
            continue
        seen[module] = path.read_bytes()
        todo.extend(_imports(seen[module]))
    digest = hashlib.sha256()
    for module in sorted(seen):
        digest.update(module.encode() + b"\0" + seen[module] + b"\0")
    for path in sorted(room.rglob("*.jinja")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


_IMPORT = re.compile(
    rb"^[ \t]*(?:import[ \t]+(sft_pipeline[\w.]*)|from[ \t]+(sft_pipeline[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*))",
    re.M,
)


@cache
def _imports(source: bytes) -> tuple[str, ...]:
    """The modules of this package that a source imports, found twenty times as fast as by parsing it.

    What only looks like an import, in a text, counts too: a file too many in the hash does no harm.
    """
    found: list[str] = []
    for module, package, names in _IMPORT.findall(source):
        parent = (module or package).decode()
        each = re.findall(r"(\w+)(?:\s+as\s+\w+)?", re.sub(rb"#[^\n]*", b"", names).decode())
        found += [parent, *(f"{parent}.{name}" for name in each)]
    return tuple(name for name in found if name.startswith("sft_pipeline."))


def _module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE_DIR.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module_path(module: str) -> Path | None:
    base = PACKAGE_DIR.parent.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None
