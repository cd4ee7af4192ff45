"""The code version of a stage: a hash of what its code does, not of how it is written.

It covers the modules of the stage's package and all modules of this package that they import, also inside
functions. Of each module the syntax tree counts, so that comments and layout do not, without what is only
read by people: docstrings, `description=` texts, and calls of a report's `log` and `progress`. Left out are
modules that cannot change what is in an artifact (`is_counted`). It is never the git commit: a change to one
stage must not invalidate another.
"""

import ast
import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sft_pipeline.project import PACKAGE_DIR, sft_home
from sft_pipeline.store.files import write_json

# They move artifacts about, draw, log, or fetch what a pinned revision in the fingerprint names.
NOT_COUNTED = (
    "cli",
    "config",
    "definitions",
    "errors",
    "hub",
    "inspection",
    "launch",
    "lineage",
    "orchestration",
    "plots",
    "project",
    "reporting",
    "stages.code_version",
    "stages.environment",
    "stages.graph",
    "stages.run",
    "stages.stage",
    "stages.workers",
    "store",
    "sweep",
    "tracking",
)
# Modules of these names report and diagnose; `asset` only declares, and what it declares (configuration,
# digests of outside files, package versions, blocking checks) is in the fingerprint itself.
NOT_COUNTED_NAMES = ("report", "diagnosis", "asset")

TEMPLATES = {"text.find_template": "text/templates/"}  # module -> the folder of templates that it reads


@dataclass(frozen=True)
class Module:
    """One module of the package, or one template.

    Attributes:
        digest: SHA-256 of what it does.
        imports: What it imports of this package, also lazily: modules, or names within modules.
    """

    digest: str
    imports: tuple[str, ...]


@lru_cache
def code_version(stage: str) -> str:
    """The code version of a stage of this package.

    Args:
        stage: The name of a package under `stages`.
    """
    package = _this_package()
    version = version_of(stage, package)
    package.save()
    return version


def version_of(stage: str, modules: Mapping[str, Module]) -> str:
    """The first 16 hex digits of the SHA-256 over (name, digest) of all modules that a stage is made of.

    Args:
        modules: Those of the whole package, by name.
    """
    digest = hashlib.sha256()
    for name in sorted(counted(stage, modules)):
        digest.update(f"{name}\0{modules[name].digest}\0".encode())
    return digest.hexdigest()[:16]


def counted(stage: str, modules: Mapping[str, Module]) -> set[str]:
    """The names of the modules and templates that a stage is made of."""
    todo = [name for name in modules if f"{name}.".startswith(f"stages.{stage}.")]
    found: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in found and is_counted(name):
            found.add(name)
            todo += imported_modules(modules[name], modules)
            if name in TEMPLATES:
                todo += [other for other in modules if other.startswith(TEMPLATES[name])]
    return found


def imported_modules(module: Module, modules: Mapping[str, Module]) -> set[str]:
    """The names of the modules of this package that a module imports, or of which it imports something."""
    return {name if name in modules else name.rpartition(".")[0] for name in module.imports} & set(modules)


def is_counted(module: str) -> bool:
    return module.rpartition(".")[2] not in NOT_COUNTED_NAMES and not any(
        f"{module}.".startswith(f"{left_out}.") for left_out in NOT_COUNTED
    )


class _Package(Mapping[str, Module]):
    """The modules of this package, parsed when they are asked for, and kept in a file by their digests.

    Parsing all of them costs 0.8 s of CPU, those of the data stages a third of it.
    """

    def __init__(self) -> None:
        rule = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        self._sources = read_sources(PACKAGE_DIR)
        self._keys = {n: hashlib.sha256(rule.encode() + s).hexdigest() for n, s in self._sources.items()}
        self._path = sft_home() / "code_digests.json"
        self._known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(self._path.read_text(encoding="utf-8"))
            self._known = {key: known[key] for key in self._keys.values() if key in known}
        self._saved = len(self._known)

    def __getitem__(self, name: str) -> Module:
        key = self._keys[name]
        if key not in self._known:
            module = parse(name, self._sources[name])
            self._known[key] = [module.digest, module.imports]
        digest, imports = self._known[key]
        return Module(digest, tuple(imports))

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def save(self) -> None:
        """Writes what was parsed since; a cache that cannot be written costs time only."""
        if len(self._known) > self._saved:
            with contextlib.suppress(OSError):
                write_json(self._path, self._known)
            self._saved = len(self._known)


@lru_cache
def _this_package() -> _Package:
    return _Package()


def read_sources(package: Path) -> dict[str, bytes]:
    """{name: source} of modules ("text.template") and templates ("text/templates/chatml.jinja")."""
    sources = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_bytes()
    for path in sorted(package.rglob("*.jinja")):
        sources[path.relative_to(package).as_posix()] = path.read_bytes()
    return sources


def parse(name: str, source: bytes) -> Module:
    """One module from its source; a template counts by its bytes.

    Raises:
        SyntaxError: The source is no Python.
    """
    if name.endswith(".jinja"):
        return Module(hashlib.sha256(source).hexdigest(), ())
    tree = ast.parse(source)
    prefix = f"{PACKAGE_DIR.name}."
    imports: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports.update(f"{node.module}.{alias.name}" for alias in node.names)
    found = sorted(i.removeprefix(prefix) for i in imports if i.startswith(prefix))
    return Module(hashlib.sha256(repr(_plain(tree)).encode()).hexdigest(), tuple(found))


def _plain(node: Any) -> Any:
    """A syntax tree as nested tuples, without positions and without what is only read by people.

    Fields that are absent or empty are left out, so that Python versions that add fields give the same tree.
    """
    if isinstance(node, list):
        return tuple(_plain(item) for item in node if not _is_for_people(item))
    if not isinstance(node, ast.AST):
        return node
    fields = ((name, getattr(node, name, None)) for name in node._fields)
    kept = ((name, _plain(value)) for name, value in fields if value not in (None, []))
    return (type(node).__name__, *kept)


def _is_for_people(node: Any) -> bool:
    """A docstring (any statement that is only a text), a `description=`, or a line for a report."""
    if isinstance(node, ast.keyword):
        return node.arg == "description"
    if not isinstance(node, ast.Expr):
        return False
    value = node.value
    if isinstance(value, ast.Constant):
        return isinstance(value.value, str)
    if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute)):
        return False
    receiver = value.func.value
    name = receiver.attr if isinstance(receiver, ast.Attribute) else getattr(receiver, "id", "")
    return value.func.attr in ("log", "progress") and name.strip("_") == "report"
