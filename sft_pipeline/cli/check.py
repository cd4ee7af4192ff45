"""`sft check`: does everything fit together, and what will a training cost."""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sft_pipeline.cli.branch import find_branch, prepared
from sft_pipeline.cli.console import sparkline
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.errors import InputError
from sft_pipeline.graders.trial import try_graders
from sft_pipeline.stages.environment import accelerator, output_of
from sft_pipeline.stages.stage import Branch
from sft_pipeline.stages.summary import summarize
from sft_pipeline.store import Artifact
from sft_pipeline.training.base import base_folder
from sft_pipeline.training.base_weights import check_base
from sft_pipeline.training.flops import training_seconds
from sft_pipeline.training.memory import DeviceBudget, MemoryEstimate, advise, estimate
from sft_pipeline.training.reporters import require_reporters
from sft_pipeline.training.schedule import Schedule, sampled, warm_up


def check_recipe(
    recipe: str, *, snapshot: str | None, overrides: Sequence[str], console: Console
) -> dict[str, Any]:
    """The JSON of the command. The data assets are brought up to date on the way: the budget is counted.

    Raises:
        BlockedError: A blocking check of the data failed.
        InputError: Bad configuration or data.
    """
    _, branch = find_branch(recipe, snapshot, overrides, console)
    config = branch.require_recipe()
    require_reporters(config.training)
    check_base(config.model)
    gpu = accelerator() is not None
    with prepared(branch, "packed_shards", console) as outcomes:
        artifacts = {name: outcome.artifact for name, outcome in outcomes.items()}
        budget = json.loads(artifacts["packed_shards"].file("budget.json").read_text())
        formatting = json.loads(artifacts["tokenized_rows"].file("formatting.json").read_text())
        counts = {name: dict(a.manifest.counts) for name, a in artifacts.items()}
    tokens = config.training.per_device_batch * config.tokens.max_length
    supervised = int(tokens * budget["supervised_tokens"] / max(budget["tokens"], 1))
    memory = estimate(config.model, config.training, tokens=tokens, supervised=supervised, gpu=gpu)
    updates = min(budget["updates"], config.training.max_steps or budget["updates"])
    warnings = [text for a in artifacts.values() for text, level in summarize(a) if level == "warning"]
    if config.evaluation.graders:
        named = ", ".join(grader.name for grader in config.evaluation.graders)
        console.print(f"  trying the graders on held-out rows: {named}", style="dim")
    ungradable, zero = _try_graders(config, artifacts["tokenized_rows"])
    problems = _misfits(branch, formatting) + ungradable
    warnings += [f"grader {name} scores every expected completion 0 that was tried" for name in zero]
    return {
        "valid": not problems,
        "problems": problems,
        "warnings": warnings,
        "recipe": config.name,
        "dataset": branch.dataset.name,
        "snapshot": branch.snapshot,
        "rows": counts,
        "budget": {
            **budget,
            "blocks_per_update": config.training.planned_blocks,
            "per_device_batch": config.training.per_device_batch,
            "gradient_accumulation": config.training.gradient_accumulation,
            "processes": config.training.processes,
        },
        "memory": memory.as_dict(),
        "advice": advise(
            memory,
            config.model,
            config.training,
            DeviceBudget(_device_bytes(gpu), gpu),
            tokens=tokens,
            supervised=supervised,
        ),
        "schedule": _schedule(config, updates),
        "seconds": None if gpu else _cpu_seconds(memory, budget, config.training.epochs, updates),
    }


def _misfits(branch: Branch, formatting: dict[str, Any]) -> list[str]:
    """Where tokenizer, context and model do not fit each other."""
    recipe = branch.require_recipe()
    path = base_folder(recipe.model) / "config.json"
    model = json.loads(path.read_text(encoding="utf-8"))
    model = {**model, **model.get("text_config", {})}
    found = []
    vocabulary, size = model.get("vocab_size"), formatting.get("vocab_size")
    if vocabulary and size and size > vocabulary:
        found.append(
            f"the tokenizer {recipe.tokenizer} has {size} tokens, the model {recipe.model.base} only "
            f"{vocabulary}: its ids would fall outside. Take the model's own tokenizer"
        )
    positions = model.get("max_position_embeddings")
    if positions and recipe.tokens.max_length > positions:
        found.append(
            f"tokens.max_length is {recipe.tokens.max_length}, the model has {positions} positions: "
            f"lower it to {positions} at most"
        )
    return found


