"""The oracle of the grouped operation in plain torch, forward and backward. It is also what runs on a CPU.

The oracle runs on any device. It computes in float64 for float64 rewards and in float32 for all others. The kernels of
`kernels/group_advantages.py` are tested against it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._precision import compute_dtype, power_of_two


class GroupSettings(NamedTuple):
    """Everything the grouped operation reads beside the rewards [N, columns]. The tensors come first.

    Attributes:
        weights: [N], what a row counts for in every statistic; a row of weight 0 gets advantage 0. None: 1 for each.
        order: int64 [N], the row numbers, group after group. None: the rows already come group after group.
        offsets: int64 [G + 1], group g is the positions offsets[g] to offsets[g + 1] in `order`. None: every group has
            `group_size` rows.
        group_size: rows of each group. It is not read where there are offsets.
        baseline: "mean", "leave_one_out" or "none".
        scale: "std", "mean" or "none".
        ddof: the variance divides by (W - ddof), with W the sum of the weights.
        eps: added to the scale.
        singleton_groups: what a group of one row gets where `needs_others`: 0 ("zero"), or its reward over 1 + eps
            ("keep"; over 1 where the scale is "none"). "nan" makes it NaN with all settings, which marks these groups.
        omit_nan: a NaN reward has weight 0.
    """

    weights: Tensor | None
    order: Tensor | None
    offsets: Tensor | None
    group_size: int
    baseline: str
    scale: str
    ddof: int
    eps: float
    singleton_groups: str
    omit_nan: bool

    @property
    def needs_others(self) -> bool:
        """Whether an advantage needs a second row in the group: as a baseline, or for a deviation."""
        return self.baseline != "none" or self.scale == "std"

    def num_groups(self, rows: int) -> int:
        return rows // self.group_size if self.offsets is None else self.offsets.shape[0] - 1


def require_offsets(offsets: Tensor, rows: int) -> None:
    """Checks the values on a CPU. On an accelerator nothing beyond the rewards is read, and rows in no group get 0."""
    if offsets.device.type != "cpu":
        return
    if int(offsets[0]) != 0 or int(offsets[-1]) != rows or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets must go from 0 to N = {rows} and never fall, got {offsets.tolist()}")


def group_advantages(rewards: Tensor, settings: GroupSettings) -> tuple[Tensor, Tensor]:
    """The advantages and the scale of each group.

    With c = x - mean, W the sum of a group's weights and w the weight of a row:

        numerator  c ("mean"); c W / (W - w) ("leave_one_out"), which is x - (mean of the others); x ("none")
        scale      sqrt(sum w c^2 / max(W - ddof, 1)) ("std"); mean ("mean"); 1 ("none")
        advantage  numerator / (scale + eps); the numerator itself where the scale is "none"

    A group whose scale + eps is 0 gets 0. `GroupSettings.singleton_groups` says what a group of one row gets.

    Args:
        rewards: [N, columns], each column by itself.

    Returns:
        advantages [N, columns] in the dtype of `rewards`; scales [groups, columns] in the dtype of the computation.
    """
    groups = _Groups(rewards, settings)
    s = _statistics(groups, rewards, settings)
    divisor = groups.to_rows(s.divisor)
    has_divisor = divisor != 0
    out = torch.where(s.of_counted(has_divisor), s.numerator / torch.where(has_divisor, divisor, 1), 0)
    if settings.singleton_groups == "nan":
        out = torch.where(s.of_counted(groups.to_rows(s.is_singleton)), torch.nan, out)
    return groups.restore(out).to(rewards.dtype), s.scale.reshape(groups.count, -1)


def group_advantages_backward(grad: Tensor, grad_scales: Tensor, rewards: Tensor, settings: GroupSettings) -> Tensor:
    """The gradient of the rewards, [N, columns] in their dtype, from the gradients of both outputs."""
    groups = _Groups(rewards, settings)
    s = _statistics(groups, rewards, settings)
    divisor = groups.to_rows(s.divisor)
    has_divisor = divisor != 0
    safe_divisor = torch.where(has_divisor, divisor, 1)
    # What a row gets through its own numerator. The rest comes through the group's mean and scale.
    direct = torch.where(s.of_counted(has_divisor), groups.arrange(grad).to(s.weight.dtype) * s.factor / safe_divisor, 0)
    direct_sum = groups.sum(direct)
    grad_divisor = -groups.sum(torch.where(direct != 0, direct * (s.numerator / s.factor) / safe_divisor, 0))
    if settings.singleton_groups == "keep" and settings.needs_others:
        # A kept row depends on neither a mean nor a scale.
        direct_sum = torch.where(s.is_singleton, 0, direct_sum)
        grad_divisor = torch.where(s.is_singleton, 0, grad_divisor)
    grad_scale = grad_divisor + grad_scales.reshape(grad_divisor.shape)
    inverse_weight = 1 / s.total_weight.clamp(min=1)
    out = direct
    if settings.baseline != "none":
        out = out - s.weight * groups.to_rows(direct_sum * inverse_weight)
    if settings.scale == "std":
        # A standard deviation of 0 passes nothing on: its one-sided derivative is no gradient.
        has_std = s.scale > 0
        slope = torch.where(has_std, grad_scale / (s.total_weight - settings.ddof).clamp(min=1), 0)
        deviations = s.centered / groups.to_rows(torch.where(has_std, s.scale, 1))
        out = out + s.weight * deviations * groups.to_rows(slope)
    elif settings.scale == "mean":
        out = out + s.weight * groups.to_rows(grad_scale * inverse_weight)
    return groups.restore(_where(s.counted, out, 0)).to(rewards.dtype)


class _Groups:
    """Sums within groups. Groups of one size are summed as [size, groups, columns], others by the group of each row.

    Groups are small and many: sums over a first dimension take many groups at once, sums over an inner one do not.
    """

    def __init__(self, rewards: Tensor, settings: GroupSettings) -> None:
        rows, offsets = rewards.shape[0], settings.offsets
        self.order, self.shape = settings.order, rewards.shape
        self.count, self.size = settings.num_groups(rows), settings.group_size
        self.equal_sizes = offsets is None
        if offsets is not None:
            require_offsets(offsets, rows)
            group = torch.searchsorted(offsets, torch.arange(rows, device=offsets.device), right=True) - 1
            self.in_a_group = (group >= 0) & (group < self.count)
            self.group_of_row = group.clamp_(0, self.count - 1)

    def arrange(self, x: Tensor) -> Tensor:
        """The rows group after group."""
        x = x if self.order is None else x[self.order]
        return x.reshape(self.count, self.size, -1).transpose(0, 1).contiguous() if self.equal_sizes else x

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `arrange`."""
        x = (x.expand(self.size, -1, -1).transpose(0, 1) if self.equal_sizes else x).reshape(self.shape).contiguous()
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order, x)

    def sum(self, x: Tensor) -> Tensor:
        if self.equal_sizes:
            return x.sum(0, keepdim=True)
        return x.new_zeros(self.count, x.shape[1]).index_add_(0, self.group_of_row, x)

    def max(self, x: Tensor) -> Tensor:
        if self.equal_sizes:
            return x.amax(0, keepdim=True)
        index = self.group_of_row[:, None].expand(x.shape)
        return x.new_full((self.count, x.shape[1]), -torch.inf).scatter_reduce_(0, index, x, "amax")

    def to_rows(self, of_groups: Tensor) -> Tensor:
        """For each row the value of its group."""
        return of_groups if self.equal_sizes else of_groups[self.group_of_row]


