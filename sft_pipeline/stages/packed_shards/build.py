"""Builds `packed_shards` from `tokenized_rows`."""

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sft_pipeline.errors import InputError
from sft_pipeline.stages.packed_shards.blocks import FlatRows, WrittenBlocks, flatten, write_blocks
from sft_pipeline.stages.packed_shards.config import PackedShardsConfig
from sft_pipeline.stages.packed_shards.packing import Packing, pack
from sft_pipeline.stages.packed_shards.plan import PlanBudget, UpdatePlan, budget_of, plan_updates
from sft_pipeline.stages.packed_shards.report import evidence
from sft_pipeline.stages.stage import Build, Built, Check, number
from sft_pipeline.store.files import write_json
from sft_pipeline.tables.parquet import FileWriter, count_rows

MIN_EFFICIENCY, ENOUGH_BLOCKS = 0.90, 50
MAX_CV = 0.10

_PLAN_COLUMNS = ("update", "position", "block", "epoch", "tokens", "supervised", "examples")
# `weight`: summed loss weights of the block's supervised tokens; where no message has one, `supervised`.
PLAN = pa.schema([*((name, pa.int32()) for name in _PLAN_COLUMNS), ("weight", pa.float64())])


@dataclass(frozen=True)
class PackedSplit:
    """One split, packed and written.

    Attributes:
        expected: Rows of the split in tokenized_rows.
        written: What was found while its blocks were written.
        on_disk: Blocks in its files, read back.
    """

    rows: FlatRows
    packing: Packing
    expected: int
    written: WrittenBlocks
    on_disk: int


