"""What is compared, and on which rows: the export's checks of parity."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds

from sft_pipeline.stages.exported_model.parity import Difference, first_difference, served_prompt
from sft_pipeline.stages.stage import Check, number, table
from sft_pipeline.store import Artifact
from sft_pipeline.tables.held_out import HeldOut, chosen_positions, held_out_rows
from sft_pipeline.text.conversation import ForgeryGuard, conversation
from sft_pipeline.text.template import FROZEN_CLOCK, ChatTemplate
from sft_pipeline.text.tokenizer import Tokenizer

PROBES = 6
ANSWERS = 4
ANSWER_TOKENS = 64
PROMPTS_A_SIDE = 100
SIDES = ("test", "validation", "train")


@dataclass(frozen=True)
class Prompts:
    """Served prompts against training's.

    Attributes:
        compared: Rows looked at.
        skipped: Rows that were cut to fit, whose served prompt is meant to differ.
        different: Those that differ: row_id, side, position, and both ids there.
    """

    compared: int
    skipped: int
    different: list[dict[str, Any]]

    def check(self) -> Check:
        passed = not self.different and self.compared > 0
        if passed:
            said = f"AutoTokenizer with the exported template gives training's ids for the prompts of {self.compared} rows"
        elif self.compared:
            first = self.different[0]
            said = (
                f"{len(self.different)} of {self.compared} prompts differ, first at token {first['position']} of row {first['row_id']}: "
                f"training has {first['training']!r}, AutoTokenizer {first['served']!r}. A server would send the model what it was not trained on"
            )
        else:
            said = "no row could be compared: every row was cut to fit (tokens.overflow)"
        if self.skipped:
            said += f"; {self.skipped} rows that were cut to fit were left out"
        return Check(
            "served_prompt_equal",
            passed,
            said,
            {"different": table(self.different[:10]), "compared": number(self.compared)},
        )


@dataclass(frozen=True)
class Answers:
    """Greedy answers before saving and after loading again, as text."""

    prompts: list[str]
    before: list[str]
    after: list[str]
    ids_equal: list[bool]

    def check(self, judged: tuple[int, int] | None) -> Check:
        wrong = [i for i, same in enumerate(self.ids_equal) if not same]
        passed = not wrong and bool(self.ids_equal)
        said = f"{len(self.ids_equal) - len(wrong)} of {len(self.ids_equal)} greedy answers are the same after loading the export again"
        if judged is not None:
            said += f"; {judged[0]} of {judged[1]} are those that the evaluation recorded"
        rows = [
            {"prompt": p[-200:], "before": b[:200], "after": a[:200], "same": same}
            for p, b, a, same in zip(self.prompts, self.before, self.after, self.ids_equal)
        ]
        return Check("reload_answers_equal", passed, said, {"answers": table(rows)})


def probe_rows(tokenized: Artifact, count: int) -> list[HeldOut]:
    """A few rows of the first side that has any, test first: always the same ones."""
    for side in SIDES:
        parts = tokenized.parts(side)
        rows = list(held_out_rows(parts, chosen_positions(parts, count)))
        if rows:
            return rows
    return []


def compare_prompts(
    tokenized: Artifact,
    split: Artifact,
    served: Any,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    config: Mapping[str, Any],
    limit: int = PROMPTS_A_SIDE,
) -> Prompts:
    """Renders and tokenizes prompts as a server would, from the rows' messages, and compares with the tokenized rows.

    Args:
        served: The exported tokenizer, loaded by AutoTokenizer.
        config: The configuration of tokenized_rows.
        limit: Rows of each side.
    """
    guard = ForgeryGuard(tokenizer, template, config["tokens"]["control_tokens"])
    variables = {"strftime_now": FROZEN_CLOCK.strftime} if template.uses_clock else {}
    compared = skipped = 0
    different: list[dict[str, Any]] = []
    for side in SIDES:
        parts = tokenized.parts(side)
        rows = list(held_out_rows(parts, chosen_positions(parts, limit)))
        cut = _cut_rows(parts, [r.row_id for r in rows])
        messages = _messages(split.parts(side), [r.row_id for r in rows])
        for row in rows:
            if row.row_id in cut:
                skipped += 1
                continue
            given = guard.check(conversation(messages[row.row_id], config["template"]["system"]))
            ids = served_prompt(served, given.messages[:-1], given.tools, **variables)
            compared += 1
            at = first_difference(row.prompt, ids)
            if at is not None:
                different.append(
                    {
                        "row_id": row.row_id,
                        "side": side,
                        "position": at,
                        "training": tokenizer.decode(row.prompt[at : at + 5]),
                        "served": tokenizer.decode(ids[at : at + 5]),
                    }
                )
    return Prompts(compared, skipped, different)


def _cut_rows(parts: Sequence[Path], row_ids: list[str]) -> set[str]:
    if not parts or not row_ids:
        return set()
    found = ds.dataset([str(p) for p in parts], format="parquet").to_table(
        columns=["row_id"], filter=ds.field("row_id").isin(row_ids) & (ds.field("truncated") > 0)
    )
    return set(found.column(0).to_pylist())


def _messages(parts: Sequence[Path], row_ids: list[str]) -> dict[str, dict[str, Any]]:
    if not parts or not row_ids:
        return {}
    found = ds.dataset([str(p) for p in parts], format="parquet").to_table(
        columns=["row_id", "messages", "tools"], filter=ds.field("row_id").isin(row_ids)
    )
    return {r["row_id"]: r for r in found.to_pylist()}


def merged_check(
    exact: Difference | None, loaded: Difference, dtype: Any, quantized: Difference | None, *, merged: bool
) -> Check:
    """Blocking: the exported weights' logits are those of base and adapter.

    Args:
        exact: Before casting: merged against base and adapter, both in fp32. None where nothing was merged.
        loaded: After loading the export again, in its own dtype.
        quantized: Against the 4-bit model that was trained and judged, for QLoRA.
    """
    import torch

    passed = loaded.within(dtype) and (exact is None or exact.within(torch.float32))
    what = "merged weights" if merged and exact is not None else "exported weights"
    name = str(dtype).removeprefix("torch.")
    said = f"{what} loaded again in {name}: logits differ by at most {loaded.largest:.2g} of {loaded.scale:.3g}, the likeliest token agrees at {loaded.agreement:.1%} of positions"
    if exact is not None:
        said += f"; the merge itself, in fp32: {exact.largest:.2g}"
    if quantized is not None:
        said += f"; against the 4-bit model that was trained: {quantized.largest:.2g}, agreement {quantized.agreement:.1%}"
    if not passed:
        said += ". That is more than rounding explains: try export.dtype float32, or report the architecture"
    evidence = {"largest_difference": number(loaded.largest), "agreement": number(loaded.agreement)}
    return Check("merged_equals_adapter", passed, said, evidence)


def free_memory() -> None:
    """Gives back what a dropped model held, before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
