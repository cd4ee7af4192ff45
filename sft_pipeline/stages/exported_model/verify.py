"""Proof that what is exported is what was judged: logits, greedy answers, served prompts."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch

from sft_pipeline.errors import InputError
from sft_pipeline.stages.stage import Check, number, table
from sft_pipeline.store import Artifact
from sft_pipeline.tables.held_out import HeldOutRow, chosen_positions, held_out_rows
from sft_pipeline.text.auto_tokenizer import frozen_clock
from sft_pipeline.text.conversation import ForgeryGuard, conversation
from sft_pipeline.text.template import ChatTemplate
from sft_pipeline.text.tokenizer import Tokenizer
from sft_pipeline.training.process import threads_for

PROBES, ANSWERS = 6, 4  # rows whose logits are compared, and the first of them that are answered
PROBE_TOKENS, ANSWER_TOKENS = 256, 64
PROMPTS_PER_SPLIT = 100
SPLITS = ("test", "validation", "train")
# Largest difference of a logit, in units of the largest logit, that rounding the weights to a dtype explains.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@dataclass(frozen=True)
class LogitDifference:
    """Of two models' logits on the same ids.

    Attributes:
        largest: Largest absolute difference.
        scale: Largest absolute reference logit.
        agreement: Share of positions whose most likely token is the same.
    """

    largest: float
    scale: float
    agreement: float

    def within(self, dtype: torch.dtype) -> bool:
        return self.largest <= TOLERANCE[dtype] * max(1.0, self.scale)


@dataclass(frozen=True)
class ExportProof:
    """What was measured while the weights were written and loaded again.

    Attributes:
        exact: Before casting: merged against base and adapter, both in fp32. None where nothing was merged.
        loaded: The reference (the checkpoint in fp32) against the export loaded again, in its own dtype.
        quantized: The reference against the 4-bit model that was trained and judged, for QLoRA.
        before, after: Ids of greedy answers before saving and after loading again.
        dtype: Of the exported weights.
    """

    exact: LogitDifference | None
    loaded: LogitDifference
    quantized: LogitDifference | None
    before: list[list[int]]
    after: list[list[int]]
    dtype: torch.dtype


def probe_rows(tokenized: Artifact, count: int) -> list[HeldOutRow]:
    """A few rows of the first split that has any, test first: always the same ones.

    Raises:
        InputError: No split has a row.
    """
    for split in SPLITS:
        parts = tokenized.parts(split)
        rows = list(held_out_rows(parts, chosen_positions(parts, count)))
        if rows:
            return rows
    raise InputError(f"{tokenized.manifest.asset} has no rows to prove the export with")


@torch.inference_mode()
def logits(model: Any, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """fp32 logits [length, vocabulary] of each sequence (its first 256 tokens), on the CPU, one at a time."""
    device = next(model.parameters()).device
    found = []
    with threads_for(model):
        # One by one: padding would make models differ that agree on the row itself.
        for ids in sequences:
            batch = torch.tensor([list(ids)[:PROBE_TOKENS]], device=device)
            found.append(model(input_ids=batch, use_cache=False).logits[0].float().cpu())
    return found


def difference(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> LogitDifference:
    """Compares logits position by position. A NaN in either is an infinite difference."""
    infinity = float("inf")
    largest = max(
        float((a - b).abs().nan_to_num(nan=infinity).max()) for a, b in zip(reference, other, strict=True)
    )
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(reference, other))
    scale = max(float(a.abs().max()) for a in reference)
    return LogitDifference(largest, scale, same / sum(len(a) for a in reference))


@torch.inference_mode()
def greedy(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, **settings: Any
) -> list[list[int]]:
    """New ids for each prompt, by transformers' own `generate`, one prompt at a time, as users call it.

    Args:
        settings: eos_token_id and pad_token_id, where the model's generation config is not to be used.
    """
    device = next(model.parameters()).device
    found = []
    with threads_for(model):
        for ids in prompts:
            batch = torch.tensor([list(ids)], device=device)
            out = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                **settings,
            )
            found.append(out[0, len(ids) :].tolist())
    return found


def reload_model(folder: Path, *, trust_remote_code: bool) -> Any:
    """The exported weights as a stranger would load them."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def reload_tokenizer(folder: Path) -> Any:
    """The exported tokenizer as a stranger would load it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def free_memory() -> None:
    """Gives back what a dropped model held, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def merged_equals_adapter(proof: ExportProof) -> Check:
    """Blocking: the exported weights' logits are those of base and adapter."""
    exact, loaded, quantized = proof.exact, proof.loaded, proof.quantized
    passed = loaded.within(proof.dtype) and (exact is None or exact.within(torch.float32))
    description = (
        f"{'exported' if exact is None else 'merged'} weights loaded again in "
        f"{str(proof.dtype).removeprefix('torch.')}: logits differ by at most {loaded.largest:.2g} "
        f"of {loaded.scale:.3g}, the likeliest token agrees at {loaded.agreement:.1%} of positions"
    )
    if exact is not None:
        description += f"; the merge itself, in fp32: {exact.largest:.2g}"
    if quantized is not None:
        description += (
            f"; against the 4-bit model that was trained: {quantized.largest:.2g}, "
            f"agreement {quantized.agreement:.1%}"
        )
    if not passed:
        description += (
            ". That is more than rounding explains: try export.dtype float32, or report the architecture"
        )
    evidence = {"largest_difference": number(loaded.largest), "agreement": number(loaded.agreement)}
    return Check("merged_equals_adapter", passed, description, evidence)


