"""`sft import`: a recipe from the settings of another trainer.

Read are an axolotl or LLaMA-Factory YAML file (or JSON), a Python script's SFTConfig, TrainingArguments and
LoraConfig (their constants; nothing is executed), and a command line with `--name value`.
"""

import ast
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from sft_pipeline.config.foreign_names import DONE_OTHERWISE, KEYS
from sft_pipeline.config.load import config_folders
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.errors import InputError

SETTINGS = ("SFTConfig", "TrainingArguments", "Seq2SeqTrainingArguments", "LoraConfig", "SFTTrainer")
SCHEDULES = {name: name for name in ("cosine", "linear", "constant")}
SCHEDULES |= {"constant_with_warmup": "constant", "warmup_stable_decay": "wsd"}
ADAPTERS = {"lora": "lora", "qlora": "qlora", "full": "full"}
OFF: tuple[Any, ...] = (None, "", False, [], {}, "none", "None")


def import_recipe(file: str, *, name: str | None, dataset: str | None, into: str | None) -> dict[str, Any]:
    """The JSON of the command; writes the recipe file.

    Raises:
        InputError: The file is not there, holds no settings, or the recipe is there already.
    """
    path = Path(os.path.expanduser(file))
    if not path.is_file():
        raise InputError(f"{file}: no such file")
    settings = read_settings(path)
    name = name or re.sub(r"\W+", "_", path.stem, flags=re.ASCII).strip("_").lower() or "imported"
    name = name if name[:1].isalpha() else f"recipe_{name}"
    recipe, mapped, unmapped = translated(settings)
    if not mapped:
        known = ", ".join(f"{key} ({why})" for key, why in list(unmapped.items())[:5])
        raise InputError(f"{path}: nothing of it is a setting that a recipe has: {known}")
    recipe = {"name": name, "dataset": dataset or "YOUR_DATASET", **recipe}
    recipe.setdefault("model", {}).setdefault("base", "YOUR_MODEL")
    try:
        RecipeConfig.model_validate(recipe)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{file}: {where}: {first['msg']} (given: {first['input']!r})") from None
    folder = Path(into).resolve() if into else config_folders()[-1]
    target = folder / "recipes" / f"{name}.yaml"
    if target.exists():
        raise InputError(f"{target} is there already: remove it, or give another --name")
    target.parent.mkdir(parents=True, exist_ok=True)
    left = [f"#   {key}: {why}" for key, why in unmapped.items()]
    head = [f"# From {path.name}.", *(["# Not taken over:", *left] if left else [])]
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    target.write_text("\n".join([*head, text]), encoding="utf-8")
    return {"recipe": str(target), "mapped": mapped, "unmapped": unmapped}


def show_import(result: dict[str, Any], console: Console) -> None:
    """The result for people."""
    table = Table("theirs", "here", "value")
    for theirs, (ours, value) in result["mapped"].items():
        table.add_row(theirs, ours, str(value))
    console.print(table)
    if result["unmapped"]:
        rest = Table("not taken over", "why")
        for theirs, why in result["unmapped"].items():
            rest.add_row(theirs, why)
        console.print(rest)
    console.print(f"recipe: {result['recipe']}", soft_wrap=True)


