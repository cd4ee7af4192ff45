"""From the blocks of an update to micro-batches of tensors, in the order of the update plan.

The update plan says which blocks an update holds. Rank r takes every world-th of them from the r-th on, and
lays its share out in the way that is fastest on its device. Every layout holds the same examples and gives
the same gradients.

    packed   one row per block, positions restart at each example, no attention mask   (GPU)
             | a a a | b b | c c c c |        positions 0 1 2 0 1 0 1 2 3
    flat     the blocks of a micro-batch in one row, with segment offsets              (GPU, flash attention)
    rows     one row per example, padded on the right, similar lengths together        (CPU)
             | a a a . | c c c c |  | b b |

On a CPU a block-diagonal mask would cost attention over the whole block.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from sft_pipeline.tables.schemas import IGNORE_LABEL
from sft_pipeline.training.config import TrainingConfig
from sft_pipeline.training.shards import Block, Plan, Shards

Layout = Literal["packed", "flat", "rows"]
T = TypeVar("T")


def layout_for(device: torch.device, attention: str) -> Layout:
    """The fastest: examples as rows on a CPU, blocks on a GPU, flattened where attention takes offsets."""
    if device.type == "cpu":
        return "rows"
    return "flat" if attention.startswith("flash_attention") else "packed"


def supervised_targets(
    labels: Sequence[int] | np.ndarray, starts: Sequence[int] | np.ndarray = (0,)
) -> tuple[np.ndarray, np.ndarray]:
    """Where a prediction is scored, and what must be predicted there.

    Position t predicts the token at t + 1. The first token of an example is predicted by nothing: at a
    boundary inside a block it would be the last token of the example before, which has nothing to do with it.

    Args:
        labels: [L], -100 where not supervised.
        starts: First positions of the examples.

    Returns:
        (positions [N] ascending, targets [N]), int64.
    """
    labels = np.array(labels, dtype=np.int64)
    labels[np.asarray(starts, dtype=np.int64)] = IGNORE_LABEL
    at = np.flatnonzero(labels != IGNORE_LABEL)
    return at - 1, labels[at]


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass takes.

    inputs: keyword arguments of the model: input_ids [B, T]; in the layouts packed and flat also position_ids
    [B, T]; in flat the segment offsets too;
    index, targets: int64 [N], flattened positions that are scored and the ids predicted there;
    weights: float32 [N], what each of them counts for in the loss, or None where all count 1;
    lengths: int64 [B], in the layout rows, where each sequence is one example: its length without padding;
    examples, tokens: without padding.
    """

    inputs: dict[str, Any]
    index: torch.Tensor
    targets: torch.Tensor
    examples: int
    tokens: int
    weights: torch.Tensor | None = None
    lengths: torch.Tensor | None = None

    @property
    def weight(self) -> float:
        """The sum of the weights: what the summed loss is divided by."""
        return len(self.targets) if self.weights is None else float(self.weights.sum(dtype=torch.float64))

    def to(self, device: torch.device) -> "Microbatch":
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Microbatch":
        """In page-locked memory, from which a GPU copies without waiting."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Microbatch":
        inputs = {k: move(v) if isinstance(v, torch.Tensor) else v for k, v in self.inputs.items()}
        given = {
            "index": self.index,
            "targets": self.targets,
            "weights": self.weights,
            "lengths": self.lengths,
        }
        moved: dict[str, Any] = {k: None if v is None else move(v) for k, v in given.items()}
        return replace(self, inputs=inputs, **moved)


@dataclass(frozen=True)
class UpdateBatch:
    """One rank's share of one update. `blocks` are all blocks of the update, whatever the rank."""

    update: int
    blocks: tuple[int, ...]
    microbatches: tuple[Microbatch, ...] = field(repr=False)

    @property
    def supervised(self) -> int:
        return sum(len(m.targets) for m in self.microbatches)

    @property
    def weight(self) -> float:
        return sum(m.weight for m in self.microbatches)

    @property
    def tokens(self) -> int:
        return sum(m.tokens for m in self.microbatches)

    @property
    def examples(self) -> int:
        return sum(m.examples for m in self.microbatches)


