"""The loss: cross-entropy at supervised positions only, without logits for the rest.

    hidden [B, T, H] -> gather N supervised rows [N, H] -> output projection in chunks -> sum of NLL (fp32)

Where messages have loss weights, the sum is of weight x NLL, and whoever takes the mean divides by the sum of
the weights, as torch's cross_entropy does with weights of classes.

Of a prompt of 1,000 tokens with an answer of 50, this projects 50 rows onto the vocabulary. Within a chunk
the gradient of the loss is computed in the forward pass (as fused cross-entropy kernels do), so that no
chunk's logits outlive it: memory is one chunk, and nothing is recomputed.

Computed in fp32, loss and gradients are those of a float64 model on padded, unpacked rows to within 1e-5
(relative L2 per tensor; measured: 4e-7 to 3e-6). In bf16 the rounding of the model's own operations
dominates: gradients are within 6 % per tensor of those in fp32 (measured on tiny models: 0.8 % full, 2.3 %
LoRA, 4 % LoRA under a softcap).
"""

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

log = logging.getLogger(__name__)


CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows projected at once: a chunk of fp32 logits stays near 64 MB on a CPU and 256 MB on a GPU."""
    return max(32, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"]) // vocabulary)


class _SummedNll(torch.autograd.Function):
    """sum over i of -weight_i log softmax(transform(hidden_i W^T + b))[target_i], with its gradients in
    forward. `weights`: float32 [N], or None where all are 1.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights, scale, cap, dtype):
        want_hidden, want_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        want_bias = bias is not None and ctx.needs_input_grad[2]
        wanted = want_hidden or want_weight or want_bias
        total = torch.zeros((), dtype=_accumulator(hidden), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = (
            torch.zeros(weight.shape, dtype=_accumulator(weight), device=weight.device)
            if want_weight
            else None
        )
        grad_bias = (
            torch.zeros(bias.shape, dtype=_accumulator(bias), device=bias.device) if want_bias else None
        )
        rows = chunk_rows(weight.shape[0], hidden.device.type)
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            b = bias.to(dtype) if bias is not None else None
            for start in range(0, hidden.shape[0], rows):
                h, y = hidden[start : start + rows].to(dtype), targets[start : start + rows]
                logits = _transform(F.linear(h, w, b), scale, cap)
                picked = logits.gather(1, y[:, None])[:, 0]
                slope = (1 - (logits / cap) ** 2) if cap and wanted else None
                highest = logits.amax(-1)
                # exp(logits - highest) in place serves the norm and, divided by it, the gradient: one
                # exponential.
                grad = logits.sub_(highest[:, None]).exp_()
                norm = grad.sum(-1)
                nll = highest + norm.log() - picked
                share = None if weights is None else weights[start : start + rows].to(nll.dtype)
                total += nll.sum() if share is None else nll @ share
                if not wanted:
                    continue
                grad /= norm[:, None]
                grad.scatter_add_(1, y[:, None], grad.new_full((len(y), 1), -1.0))
                if share is not None:
                    grad *= share[:, None]
                if slope is not None:
                    grad *= slope
                if scale != 1.0:
                    grad *= scale
                grad = grad.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + rows] = grad @ w
                if grad_weight is not None and grad_weight.dtype == dtype:
                    grad_weight.addmm_(grad.t(), h)  # no second matrix of the weight's size: half the time
                elif grad_weight is not None:
                    grad_weight += grad.t() @ h
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        grads = [
            None if g is None else (g * upstream.to(g.dtype)).to(d)
            for g, d in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None, None)


