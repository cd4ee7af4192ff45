"""What a sweep varies: `--set key=a,b,c` options as a grid of trials."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import yaml

from sft_pipeline.config.yaml_lines import parse_set
from sft_pipeline.errors import InputError

# What makes a model. Graders, gates and ranking judge the trials, so they must be the same for all.
SECTIONS = ("model", "template", "tokens", "packing", "training")
# What the common budget decides.
SET_BY_SWEEP = ("max_steps", "eval_steps", "save_steps", "early_stopping", "keep_checkpoints")


@dataclass(frozen=True)
class Axis:
    """A key and the values it takes, each as the YAML text that was given."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """Every combination of the axes' values.

    Attributes:
        common: `a.b=value` options that hold for all trials.
    """

    common: tuple[str, ...]
    axes: tuple[Axis, ...]

    def trials(self) -> list[tuple[str, ...]]:
        """The `a.b=value` options of each trial, the last axis varying fastest."""
        return [
            tuple(f"{axis.key}={value}" for axis, value in zip(self.axes, values))
            for values in product(*(axis.values for axis in self.axes))
        ]


def parse_grid(options: Sequence[str]) -> Grid:
    """Reads the `--set` options: several values make an axis, a single value holds for all trials.

    Raises:
        InputError: An option is not of that form, cannot be swept, or nothing varies.
    """
    common: list[str] = []
    axes: list[Axis] = []
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise InputError(f"--set {option}: write it as a.b=value, or a.b=value,value,...")
        key, values = key.strip(), split_values(text)
        for value in values:
            value_of(f"{key}={value}")
        _must_be_sweepable(option, key, values)
        if any(key == axis.key for axis in axes) or any(key == o.partition("=")[0] for o in common):
            raise InputError(f"--set {option}: {key} is given twice; list its values in one --set")
        if len(values) == 1:
            common.append(f"{key}={values[0]}")
        else:
            axes.append(Axis(key, tuple(values)))
    if not axes:
        raise InputError(
            "nothing to sweep: give a --set with several values, "
            "for example --set training.learning_rate=1e-5,5e-5,1e-4"
        )
    return Grid(tuple(common), tuple(axes))


def split_values(text: str) -> list[str]:
    """The text cut at its commas outside brackets and quotes: "1, [a, b]" is "1" and "[a, b]"."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character == "," and not quote and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def value_of(option: str) -> Any:
    """The parsed value of one `a.b=value` option."""
    value: Any = parse_set(option).value
    for part in option.partition("=")[0].strip().split("."):
        value = value[part]
    return value


def values_of(options: Sequence[str]) -> dict[str, Any]:
    """{key: parsed value} of a trial's options."""
    return {option.partition("=")[0]: value_of(option) for option in options}


def label_of(values: dict[str, Any]) -> str:
    """A trial in words, for example "learning_rate 5e-05, r 16"."""
    names = short_names(list(values))
    return ", ".join(f"{names[key]} {as_text(value)}" for key, value in values.items())


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key's last part, or the whole key where two of them share it."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last)}


def as_text(value: Any) -> str:
    """A value as people write it in a recipe."""
    return f"{value:g}" if isinstance(value, float) else recipe_flow(value)


def recipe_flow(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def recipe_lines(values: dict[str, Any]) -> list[str]:
    """Lines to paste into the recipe, one per section: `training: {learning_rate: 5.0e-05}`."""
    sections: dict[str, Any] = {}
    for key, value in values.items():
        *above, name = key.split(".")
        inner = sections
        for part in above:
            inner = inner.setdefault(part, {})
        inner[name] = value
    return [f"{section}: {recipe_flow(content)}" for section, content in sections.items()]


def _must_be_sweepable(option: str, key: str, values: Sequence[str]) -> None:
    if not all(values) and len(values) > 1:
        raise InputError(f"--set {option}: one of the values is empty")
    section, _, name = key.partition(".")
    if section == "training" and name.split(".")[0] in SET_BY_SWEEP:
        raise InputError(
            f"--set {option}: a sweep sets {key} itself, from the budget that all trials share; "
            "--updates N sets the budget"
        )
    if len(values) > 1 and section not in SECTIONS:
        raise InputError(
            f"--set {option}: {section} cannot vary within a sweep, since all trials are judged alike; "
            f"what can: {', '.join(SECTIONS)}"
        )
    parsed = [value_of(f"{key}={value}") for value in values]
    twice = next((v for i, v in enumerate(parsed) if v in parsed[:i]), None)
    if twice is not None:
        raise InputError(f"--set {option}: the value {as_text(twice)} is given twice")
