"""Proof that what is exported is what was judged: logits, greedy answers, served prompts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq

from sft_pipeline.stages.stage import Check, number, table
from sft_pipeline.store import Artifact
from sft_pipeline.tables.held_out import HeldOutRow, chosen_positions, held_out_rows
from sft_pipeline.text.auto_tokenizer import frozen_clock
from sft_pipeline.text.conversation import ForgeryGuard, conversation
from sft_pipeline.text.template import ChatTemplate
from sft_pipeline.text.tokenizer import Tokenizer
from sft_pipeline.training.export import ExportProof

PROBES, ANSWERS = 6, 4  # rows whose logits are compared, and the first of them that are answered
ANSWER_TOKENS = 64
PROMPTS_PER_SPLIT = 100
SPLITS = ("test", "validation", "train")


def reload_tokenizer(folder: Path) -> Any:
    """The exported tokenizer as a stranger would load it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def merged_equals_adapter(proof: ExportProof) -> Check:
    """Blocking: the exported weights' logits are those of base and adapter."""
    evidence = {
        "largest_difference": number(proof.loaded.largest),
        "agreement": number(proof.loaded.agreement),
    }
    return Check("merged_equals_adapter", proof.passed, str(proof), evidence)


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
