"""Builds `packed_shards` from `tokenized_rows`."""

import contextlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sft_pipeline.errors import InputError
from sft_pipeline.stages.packed_shards.blocks import FlatRows, Written, flatten, write_blocks
from sft_pipeline.stages.packed_shards.budget import Budget, budget_of
from sft_pipeline.stages.packed_shards.config import PackedShardsConfig
from sft_pipeline.stages.packed_shards.packing import Packing, pack
from sft_pipeline.stages.packed_shards.pictures import plot_fill, plot_updates
from sft_pipeline.stages.packed_shards.plan import UpdatePlan, plan_updates
from sft_pipeline.stages.painter import Painter
from sft_pipeline.stages.stage import Build, Built, Check, Evidence, number, plot, table
from sft_pipeline.store.files import write_json
from sft_pipeline.tables.parquet import FileWriter, count_rows

MIN_EFFICIENCY, ENOUGH_BLOCKS = 0.90, 50
MAX_CV = 0.10

PLAN = pa.schema(
    [
        ("update", pa.int32()),
        ("position", pa.int32()),
        ("block", pa.int32()),
        ("epoch", pa.int32()),
        ("tokens", pa.int32()),
        ("supervised", pa.int32()),
        ("examples", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Packed:
    """One side, packed in thought."""

    name: str
    rows: FlatRows
    packing: Packing
    expected: int


@dataclass(frozen=True)
class Side(Packed):
    """One side, packed and written."""

    written: Written
    on_disk: int


def build(b: Build) -> Built:
    """Packs train and validation, and plans the updates of all epochs."""
    config: PackedShardsConfig = b.config
    scratch = b.work / "flat"
    try:
        with Painter() as painter:
            packed = [_pack(b, config, name, scratch / name) for name in ("train", "validation")]
            if not packed[0].packing.blocks:
                raise InputError(
                    f"{b.asset}: the train side of tokenized_rows has no rows, so there is nothing to pack"
                )
            rows, packing = packed[0].rows, packed[0].packing
            supervised = packing.sums(rows.supervised)
            plan = plan_updates(supervised, config.blocks_per_update, config.epochs, config.seed)
            fills = packing.sums(rows.lengths)
            painter.draw(
                plot_fill, b.out / "plots" / "block_fill.png", fills, rows.lengths, config.max_length
            )
            painter.draw(plot_updates, b.out / "plots" / "updates.png", plan.sums(supervised))
            train, validation = (_write(b, config, side) for side in packed)
            budget = budget_of(packing, plan, rows.lengths, rows.supervised, config.max_length)
            _write_plan(b.out / "plan.parquet", plan, train)
            write_json(
                b.out / "budget.json",
                {**budget.to_json(), "blocks_per_update": config.blocks_per_update, "epochs": config.epochs},
            )
        return Built(
            counts={
                "rows_read": train.expected + validation.expected,
                "rows_packed": train.written.examples + validation.written.examples,
                "blocks": train.packing.blocks,
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
            evidence=_evidence(config, train, plan, supervised, budget),
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            b.work.rmdir()


def _pack(b: Build, config: PackedShardsConfig, side: str, scratch: Path) -> Packed:
    parts = b.inputs["tokenized_rows"].parts(side)
    rows = flatten(parts, scratch)
    packing = pack(rows.lengths, config.max_length, config.packing.strategy, config.seed)
    return Packed(side, rows, packing, count_rows(parts))


def _write(b: Build, config: PackedShardsConfig, side: Packed) -> Side:
    written = write_blocks(side.rows, side.packing, b.out / side.name)
    b.report.log(
        f"packed_shards: {written.examples} {side.name} examples in {written.blocks} blocks of {config.max_length}"
    )
    on_disk = count_rows(sorted((b.out / side.name).glob("*.parquet")))
    return Side(side.name, side.rows, side.packing, side.expected, written, on_disk)


def _write_plan(path: Path, plan: UpdatePlan, train: Side) -> None:
    per_block = {
        "tokens": train.packing.sums(train.rows.lengths),
        "supervised": train.packing.sums(train.rows.supervised),
        "examples": np.diff(train.packing.starts),
    }
    columns = {"update": plan.update, "position": plan.position, "block": plan.block, "epoch": plan.epoch}
    columns |= {name: values[plan.block] for name, values in per_block.items()}
    with FileWriter(path, PLAN) as out:
        out.write(pa.table({f.name: pa.array(columns[f.name].astype(np.int32)) for f in PLAN}, schema=PLAN))


def _checks(
    config: PackedShardsConfig, train: Side, validation: Side, plan: UpdatePlan, budget: Budget
) -> tuple[Check, ...]:
    sides = {"train": train, "validation": validation}
    once = all(_packed_once(s) for s in sides.values())
    numbers = ", ".join(f"{name}: {s.expected} rows in {s.on_disk} blocks" for name, s in sides.items())
    bad = sum(s.written.bad_boundaries for s in sides.values())
    wrong = sum(
        s.rows.wrong_labels + abs(s.written.supervised - int(s.rows.supervised.sum())) for s in sides.values()
    )
    covered = _covers(plan, train.packing.blocks, config.epochs)
    full = (
        budget.packing_efficiency >= MIN_EFFICIENCY
        or budget.blocks < ENOUGH_BLOCKS
        or config.packing.strategy == "none"
    )
    return (
        Check("every_row_packed_once", once, numbers),
        Check(
            "boundaries_restart",
            bad == 0,
            f"{train.written.examples + validation.written.examples} examples, {bad} with position ids that do not run from 0",
        ),
        Check(
            "labels_match_inputs",
            wrong == 0,
            f"{train.written.supervised} supervised training tokens, {wrong} labels that do not belong",
        ),
        Check(
            "plan_covers_every_block",
            covered,
            f"{budget.updates} updates over {config.epochs} epochs, each with all {budget.blocks} blocks",
        ),
        Check(
            "packing_efficiency",
            full,
            f"blocks are {budget.packing_efficiency:.1%} full; padding each example to {config.max_length} would waste {budget.padding_waste:.1%}",
            {
                "packing_efficiency": number(budget.packing_efficiency),
                "padding_waste": number(budget.padding_waste),
            },
        ),
        Check(
            "balanced_updates",
            budget.balance_cv <= MAX_CV,
            f"supervised tokens per update: mean {budget.supervised_tokens_per_update.mean:,.0f}, {budget.supervised_tokens_per_update.min:,} to "
            f"{budget.supervised_tokens_per_update.max:,}; variation {budget.balance_cv:.2%} over updates of equal size",
            {"cv": number(budget.balance_cv)},
        ),
    )


def _packed_once(side: Side) -> bool:
    """Every example's index occurs once in the packing, and as many examples and blocks lie on the disk."""
    times = np.bincount(side.packing.order, minlength=side.expected)
    return (
        bool((times == 1).all())
        and len(times) == side.expected == side.written.examples
        and side.on_disk == side.packing.blocks
    )


def _covers(plan: UpdatePlan, blocks: int, epochs: int) -> bool:
    times = np.zeros((epochs, blocks), dtype=np.int64)
    np.add.at(times, (plan.epoch, plan.block), 1)
    return (
        bool((times == 1).all())
        and bool((np.diff(plan.update) >= 0).all())
        and len(plan.sizes()) == plan.updates
        and bool((plan.sizes() > 0).all())
    )


def _evidence(
    config: PackedShardsConfig, train: Side, plan: UpdatePlan, supervised: np.ndarray, budget: Budget
) -> dict[str, Evidence]:
    tokens, examples = (
        plan.sums(train.packing.sums(train.rows.lengths)),
        plan.sums(np.diff(train.packing.starts)),
    )
    per_update = plan.sums(supervised)
    first = [
        {
            "update": u,
            "blocks": int(plan.sizes()[u]),
            "examples": int(examples[u]),
            "tokens": int(tokens[u]),
            "supervised tokens": int(per_update[u]),
        }
        for u in range(min(10, plan.updates))
    ]
    spreads = ("examples_per_update", "supervised_tokens_per_update", "tokens_per_update")
    return {
        "row_count": number(budget.examples),
        "blocks": number(budget.blocks),
        "updates": number(budget.updates),
        "packing_efficiency": number(budget.packing_efficiency),
        "padding_waste": number(budget.padding_waste),
        "budget": table(
            [
                {
                    "per update": name.removesuffix("_per_update").replace("_", " "),
                    **asdict(getattr(budget, name)),
                }
                for name in spreads
            ]
        ),
        "first_updates": table(first),
        "block_fill_plot": plot("plots/block_fill.png"),
        "updates_plot": plot("plots/updates.png"),
    }
