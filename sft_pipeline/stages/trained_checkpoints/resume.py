"""Going on from a checkpoint: what may differ from the run that made it, and what is refused."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.trained_checkpoints import state
from sft_pipeline.stages.trained_checkpoints.bundle import Bundle
from sft_pipeline.training.config import ModelConfig, TrainingConfig
from sft_pipeline.training.trainer import SupervisedTrainer

# Names of folders, which may differ from machine to machine: their content is in the stage's fingerprint.
NAMES_OF_FOLDERS = ("model.base", "model.tokenizer")


@dataclass(frozen=True)
class Division:
    """How updates are divided over processes and micro-batches, from one update (counted from 1) on.

    It changes neither which rows an update holds nor the order of updates, so a resumed run may have another.
    """

    from_update: int
    processes: int
    per_device_batch: int

    def same_as(self, other: "Division") -> bool:
        return (self.processes, self.per_device_batch) == (other.processes, other.per_device_batch)

    @property
    def words(self) -> str:
        return f"{self.processes} process{'es' if self.processes > 1 else ''} with micro-batches of {self.per_device_batch}"


def divisions(bundle: Bundle | None, world: int, per_device_batch: int, report: Reporter) -> list[Division]:
    """Those so far, and the one from here on where it is another; a change is reported.

    A resume with the same division adds nothing, so that a run that was killed ends with the files of one that was not.
    """
    now = Division(bundle.step + 1 if bundle else 1, world, per_device_batch)
    before = [Division(**d) for d in bundle.value("divisions")] if bundle else []
    if before and before[-1].same_as(now):
        return before
    if before:
        report.log(
            f"update {now.from_update} and those after it are made by {now.words}, those before by {before[-1].words}: updates keep their rows and their order",
            "warning",
        )
    return [*before, now]


def recipe_items(model: ModelConfig, training: TrainingConfig) -> dict[str, Any]:
    """Every key of the recipe that shapes the result, flat: {"training.seed": 42, ...}."""
    found = _flat({"model": model.identity(), "training": training.identity()})
    return {k: v for k, v in found.items() if k not in NAMES_OF_FOLDERS}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value}


def refuse_foreign(bundle: Bundle, data: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """
    Args:
        data: Identity of the data, by item of the bundle.
        recipe: As `recipe_items` gives it.

    Raises:
        InputError: The checkpoint was made with other data, another update plan, template, tokenizer or recipe.
    """
    for item, value in data.items():
        if bundle.value(item) != value:
            raise _foreign(bundle, f"its {item} is not that of the inputs", bundle.value(item), value)
    there = bundle.value("recipe")
    for key in sorted(there.keys() | recipe.keys()):
        if there.get(key) != recipe.get(key):
            raise _foreign(bundle, f"it was made with another {key}", there.get(key), recipe.get(key))


def _foreign(bundle: Bundle, why: str, there: Any, here: Any) -> InputError:
    return InputError(
        f"{bundle.path} cannot be resumed: {why} ({_short(there)} there, {_short(here)} here). Delete the folder to train anew"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."


def as_item(found: Sequence[Division]) -> list[dict[str, int]]:
    """For bundle.json and training.json."""
    return [asdict(d) for d in found]


class Restore:
    """Puts optimizer, schedule and random state back, when the loop asks for them."""

    def __init__(self, bundle: Bundle, rank: int, world: int, seed: int) -> None:
        self.bundle, self.rank, self.world, self.seed = bundle, rank, world, seed
        self.step = bundle.step

    def optimizer(self, trainer: SupervisedTrainer) -> None:
        state.load_optimizer(trainer.optimizer, trainer.model, self.bundle.path, trainer.accelerator.scaler)
        state.load_scheduler(trainer.lr_scheduler, self.bundle.path)

    def rng(self, trainer: SupervisedTrainer) -> None:
        state.load_rng(self.bundle.path, self.rank, self.world, self.seed, self.bundle.step)
