"""Log-probabilities of chosen ids and the entropy in one pass over the logits, and their gradient in one more.

Forward: a program a row and a piece of the vocabulary reads its logits once and leaves their largest, the sum of
exp(z - largest) and, for the entropy, its first moment. Then a program a row merges the pieces, and stores the row's
largest logit and the sum. How the vocabulary is cut depends on V alone, so a row's bits do not depend on its
batch, and a few rows keep the whole GPU busy. The backward needs no reduction: each program reads one tile of logits
and writes the same tile of the gradient, which may be the memory of the logits.

Logits are [b, t, v] with any strides: a slice logits[:, :-1] is read where it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .primitives import (
    LN_2,
    aligned_rows,
    ceil_div,
    exponentials,
    interpreted,
    launch,
    launcher,
    merged,
    next_power_of_2,
    scale,
    widen,
)


@triton.jit(do_not_specialize=["t"])
def selective_log_softmax_partials_kernel(
    logits, tops, masses, moments, t, v, splits, stride_b, stride_t, stride_v, slope,
    ENTROPY: tl.constexpr, INT64: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row, split = widen(pid // splits, INT64), pid % splits
    columns = split * BLOCK_V + tl.arange(0, BLOCK_V)
    where = logits + (row // t) * stride_b + (row % t) * stride_t + widen(columns, INT64) * stride_v
    x = tl.load(where, mask=columns < v, other=float("-inf")).to(tl.float32)
    top_x = tl.max(x, axis=0)
    e, e_log_e = exponentials(x, top_x, slope)
    tl.store(tops + pid, top_x)
    tl.store(masses + pid, tl.sum(e, axis=0))
    if ENTROPY:
        tl.store(moments + pid, tl.sum(e_log_e, axis=0) * LN_2)


@triton.jit(do_not_specialize=["n", "t"])
def selective_log_softmax_forward_kernel(
    logits, ids, tops, masses, moments, logprobs, entropies, normalizer, n, t, v, splits, stride_b, stride_t, stride_v,
    inverse, residual, slope,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, ENTROPY: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    row = widen(tl.program_id(0), INT64)
    s = tl.arange(0, BLOCK_S)
    piece, there = row * splits + s, s < splits
    tops_x = tl.load(tops + piece, mask=there, other=float("-inf"))
    mass = tl.load(masses + piece, mask=there, other=0.0)
    moment = tl.load(moments + piece, mask=there, other=0.0) if ENTROPY else tl.zeros_like(mass)
    top_x, total, log_sum, entropy = merged(tops_x, mass, moment, slope)
    top_x = tl.where(top_x == float("-inf"), 0.0, top_x)
    tl.store(normalizer + row, top_x)
    tl.store(normalizer + n + row, total)
    if ENTROPY:
        tl.store(entropies + row, entropy)
    c = tl.arange(0, BLOCK_K)
    token = tl.load(ids + row * K + c, mask=c < K, other=-1)
    known = (token >= 0) & (token < v)
    where = logits + (row // t) * stride_b + (row % t) * stride_t + widen(token, INT64) * stride_v
    x = tl.load(where, mask=known, other=float("nan")).to(tl.float32)
    tl.store(logprobs + row * K + c, scale(x - top_x, inverse, residual) - log_sum, mask=c < K)


@triton.jit(do_not_specialize=["n", "t"])
def selective_log_softmax_backward_kernel(
    grad, grad_entropy, logits, ids, entropy, normalizer, out, n, t, v, stride_b, stride_t, stride_v,
    out_b, out_t, out_v, inverse, slope,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ENTROPY: tl.constexpr, INT64: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = widen(tl.program_id(0), INT64)
    columns = widen(tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V), INT64)
    where = (row // t) * stride_b + (row % t) * stride_t + columns * stride_v
    x = tl.load(logits + where, mask=columns < v, other=float("-inf")).to(tl.float32)
    total = tl.load(normalizer + n + row)
    e, e_log_e = exponentials(x, tl.load(normalizer + row), slope)
    c = tl.arange(0, BLOCK_K)
    token = tl.load(ids + row * K + c, mask=c < K, other=-1)
    # The slope of p, and with the entropy that of p log p. One factor of the row is left, the inverse of its sum.
    of_p = -tl.sum(tl.load(grad + row * K + c, mask=c < K, other=0.0), axis=0)
    share = inverse / total
    if ENTROPY:
        grad_h = tl.load(grad_entropy + row)
        of_p -= grad_h * (tl.load(entropy + row) - tl.log(total))  # the mean of log p is -entropy
        value = e * (of_p * share) - e_log_e * (grad_h * LN_2 * share)
    else:
        value = e * (of_p * share)
    first = tl.program_id(1) * BLOCK_V
    # Most tiles contain none of the ids.
    if tl.max(((token >= first) & (token < first + BLOCK_V)).to(tl.int32), axis=0) > 0:
        for i in range(K):
            chosen = tl.load(ids + row * K + i)
            value += tl.where(columns == chosen, tl.load(grad + row * K + i) * inverse, 0.0)
    where = (row // t) * out_b + (row % t) * out_t + columns * out_v
    tl.store(out + where, value.to(out.dtype.element_ty), mask=columns < v)


def _of_temperature(temperature: float) -> dict[str, Any]:
    return {"inverse": float(np.float32(1.0 / temperature)), "slope": 1.4426950408889634 / temperature}


@launcher("ids")
def forward(logits: Tensor, ids: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [b t, K], entropy [b t] (or empty) and normalizer [2, b t] of logits [b, t, v], ids [b t, K].

    All three are float32. An id out of range gives NaN.
    """
    (_, t, v), (n, k) = logits.shape, ids.shape
    logprobs = torch.empty(n, k, dtype=torch.float32, device=logits.device)
    entropies = torch.empty(n if entropy else 0, dtype=torch.float32, device=logits.device)
    normalizer = torch.empty(2, n, dtype=torch.float32, device=logits.device)
    kernel = selective_log_softmax_partials_kernel
    config = configs.pinned(kernel.__name__, v, interpreted=interpreted(kernel))
    splits = ceil_div(v, config.kwargs["BLOCK_V"])
    pieces = aligned_rows(3, n * splits, logits.device)
    of_temperature = _of_temperature(temperature)
    common: dict[str, Any] = {
        "logits": logits, "tops": pieces[0], "masses": pieces[1], "moments": pieces[2], "t": t, "v": v,
        "splits": splits, "stride_b": logits.stride(0), "stride_t": logits.stride(1), "stride_v": logits.stride(2),
        "slope": of_temperature["slope"], "ENTROPY": entropy,
    }  # fmt: skip
    launch(kernel, lambda meta: (n * splits,), width=v, int64_for=(logits,), **common)
    inverse = of_temperature["inverse"]
    launch(
        selective_log_softmax_forward_kernel, lambda meta: (n,), width=v, int64_for=(logits, ids), **common, ids=ids,
        logprobs=logprobs, entropies=entropies, normalizer=normalizer, n=n, inverse=inverse,
        residual=1.0 / temperature - inverse, K=k, BLOCK_K=next_power_of_2(k),
        BLOCK_S=next_power_of_2(splits),
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
        selective_log_softmax_backward_kernel, lambda meta: (n, ceil_div(v, meta["BLOCK_V"])),
        width=v, int64_for=(logits, out, ids), tunable=not in_place,
        grad=grad, grad_entropy=grad_entropy, logits=logits, ids=ids, entropy=entropy, normalizer=normalizer,
        out=out, n=n, t=t, v=v, stride_b=logits.stride(0), stride_t=logits.stride(1), stride_v=logits.stride(2),
        out_b=out.stride(0), out_t=out.stride(1), out_v=out.stride(2), **_of_temperature(temperature),
        K=k, BLOCK_K=next_power_of_2(k), ENTROPY=entropy.numel() > 0,
    )  # fmt: skip
    return out
