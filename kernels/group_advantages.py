"""Rewards centered and scaled within their groups, and the gradient.

A program handles a tile of [groups, rows of a group] and one column of rewards. It goes through a group longer than the
tile in steps. Each pass reads the rewards again, from the cache: largest reward and weight, mean, standard deviation
(two passes, so that nothing cancels), then the result. The rows of a group are consecutive, or consecutive in `order`.
Groups have one size, or are given by `offsets`.

The formula is that of the oracle. With c = x - mean, W the sum of a group's weights and w the weight of a row:

    numerator  c ("mean"); c W / (W - w) ("leave_one_out"); x ("none")
    scale      sqrt(sum w c^2 / max(W - ddof, 1)) ("std"); mean ("mean"); 1 ("none")
    advantage  numerator / (scale + eps); the numerator itself where the scale is "none"
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import ceil_div, inverse_of_power, launch, launcher, power_of_two, widen

# The constants of the kernels for the values of the settings.
_BASELINES = {"mean": 0, "leave_one_out": 1, "none": 2}
_SCALES = {"std": 0, "mean": 1, "none": 2}
_SINGLETON_GROUPS = {"zero": 0, "keep": 1, "nan": 2}


@triton.jit
def _groups(offsets, groups, group_size, INT64: tl.constexpr, BLOCK_G: tl.constexpr):
    """Number, first row and number of rows of each group of this program."""
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
    """The tile's row numbers, which of them exist, their rewards and weights. Rows of weight 0 have reward 0."""
    position = start + tl.arange(0, BLOCK_R)[None, :]
    rows = first[:, None] + position
    live = (position < size[:, None]) & (rows >= 0) & (rows < n)  # the values of the offsets are unchecked
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
    BASELINE: tl.constexpr, SCALE: tl.constexpr, SINGLETON_GROUPS: tl.constexpr, OMIT_NAN: tl.constexpr,
    INT64: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of each group: largest reward, mean of (reward - largest), scale, divisor (0: no advantages), sum of the weights,
    number of rows."""
    max_reward = tl.full([BLOCK_G], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_G], tl.float32)
    members = tl.zeros([BLOCK_G], tl.int32)
    for start in range(0, longest, BLOCK_R):
        _, _, x, w = _rows(
            rewards, weights, order, first, size, start, column, n, stride_n, stride_r, OMIT_NAN, INT64, BLOCK_R
        )
        max_reward = tl.maximum(max_reward, tl.max(tl.where(w != 0.0, x, float("-inf")), axis=1))
        weight += tl.sum(w, axis=1)
        members += tl.sum((w != 0.0).to(tl.int32), axis=1)
    # Rewards are measured from the largest of the group, so that equal rewards are centered to exactly 0.
    max_reward = tl.where(max_reward == float("-inf"), 0.0, max_reward)
    shifted_sum = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, longest, BLOCK_R):
        _, _, x, w = _rows(
            rewards, weights, order, first, size, start, column, n, stride_n, stride_r, OMIT_NAN, INT64, BLOCK_R
        )
        shifted_sum += tl.sum(tl.where(w != 0.0, w * (x - max_reward[:, None]), 0.0), axis=1)
    shifted_mean = tl.div_rn(shifted_sum, tl.maximum(weight, 1.0))
    scale = tl.full([BLOCK_G], 1.0, tl.float32)
    if SCALE == 0:
        # A power of two. The mean is measured from the largest reward: it is that reward's own deviation, and the
        # largest deviation is at most W times it. In this unit no square overflows or vanishes, and no bit changes.
        inverse_unit = inverse_of_power(power_of_two(shifted_mean))
        squares = tl.zeros([BLOCK_G], tl.float32)
        for start in range(0, longest, BLOCK_R):
            _, _, x, w = _rows(
                rewards, weights, order, first, size, start, column, n, stride_n, stride_r, OMIT_NAN, INT64, BLOCK_R
            )
            centered = ((x - max_reward[:, None]) - shifted_mean[:, None]) * inverse_unit[:, None]
            squares += tl.sum(tl.where(w != 0.0, w * centered * centered, 0.0), axis=1)
        # An approximate square root would flush small deviations to 0.
        scale = inverse_of_power(inverse_unit) * tl.sqrt_rn(tl.div_rn(squares, tl.maximum(weight - ddof, 1.0)))
    if SCALE == 1:
        scale = max_reward + shifted_mean
    divisor = scale
    if SCALE != 2:
        divisor = scale + eps
    if BASELINE != 2 or SCALE == 0:
        divisor = tl.where(members > 1, divisor, 0.0)
    if SINGLETON_GROUPS == 1 and (BASELINE != 2 or SCALE == 0):
        # With a mean of 0 and a divisor of 1 (+ eps) the reward stays.
        is_singleton = members == 1
        shifted_mean = tl.where(is_singleton, -max_reward, shifted_mean)
        divisor = tl.where(is_singleton, 1.0 + (eps if SCALE != 2 else 0.0), divisor)
    return max_reward, shifted_mean, scale, divisor, weight, members


@triton.jit
def _factor(w, weight, members, BASELINE: tl.constexpr):
    """What multiplies x - mean: W / (W - w) where the baseline is the mean of the others, else 1."""
    if BASELINE == 1:
        rest = weight[:, None] - w
        several = (members > 1)[:, None] & (rest != 0.0)
        whole = tl.broadcast_to(weight[:, None], w.shape)
        factor = tl.where(several, tl.div_rn(whole, tl.where(rest != 0.0, rest, 1.0)), 1.0)
    else:
        factor = tl.zeros_like(w) + 1.0
    return factor


@triton.jit(do_not_specialize=["groups", "group_size", "longest", "n"])
def group_advantages_kernel(
    rewards, weights, order, offsets, out, scales, groups, group_size, longest, n, columns, stride_n, stride_r,
    eps, ddof,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, SINGLETON_GROUPS: tl.constexpr, OMIT_NAN: tl.constexpr,
    INT64: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1)
    group, first, size = _groups(offsets, groups, group_size, INT64, BLOCK_G)
    if offsets is not None:
        longest = tl.max(size, axis=0).to(tl.int32)
    max_reward, shifted_mean, scale, divisor, weight, members = _statistics(
        rewards, weights, order, first, size, longest, column, n, stride_n, stride_r, eps, ddof,
        BASELINE, SCALE, SINGLETON_GROUPS, OMIT_NAN, INT64, BLOCK_G, BLOCK_R,
    )  # fmt: skip
    tl.store(scales + group * columns + column, scale, mask=group < groups)
    safe_divisor = tl.broadcast_to(tl.where(divisor != 0.0, divisor, 1.0)[:, None], (BLOCK_G, BLOCK_R))
    for start in range(0, longest, BLOCK_R):
        rows, live, x, w = _rows(
            rewards, weights, order, first, size, start, column, n, stride_n, stride_r, OMIT_NAN, INT64, BLOCK_R
        )
        value = x
        if BASELINE != 2:
            value = ((x - max_reward[:, None]) - shifted_mean[:, None]) * _factor(w, weight, members, BASELINE)
        value = tl.where((w != 0.0) & (divisor != 0.0)[:, None], tl.div_rn(value, safe_divisor), 0.0)
        if SINGLETON_GROUPS == 2:
            value = tl.where((w != 0.0) & (members == 1)[:, None], float("nan"), value)
        tl.store(out + rows * columns + column, value.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["groups", "group_size", "longest", "n"])
def group_advantages_backward_kernel(
    grad, grad_scales, rewards, weights, order, offsets, out, groups, group_size, longest, n, columns,
    stride_gn, stride_gr, stride_n, stride_r, eps, ddof,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, SINGLETON_GROUPS: tl.constexpr, OMIT_NAN: tl.constexpr,
    INT64: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1)
    group, first, size = _groups(offsets, groups, group_size, INT64, BLOCK_G)
    if offsets is not None:
        longest = tl.max(size, axis=0).to(tl.int32)
    max_reward, shifted_mean, scale, divisor, weight, members = _statistics(
        rewards, weights, order, first, size, longest, column, n, stride_n, stride_r, eps, ddof,
        BASELINE, SCALE, SINGLETON_GROUPS, OMIT_NAN, INT64, BLOCK_G, BLOCK_R,
    )  # fmt: skip
    # 0 for a group whose advantages are 0.
    inverse = tl.where(divisor != 0.0, 1.0 / tl.where(divisor != 0.0, divisor, 1.0), 0.0)
    # `direct` is what a row gets through its own numerator. The rest comes through the group's mean and scale.
    direct_sum = tl.zeros([BLOCK_G], tl.float32)
    grad_divisor = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, longest, BLOCK_R):
        rows, live, x, w = _rows(
            rewards, weights, order, first, size, start, column, n, stride_n, stride_r, OMIT_NAN, INT64, BLOCK_R
        )
        value = x
        if BASELINE != 2:
            value = (x - max_reward[:, None]) - shifted_mean[:, None]
        g = tl.load(grad + rows * stride_gn + column * stride_gr, mask=live, other=0.0).to(tl.float32)
        direct = tl.where(w != 0.0, g * _factor(w, weight, members, BASELINE) * inverse[:, None], 0.0)
        direct_sum += tl.sum(direct, axis=1)
        grad_divisor -= tl.sum(tl.where(direct != 0.0, direct * value * inverse[:, None], 0.0), axis=1)
    if SINGLETON_GROUPS == 1 and (BASELINE != 2 or SCALE == 0):
        # A kept row depends on neither a mean nor a scale.
        direct_sum = tl.where(members == 1, 0.0, direct_sum)
        grad_divisor = tl.where(members == 1, 0.0, grad_divisor)
    grad_scale = grad_divisor + tl.load(grad_scales + group * columns + column, mask=group < groups, other=0.0)
    # What every row of the group gets in proportion to its weight: through the mean, and through the deviation.
    shared = tl.zeros([BLOCK_G], tl.float32)
    slope = tl.zeros([BLOCK_G], tl.float32)
    if BASELINE != 2:
        shared -= direct_sum / tl.maximum(weight, 1.0)
    if SCALE == 0:
        # A standard deviation of 0 passes nothing on: its one-sided derivative is no gradient.
        slope = tl.where(scale > 0.0, grad_scale / tl.maximum(weight - ddof, 1.0), 0.0)
        safe_scale = tl.where(scale > 0.0, scale, 1.0)
    if SCALE == 1:
        shared += grad_scale / tl.maximum(weight, 1.0)
    for start in range(0, longest, BLOCK_R):
        rows, live, x, w = _rows(
            rewards, weights, order, first, size, start, column, n, stride_n, stride_r, OMIT_NAN, INT64, BLOCK_R
        )
        g = tl.load(grad + rows * stride_gn + column * stride_gr, mask=live, other=0.0).to(tl.float32)
        value = g * _factor(w, weight, members, BASELINE) * inverse[:, None] + w * shared[:, None]
        if SCALE == 0:
            deviations = ((x - max_reward[:, None]) - shifted_mean[:, None]) / safe_scale[:, None]
            value += w * deviations * slope[:, None]
        value = tl.where(w != 0.0, value, 0.0)
        tl.store(out + rows * columns + column, value.to(out.dtype.element_ty), mask=live)


# Where only the device knows the sizes of the groups, tiles are made for the sizes that GRPO uses.
_RAGGED_WIDTH = 16


def _launch(kernel: Any, rewards: Tensor, settings: Any, **others: Any) -> None:
    n, columns = rewards.shape
    groups = settings.num_groups(n)
    launch(
        kernel, lambda meta: (ceil_div(groups, meta["BLOCK_G"]), columns),
        width=settings.group_size if settings.offsets is None else _RAGGED_WIDTH,
        int64_for=(rewards, others.get("grad"), others["out"]),
        rewards=rewards, weights=settings.weights, order=settings.order, offsets=settings.offsets, groups=groups,
        group_size=settings.group_size, longest=settings.group_size, n=n, columns=columns,
        stride_n=rewards.stride(0), stride_r=rewards.stride(1), eps=settings.eps, ddof=settings.ddof,
        BASELINE=_BASELINES[settings.baseline], SCALE=_SCALES[settings.scale],
        SINGLETON_GROUPS=_SINGLETON_GROUPS[settings.singleton_groups], OMIT_NAN=settings.omit_nan, **others,
    )  # fmt: skip


def _contiguous(settings: Any) -> Any:
    """The settings with contiguous tensors: the kernels take no strides of them."""
    tensors = {name: getattr(settings, name) for name in ("weights", "order", "offsets")}
    return settings._replace(**{name: x.contiguous() for name, x in tensors.items() if x is not None})


def _new_output(rewards: Tensor, settings: Any) -> Tensor:
    # Rows that the offsets leave out are in no group, and no program writes them.
    make = torch.empty if settings.offsets is None else torch.zeros
    return make(rewards.shape, dtype=rewards.dtype, device=rewards.device)


@launcher()
def forward(rewards: Tensor, settings: Any) -> tuple[Tensor, Tensor]:
    """The advantages, and the scale of each group.

    Args:
        rewards: [n, columns], of any strides.
        settings: a `GroupSettings` of the operation.

    Returns:
        advantages [n, columns] in the dtype of the rewards; scales [groups, columns], float32.
    """
    settings, out = _contiguous(settings), _new_output(rewards, settings)
    groups = settings.num_groups(rewards.shape[0])
    scales = torch.empty(groups, rewards.shape[1], dtype=torch.float32, device=rewards.device)
    _launch(group_advantages_kernel, rewards, settings, out=out, scales=scales)
    return out, scales


@launcher("grad_scales")
def backward(grad: Tensor, grad_scales: Tensor, rewards: Tensor, settings: Any) -> Tensor:
    """The gradient of the rewards, in their dtype, from the gradients of both outputs."""
    settings, out = _contiguous(settings), _new_output(rewards, settings)
    _launch(
        group_advantages_backward_kernel, rewards, settings, out=out, grad=grad, grad_scales=grad_scales,
        stride_gn=grad.stride(0), stride_gr=grad.stride(1),
    )  # fmt: skip
    return out
