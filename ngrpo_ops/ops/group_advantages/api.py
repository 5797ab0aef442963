"""The public function `group_advantages`: its contract, its checks, and how advantages are put together.

Several reward functions, a scale of the whole batch, and whitening are each put together from the one grouped
operation in `registration`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

from ..._patching import renamed
from .._checks import (
    FLOATING,
    require_choice,
    require_floating,
    require_ids,
    require_integer,
    require_mask,
    require_number,
    require_same_device,
    require_shape,
    require_tensor,
    values_are_readable,
)
from .._library import choose_backend
from .._precision import compute_dtype
from . import registration
from .presets import Whitening
from .reference import GroupSettings, require_offsets

_P = ParamSpec("_P")


def _accept_singles(function: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Also takes `singles`, the name of `singleton_groups` up to version 0.6. To be removed in 0.8."""

    @functools.wraps(function)
    def accepting(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        if "singles" in kwargs:
            return function(*args, **renamed(kwargs, {"singles": "singleton_groups"}, "group_advantages"))
        return function(*args, **kwargs)

    return accepting


@_accept_singles
def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    offsets: Tensor | None = None,
    baseline: str = "mean",
    scale: str = "std",
    ddof: int = 1,
    eps: float = 1e-4,
    mask: Tensor | None = None,
    reward_weights: Tensor | None = None,
    aggregation: str = "sum_then_normalize",
    nan_policy: str = "propagate",
    singleton_groups: str = "zero",
    whitening: Whitening | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Group-relative advantages (r - baseline) / (scale + eps), one for each completion (equation 12).

    The defaults are those of TRL's GRPOTrainer. `ADVANTAGE_PRESETS` has the settings of each trainer's modes.

    Args:
        rewards: [N], or [N, R] from R reward functions; floating point. Everything is computed in float32, and in
            float64 for float64 rewards.
        group_size: rows of each group, which follow one another; divides N. Exactly one of `group_size`, `group_ids`
            and `offsets` is given.
        group_ids: int64 [N], a label for each row. The rows of a group may be anywhere, and groups may differ in size.
        offsets: int64 [G + 1], group g is the rows offsets[g] to offsets[g + 1]. They start at 0, end at N and never
            fall; this is checked on the CPU. On a GPU rows in no group get 0.
        baseline: "mean" of the group; "leave_one_out", the mean of the other rows of the group; or "none".
        scale: "std" of the group; "batch_std", over all rows; "mean" of the group; or "none", which does not use eps.
        ddof: the variances divide by (n - ddof), >= 0.
        eps: added to the scale, >= 0. Equal rewards give exactly 0 for every eps.
        mask: bool [N]. A row that is False is in no statistic and gets 0.
        reward_weights: [R], floating point, one for each reward function. None: 1 for each.
        aggregation: for several reward functions, "sum_then_normalize", or "normalize_then_sum" (GDPO), which
            normalizes each function by itself.
        nan_policy: "propagate" makes every advantage of a group with a NaN reward NaN, and every advantage of the
            batch with "batch_std" or a whitening. "omit" leaves NaN rewards out of every statistic and out of the sum
            over functions; a row whose rewards are all NaN gets 0.
        singleton_groups: what a group of one row gets. "zero" is 0, and NaN only where the batch's own scale is NaN.
            "keep" is its reward over 1 + eps, as in verl, and its reward over the batch's scale with "batch_std". It
            is not used where neither baseline nor scale comes from the group: baseline "none" with scale "none",
            "mean" or "batch_std".
        whitening: a `Whitening` of the advantages over the whole batch. Rows without an advantage are left out: masked
            rows, rows without a reward under "omit", and rows that are alone in their group where the baseline is the
            mean of the others.
        lengths: int64 [N], not negative, the tokens of each completion: the statistics of the whitening cover tokens.
            None: they cover rows.
        backend: "eager", "triton" or None. None is "triton" on a GPU except for float64, and under TRITON_INTERPRET=1.

    Returns:
        advantages [N] in the dtype of `rewards`. Differentiable once in `rewards`.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or range, by name; an empty batch; a group_size that
            does not divide N; not exactly one of group_size, group_ids and offsets; a backend that cannot be used.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import ADVANTAGE_PRESETS, group_advantages
        >>> rewards = torch.tensor([1.0, 0.0, 1.0, 1.0])
        >>> group_advantages(rewards, group_size=2)  # equal rewards give exactly 0
        tensor([ 0.7070, -0.7070,  0.0000,  0.0000])
        >>> group_advantages(rewards, group_ids=torch.tensor([7, 7, 7, 2]), **ADVANTAGE_PRESETS["verl/rloo"])
        tensor([ 0.5000, -1.0000,  0.5000,  1.0000])
    """
    require_tensor(rewards, "rewards")
    if rewards.dim() not in (1, 2) or rewards.dtype not in FLOATING or rewards.numel() == 0:
        raise ValueError(
            f"rewards must be a non-empty floating-point [N] or [N, R], got {rewards.dtype} of shape "
            f"{tuple(rewards.shape)}"
        )
    columns = rewards if rewards.dim() == 2 else rewards[:, None]
    require_choice(baseline, ("mean", "leave_one_out", "none"), "baseline")
    require_choice(scale, ("std", "batch_std", "mean", "none"), "scale")
    require_choice(aggregation, ("sum_then_normalize", "normalize_then_sum"), "aggregation")
    require_choice(nan_policy, ("propagate", "omit"), "nan_policy")
    require_choice(singleton_groups, ("zero", "keep"), "singleton_groups")
    require_integer(ddof, "ddof", least=0)
    require_number(eps, "eps", least=0)
    if whitening is not None and not isinstance(whitening, Whitening):
        raise TypeError(f"whitening must be a Whitening or None, got {whitening!r}")
    if lengths is not None and whitening is None:
        raise ValueError("lengths are read only with a whitening")
    _require_companions(columns, mask, reward_weights, lengths)
    order, offsets, group_size = _group_layout(rewards, group_size, group_ids, offsets)
    backend = choose_backend(backend, rewards)
    settings = GroupSettings(
        weights=mask,
        order=order,
        offsets=offsets,
        group_size=group_size,
        baseline=baseline,
        scale="none" if scale == "batch_std" else scale,
        ddof=ddof,
        eps=float(eps),
        singleton_groups=singleton_groups,
        omit_nan=nan_policy == "omit",
    )
    is_sum = columns.shape[1] > 1 or reward_weights is not None
    has_parts = is_sum or scale == "batch_std" or whitening is not None
    scored = None  # rows that have a reward, bool [N]; None: all
    if has_parts:
        columns = columns.to(compute_dtype(rewards))  # the advantages are rounded once, at the end
        scored = ~columns.detach().isnan().all(1) if settings.omit_nan else None
    counted = _product(mask, scored)
    if aggregation == "sum_then_normalize":
        columns = _weighted_sum(columns, reward_weights, settings.omit_nan, scored)
    advantages, _ = registration.group_advantages(columns, *settings, backend)
    if scale == "batch_std":
        advantages = _divide(advantages, _batch_std(columns, mask, ddof, settings.omit_nan, backend), settings.eps)
    if aggregation == "normalize_then_sum":
        advantages = _weighted_sum(advantages, reward_weights)
    if whitening is not None:
        if baseline == "leave_one_out" and singleton_groups == "zero":
            # The row of a singleton group has no others to be compared with: its advantage stays 0.
            compared = ~_in_singleton_group(columns, settings, backend).all(1)
            scored = compared if scored is None else scored & compared
        advantages = _whiten(advantages, whitening, _product(lengths, mask, scored), backend)
    if has_parts and counted is not None:  # 0 whatever it was weighted with or divided by
        advantages = torch.where(counted[:, None], advantages, 0)
    return advantages.squeeze(1).to(rewards.dtype)


# Checks -----------------------------------------------------------------------------------------------------------


def _require_companions(
    rewards: Tensor, mask: Tensor | None, reward_weights: Tensor | None, lengths: Tensor | None
) -> None:
    """The tensors that come with rewards [N, R]."""
    rows, functions = rewards.shape
    if mask is not None:
        require_mask(mask, (rows,), "mask", "[N]")
        require_same_device("mask", mask, "rewards", rewards)
    if reward_weights is not None:
        require_floating(reward_weights, "reward_weights")
        require_shape(reward_weights, (functions,), "reward_weights", "[R]")
        require_same_device("reward_weights", reward_weights, "rewards", rewards)
    if lengths is not None:
        require_ids(lengths, "lengths")
        if values_are_readable(lengths) and bool((lengths < 0).any()):
            raise ValueError(f"lengths must not be negative, got {int(lengths.min())}")
        require_shape(lengths, (rows,), "lengths", "[N]")
        require_same_device("lengths", lengths, "rewards", rewards)


def _group_layout(
    rewards: Tensor, group_size: int | None, group_ids: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor | None, Tensor | None, int]:
    """`order`, `offsets` and `group_size` of GroupSettings."""
    rows = rewards.shape[0]
    if sum(x is not None for x in (group_size, group_ids, offsets)) != 1:
        raise ValueError("exactly one of group_size, group_ids and offsets must be given")
    if group_size is not None:
        require_integer(group_size, "group_size")
        if group_size < 1 or rows % group_size:
            raise ValueError(f"group_size must divide the {rows} rewards, got {group_size}")
        return None, None, group_size
    if group_ids is not None:
        require_ids(group_ids, "group_ids")
        require_shape(group_ids, (rows,), "group_ids", "[N]")
        require_same_device("group_ids", group_ids, "rewards", rewards)
        return *_layout_of_labels(group_ids), 1
    assert offsets is not None
    require_ids(offsets, "offsets")
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(f"offsets must be [G + 1] with G >= 1, got shape {tuple(offsets.shape)}")
    require_same_device("offsets", offsets, "rewards", rewards)
    if not torch.compiler.is_compiling():
        require_offsets(offsets, rows)
    return None, offsets, 1


def _layout_of_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """`order` and `offsets` of N labels.

    The number of different labels is not read, because the host would wait for the device. There are always N groups,
    and those after the last label are empty.
    """
    ordered, order = labels.sort(stable=True)
    new = torch.cat([torch.zeros_like(ordered[:1]), (ordered[1:] != ordered[:-1]).to(torch.int64)])
    number = new.cumsum(0)
    bounds = torch.arange(labels.shape[0] + 1, device=labels.device)
    return order, torch.searchsorted(number, bounds)


# Parts of an advantage --------------------------------------------------------------------------------------------


def _weighted_sum(
    x: Tensor, reward_weights: Tensor | None, omit_nan: bool = False, scored: Tensor | None = None
) -> Tensor:
    """The sum over the columns, [N, 1]. With `omit_nan`, NaN is left out; a row that is not `scored` is NaN."""
    if x.shape[1] == 1 and reward_weights is None:
        return x
    weighted = x if reward_weights is None else x * reward_weights.to(x.dtype)
    total = weighted.nansum(1, keepdim=True) if omit_nan else weighted.sum(1, keepdim=True)
    return total if scored is None else torch.where(scored[:, None], total, torch.nan)


def _in_singleton_group(rewards: Tensor, settings: GroupSettings, backend: str) -> Tensor:
    """Which rewards are the only ones of their group, bool of the shape of `rewards`."""
    rewards = rewards.detach()
    level = torch.zeros_like(rewards)
    if settings.omit_nan:
        level = torch.where(rewards.isnan(), torch.nan, level)
    marking = settings._replace(baseline="mean", scale="none", ddof=0, eps=0.0, singleton_groups="nan")
    marked, _ = registration.group_advantages(level, *marking, backend)
    return marked.isnan()


def _batch_settings(
    rows: int, weights: Tensor | None, scale: str, ddof: int = 0, omit_nan: bool = False
) -> GroupSettings:
    """The whole batch as one group."""
    return GroupSettings(weights, None, None, rows, "mean", scale, ddof, 0.0, "zero", omit_nan)


def _batch_std(x: Tensor, weights: Tensor | None, ddof: int, omit_nan: bool, backend: str) -> Tensor:
    """The standard deviation over all rows, [1, columns]. Differentiable."""
    _, std = registration.group_advantages(x, *_batch_settings(x.shape[0], weights, "std", ddof, omit_nan), backend)
    return std


def _whiten(x: Tensor, whitening: Whitening, weights: Tensor | None, backend: str) -> Tensor:
    if whitening.floor == 0:
        settings = _batch_settings(x.shape[0], weights, "std", whitening.ddof)._replace(eps=whitening.eps)
        return registration.group_advantages(x, *settings, backend)[0]
    centered, _ = registration.group_advantages(x, *_batch_settings(x.shape[0], weights, "none"), backend)
    std = _batch_std(x, weights, whitening.ddof, False, backend).clamp(min=whitening.floor)
    return _divide(centered, std, whitening.eps)


def _product(*factors: Tensor | None) -> Tensor | None:
    """The product of the factors that are not None."""
    product = None
    for factor in factors:
        product = factor if product is None else product if factor is None else product * factor
    return product


def _divide(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / (scale + eps), 0 where the divisor is."""
    divisor = scale + eps
    return torch.where(divisor != 0, x / torch.where(divisor != 0, divisor, 1), 0).to(x.dtype)
