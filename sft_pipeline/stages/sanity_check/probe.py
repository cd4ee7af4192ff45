"""The boundary probe: does any example of a packed block see another?

Asked of the loaded model itself, in its dtype and with its attention, through the collator and the forward
that training uses. Three questions, for every ordered pair (i, j) of examples:

    moved[i][j]      change every token of i: how far do j's predictions move?             must be 0
    gradient[i][j]   how much of the gradient of j's loss falls on i's embeddings?         must be 0
    alone[j]         j's loss in the block, against its loss in a row of its own           must be equal
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch

from sft_pipeline.training.data import Layout, Microbatch, microbatches
from sft_pipeline.training.loss import causal_model, install_supervised_forward
from sft_pipeline.training.shards import Block, Shards

EXAMPLES, TOKENS_EACH = 3, 48
STATE_SPACE = (
    "mamba",
    "jamba",
    "zamba",
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "rwkv",
    "recurrent_gemma",
    "lfm2",
    "qwen3_next",
    "granitemoehybrid",
    "nemotron_h",
    "xlstm",
    "minimax",
)
Collate = Callable[[Sequence[Block]], list[Microbatch]]


@dataclass(frozen=True)
class ProbeTolerance:
    """What rounding explains. moved: nats; gradient: share of the own; alone: relative."""

    moved: float
    gradient: float
    alone: float


# In fp32 and fp64 only the order of summation differs; 16-bit and 4-bit weights round every product.
EXACT, ROUNDED = ProbeTolerance(1e-4, 1e-5, 1e-4), ProbeTolerance(2e-2, 1e-3, 3e-2)


@dataclass(frozen=True)
class BoundaryProbe:
    """What the probe found for one layout; matrices are [changed example][observed example]."""

    layout: str
    passed: bool
    moved: list[list[float]] = field(default_factory=list)
    gradient: list[list[float]] = field(default_factory=list)
    packed_against_alone: list[float] = field(default_factory=list)
    cause: str | None = None
    remedy: str | None = None

    @property
    def most_moved(self) -> float:
        """The largest move of an example's predictions by a change of another, in nats."""
        others = (m for i, row in enumerate(self.moved) for j, m in enumerate(row) if i != j)
        return max(others, default=0.0)

    def rows(self) -> list[dict[str, Any]]:
        """The matrices as a table, for people."""
        return [
            {
                "layout": self.layout,
                "changed": i,
                **{f"moved_{j}": m for j, m in enumerate(moved)},
                **{f"gradient_{j}": g for j, g in enumerate(gradient)},
            }
            for i, (moved, gradient) in enumerate(zip(self.moved, self.gradient, strict=True))
        ]


def collate_as(layout: Layout) -> Collate:
    """The collator that training uses for a layout."""
    return lambda blocks: microbatches(blocks, layout=layout, per_device_batch=1, max_tokens=1 << 20)


def probe_block(shards: Shards) -> Block | None:
    """A block of the first examples of the shards, cut short: the probe looks at boundaries, not at meaning.

    Returns None where there are not two examples of two tokens.
    """
    found = list(islice((s for s in _examples(shards) if len(s) >= 2), EXAMPLES))
    return joined(found) if len(found) > 1 else None


def joined(segments: Sequence[np.ndarray]) -> Block:
    """One block of whole segments, every token supervised."""
    ids = np.concatenate(segments).astype(np.int32)
    positions = np.concatenate([np.arange(len(s)) for s in segments]).astype(np.int32)
    return Block(0, ids, ids.copy(), positions, np.array([len(s) for s in segments], dtype=np.int32))


def probe(model: Any, block: Block, layout: str, collate: Collate) -> BoundaryProbe:
    """Asks the three questions. The model is left as it was."""
    install_supervised_forward(model)
    training = model.training
    model.eval()
    try:
        return _probe(model, block, layout, collate)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        cause, remedy = explain_leak(model, layout, {"position_ids": None})
        cause = f"{cause} (its forward refuses an input: {error})"
        return BoundaryProbe(layout, False, cause=cause, remedy=remedy)
    finally:
        model.train(training)