def microbatches(
    blocks: Sequence[Block], *, layout: Layout, per_device_batch: int, max_tokens: int
) -> list[Microbatch]:
    """Lays blocks out as micro-batches.

    Args:
        per_device_batch: Blocks in a micro-batch of the packed layouts.
        max_tokens: Padded tokens in a micro-batch of the rows layout (at least one example).
    """
    if not blocks:
        # An update with fewer blocks than there are ranks: this rank must still join the gradient sum.
        none = torch.zeros(0, dtype=torch.long)
        return [Microbatch({"input_ids": torch.zeros((1, 2), dtype=torch.long)}, none, none, 0, 0)]
    if layout == "rows":
        return _rows(blocks, max_tokens)
    groups = [blocks[i : i + per_device_batch] for i in range(0, len(blocks), per_device_batch)]
    return [(_flat if layout == "flat" else _packed)(group) for group in groups]


def _packed(blocks: Sequence[Block]) -> Microbatch:
    width = max(len(b.input_ids) for b in blocks)
    ids = np.zeros((len(blocks), width), dtype=np.int64)
    # Padding counts from 0 again, so that it is a segment of its own, which no real token can see.
    positions = np.zeros((len(blocks), width), dtype=np.int64)
    scored = _Scored()
    for row, block in enumerate(blocks):
        n = len(block.input_ids)
        ids[row, :n], positions[row, :n] = block.input_ids, block.position_ids
        positions[row, n:] = np.arange(width - n)
        scored.add(block.labels, block.starts, block.weights, row * width)
    inputs = {"input_ids": torch.from_numpy(ids), "position_ids": torch.from_numpy(positions)}
    return _microbatch(blocks, inputs, scored)


