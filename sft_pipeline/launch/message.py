"""What the launcher and its child write for each other, as JSON files: what to build, and the result."""

import errno
import importlib
import json
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft_pipeline.errors import BlockedError, InputError, Interrupted, SftError
from sft_pipeline.reporting import Reporter
from sft_pipeline.secret_text import redacted
from sft_pipeline.stages.stage import Build, Built, Check, Evidence, Stage
from sft_pipeline.store import Artifact
from sft_pipeline.store.files import write_json

ERRORS: dict[int, type[SftError]] = {e.exit_code: e for e in (InputError, BlockedError, Interrupted)}


@dataclass(frozen=True)
class LaunchSpec:
    """What a child is asked to build; paths are absolute.

    Attributes:
        load_build: "module:function" of what imports the stage's build function.
        config_class: "module:class" of the stage's configuration.
        config: Its JSON form.
        inputs: Artifact folder by stage name.
        out, work: See `Build`.
        events: The FileReporter's file.
        result: Where rank 0 puts its result; another rank that fails puts its own beside it.
        import_path: The parent's sys.path: a user's grader, for example, can be imported from there.
    """

    load_build: str
    config_class: str
    config: Any
    inputs: dict[str, str]
    out: str
    work: str
    events: str
    result: str
    snapshot: str
    asset: str
    import_path: list[str]

    @classmethod
    def of(cls, stage: Stage, build: Build, folder: Path) -> "LaunchSpec":
        """What a child needs for this build; `folder` is for the files of this launch."""
        kind, folder = type(build.config), folder.absolute()
        return cls(
            load_build=f"{stage.load_build.__module__}:{stage.load_build.__qualname__}",
            config_class=f"{kind.__module__}:{kind.__qualname__}",
            config=build.config.model_dump(mode="json", by_alias=True),
            inputs={name: str(artifact.path.absolute()) for name, artifact in build.inputs.items()},
            out=str(build.out.absolute()),
            work=str(build.work.absolute()),
            events=str(folder / "events.jsonl"),
            result=str(folder / "result.json"),
            snapshot=build.snapshot,
            asset=build.asset,
            import_path=[p for p in sys.path if p],
        )

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "LaunchSpec":
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def run(self, report: Reporter) -> Built:
        """Calls the build function, in the child."""
        build = Build(
            config=_imported(self.config_class).model_validate(self.config),
            inputs={name: Artifact(Path(path)) for name, path in self.inputs.items()},
            out=Path(self.out),
            work=Path(self.work),
            report=report,
            snapshot=self.snapshot,
            asset=self.asset,
        )
        return _imported(self.load_build)()(build)

    def result_of(self, rank: int) -> Path:
        """Where one rank writes its result."""
        path = Path(self.result)
        return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


@dataclass(frozen=True)
class Failed:
    """Why a child did not build.

    Attributes:
        expected: It is an error of `sft_pipeline.errors`: its message is enough, no traceback is shown.
        time: Unix seconds. The first rank that failed made the others fail.
    """

    exit_code: int
    message: str
    expected: bool
    time: float
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException, at: float) -> "Failed":
        """A failure from the exception that was raised; for a lack of memory, with the remedy."""
        if isinstance(error, SftError):
            return cls(error.exit_code, redacted(str(error)), True, at)
        trace = redacted("".join(traceback.format_exception(error)))
        if _is_lack_of_memory(error):
            first = (redacted(str(error)).splitlines() or [""])[0][:300]
            message = (
                f"out of memory{f' ({first})' if first else ''}: set a smaller training.per_device_batch "
                "(with a larger training.gradient_accumulation for the same update), a smaller "
                "tokens.max_length, or training.gradient_checkpointing: true. "
                "Running again resumes from the last whole checkpoint"
            )
            return cls(1, message, True, at, trace)
        return cls(1, redacted(f"{type(error).__name__}: {error}"), False, at, trace)

    def error(self, prefix: str = "") -> SftError:
        """The exception to raise in the parent: of the class that the exit code names."""
        return ERRORS.get(self.exit_code, SftError)(prefix + self.message)


def write_built(path: Path, built: Built) -> None:
    """NumPy and torch scalars become Python's own; anything else that is not JSON becomes text."""
    plain = json.dumps(asdict(built), default=lambda v: v.item() if hasattr(v, "item") else str(v))
    write_json(path, {"built": json.loads(plain)})


def write_failed(path: Path, failed: Failed) -> None:
    write_json(path, {"failed": asdict(failed)})


def read_result(path: Path) -> Built | Failed | None:
    """What one rank wrote, or None where it wrote nothing."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if "failed" in data:
        return Failed(**data["failed"])

    def evidence(data: dict[str, Any]) -> dict[str, Evidence]:
        return {name: Evidence(**value) for name, value in data.items()}

    built = data["built"]
    checks = tuple(Check(**c | {"evidence": evidence(c["evidence"])}) for c in built["checks"])
    return Built(built["counts"], checks, tuple(built["volatile"]), evidence(built["evidence"]))


def _imported(name: str) -> Any:
    module, path = name.split(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _is_lack_of_memory(error: BaseException) -> bool:
    # By name, so that torch is not imported where the stage did not need it.
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or type(error).__name__ == "OutOfMemoryError"
        or (
            isinstance(error, RuntimeError)
            and ("out of memory" in text or "can't allocate memory" in text or "not enough memory" in text)
        )
    )
