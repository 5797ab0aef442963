"""Log-probabilities of chosen ids and the entropy in one pass over the logits, and their gradient in one more.

Forward: one program a row. It keeps the running maximum m, the sum of exp(z - m) and, for the entropy, the sum of
exp(z - m) (z - m), and rescales both sums when m grows. It stores m and the log of the first sum. So the backward needs
no reduction: each program reads one tile of logits and writes the same tile of the gradient, which may be the memory of
the logits.

Logits are [b, t, v] with any strides: a slice logits[:, :-1] is read where it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import launch, launcher, scale, widen


@triton.jit(do_not_specialize=["n", "t"])
def selective_log_softmax_forward_kernel(
    logits, ids, logprobs, entropy, normalizer, n, t, v, stride_b, stride_t, stride_v, inverse, residual,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ENTROPY: tl.constexpr, INT64: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = widen(tl.program_id(0), INT64)
    base = logits + (row // t) * stride_b + (row % t) * stride_t
    max_logit = float("-inf")
    exp_sum = 0.0
    weighted_sum = 0.0
    for start in range(0, v, BLOCK_V):
        columns = widen(start + tl.arange(0, BLOCK_V), INT64)
        z = tl.load(base + columns * stride_v, mask=columns < v, other=float("-inf")).to(tl.float32)
        z = scale(z, inverse, residual)
        new_max = tl.maximum(max_logit, tl.max(z, axis=0))
        # As long as all logits are -inf, any finite reference will do.
        reference = tl.where(new_max == float("-inf"), 0.0, new_max)
        shifted = z - reference
        e = tl.exp(shifted)
        shift = tl.where(max_logit == float("-inf"), 0.0, max_logit - reference)
        rescale = tl.exp(shift)
        if ENTROPY:
            weighted_sum = rescale * (weighted_sum + shift * exp_sum)
            weighted_sum += tl.sum(e * tl.where(e > 0.0, shifted, 0.0), axis=0)
        exp_sum = exp_sum * rescale + tl.sum(e, axis=0)
        max_logit = new_max
    max_logit = tl.where(max_logit == float("-inf"), 0.0, max_logit)
    log_sum = tl.log(exp_sum)
    tl.store(normalizer + row, max_logit)
    tl.store(normalizer + n + row, log_sum)
    if ENTROPY:
        tl.store(entropy + row, log_sum - weighted_sum / exp_sum)
    c = tl.arange(0, BLOCK_K)
    token = tl.load(ids + row * K + c, mask=c < K, other=-1)
    known = (token >= 0) & (token < v)
    z = tl.load(base + widen(token, INT64) * stride_v, mask=known, other=float("nan")).to(tl.float32)
    tl.store(logprobs + row * K + c, (scale(z, inverse, residual) - max_logit) - log_sum, mask=c < K)


@triton.jit(do_not_specialize=["n", "t"])
def selective_log_softmax_backward_kernel(
    grad, grad_entropy, logits, ids, entropy, normalizer, out, n, t, v, stride_b, stride_t, stride_v,
    out_b, out_t, out_v, inverse, residual,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ENTROPY: tl.constexpr, INT64: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = widen(tl.program_id(0), INT64)
    columns = widen(tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V), INT64)
    where = (row // t) * stride_b + (row % t) * stride_t + columns * stride_v
    z = tl.load(logits + where, mask=columns < v, other=float("-inf")).to(tl.float32)
    log_p = (scale(z, inverse, residual) - tl.load(normalizer + row)) - tl.load(normalizer + n + row)
    p = tl.exp(log_p)
    c = tl.arange(0, BLOCK_K)
    token = tl.load(ids + row * K + c, mask=c < K, other=-1)
    value = -p * tl.sum(tl.load(grad + row * K + c, mask=c < K, other=0.0), axis=0)
    if ENTROPY:
        above_mean = tl.where(p > 0.0, log_p, 0.0) + tl.load(entropy + row)  # the mean of log p is -entropy
        value -= tl.load(grad_entropy + row) * (p * above_mean)
    first = tl.program_id(1) * BLOCK_V
    # Most tiles contain none of the ids.
    if tl.max(((token >= first) & (token < first + BLOCK_V)).to(tl.int32), axis=0) > 0:
        for i in range(K):
            chosen = tl.load(ids + row * K + i)
            value += tl.where(columns == chosen, tl.load(grad + row * K + i), 0.0)
    where = (row // t) * out_b + (row % t) * out_t + columns * out_v
    tl.store(out + where, (value * inverse).to(out.dtype.element_ty), mask=columns < v)


def _inverse(temperature: float) -> dict[str, Any]:
    inverse = float(np.float32(1.0 / temperature))
    return {"inverse": inverse, "residual": 1.0 / temperature - inverse}


@launcher("ids")
def forward(logits: Tensor, ids: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [b t, K], entropy [b t] (or empty) and normalizer [2, b t] of logits [b, t, v], ids [b t, K].

    All three are float32. An id out of range gives NaN.
    """
    (_, t, v), (n, k) = logits.shape, ids.shape
    logprobs = torch.empty(n, k, dtype=torch.float32, device=logits.device)
    entropies = torch.empty(n if entropy else 0, dtype=torch.float32, device=logits.device)
    normalizer = torch.empty(2, n, dtype=torch.float32, device=logits.device)
    launch(
        selective_log_softmax_forward_kernel, lambda meta: (n,), width=v, int64_for=(logits, ids),
        logits=logits, ids=ids, logprobs=logprobs, entropy=entropies, normalizer=normalizer, n=n, t=t, v=v,
        stride_b=logits.stride(0), stride_t=logits.stride(1), stride_v=logits.stride(2),
        **_inverse(temperature), K=k, BLOCK_K=triton.next_power_of_2(k), ENTROPY=entropy,
    )  # fmt: skip
    return logprobs, entropies, normalizer


@launcher("grad", "grad_entropy", "ids", "entropy", "normalizer")
def backward(
    grad: Tensor, grad_entropy: Tensor, logits: Tensor, ids: Tensor, entropy: Tensor, normalizer: Tensor,
    temperature: float, in_place: bool,
) -> Tensor:  # fmt: skip
    """The gradient of logits, in their dtype; in their own memory with `in_place`."""
    (b, t, v), (n, k) = logits.shape, ids.shape
    out = logits if in_place else torch.empty(b, t, v, dtype=logits.dtype, device=logits.device)
    launch(
        selective_log_softmax_backward_kernel, lambda meta: (n, triton.cdiv(v, meta["BLOCK_V"])),
        width=v, int64_for=(logits, out, ids), tunable=not in_place,
        grad=grad, grad_entropy=grad_entropy, logits=logits, ids=ids, entropy=entropy, normalizer=normalizer,
        out=out, n=n, t=t, v=v, stride_b=logits.stride(0), stride_t=logits.stride(1), stride_v=logits.stride(2),
        out_b=out.stride(0), out_t=out.stride(1), out_v=out.stride(2), **_inverse(temperature),
        K=k, BLOCK_K=triton.next_power_of_2(k), ENTROPY=entropy.numel() > 0,
    )  # fmt: skip
    return out
