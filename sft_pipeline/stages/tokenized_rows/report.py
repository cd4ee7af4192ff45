"""The report of tokenized_rows: numbers, tables, plots, and how the rows were encoded."""

from pathlib import Path
from typing import Any

import numpy as np

from sft_pipeline.plots.tokens import plot_lengths, plot_masks
from sft_pipeline.stages.stage import Evidence, markdown, number, plot, table
from sft_pipeline.stages.tokenized_rows.config import TokenizedRowsConfig
from sft_pipeline.stages.tokenized_rows.stats import StageStats
from sft_pipeline.text.tokenizer import Tokenizer


def evidence(
    stats: StageStats,
    formatting: dict[str, Any],
    config: TokenizedRowsConfig,
    tokenizer: Tokenizer,
    out: Path,
) -> dict[str, Evidence]:
    """Numbers, tables and plots; the plots are drawn into `out`/plots."""
    n = stats.numbers
    found: dict[str, Evidence] = {
        "row_count": number(n["examples"]),
        "tokens": number(n["tokens"]),
        "supervised_tokens": number(n["supervised_tokens"]),
        "supervised_share": number(round(n["supervised_tokens"] / max(n["tokens"], 1), 4)),
        "rows_rejected": number(n["rejected"]),
    }
    if stats.lengths:
        lengths, supervised = np.concatenate(stats.lengths), np.concatenate(stats.supervised)
        found["length_quantiles"] = table(
            [
                {
                    "quantile": f"{q:.0%}",
                    "tokens": int(np.quantile(lengths, q)),
                    "supervised": int(np.quantile(supervised, q)),
                }
                for q in (0, 0.5, 0.9, 0.99, 1)
            ]
        )
        plot_lengths(out / "plots/lengths.png", lengths, supervised, config.tokens.max_length)
        plot_masks(out / "plots/mask_preview.png", stats.previews, tokenizer.decode, tokenizer.control_ids)
        found["lengths_plot"] = plot("plots/lengths.png")
        found["mask_preview"] = plot("plots/mask_preview.png")
    found["encoding"] = markdown(_how_encoded(stats))
    if stats.first_rejected:
        found["first_rejected_rows"] = table(stats.first_rejected)
    template = formatting["chat_template"]
    found["chat_template"] = markdown(f"`{config.template.chat_template}`\n\n```jinja\n{template}\n```")
    return found


def _how_encoded(stats: StageStats) -> str:
    n = stats.numbers
    reused = f"{n['tokenized']:,} rows tokenized, {n['reused']:,} reused from earlier builds."
    if n["by_columns"]:
        how = (
            f"{n['by_columns']:,} rows by the fast encoder, {n['by_rows']:,} by the reference. "
            f"{n['compared']:,} rows were encoded by both: no difference."
        )
    else:
        why = f" ({stats.why_not_fast})" if stats.why_not_fast else ""
        how = f"All of them by the reference{why}."
    return f"{reused}\n\n{how}"