def _accumulator(tensor: torch.Tensor) -> torch.dtype:
    """Sums are kept in fp32, in fp64 where the model is."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _transform(logits: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    logits = logits.to(_accumulator(logits))
    if scale != 1.0:
        logits = logits * scale
    if cap:
        logits = torch.tanh(logits / cap) * cap
    return logits


def output_transform(config: Any) -> tuple[float, float | None]:
    """(factor, softcap) that an architecture applies to its logits.

    Gemma caps, Granite divides, Cohere multiplies.
    """
    text = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            scale = float(getattr(text, name))
    if getattr(text, "logits_scaling", None) is not None:
        scale = 1.0 / float(text.logits_scaling)
    cap = getattr(text, "final_logit_softcapping", None)
    return scale, (float(cap) if cap else None)


def causal_model(model: nn.Module) -> Any:
    """The architecture's own causal model below data-parallel, compile and PEFT wrappers."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    inner = getattr(inner, "_orig_mod", inner)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def install_supervised_forward(model: nn.Module) -> str:
    """Gives the causal model a forward that returns the loss at supervised positions.

    `model(input_ids=..., supervised_index=i [N], supervised_targets=y [N], supervised_weights=w [N] | None,
    reduction="sum"|"none")` then returns {"nll": sum of w * NLL, or NLL [N]} in fp32, where i indexes the
    flattened [B * T] positions and y the ids predicted there. Calls without `supervised_index` are the
    model's own. It sits inside the wrappers, so that DDP's gradient hooks, PEFT and gradient checkpointing
    see an ordinary forward.

    Returns:
        "selected" where only supervised positions are projected, or "full: <why>" where the model's own
        logits must be taken whole; the caller reports it.
    """
    causal = causal_model(model)
    if getattr(causal, "supervised_head", None) is not None:
        return causal.supervised_head
    own_forward = causal.forward
    scale, cap = output_transform(causal.config)

    def selected(
        index: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        reduction: str,
        inputs: dict[str, Any],
    ) -> torch.Tensor:
        hidden = causal.base_model(**inputs, use_cache=False).last_hidden_state
        head = causal.get_output_embeddings()
        rows = hidden.reshape(-1, hidden.shape[-1])[index.to(hidden.device)]
        targets = targets.to(hidden.device)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        if reduction == "sum":
            weights = None if weights is None else weights.to(hidden.device)
            return _SummedNll.apply(rows, head.weight, head.bias, targets, weights, scale, cap, dtype)
        return token_nll(rows.to(dtype), head.weight.to(dtype), head.bias, targets, scale, cap)

    def whole(
        index: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        reduction: str,
        inputs: dict[str, Any],
    ) -> torch.Tensor:
        logits = own_forward(**inputs, use_cache=False).logits
        rows = logits.reshape(-1, logits.shape[-1])[index.to(logits.device)]
        targets = targets.to(rows.device)
        if weights is None or reduction == "none":
            return F.cross_entropy(rows.to(_accumulator(rows)), targets, reduction=reduction)
        nll = F.cross_entropy(rows.to(_accumulator(rows)), targets, reduction="none")
        return nll @ weights.to(nll)

    reason = _why_not(causal, scale, cap, own_forward)
    compute = whole if reason else selected

    @functools.wraps(type(causal).forward)  # generate() checks its arguments against this signature
    def forward(
        *args,
        supervised_index=None,
        supervised_targets=None,
        supervised_weights=None,
        reduction="sum",
        **kwargs,
    ):
        if supervised_index is None:
            return own_forward(*args, **kwargs)
        return {"nll": compute(supervised_index, supervised_targets, supervised_weights, reduction, kwargs)}

    causal.forward = forward
    causal.supervised_head = f"full: {reason}" if reason else "selected"
    if reason:
        log.warning("the loss takes the model's whole logits, which costs time and memory: %s", reason)
    return causal.supervised_head


def token_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scale: float,
    cap: float | None,
) -> torch.Tensor:
    """NLL [N] of each target, by chunks; ordinary autograd applies."""
    rows = chunk_rows(weight.shape[0], hidden.device.type)
    parts = [
        F.cross_entropy(
            _transform(F.linear(hidden[s : s + rows], weight, bias), scale, cap),
            targets[s : s + rows],
            reduction="none",
        )
        for s in range(0, len(hidden), rows)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def _why_not(causal: Any, scale: float, cap: float | None, own_forward: Any) -> str | None:
    """Why the projection cannot be taken apart from the model, found by trying; None where it can."""
    head = causal.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"its output layer is {type(head).__name__}, not a plain linear layer"
    if causal.base_model is causal:
        return "its backbone cannot be called apart from its head"
    vocabulary = causal.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(8, device=head.weight.device) * 7 % vocabulary)[None]
    training = causal.training
    causal.eval()
    try:
        with torch.no_grad():
            expected = own_forward(input_ids=ids, use_cache=False).logits
            hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
            found = _transform(head(hidden), scale, cap)
    except Exception as error:
        return f"its parts could not be called apart ({type(error).__name__}: {error})"
    finally:
        causal.train(training)
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    # Written so that NaN weights, which some other check must report, do not look like a different
    # architecture.
    if (found - expected).abs().max() > tolerance * max(1.0, expected.abs().max().item()):
        return f"{type(causal).__name__} does something to its logits that its configuration does not say"
    return None