def sees_ahead(model: Any, shards: Shards) -> tuple[float, bool]:
    """(how far predictions in the first half of an example move, in nats, when its second half is changed;
    whether that is within rounding). The model is left as it was.
    """
    example = next((s for s in _examples(shards) if len(s) >= 4), None)
    if example is None:
        return 0.0, True
    install_supervised_forward(model)
    training = model.training
    model.eval()
    try:
        half = len(example) // 2
        changed = example.copy()
        changed[half:] = _changed(example, causal_model(model))[half:]
        collate = collate_as("rows")
        before, after = (_losses(model, collate([joined([s])]), [s])[0] for s in (example, changed))
    finally:
        model.train(training)
    # The prediction at position t is of token t + 1. On a CPU also 4-bit weights are computed with in fp32.
    moved = float(np.abs(after[: half - 1] - before[: half - 1]).max())
    causal = causal_model(model)
    exact = causal.device.type == "cpu" and causal.dtype in (torch.float32, torch.float64)
    return moved, moved <= (EXACT if exact else ROUNDED).moved


def _examples(shards: Shards) -> Iterator[np.ndarray]:
    """The examples of the shards, cut short."""
    for number in range(len(shards)):
        block = shards.block(number)
        for start, length in zip(block.starts, block.lengths, strict=True):
            yield block.input_ids[start : start + min(length, TOKENS_EACH)]


def _changed(ids: np.ndarray, causal: Any) -> np.ndarray:
    """Other ids of the vocabulary: by 1, 2 or 3 modulo its size, so that no token stays what it was."""
    return (ids + 1 + np.arange(len(ids)) % 3) % causal.get_input_embeddings().weight.shape[0]


def _tolerance(causal: Any) -> ProbeTolerance:
    whole_precision = causal.dtype in (torch.float32, torch.float64)
    four_bit = getattr(causal, "is_loaded_in_4bit", False)
    return EXACT if whole_precision and not four_bit else ROUNDED


def _probe(model: Any, block: Block, layout: str, collate: Collate) -> BoundaryProbe:
    causal = causal_model(model)
    tolerance = _tolerance(causal)
    n = len(block.lengths)
    segments = [block.input_ids[s : s + k] for s, k in zip(block.starts, block.lengths, strict=True)]
    before = _losses(model, collate([block]), segments)
    moved = []
    for i in range(n):
        changed = list(segments)
        changed[i] = _changed(segments[i], causal)
        after = _losses(model, collate([joined(changed)]), changed)
        moved.append([float(np.abs(after[j] - before[j]).max()) for j in range(n)])
    gradient = _gradients(model, block, collate, segments)
    single = [_losses(model, collate_as("rows")([joined([s])]), [s])[0].sum() for s in segments]
    alone = [float(abs(before[j].sum() - single[j]) / max(abs(single[j]), 1e-9)) for j in range(n)]
    others = [(i, j) for i in range(n) for j in range(n) if i != j]
    finite = all(np.isfinite(losses).all() for losses in before)
    passed = (
        finite
        and all(moved[i][j] <= tolerance.moved and gradient[i][j] <= tolerance.gradient for i, j in others)
        and all(a <= tolerance.alone for a in alone)
    )
    if passed:
        return BoundaryProbe(layout, True, moved, gradient, alone)
    if finite:
        cause, remedy = explain_leak(model, layout, collate([block])[0].inputs)
    else:
        cause = "the model's predictions are not finite before any training"
        remedy = "check the base model's weights and training.precision"
    return BoundaryProbe(layout, False, moved, gradient, alone, cause, remedy)


def _token_losses(model: Any, m: Microbatch) -> torch.Tensor:
    """NLL of each scored prediction, [N]."""
    return model(**m.inputs, supervised_index=m.index, supervised_targets=m.targets, reduction="none")["nll"]