def build(b: Build) -> Built:
    """Packs train and validation, and plans the updates of all epochs.

    Raises:
        InputError: The train split has no rows.
    """
    config: PackedShardsConfig = b.config
    scratch = b.work / "flat"
    try:
        train = _pack(b, "train", scratch)
        if not train.packing.blocks:
            raise InputError(
                f"{b.asset}: the train split of tokenized_rows has no rows, so there is nothing to pack"
            )
        validation = _pack(b, "validation", scratch)
        rows, packing = train.rows, train.packing
        plan = plan_updates(packing.sums(rows.weight), config.blocks_per_update, config.epochs, config.seed)
        budget = budget_of(packing, plan, rows.lengths, rows.supervised, rows.weight, config.max_length)
        per_block = {
            "tokens": packing.sums(rows.lengths),
            "supervised": packing.sums(rows.supervised),
            "weight": packing.sums(rows.weight),
            "examples": np.diff(packing.starts),
        }
        _write_plan(b.out / "plan.parquet", plan, per_block)
        write_json(
            b.out / "budget.json",
            {**budget.to_json(), "blocks_per_update": config.blocks_per_update, "epochs": config.epochs},
        )
        return Built(
            counts={
                "rows_read": train.expected + validation.expected,
                "rows_packed": train.written.examples + validation.written.examples,
                "blocks": packing.blocks,
                "validation_blocks": validation.packing.blocks,
                "updates": budget.updates,
                "examples": budget.examples,
                "tokens": budget.tokens,
                "supervised_tokens": budget.supervised_tokens,
                "validation_examples": validation.written.examples,
                "validation_tokens": validation.written.tokens,
                "validation_supervised_tokens": validation.written.supervised,
                "blocks_per_update": config.blocks_per_update,
            },
            checks=_checks(config, train, validation, plan, budget),
            volatile=("plots/",),
            evidence=evidence(b.out, rows.lengths, per_block, plan, budget, config.max_length),
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            b.work.rmdir()


def _pack(b: Build, split: str, scratch: Path) -> PackedSplit:
    """Packs one split and writes its blocks."""
    config: PackedShardsConfig = b.config
    parts = b.inputs["tokenized_rows"].parts(split)
    rows = flatten(parts, scratch / split, b.report)
    packing = pack(rows.lengths, config.max_length, config.packing.strategy, config.seed)
    written = write_blocks(rows, packing, b.out / split, b.report)
    b.report.log(
        f"packed_shards: {written.examples} {split} examples in {written.blocks} blocks of "
        f"{config.max_length} tokens"
    )
    on_disk = count_rows(sorted((b.out / split).glob("*.parquet")))
    return PackedSplit(rows, packing, count_rows(parts), written, on_disk)


def _write_plan(path: Path, plan: UpdatePlan, per_block: dict[str, np.ndarray]) -> None:
    # Updates are counted from 1 wherever people see them.
    columns = {"update": plan.update + 1, "position": plan.position, "block": plan.block, "epoch": plan.epoch}
    columns |= {name: values[plan.block] for name, values in per_block.items()}
    with FileWriter(path, PLAN) as out:
        out.write(pa.table({f.name: pa.array(columns[f.name]).cast(f.type) for f in PLAN}, schema=PLAN))


def _checks(
    config: PackedShardsConfig,
    train: PackedSplit,
    validation: PackedSplit,
    plan: UpdatePlan,
    budget: PlanBudget,
) -> tuple[Check, ...]:
    splits = {"train": train, "validation": validation}
    bad = sum(s.written.bad_boundaries for s in splits.values())
    wrong = sum(
        s.rows.wrong_labels + abs(s.written.supervised - int(s.rows.supervised.sum()))
        for s in splits.values()
    )
    same_weight = all(
        not s.written.wrong_weights and np.allclose(s.written.weight, s.packing.sums(s.rows.weight), atol=0)
        for s in splits.values()
    )
    uses = np.zeros((config.epochs, budget.blocks), dtype=np.int64)
    np.add.at(uses, (plan.epoch, plan.block), 1)
    covered = bool((uses == 1).all() and (np.diff(plan.update) >= 0).all() and (plan.sizes() > 0).all())
    full = (
        budget.packing_efficiency >= MIN_EFFICIENCY
        or budget.blocks < ENOUGH_BLOCKS
        or config.packing.strategy == "none"
    )
    weighted = budget.loss_weight_per_update is not None
    per_update = budget.loss_weight_per_update or budget.supervised_tokens_per_update
    return (
        Check(
            "every_row_packed_once",
            all(map(_packed_once, splits.values())),
            ", ".join(f"{name}: {s.expected} rows in {s.on_disk} blocks" for name, s in splits.items()),
        ),
        Check(
            "boundaries_restart",
            bad == 0,
            f"{train.written.examples + validation.written.examples} examples, {bad} with position ids that "
            "do not run from 0",
        ),
        Check(
            "labels_match_inputs",
            wrong == 0 and same_weight,
            f"{train.written.supervised} supervised training tokens, {wrong} labels that are "
            "neither -100 nor the input id, or stand at an example's start"
            + ("" if same_weight else "; the loss weights are not those of the tokenized rows"),
        ),
        Check(
            "plan_covers_every_block",
            covered,
            f"{budget.updates} updates over {config.epochs} epochs, each with all {budget.blocks} blocks",
        ),
        Check(
            "packing_efficiency",
            full,
            f"blocks are {budget.packing_efficiency:.1%} full; padding each example to {config.max_length} "
            f"would waste {budget.padding_waste:.1%}",
            {
                "packing_efficiency": number(budget.packing_efficiency),
                "padding_waste": number(budget.padding_waste),
            },
        ),
        Check(
            "balanced_updates",
            budget.balance_cv <= MAX_CV,
            f"{'summed loss weights' if weighted else 'supervised tokens'} per update: mean "
            f"{per_update.mean:,.0f}, {per_update.min:,} to {per_update.max:,}; variation "
            f"{budget.balance_cv:.2%} over updates of equal size",
            {"cv": number(budget.balance_cv)},
        ),
    )


def _packed_once(split: PackedSplit) -> bool:
    """Every example's index occurs once in the packing, and its files hold as many examples and blocks."""
    times = np.bincount(split.packing.order, minlength=split.expected)
    return (
        bool((times == 1).all())
        and len(times) == split.expected == split.written.examples
        and split.on_disk == split.packing.blocks
    )
