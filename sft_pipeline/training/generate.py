"""Generation and scoring in batches, and samples during a training; greedy by default.

Generation pads on the left, with the mask and the positions that this needs. Scoring pads on the right, where
a causal model needs neither: nothing real can see what comes after it. Both sort by length, and give results
in the order of the input.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch

from sft_pipeline.reporting import Reporter
from sft_pipeline.training.data import supervised_targets
from sft_pipeline.training.loss import causal_model, install_supervised_forward
from sft_pipeline.training.process import threads_for

SAMPLES, SAMPLE_TOKENS = 3, 96  # generated at every evaluation of a training


class Decoding(Protocol):
    """How the next token is chosen: temperature 0 is greedy."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Greedy:
    """The most likely token."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """What a model answered.

    Attributes:
        ids: New tokens, without the stop token.
        finished: It ended with a stop token; False where it ran into the limit.
    """

    ids: list[int]
    finished: bool


def generate(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stop_ids: set[int],
    pad_id: int,
    batch_size: int = 32,
    decoding: Decoding | None = None,
    report: Reporter | None = None,
    name: str = "generation",
) -> list[Reply]:
    """Replies to prompts of token ids, in their order.

    A sampled reply depends on (seed, index of the prompt) alone, not on what shares its batch. A reply also
    ends where the model's positions end; an empty prompt, or one that leaves no room, gives an empty,
    unfinished reply.

    Args:
        prompts: Ids of each prompt, without padding.
        stop_ids: Ids that end a reply.
        pad_id: Any id inside the vocabulary; what it is makes no difference.
    """
    report = report or Reporter()
    decoding = decoding or Greedy()
    positions = getattr(causal_model(model).config.get_text_config(), "max_position_embeddings", None)
    limit = int(positions) if positions else 1 << 30
    room = [max(0, min(max_new_tokens, limit - len(p))) if p else 0 for p in prompts]
    replies = [Reply([], False) for _ in prompts]
    order = sorted((i for i in range(len(prompts)) if room[i]), key=lambda i: (-len(prompts[i]), i))
    done = len(prompts) - len(order)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                ids, limits = [prompts[i] for i in batch], [room[i] for i in batch]
                found = _generate_batch(model, ids, limits, batch, stop_ids, pad_id, limit, decoding)
                for i, reply in zip(batch, found, strict=True):
                    replies[i] = reply
                done += len(batch)
                report.progress(name, done, len(prompts), "replies")
    finally:
        model.train(training)
    return replies


def _generate_batch(
    model: Any,
    prompts: list[list[int]],
    room: list[int],
    index: list[int],
    stop_ids: set[int],
    pad_id: int,
    limit: int,
    decoding: Decoding,
) -> list[Reply]:
    from transformers import DynamicCache

    device = causal_model(model).device
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    generators = (
        [torch.Generator().manual_seed(decoding.seed * 1_000_003 + i) for i in index]
        if decoding.temperature > 0
        else None
    )
    call, cache_name = _caller(model)
    cache: Any = DynamicCache(config=causal_model(model).config.get_text_config(decoder=True))
    live = list(range(len(prompts)))  # batch row -> prompt
    out: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    while True:
        result = call(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **{cache_name: cache}
        )
        cache = getattr(result, cache_name)
        chosen = _choose(
            result.logits[:, -1].float(),
            decoding,
            [generators[i] if i >= 0 else None for i in live] if generators else None,
        )
        tokens = chosen.tolist()
        keep = []
        for row, (i, token) in enumerate(zip(live, tokens, strict=True)):
            if i < 0:
                continue
            if token in stop_ids:
                finished[i] = True
                live[row] = -1
                continue
            out[i].append(token)
            if len(out[i]) >= room[i]:
                live[row] = -1
            else:
                keep.append(row)
        if not keep:
            return [Reply(o, f) for o, f in zip(out, finished, strict=True)]
        if len(keep) <= len(live) // 2 and _can_shrink(cache):
            rows = torch.tensor(keep, device=device)
            cache.batch_select_indices(rows)
            chosen, mask, positions = chosen[rows], mask[rows], positions[rows]
            live = [live[r] for r in keep]
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        positions = (positions[:, -1:] + 1).clamp(max=limit - 1)  # only rows that have ended would run over


def _choose(
    logits: torch.Tensor, decoding: Decoding, generators: list[torch.Generator | None] | None
) -> torch.Tensor:
    if generators is None:
        return logits.argmax(-1)
    probabilities = (logits / decoding.temperature).softmax(-1).cpu()
    if decoding.top_p < 1:
        ordered, at = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered > decoding.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, at, ordered)
    picked = [
        torch.multinomial(p, 1, generator=g) if g else p.argmax(-1, keepdim=True)
        for p, g in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(picked).to(logits.device)


def _caller(model: Any) -> tuple[Any, str]:
    """The model, projecting only the last position where it can, and the name of its cache argument."""
    names = inspect.signature(type(causal_model(model)).forward).parameters
    cache_name = "cache_params" if "cache_params" in names else "past_key_values"
    extra = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
    drops = {"position_ids"} - set(names)

    def call(**inputs: Any) -> Any:
        return model(**{k: v for k, v in inputs.items() if k not in drops}, **extra)

    return call, cache_name


def _can_shrink(cache: Any) -> bool:
    """Rows can be taken out of a cache of plain keys and values; recurrent states keep the whole batch."""
    from transformers.cache_utils import DynamicLayer

    return all(isinstance(layer, DynamicLayer) for layer in getattr(cache, "layers", [None]))


def score_nll(
    model: Any,
    examples: Sequence[tuple[Any, Any, Any]],
    *,
    batch_tokens: int = 8192,
    report: Reporter | None = None,
    name: str = "scoring",
) -> list[tuple[float, float]]:
    """(NLL in nats summed over supervised tokens, their number) of each example, in their order; where it has
    loss weights, both are weighted sums.

    Args:
        examples: (input_ids, labels, weights) of one example each, equally long; labels are -100 where not
            supervised; weights None: all are 1. The label of a first position is never predicted, and not
            counted.
        batch_tokens: Padded tokens per forward pass.
    """
    report = report or Reporter()
    install_supervised_forward(model)
    device = causal_model(model).device
    results: list[tuple[float, float]] = [(0.0, 0)] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i][0]), i))
    training, done = model.training, 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in _by_tokens(order, [len(e[0]) for e in examples], batch_tokens):
                width = len(examples[batch[0]][0])
                ids = torch.zeros((len(batch), width), dtype=torch.long)
                index, targets, positions = [], [], []
                for row, i in enumerate(batch):
                    ids[row, : len(examples[i][0])] = torch.as_tensor(examples[i][0])
                    at, y = supervised_targets(examples[i][1])
                    index.append(torch.from_numpy(at) + row * width)
                    targets.append(torch.from_numpy(y))
                    positions.append(at + 1)
                nll = model(
                    input_ids=ids.to(device),
                    supervised_index=torch.cat(index).to(device),
                    supervised_targets=torch.cat(targets).to(device),
                    reduction="none",
                )["nll"]
                parts = nll.double().cpu().split([len(at) for at in positions])
                for i, part, at in zip(batch, parts, positions, strict=True):
                    if (weights := examples[i][2]) is None:
                        results[i] = (float(part.sum()), len(part))
                    else:
                        of_tokens = np.asarray(weights, dtype=np.float64)[at]
                        results[i] = (float(part.numpy() @ of_tokens), float(of_tokens.sum()))
                done += len(batch)
                report.progress(name, done, len(examples), "examples")
    finally:
        model.train(training)
    return results


def _by_tokens(order: list[int], lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Groups of a descending order whose padded size is at most `batch_tokens`; at least one member each."""
    batch: list[int] = []
    for i in order:
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def make_sampler(
    model: Any,
    tokenizer: Any,
    parts: list[Path],
    formatting: Mapping[str, Any],
    count: int,
    new_tokens: int = SAMPLE_TOKENS,
) -> Callable[[], list[dict[str, Any]]]:
    """Replies of the model as it is now to a few fixed held-out prompts."""
    rows = _sample_rows(parts, count)
    prompts = [r["input_ids"][: r["prompt_length"]] for r in rows]
    stop_ids = set(formatting["stop_token_ids"])

    def sample() -> list[dict[str, Any]]:
        with threads_for(model):
            replies = generate(
                model,
                prompts,
                max_new_tokens=new_tokens,
                stop_ids=stop_ids,
                pad_id=min(stop_ids, default=0),
                batch_size=max(1, count),
            )
        return [
            {
                "prompt": tokenizer.decode(p),
                "reply": tokenizer.decode(r.ids),
                "expected": row["completion"],
                "finished": r.finished,
            }
            for p, r, row in zip(prompts, replies, rows, strict=True)
        ]

    return sample


def _sample_rows(parts: list[Path], count: int) -> list[dict[str, Any]]:
    """`count` tokenized rows, spread over the first row group: always the same ones."""
    for part in parts:
        file = pq.ParquetFile(part, memory_map=True)
        if file.metadata.num_rows:
            table = file.read_row_group(0, columns=["input_ids", "prompt_length", "completion"])
            few, last = min(count, table.num_rows), table.num_rows - 1
            return table.take(sorted({round(i * last / max(1, count - 1)) for i in range(few)})).to_pylist()
    return []