def _losses(model: Any, batches: Sequence[Microbatch], segments: Sequence[np.ndarray]) -> list[np.ndarray]:
    """NLL of each predicted token, by example, recognized by its ids: a layout may reorder them."""
    found: dict[int, np.ndarray] = {}
    device = causal_model(model).device
    with torch.no_grad():
        for m in batches:
            m = m.to(device)
            nll = _token_losses(model, m)
            for j, part in _owners(m, segments, used=set(found)):
                found[j] = nll[part].double().cpu().numpy()
    if len(found) < len(segments):
        raise AssertionError("the collator lost an example")
    return [found[j] for j in range(len(segments))]


def _owners(m: Microbatch, segments: Sequence[np.ndarray], used: set[int]) -> list[tuple[int, slice]]:
    """Which scored predictions belong to which example: runs of targets equal to an example's tokens after
    the first.

    Args:
        used: Examples that are in other micro-batches.
    """
    targets = m.targets.cpu().numpy()
    owners, start, used = [], 0, set(used)
    while start < len(targets):
        for j, segment in enumerate(segments):
            stop = start + len(segment) - 1
            if j not in used and stop <= len(targets) and np.array_equal(targets[start:stop], segment[1:]):
                used.add(j)
                owners.append((j, slice(start, stop)))
                start = stop
                break
        else:
            raise AssertionError("the collator changed the order of tokens within an example")
    return owners


def _gradients(
    model: Any, block: Block, collate: Collate, segments: Sequence[np.ndarray]
) -> list[list[float]]:
    """Norm of d loss_j / d embeddings_i, as a share of d loss_j / d embeddings_j; [i][j]."""
    causal = causal_model(model)
    n = len(segments)
    shares = [[0.0] * n for _ in range(n)]

    # The embeddings of a whole micro-batch become a leaf: one backward pass per example then gives its
    # gradient on all of them, and none reaches the weights.
    def leaf(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append(output.detach().requires_grad_(True))
        return kept[-1]

    for m in collate([block]):
        m = m.to(causal.device)
        kept: list[torch.Tensor] = []
        hook = causal.get_input_embeddings().register_forward_hook(leaf)
        try:
            nll = _token_losses(model, m)
        finally:
            hook.remove()
        owners = _owners(m, segments, used=set())
        for j, part in owners:
            (grad,) = torch.autograd.grad(nll[part].sum(), kept[0], retain_graph=True)
            norms = grad.reshape(-1, grad.shape[-1]).double().norm(dim=-1).cpu().numpy()
            # An example whose loss has no gradient at all must not divide by zero.
            own = max(float(np.sqrt((norms[_span(m, part)] ** 2).sum())), 1e-30)
            for i, other in owners:
                if i != j:
                    shares[i][j] = float(np.sqrt((norms[_span(m, other)] ** 2).sum())) / own
    return shares


def _span(m: Microbatch, part: slice) -> np.ndarray:
    """Flat positions of an example's tokens: those it predicts from, and the last one."""
    index = m.index.cpu().numpy()[part]
    return np.append(index, index[-1] + 1)


def explain_leak(model: Any, layout: str, inputs: dict[str, Any]) -> tuple[str, str]:
    """Why examples see each other, and what to do."""
    causal = causal_model(model)
    config = causal.config.get_text_config()
    kind = getattr(config, "model_type", "")
    layers = set(getattr(config, "layer_types", None) or [])
    if (
        any(kind.startswith(s) for s in STATE_SPACE)
        or layers & {"linear_attention", "mamba", "conv", "recurrent"}
        or getattr(causal, "_is_stateful", False)
    ):
        return (
            f"{kind} belongs to the state-space or convolution family: its state runs on across the boundary "
            "of examples, whatever the positions say",
            "set packing.strategy: none",
        )
    if inputs.get("attention_mask") is not None:
        return (
            "an attention mask is passed beside the position ids: it switches the block-diagonal mask off",
            "leave attention_mask out of the packed batch",
        )
    if inputs.get("use_cache"):
        return "the cache is on: positions are then not read as boundaries", "pass use_cache=False"
    if layout != "rows" and "position_ids" not in inputs:
        return (
            "the packed batch has no position ids: the whole row is one document",
            "pass position ids that restart at each example",
        )
    return (
        f"{type(causal).__name__} with attention {config._attn_implementation} "
        "does not read position ids as boundaries",
        "set packing.strategy: none, or another model.attention",
    )