def _try_graders(config: RecipeConfig, tokenized: Artifact) -> tuple[list[str], list[str]]:
    """(why a grader cannot be used, where one cannot; graders that give every expected completion 0)."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a grader prints is not the command's JSON
            scores = try_graders(config.evaluation.graders, tokenized, config.evaluation.max_rows)
    except InputError as error:
        return [str(error)], []
    return [], [s["grader"] for s in scores if s["expected_completions"] == 0]


def _device_bytes(gpu: bool) -> int:
    if gpu:
        mebibytes = output_of("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
        if mebibytes is None:
            raise InputError("nvidia-smi does not report the GPU's memory")
        return int(mebibytes.split()[0]) * 2**20
    import psutil

    return psutil.virtual_memory().total


def _cpu_seconds(memory: MemoryEstimate, budget: dict[str, Any], epochs: int, updates: int) -> float:
    tokens = min(budget["tokens"] * epochs, int(budget["tokens_per_update"]["mean"] * updates))
    return round(training_seconds(memory.parameters, tokens), 1)


def _schedule(config: RecipeConfig, updates: int) -> dict[str, Any]:
    """The learning rate schedule, with its curve as (update, rate) pairs."""
    schedule = Schedule.of(config.training, config.model)
    return {
        "kind": schedule.kind,
        "peak": schedule.peak,
        "minimum": schedule.minimum,
        "warmup_updates": warm_up(updates, schedule),
        "updates": updates,
        "curve": [list(point) for point in sampled(updates, schedule)],
    }


def show_check(result: dict[str, Any], console: Console) -> None:
    """The result for people."""
    budget, schedule = result["budget"], result["schedule"]
    blocks, parts = budget["blocks_per_update"], ("per_device_batch", "gradient_accumulation", "processes")
    device, accumulated, processes = (budget[name] for name in parts)
    if blocks == device * accumulated * processes:
        origin = f" = {device} per device x {accumulated} accumulated x {processes} processes"
    else:
        origin = ", as given by training.blocks_per_update"
    stops = f" of {budget['updates']:,} planned" if schedule["updates"] < budget["updates"] else ""
    title = f"{result['recipe']} on {result['dataset']} {result['snapshot']}"
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows = {
        "updates": f"{schedule['updates']:,}{stops}",
        "blocks per update": f"{blocks:,}{origin}",
        "training examples": f"{budget['examples']:,} in {budget['blocks']:,} blocks",
        "tokens an epoch": f"{budget['tokens']:,}, of them {budget['supervised_tokens']:,} supervised",
        "packing efficiency": f"{budget['packing_efficiency']:.1%}",
        "padding would waste": f"{budget['padding_waste']:.1%}",
        "learning rate schedule": sparkline([rate for _, rate in schedule["curve"]]),
        "": (
            f"{schedule['kind']}: up to {schedule['peak']:g} in {schedule['warmup_updates']:,} updates, "
            f"{schedule['curve'][-1][1]:g} at the last"
        ),
        "parameters": (
            f"{result['memory']['parameters']:,}, of them {result['memory']['trainable']:,} trained"
        ),
        "memory": result["advice"],
        "time": "measured by the sanity check"
        if result["seconds"] is None
        else f"about {result['seconds']:,.0f} s of training on {os.cpu_count()} CPUs, very roughly",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.print(_per_update(budget))
    for warning in result["warnings"]:
        console.print(f"! {warning}", style="yellow", soft_wrap=True)
    for problem in result["problems"]:
        console.print(f"✘ {problem}", style="red", soft_wrap=True)
    if result["valid"]:
        word = "valid, see the warnings above" if result["warnings"] else "valid: everything fits"
        console.print(word, style="green")


def _per_update(budget: dict[str, Any]) -> Table:
    table = Table(title="what an update holds")
    table.add_column("")
    for column in ("mean", "min", "max", "cv"):
        table.add_column(column, justify="right")
    for name in ("examples", "tokens", "supervised_tokens", "loss_weight"):
        s = budget[f"{name}_per_update"]
        if s is None:  # no message has a weight of its own
            continue
        table.add_row(
            name.replace("_", " "), f"{s['mean']:,.1f}", f"{s['min']:,}", f"{s['max']:,}", f"{s['cv']:.2%}"
        )
    return table
