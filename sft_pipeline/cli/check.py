"""`sft check`: does everything fit together, and what will a training cost."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sft_pipeline.cli.branch import find_branch, prepared
from sft_pipeline.cli.console import sparkline
from sft_pipeline.cli.fail_fast import misfits
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.errors import InputError
from sft_pipeline.graders.trial import try_graders
from sft_pipeline.project import sft_home
from sft_pipeline.stages.environment import accelerator, output_of
from sft_pipeline.stages.summary import summarize
from sft_pipeline.store import Artifact
from sft_pipeline.training.base import base_folder
from sft_pipeline.training.base_weights import check_base
from sft_pipeline.training.flops import training_seconds
from sft_pipeline.training.memory import DeviceBudget, MemoryEstimate, advise, estimate
from sft_pipeline.training.reporters import require_reporters
from sft_pipeline.training.schedule import Schedule, sampled, warm_up

CHECKPOINT_BYTES = 12  # per trained parameter: itself and two moments of AdamW, in fp32
EXPORT_COPIES = 2  # the merged model, and the one it is compared with, in fp32 at most
MUCH = 0.5  # of the free space


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
    described = json.loads((base_folder(config.model) / "config.json").read_text(encoding="utf-8"))
    problems = misfits(config, described, formatting.get("vocab_size")) + ungradable
    warnings += _room(config, memory, updates)
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


def _room(config: RecipeConfig, memory: MemoryEstimate, updates: int) -> list[str]:
    """What checkpoints and export take on the disk, where that is much, or more than there is."""
    every = config.training.save_steps or config.training.eval_steps or max(1, updates // 10)
    kept = config.training.keep_checkpoints
    count = max(1, updates // every) if kept is None else min(kept + 1, max(1, updates // every))
    each = memory.trainable * CHECKPOINT_BYTES
    needed = count * each + EXPORT_COPIES * 4 * memory.parameters
    home = sft_home()
    free = shutil.disk_usage(next(p for p in (home, *home.parents) if p.exists())).free
    if needed < MUCH * free:
        return []
    return [
        f"{count} checkpoints of {each / 2**30:.1f} GiB and the export take about {needed / 2**30:.1f} GiB; "
        f"{free / 2**30:.1f} GiB are free for {home}. training.keep_checkpoints and a larger "
        "training.eval_steps make fewer of them; SFT_HOME points elsewhere"
    ]


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
