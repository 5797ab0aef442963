"""Rewards centred and scaled within their groups, and the gradient.

One program a tile of [groups, rows of a group] and a column of rewards; a group longer than the tile is gone through in
steps. Each pass reads the rewards again, from the cache: largest reward and weight, mean, spread (two passes, so that
nothing cancels), then the result. Rows of a group are consecutive, or consecutive in `order`; groups are equal in size,
or given by `offsets`.

The formula (`reference` has the same): with c = x - mean, W the sum of the weights and w a row's own,

    numerator  c ("mean"), c W / (W - w) ("leave_one_out"), x ("none")
    spread     sqrt(sum w c^2 / max(W - ddof, 1)) ("std"), mean ("mean")
    advantage  numerator / (spread + eps), or numerator where the scale is "none"
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import launch, launcher, widen

BASELINES = {"mean": 0, "leave_one_out": 1, "none": 2}
SCALES = {"std": 0, "mean": 1, "none": 2}
SINGLES = {"zero": 0, "keep": 1, "nan": 2}


@triton.jit
def _groups(offsets, groups, group_size, INT64: tl.constexpr, BLOCK_G: tl.constexpr):
    """First row and number of rows of each group of this program."""
    group = widen(tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G), INT64)
    live = group < groups
    if offsets is None:
        first = group * group_size
        size = tl.where(live, group_size, 0)
    else:
        first = widen(tl.load(offsets + group, mask=live, other=0), INT64)
        size = widen(tl.load(offsets + group + 1, mask=live, other=0), INT64) - first
    return group, first, size


@triton.jit
def _rows(
    rewards, weights, order, first, size, start, column, n, stride_n, stride_r,
    OMIT_NAN: tl.constexpr, INT64: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The tile's row numbers, rewards and weights; rows that are not there weigh nothing and have reward 0."""
    position = start + tl.arange(0, BLOCK_R)[None, :]
    rows = first[:, None] + position
    live = (position < size[:, None]) & (rows >= 0) & (rows < n)  # whatever the offsets say
    if order is not None:
        rows = widen(tl.load(order + rows, mask=live, other=0), INT64)
    x = tl.load(rewards + rows * stride_n + column * stride_r, mask=live, other=0.0).to(tl.float32)
    w = tl.where(live, 1.0, 0.0)
    if weights is not None:
        w = tl.load(weights + rows, mask=live, other=0).to(tl.float32)
    if OMIT_NAN:
        w = tl.where(x == x, w, 0.0)
    return rows, live, tl.where(w != 0.0, x, 0.0), w