class _Statistics(NamedTuple):
    """What forward and backward share. The first five are values of rows, the others of groups."""

    weight: Tensor
    counted: Tensor | None  # weight != 0; None: every row
    centered: Tensor
    numerator: Tensor
    factor: Tensor | float  # what multiplies x - mean in the numerator
    total_weight: Tensor
    is_singleton: Tensor
    scale: Tensor
    divisor: Tensor  # 0: the group has no advantages

    def of_counted(self, chosen: Tensor) -> Tensor:
        return chosen if self.counted is None else self.counted & chosen


def _where(condition: Tensor | None, x: Tensor, other: float) -> Tensor:
    """x where the condition is met, everywhere without one."""
    return x if condition is None else torch.where(condition, x, other)


def _statistics(groups: _Groups, rewards: Tensor, settings: GroupSettings) -> _Statistics:
    baseline, scale_by, weights = settings.baseline, settings.scale, settings.weights
    dtype = compute_dtype(rewards)
    x = groups.arrange(rewards).to(dtype)
    counted: Tensor | None = None
    if weights is None and not settings.omit_nan and groups.equal_sizes:
        w = x.new_ones(())
        total_weight = members = x.new_full((), groups.size)
    else:
        w = torch.ones_like(x) if weights is None else groups.arrange(weights[:, None]).to(dtype).expand(x.shape)
        if settings.omit_nan:
            w = torch.where(x.isnan(), 0, w)
        if not groups.equal_sizes:
            w = torch.where(groups.in_a_group[:, None], w, 0)
        counted = w != 0
        x = torch.where(counted, x, 0)
        total_weight, members = groups.sum(w), groups.sum(counted.to(dtype))
    is_singleton = members == 1
    # Rewards are measured from the largest of the group, so that equal rewards are centered to exactly 0.
    max_reward = groups.max(_where(counted, x, -torch.inf))
    max_reward = torch.where(max_reward == -torch.inf, 0, max_reward)
    shifted = _where(counted, x - groups.to_rows(max_reward), 0)
    weighted = shifted if counted is None else w * shifted
    shifted_mean = groups.sum(weighted) / total_weight.clamp(min=1)
    centered = _where(counted, shifted - groups.to_rows(shifted_mean), 0)
    if scale_by == "std":
        # A power of two. The mean is measured from the largest reward: it is that reward's own deviation, and the
        # largest deviation is at most W times it. In this unit no square overflows or vanishes, and no bit changes.
        unit = power_of_two(shifted_mean)
        squares = (centered / groups.to_rows(unit)).square()
        squares = groups.sum(squares if counted is None else w * squares)
        scale = unit * (squares / (total_weight - settings.ddof).clamp(min=1)).sqrt()
    else:
        scale = max_reward + shifted_mean if scale_by == "mean" else torch.ones_like(shifted_mean)
    divisor = scale if scale_by == "none" else scale + settings.eps
    if settings.needs_others:
        divisor = torch.where(members > 1, divisor, 0)
    keep = settings.singleton_groups == "keep" and settings.needs_others
    if keep:
        divisor = torch.where(is_singleton, 1 + (0 if scale_by == "none" else settings.eps), divisor)
    factor: Tensor | float = 1.0
    numerator = x if baseline == "none" else centered
    if baseline == "leave_one_out":
        whole = groups.to_rows(total_weight)
        rest = whole - w
        factor = torch.where(groups.to_rows(members > 1) & (rest != 0), whole / torch.where(rest != 0, rest, 1), 1)
        numerator = centered * factor
    if keep:
        numerator = torch.where(groups.to_rows(is_singleton), x, numerator)
    return _Statistics(w, counted, centered, numerator, factor, total_weight, is_singleton, scale, divisor)