def read_settings(path: Path) -> dict[str, Any]:
    """{name: value} of a file.

    Raises:
        InputError: It cannot be read, or holds none.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml", ".json"):
            found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        elif path.suffix == ".py":
            found = _of_script(text)
        else:
            found = _of_command_line(text)
    except (OSError, ValueError, SyntaxError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict) or not found:
        raise InputError(
            f"{path}: no settings found: give an axolotl or LLaMA-Factory file, a script with SFTConfig, or "
            "a command line with --name value"
        )
    return {str(key).lstrip("-").replace("-", "_"): value for key, value in found.items()}


def _of_script(text: str) -> dict[str, Any]:
    """The keyword arguments that are constants, of the calls that hold settings."""
    found: dict[str, Any] = {}
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        function = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        for keyword in node.keywords if function in SETTINGS else ():
            try:
                found[str(keyword.arg)] = ast.literal_eval(keyword.value)
            except ValueError:  # not a constant
                if keyword.arg in KEYS or keyword.arg in DONE_OTHERWISE:
                    found[str(keyword.arg)] = NOT_CONSTANT
        if function == "from_pretrained" and node.args and isinstance(node.args[0], ast.Constant):
            found.setdefault("model_name_or_path", node.args[0].value)
    return found


class _NotConstant:
    def __str__(self) -> str:
        return "computed in the script"


NOT_CONSTANT = _NotConstant()


def _of_command_line(text: str) -> dict[str, Any]:
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    found: dict[str, Any] = {}
    for word, following in zip(words, [*words[1:], "--"]):
        if word.startswith("--"):
            key, given, value = word[2:].partition("=")
            is_flag = not given and following.startswith("--")
            found[key] = True if is_flag else yaml.safe_load(value if given else following)
    found.pop("", None)
    return found


def translated(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[str, Any]], dict[str, str]]:
    """(recipe, {their key: (ours, value)}, {their key: why it is not taken over})."""
    recipe: dict[str, Any] = {}
    mapped: dict[str, tuple[str, Any]] = {}
    unmapped: dict[str, str] = {}

    def put(theirs: str, ours: str, value: Any) -> None:
        section = recipe
        *above, last = ours.split(".")
        for part in above:
            section = section.setdefault(part, {})
        section[last] = value
        mapped[theirs] = (ours, value)

    for theirs, given in settings.items():
        try:
            ours, value = _one(theirs, given, settings)
        except _NotTaken as why:
            unmapped[theirs] = str(why)
            continue
        except (ValueError, TypeError):
            unmapped[theirs] = f"{given!r} is no number"
            continue
        put(theirs, ours, value)
    return recipe, mapped, unmapped


class _NotTaken(Exception):
    pass


def _one(theirs: str, given: Any, settings: dict[str, Any]) -> tuple[str, Any]:
    """(our key, value) of one of their settings."""
    if given is NOT_CONSTANT:
        raise _NotTaken(str(given))
    switches: dict[str, tuple[str, Any]] = {
        "packing": ("packing.strategy", "bfd" if given else "none"),
        "sample_packing": ("packing.strategy", "bfd" if given else "none"),
        "bf16": ("training.precision", "bf16" if given not in (*OFF, "auto") else "auto"),
        "fp16": ("training.precision", "fp16"),
        "load_in_4bit": ("model.parameterization", "qlora"),
        "adapter": ("model.parameterization", ADAPTERS.get(str(given))),
        "finetuning_type": ("model.parameterization", ADAPTERS.get(str(given))),
        "train_on_inputs": ("tokens.supervise", "all" if given else "completion"),
        "completion_only_loss": ("tokens.supervise", "completion" if given else "all"),
        "assistant_only_loss": ("tokens.supervise", "assistant" if given else "completion"),
    }
    if theirs in switches:
        ours, value = switches[theirs]
        if value is None or (theirs in ("fp16", "load_in_4bit") and given in OFF):
            raise _NotTaken(DONE_OTHERWISE.get(theirs, f"{given!r} is not there"))
        if theirs == "adapter" and value == "lora" and settings.get("load_in_4bit"):
            value = "qlora"
        return ours, value
    ours = KEYS.get(theirs, "")
    if not ours or ours.startswith("split."):
        raise _NotTaken(
            DONE_OTHERWISE.get(theirs) or (f"{ours} of the dataset file" if ours else "not known")
        )
    value = given
    if ours == "training.schedule":
        value = SCHEDULES.get(str(given))
    elif ours == "model.lora.target_modules" and given in ("all", "all-linear", ["all"]):
        value = "all-linear"
    elif ours == "model.lora.target_modules" and isinstance(given, str):
        value = [part.strip() for part in given.split(",")]
    elif ours == "training.epochs":
        value = max(1, round(float(given)))
    elif ours == "training.learning_rate":
        value = float(given)
    elif ours in ("training.eval_steps", "training.save_steps") and isinstance(given, float) and given < 1:
        raise _NotTaken("a fraction of the updates; a number of updates here")
    elif ours == "training.max_steps" and isinstance(given, int) and given <= 0:
        raise _NotTaken("no bound")
    if value is None:
        raise _NotTaken(f"{given!r} is not there")
    return ours, value