@triton.jit
def _statistics(
    rewards, weights, order, first, size, longest, column, n, stride_n, stride_r, eps, ddof,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, SINGLES: tl.constexpr, OMIT_NAN: tl.constexpr,
    INT64: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of each group: what to measure from, mean from there, spread, divisor (0: no advantages), weight, members."""
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_G], tl.float32)
    members = tl.zeros([BLOCK_G], tl.int32)
    for start in range(0, longest, BLOCK_R):
        _, _, x, w = _rows(
            rewards, weights, order, first, size, start, column, n, stride_n, stride_r, OMIT_NAN, INT64, BLOCK_R
        )
        top = tl.maximum(top, tl.max(tl.where(w != 0.0, x, float("-inf")), axis=1))
        weight += tl.sum(w, axis=1)
        members += tl.sum((w != 0.0).to(tl.int32), axis=1)
    # Measured from the group's largest reward, so that equal rewards are centred to exactly 0.
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, longest, BLOCK_R):
        _, _, x, w = _rows(
            rewards, weights, order, first, size, start, column, n, stride_n, stride_r, OMIT_NAN, INT64, BLOCK_R
        )
        total += tl.sum(tl.where(w != 0.0, w * (x - top[:, None]), 0.0), axis=1)
    mean = total / tl.maximum(weight, 1.0)
    spread = tl.full([BLOCK_G], 1.0, tl.float32)
    if SCALE == 0:
        squares = tl.zeros([BLOCK_G], tl.float32)
        for start in range(0, longest, BLOCK_R):
            _, _, x, w = _rows(
                rewards, weights, order, first, size, start, column, n, stride_n, stride_r, OMIT_NAN, INT64, BLOCK_R
            )
            centered = (x - top[:, None]) - mean[:, None]
            squares += tl.sum(tl.where(w != 0.0, w * centered * centered, 0.0), axis=1)
        spread = tl.sqrt_rn(squares / tl.maximum(weight - ddof, 1.0))  # an approximate one flushes small spreads to 0
    if SCALE == 1:
        spread = top + mean
    divisor = spread
    if SCALE != 2:
        divisor = spread + eps
    if BASELINE != 2 or SCALE == 0:
        divisor = tl.where(members > 1, divisor, 0.0)
    if SINGLES == 1 and (BASELINE != 2 or SCALE == 0):
        # Measured from nothing and divided by 1: the reward stays.
        single = members == 1
        mean = tl.where(single, -top, mean)
        divisor = tl.where(single, 1.0 + (eps if SCALE != 2 else 0.0), divisor)
    return top, mean, spread, divisor, weight, members


@triton.jit
def _factor(w, weight, members, BASELINE: tl.constexpr):
    """What multiplies x - mean: 1, or, where the others' mean is the baseline, W / (W - w)."""
    if BASELINE == 1:
        rest = weight[:, None] - w
        several = (members > 1)[:, None] & (rest != 0.0)
        factor = tl.where(several, weight[:, None] / tl.where(rest != 0.0, rest, 1.0), 1.0)
    else:
        factor = tl.zeros_like(w) + 1.0
    return factor


@triton.jit(do_not_specialize=["groups", "group_size", "longest", "n"])
def group_advantages_kernel(
    rewards, weights, order, offsets, out, spreads, groups, group_size, longest, n, columns, stride_n, stride_r,
    eps, ddof,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, SINGLES: tl.constexpr, OMIT_NAN: tl.constexpr,
    INT64: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1)
    group, first, size = _groups(offsets, groups, group_size, INT64, BLOCK_G)
    if offsets is not None:
        longest = tl.max(size, axis=0).to(tl.int32)
    top, mean, spread, divisor, weight, members = _statistics(
        rewards, weights, order, first, size, longest, column, n, stride_n, stride_r, eps, ddof,
        BASELINE, SCALE, SINGLES, OMIT_NAN, INT64, BLOCK_G, BLOCK_R,
    )  # fmt: skip
    tl.store(spreads + group * columns + column, spread, mask=group < groups)
    safe = tl.where(divisor != 0.0, divisor, 1.0)[:, None]
    for start in range(0, longest, BLOCK_R):
        rows, live, x, w = _rows(
            rewards, weights, order, first, size, start, column, n, stride_n, stride_r, OMIT_NAN, INT64, BLOCK_R
        )
        value = x
        if BASELINE != 2:
            value = ((x - top[:, None]) - mean[:, None]) * _factor(w, weight, members, BASELINE)
        value = tl.where((w != 0.0) & (divisor != 0.0)[:, None], value / safe, 0.0)
        if SINGLES == 2:
            value = tl.where((w != 0.0) & (members == 1)[:, None], float("nan"), value)
        tl.store(out + rows * columns + column, value.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["groups", "group_size", "longest", "n"])
def group_advantages_backward_kernel(
    grad, grad_spreads, rewards, weights, order, offsets, out, groups, group_size, longest, n, columns,
    stride_gn, stride_gr, stride_n, stride_r, eps, ddof,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, SINGLES: tl.constexpr, OMIT_NAN: tl.constexpr,
    INT64: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1)
    group, first, size = _groups(offsets, groups, group_size, INT64, BLOCK_G)
    if offsets is not None:
        longest = tl.max(size, axis=0).to(tl.int32)
    top, mean, spread, divisor, weight, members = _statistics(
        rewards, weights, order, first, size, longest, column, n, stride_n, stride_r, eps, ddof,
        BASELINE, SCALE, SINGLES, OMIT_NAN, INT64, BLOCK_G, BLOCK_R,
    )  # fmt: skip
    # 0 where the group's advantages are.
    inverse = tl.where(divisor != 0.0, 1.0 / tl.where(divisor != 0.0, divisor, 1.0), 0.0)
    sum_direct = tl.zeros([BLOCK_G], tl.float32)
    to_divisor = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, longest, BLOCK_R):
        rows, live, x, w = _rows(
            rewards, weights, order, first, size, start, column, n, stride_n, stride_r, OMIT_NAN, INT64, BLOCK_R
        )
        value = x
        if BASELINE != 2:
            value = (x - top[:, None]) - mean[:, None]
        g = tl.load(grad + rows * stride_gn + column * stride_gr, mask=live, other=0.0).to(tl.float32)
        direct = tl.where(w != 0.0, g * _factor(w, weight, members, BASELINE) * inverse[:, None], 0.0)
        sum_direct += tl.sum(direct, axis=1)
        to_divisor -= tl.sum(tl.where(direct != 0.0, direct * value * inverse[:, None], 0.0), axis=1)
    if SINGLES == 1 and (BASELINE != 2 or SCALE == 0):  # neither a mean nor a spread of its own
        sum_direct = tl.where(members == 1, 0.0, sum_direct)
        to_divisor = tl.where(members == 1, 0.0, to_divisor)
    to_spread = to_divisor + tl.load(grad_spreads + group * columns + column, mask=group < groups, other=0.0)
    # What every row of the group gets, by its weight: from the mean, and from the spread.
    shared = tl.zeros([BLOCK_G], tl.float32)
    slope = tl.zeros([BLOCK_G], tl.float32)
    if BASELINE != 2:
        shared -= sum_direct / tl.maximum(weight, 1.0)
    if SCALE == 0:
        # A spread of zero passes nothing on: its one-sided derivative is no gradient.
        scale = tl.maximum(weight - ddof, 1.0) * spread
        slope = tl.where(spread > 0.0, to_spread / tl.where(spread > 0.0, scale, 1.0), 0.0)
    if SCALE == 1:
        shared += to_spread / tl.maximum(weight, 1.0)
    for start in range(0, longest, BLOCK_R):
        rows, live, x, w = _rows(
            rewards, weights, order, first, size, start, column, n, stride_n, stride_r, OMIT_NAN, INT64, BLOCK_R
        )
        g = tl.load(grad + rows * stride_gn + column * stride_gr, mask=live, other=0.0).to(tl.float32)
        value = g * _factor(w, weight, members, BASELINE) * inverse[:, None] + w * shared[:, None]
        if SCALE == 0:
            value += w * ((x - top[:, None]) - mean[:, None]) * slope[:, None]
        value = tl.where(w != 0.0, value, 0.0)
        tl.store(out + rows * columns + column, value.to(out.dtype.element_ty), mask=live)