def reload_answers_equal(
    proof: ExportProof,
    rows: Sequence[HeldOutRow],
    decode: Callable[[Sequence[int]], str],
    evaluated: Artifact,
    evaluation: Mapping[str, Any],
) -> Check:
    """Blocking: greedy answers are the same before saving and after loading again.

    Where the evaluation decoded greedily, the description says how many are the replies that it recorded.

    Args:
        rows: What was answered.
        evaluated: The evaluation, with samples.parquet.
        evaluation: Its evaluation.json.
    """
    same = [a == b for a, b in zip(proof.before, proof.after, strict=True)]
    description = f"{sum(same)} of {len(same)} greedy answers are the same after loading the export again"
    if evaluation["decoding"]["temperature"] == 0:
        samples = pq.read_table(
            evaluated.file("samples.parquet"),
            columns=["row_id", "reply", "step"],
            filters=[("step", "=", evaluation["chosen_step"])],
        )
        replies = {r["row_id"]: r["reply"].strip() for r in samples.to_pylist()}
        pairs = [
            (answer, decode(answer).strip(), replies[row.row_id])
            for row, answer in zip(rows, proof.before)
            if row.row_id in replies
        ]
        # Answers are cut at fewer tokens here, and what the template puts around a reply is removed there.
        recorded = sum(
            a == b or (b != "" and b in a) or (len(ids) > 0 and b.startswith(a)) for ids, a, b in pairs
        )
        if pairs:
            description += f"; {recorded} of {len(pairs)} are those that the evaluation recorded"
    answers = [
        {
            "prompt": decode(row.prompt)[-200:],
            "before": decode(before)[:200],
            "after": decode(after)[:200],
            "same": before == after,
        }
        for row, before, after in zip(rows, proof.before, proof.after)
    ]
    return Check("reload_answers_equal", bool(same) and all(same), description, {"answers": table(answers)})


def served_prompt(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
) -> list[int]:
    """The ids that a server sends to have the next message generated."""
    found = tokenizer.apply_chat_template(
        list(messages), tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return list(found)


def served_prompt_equal(
    tokenized: Artifact, split: Artifact, served: Any, tokenizer: Tokenizer, template: ChatTemplate
) -> Check:
    """Blocking: prompts that a server would make of the rows' messages are those of training, id by id.

    Rows that were cut to fit are left out, since their served prompt is meant to differ.

    Args:
        tokenized: The rows, whose prompts are the reference; 100 of each split are compared.
        split: grouped_split, with the rows' messages.
        served: The exported tokenizer, loaded by AutoTokenizer.
        tokenizer, template: Those that the rows were made with.
    """
    config = tokenized.manifest.config
    guard = ForgeryGuard(tokenizer, template, config["tokens"]["control_tokens"])
    compared = skipped = 0
    different: list[dict[str, Any]] = []
    for name in SPLITS:
        parts = tokenized.parts(name)
        rows = list(held_out_rows(parts, chosen_positions(parts, PROMPTS_PER_SPLIT)))
        row_ids = [r.row_id for r in rows]
        cut = {r["row_id"] for r in _select(parts, row_ids, ["row_id"], ds.field("truncated") > 0)}
        messages = _select(split.parts(name), row_ids, ["row_id", "messages", "tools"])
        by_id = {r["row_id"]: r for r in messages}
        for row in rows:
            if row.row_id in cut:
                skipped += 1
                continue
            given = guard.check(conversation(by_id[row.row_id], config["template"]["system"]))
            with frozen_clock():
                ids = served_prompt(served, template.as_read(given.messages[:-1]), given.tools)
            compared += 1
            if ids != row.prompt:
                pairs = enumerate(zip(row.prompt, ids))
                at = next((i for i, (a, b) in pairs if a != b), min(len(row.prompt), len(ids)))
                different.append(
                    {
                        "row_id": row.row_id,
                        "side": name,
                        "position": at,
                        "training": tokenizer.decode(row.prompt[at : at + 5]),
                        "served": tokenizer.decode(ids[at : at + 5]),
                    }
                )
    if different:
        first = different[0]
        description = (
            f"{len(different)} of {compared} prompts differ, first at token {first['position']} of row "
            f"{first['row_id']}: training has {first['training']!r}, AutoTokenizer {first['served']!r}. "
            "A server would send the model what it was not trained on"
        )
    elif compared:
        description = (
            "AutoTokenizer with the exported template gives training's ids "
            f"for the prompts of {compared} rows"
        )
    else:
        description = "no row could be compared: every row was cut to fit (tokens.overflow)"
    if skipped:
        description += f"; {skipped} rows that were cut to fit were left out"
    evidence = {"different": table(different[:10]), "compared": number(compared)}
    return Check("served_prompt_equal", bool(compared) and not different, description, evidence)


def _select(
    parts: Sequence[Path], row_ids: list[str], columns: list[str], condition: ds.Expression | None = None
) -> list[dict[str, Any]]:
    """The rows of Parquet parts with these ids, and only those that meet the condition."""
    if not parts or not row_ids:
        return []
    wanted = ds.field("row_id").isin(row_ids)
    rows = ds.dataset([str(p) for p in parts], format="parquet")
    return rows.to_table(columns, filter=wanted if condition is None else wanted & condition).to_pylist()