def _flat(blocks: Sequence[Block]) -> Microbatch:
    lengths = np.concatenate([b.lengths for b in blocks])
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    longest = int(lengths.max())
    scored, before = _Scored(), 0
    for block in blocks:
        scored.add(block.labels, block.starts, block.weights, before)
        before += len(block.input_ids)
    ids = np.concatenate([b.input_ids for b in blocks]).astype(np.int64)
    positions = np.concatenate([b.position_ids for b in blocks]).astype(np.int64)
    inputs = {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return _microbatch(blocks, inputs, scored)


def _microbatch(blocks: Sequence[Block], inputs: dict[str, Any], scored: "_Scored") -> Microbatch:
    return Microbatch(
        inputs,
        *scored.index_and_targets(),
        examples=sum(len(b.lengths) for b in blocks),
        tokens=sum(len(b.input_ids) for b in blocks),
        weights=scored.weights(),
    )


class _Scored:
    """The scored positions of a micro-batch, gathered sequence by sequence."""

    def __init__(self) -> None:
        self._index: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []
        self._weights: list[np.ndarray | None] = []

    def add(
        self, labels: np.ndarray, starts: Sequence[int] | np.ndarray, weights: np.ndarray | None, before: int
    ) -> None:
        """Those of a sequence that has `before` positions in front of it."""
        at, y = supervised_targets(labels, starts)
        self._index.append(at + before)
        self._targets.append(y)
        self._weights.append(None if weights is None else weights[at + 1])

    def index_and_targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(np.concatenate(self._index)), torch.from_numpy(np.concatenate(self._targets))

    def weights(self) -> torch.Tensor | None:
        if all(w is None for w in self._weights):
            return None
        given = [
            np.ones(len(y), np.float32) if w is None else w for w, y in zip(self._weights, self._targets)
        ]
        return torch.from_numpy(np.concatenate(given).astype(np.float32))


def _rows(blocks: Sequence[Block], max_tokens: int) -> list[Microbatch]:
    """Examples by descending length (ties in plan order), in micro-batches that stay in the bound.

    No mask and no positions are needed: to a causal model padding on the right is invisible.
    """
    segments: list[_Segment] = [
        (b.input_ids[s : s + n], b.labels[s : s + n], None if b.weights is None else b.weights[s : s + n])
        for b in blocks
        for s, n in zip(b.starts, b.lengths, strict=True)
    ]
    segments.sort(key=lambda s: -len(s[0]))
    found: list[Microbatch] = []
    group: list[_Segment] = []
    for segment in segments:
        if group and len(group[0][0]) * (len(group) + 1) > max_tokens:
            found.append(_pad(group))
            group = []
        group.append(segment)
    found.append(_pad(group))
    return found


_Segment = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # input_ids, labels, weights of an example


def _pad(group: list[_Segment]) -> Microbatch:
    width = len(group[0][0])
    ids = np.zeros((len(group), width), dtype=np.int64)
    scored = _Scored()
    for row, (tokens, labels, weights) in enumerate(group):
        ids[row, : len(tokens)] = tokens
        scored.add(labels, (0,), weights, row * width)
    return Microbatch(
        {"input_ids": torch.from_numpy(ids)},
        *scored.index_and_targets(),
        examples=len(group),
        tokens=sum(len(t) for t, _, _ in group),
        weights=scored.weights(),
        lengths=torch.tensor([len(tokens) for tokens, _, _ in group]),
    )


@dataclass(frozen=True)
class Feed:
    """Updates in plan order, as this rank's tensors.

    `updates` bounds the plan (training.max_steps); `max_tokens` bounds padded tokens of a rows micro-batch.
    """

    shards: Shards
    plan: Plan
    layout: Layout
    per_device_batch: int
    max_tokens: int
    updates: int
    rank: int = 0
    world: int = 1

    def update(self, number: int) -> UpdateBatch:
        blocks = [int(b) for b in self.plan.blocks(number)]
        own = [self.shards.block(b) for b in blocks[self.rank :: self.world]]
        parts = microbatches(
            own, layout=self.layout, per_device_batch=self.per_device_batch, max_tokens=self.max_tokens
        )
        return UpdateBatch(number, tuple(blocks), tuple(parts))

    def iterate(self, start: int) -> Iterator[UpdateBatch]:
        """Updates start, start + 1, ... to the end, made ahead in a thread."""

        def batches() -> Iterator[UpdateBatch]:
            for number in range(start, self.updates):
                batch = self.update(number)
                if torch.cuda.is_available():
                    batch = replace(batch, microbatches=tuple(m.pinned() for m in batch.microbatches))
                yield batch

        return prefetched(batches(), depth=4)

    def row_ids(self, update: int) -> list[str]:
        """Every row of an update."""
        return [row for block in self.plan.blocks(update) for row in self.shards.row_ids(int(block))]


def make_feed(
    shards: Shards,
    plan: Plan,
    training: TrainingConfig,
    *,
    layout: Layout,
    updates: int,
    rank: int = 0,
    world: int = 1,
) -> Feed:
    """The feed of a training.

    A rows micro-batch may hold as many padded tokens as a packed one: per_device_batch of the longest block
    of the first update. Packed blocks are about equally long; without packing, that of another update can be
    longer. The bound only groups examples, but other groups round sums otherwise, so it stays.
    """
    batch = training.per_device_batch
    longest = max((len(shards.block(int(b)).input_ids) for b in plan.blocks(0)), default=1)
    return Feed(shards, plan, layout, batch, batch * longest, updates, rank, world)


def all_blocks(
    shards: Shards, *, layout: Layout, per_device_batch: int, max_tokens: int, rank: int = 0, world: int = 1
) -> Iterator[Microbatch]:
    """Every block once, for evaluation: this rank's share, laid out 8 micro-batches at a time."""
    own = range(rank, len(shards), world)
    step = 8 * per_device_batch
    for start in range(0, len(own), step):
        blocks = [shards.block(i) for i in own[start : start + step]]
        yield from microbatches(
            blocks, layout=layout, per_device_batch=per_device_batch, max_tokens=max_tokens
        )


def prefetched(items: Iterable[T], depth: int) -> Iterator[T]:
    """The same items, made up to `depth` ahead in a thread, which ends with the consumer."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop, end = threading.Event(), object()

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    threading.Thread(target=work, name="feed", daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
