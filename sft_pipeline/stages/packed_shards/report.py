"""What people look at in packed_shards: numbers, tables and plots."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from sft_pipeline.plots.data import plot_block_fill, plot_updates
from sft_pipeline.stages.packed_shards.plan import PlanBudget, UpdatePlan
from sft_pipeline.stages.stage import Evidence, number, plot, table


def evidence(
    out: Path,
    lengths: np.ndarray,
    per_block: Mapping[str, np.ndarray],
    plan: UpdatePlan,
    budget: PlanBudget,
    max_length: int,
) -> dict[str, Evidence]:
    """Numbers, tables and plots of the training split; the plots are written under out/plots/.

    Args:
        lengths: Tokens per example.
        per_block: For each block its tokens, supervised tokens, their summed loss weights, and examples.
    """
    per_update = {name: plan.sums(values) for name, values in per_block.items()}
    plot_block_fill(out / "plots" / "block_fill.png", per_block["tokens"], lengths, max_length)
    plot_updates(out / "plots" / "updates.png", per_update["supervised"])
    sizes = plan.sizes()
    first = [
        {
            "update": u + 1,
            "blocks": int(sizes[u]),
            "examples": int(per_update["examples"][u]),
            "tokens": int(per_update["tokens"][u]),
            "supervised tokens": int(per_update["supervised"][u]),
        }
        for u in range(min(10, plan.updates))
    ]
    spreads = {
        "examples": budget.examples_per_update,
        "supervised tokens": budget.supervised_tokens_per_update,
        "tokens": budget.tokens_per_update,
    }
    if budget.loss_weight_per_update is not None:
        spreads["summed loss weights"] = budget.loss_weight_per_update
    return {
        "row_count": number(budget.examples),
        "blocks": number(budget.blocks),
        "updates": number(budget.updates),
        "packing_efficiency": number(budget.packing_efficiency),
        "padding_waste": number(budget.padding_waste),
        "budget": table([{"per update": name, **asdict(spread)} for name, spread in spreads.items()]),
        "first_updates": table(first),
        "block_fill_plot": plot("plots/block_fill.png"),
        "updates_plot": plot("plots/updates.png"),
    }
