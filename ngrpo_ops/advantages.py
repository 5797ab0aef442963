"""How group advantages are put together: several reward functions, batch-wide scale, whitening, each from the one
grouped operation of `ops`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from . import _operations as ops
from .ops._checks import require_integer, require_number
from .ops._precision import compute_dtype


@dataclass(frozen=True)
class Groups:
    """Groups of rows: runs of `size`, or of `offsets` ([G + 1]), counted through `order` where there is one."""

    order: Tensor | None
    offsets: Tensor | None
    size: int

    @classmethod
    def of_labels(cls, labels: Tensor) -> Groups:
        """Without waiting for a device, so without knowing how many labels there are: the groups after the last are
        empty."""
        ordered, order = labels.sort(stable=True)
        new = torch.cat([torch.zeros_like(ordered[:1]), (ordered[1:] != ordered[:-1]).to(torch.int64)])
        number = new.cumsum(0)
        bounds = torch.arange(labels.shape[0] + 1, device=labels.device)
        return cls(order, torch.searchsorted(number, bounds), 1)


@dataclass(frozen=True)
class Whitening:
    """Advantages less their mean, divided by max(their standard deviation, floor) + eps, over all rows of the batch.

    The statistics go over the rows that have an advantage, or, where `group_advantages` is given `lengths`, over their
    tokens. The standard deviation divides by (n - ddof).
    """

    ddof: int = 1
    eps: float = 1e-4
    floor: float = 0.0

    def __post_init__(self) -> None:
        require_integer(self.ddof, "ddof", least=0)
        require_number(self.eps, "eps", least=0)
        require_number(self.floor, "floor", least=0)


_LEAVE_ONE_OUT = {"baseline": "leave_one_out", "scale": "none"}
_KEPT = {"eps": 1e-6, "singles": "keep"}

#: Keywords of `group_advantages` that reproduce a trainer's advantages: TRL 1.16 (`scale_rewards` and
#: `multi_objective_aggregation`; RLOOTrainer with and without `normalize_advantages`), verl (`adv_estimator`; Dr. GRPO
#: is `norm_adv_by_std_in_grpo=False`), OpenRLHF 0.11 (`advantage_estimator`; reinforce_baseline also wants `lengths`).
#: Equal rewards give exactly 0 here, where theirs may leave a rounding error of the mean divided by eps.
ADVANTAGE_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "trl/grpo": {"nan_policy": "omit"},
        "trl/grpo_batch": {"scale": "batch_std", "nan_policy": "omit"},
        "trl/dr_grpo": {"scale": "none", "nan_policy": "omit"},
        "trl/gdpo": {"aggregation": "normalize_then_sum", "nan_policy": "omit", "whitening": Whitening()},
        "trl/rloo": {**_LEAVE_ONE_OUT, "nan_policy": "omit"},
        "trl/rloo_normalized": {**_LEAVE_ONE_OUT, "nan_policy": "omit", "whitening": Whitening()},
        "verl/grpo": _KEPT,
        "verl/dr_grpo": {**_KEPT, "scale": "none"},
        "verl/rloo": {**_KEPT, **_LEAVE_ONE_OUT},
        "openrlhf/group_norm": {"eps": 1e-9},
        "openrlhf/dr_grpo": {"scale": "none"},
        "openrlhf/rloo": _LEAVE_ONE_OUT,
        "openrlhf/reinforce_baseline": {"scale": "none", "whitening": Whitening(ddof=0, eps=0.0, floor=1e-4)},
        "maxrl": {"scale": "mean", "eps": 0.0},
    }
)


@dataclass(frozen=True)
class Options:
    """The keywords of `group_advantages`, as they are named there."""

    baseline: str
    scale: str
    ddof: int
    eps: float
    singles: str
    omit_nan: bool
    normalize_then_sum: bool
    whitening: Whitening | None
    backend: str


def compute(
    rewards: Tensor, groups: Groups, options: Options, mask: Tensor | None, reward_weights: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:  # fmt: skip
    """rewards [N, R]; advantages [N]."""
    dtype = rewards.dtype
    several_steps = options.scale == "batch_std" or options.whitening is not None
    if several_steps or rewards.shape[1] > 1 or reward_weights is not None:
        rewards = rewards.to(compute_dtype(rewards))  # rounded once, at the end
    scored = rewards.detach().isnan().logical_not().any(1) if options.omit_nan else None
    if not options.normalize_then_sum:
        rewards = _weighted_sum(rewards, reward_weights, options.omit_nan, scored)
    out = _normalize(rewards, groups, options, mask)
    if options.whitening is not None and options.baseline == "leave_one_out" and options.singles != "keep":
        # A row that is alone has no others to be measured by: it is left out of the whitening, and stays 0.
        several = ~_alone(rewards.detach(), groups, options, mask).all(1)
        scored = several if scored is None else scored & several
    if options.normalize_then_sum:
        out = _weighted_sum(out, reward_weights, False, None)
    if options.whitening is not None:
        out = _whiten(out, options.whitening, options.backend, mask, scored, lengths)
    return out.squeeze(1).to(dtype)


def _alone(rewards: Tensor, groups: Groups, options: Options, mask: Tensor | None) -> Tensor:
    """Which rewards are the only ones of their group; bool as `rewards`."""
    level = torch.zeros_like(rewards)
    if options.omit_nan:
        level = torch.where(rewards.isnan(), torch.nan, level)
    out, _ = ops.group_advantages(
        level, mask, groups.order, groups.offsets, groups.size, "mean", "none", 0, 0.0, "nan", options.omit_nan,
        options.backend,
    )  # fmt: skip
    return out.isnan()


def _weighted_sum(x: Tensor, weights: Tensor | None, omit_nan: bool, scored: Tensor | None) -> Tensor:
    """[N, 1]: of the columns, those that are NaN left out; NaN where all are."""
    if x.shape[1] == 1 and weights is None:
        return x
    weighted = x if weights is None else x * weights.to(x.dtype)
    total = weighted.nansum(1, keepdim=True) if omit_nan else weighted.sum(1, keepdim=True)
    return total if scored is None else torch.where(scored[:, None], total, torch.nan)


def _normalize(x: Tensor, groups: Groups, options: Options, weights: Tensor | None) -> Tensor:
    scale = "none" if options.scale == "batch_std" else options.scale
    out, _ = ops.group_advantages(
        x, weights, groups.order, groups.offsets, groups.size, options.baseline, scale, options.ddof, options.eps,
        options.singles, options.omit_nan, options.backend,
    )  # fmt: skip
    if options.scale == "batch_std":
        out = _divide(out, _spread(x, weights, options.ddof, options.omit_nan, options.backend), options.eps)
    return out


def _whiten(
    x: Tensor,
    whitening: Whitening,
    backend: str,
    mask: Tensor | None,
    scored: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    weights = lengths
    for rows in (mask, scored):
        if rows is not None:
            weights = rows if weights is None else weights * rows
    centered, _ = ops.group_advantages(
        x, weights, None, None, x.shape[0], "mean", "none", 0, 0.0, "zero", False, backend
    )
    spread = _spread(x, weights, whitening.ddof, False, backend).clamp(min=whitening.floor)
    return _divide(centered, spread, whitening.eps)


def _spread(x: Tensor, weights: Tensor | None, ddof: int, omit_nan: bool, backend: str) -> Tensor:
    """The standard deviation over all rows, [1, columns], differentiable."""
    _, spread = ops.group_advantages(
        x, weights, None, None, x.shape[0], "mean", "std", ddof, 0.0, "zero", omit_nan, backend
    )
    return spread


def _divide(x: Tensor, spread: Tensor, eps: float) -> Tensor:
    divisor = spread + eps
    return torch.where(divisor != 0, x / torch.where(divisor != 0, divisor, 1), 0).to(x.dtype)