def _arguments(
    rewards: Tensor, weights: Tensor | None, order: Tensor | None, offsets: Tensor | None, group_size: int,
    baseline: str, scale: str, ddof: int, eps: float, singles: str, omit_nan: bool,
) -> dict[str, Any]:  # fmt: skip
    n, columns = rewards.shape
    return {
        "rewards": rewards, "weights": weights, "order": order, "offsets": offsets,
        "groups": n // group_size if offsets is None else offsets.shape[0] - 1,
        "group_size": group_size, "longest": group_size, "n": n, "columns": columns,
        "stride_n": rewards.stride(0), "stride_r": rewards.stride(1), "eps": eps, "ddof": ddof,
        "BASELINE": BASELINES[baseline], "SCALE": SCALES[scale], "SINGLES": SINGLES[singles], "OMIT_NAN": omit_nan,
    }  # fmt: skip


# Where the sizes of the groups are known to the device alone, tiles are made for the sizes GRPO uses.
_RAGGED_WIDTH = 16


@launcher("weights", "order", "offsets")
def forward(
    rewards: Tensor, weights: Tensor | None, order: Tensor | None, offsets: Tensor | None, group_size: int,
    baseline: str, scale: str, ddof: int, eps: float, singles: str, omit_nan: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """rewards [n, columns]; weights [n], order [n] and offsets [groups + 1] or None. Advantages [n, columns] in the
    rewards' dtype, and the spread [groups, columns], float32."""
    arguments = _arguments(rewards, weights, order, offsets, group_size, baseline, scale, ddof, eps, singles, omit_nan)
    groups, columns = arguments["groups"], rewards.shape[1]
    # Rows that the offsets leave out are in no group.
    make = torch.empty if offsets is None else torch.zeros
    out = make(rewards.shape, dtype=rewards.dtype, device=rewards.device)
    spreads = torch.empty(groups, columns, dtype=torch.float32, device=rewards.device)
    launch(
        group_advantages_kernel, lambda meta: (triton.cdiv(groups, meta["BLOCK_G"]), columns),
        width=group_size if offsets is None else _RAGGED_WIDTH, int64_for=(rewards, out),
        out=out, spreads=spreads, **arguments,
    )  # fmt: skip
    return out, spreads


@launcher("grad_spreads", "weights", "order", "offsets")
def backward(
    grad: Tensor, grad_spreads: Tensor, rewards: Tensor, weights: Tensor | None, order: Tensor | None,
    offsets: Tensor | None, group_size: int, baseline: str, scale: str, ddof: int, eps: float, singles: str,
    omit_nan: bool,
) -> Tensor:  # fmt: skip
    """The gradient of the rewards, in their dtype, from those of both outputs."""
    arguments = _arguments(rewards, weights, order, offsets, group_size, baseline, scale, ddof, eps, singles, omit_nan)
    groups, columns = arguments["groups"], rewards.shape[1]
    # Rows that the offsets leave out are in no group.
    make = torch.empty if offsets is None else torch.zeros
    out = make(rewards.shape, dtype=rewards.dtype, device=rewards.device)
    launch(
        group_advantages_backward_kernel, lambda meta: (triton.cdiv(groups, meta["BLOCK_G"]), columns),
        width=group_size if offsets is None else _RAGGED_WIDTH, int64_for=(rewards, grad, out),
        grad=grad, grad_spreads=grad_spreads, out=out, stride_gn=grad.stride(0), stride_gr=grad.stride(1), **arguments,
    )  # fmt: skip
    return out
