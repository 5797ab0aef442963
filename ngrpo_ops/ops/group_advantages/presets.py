"""The settings of `group_advantages` that reproduce each trainer's advantages, and the whitening some of them need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .._checks import require_integer, require_number


@dataclass(frozen=True)
class Whitening:
    """Advantages minus their mean, divided by max(their standard deviation, floor) + eps, over all rows of the batch.

    The statistics cover the rows that have an advantage. Where `group_advantages` is given `lengths`, they cover the
    tokens of these rows.

    Args:
        ddof: the variance divides by (n - ddof), >= 0.
        eps: added to the standard deviation, >= 0.
        floor: the least standard deviation, >= 0.

    Raises:
        TypeError, ValueError: an argument of another type or out of range, by name.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import Whitening, group_advantages
        >>> rewards = torch.tensor([1.0, 0.0, 6.0, 0.0])
        >>> group_advantages(rewards, group_size=2, scale="none")
        tensor([ 0.5000, -0.5000,  3.0000, -3.0000])
        >>> white = group_advantages(rewards, group_size=2, scale="none", whitening=Whitening(eps=0.0))
        >>> torch.allclose(white.std(), torch.tensor(1.0))
        True
    """

    ddof: int = 1
    eps: float = 1e-4
    floor: float = 0.0

    def __post_init__(self) -> None:
        require_integer(self.ddof, "ddof", least=0)
        require_number(self.eps, "eps", least=0)
        require_number(self.floor, "floor", least=0)


_LEAVE_ONE_OUT = {"baseline": "leave_one_out", "scale": "none"}
_KEEP_SINGLETONS = {"eps": 1e-6, "singleton_groups": "keep"}

ADVANTAGE_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "trl/grpo": {"nan_policy": "omit"},
        "trl/grpo_batch": {"scale": "batch_std", "nan_policy": "omit"},
        "trl/dr_grpo": {"scale": "none", "nan_policy": "omit"},
        "trl/gdpo": {"aggregation": "normalize_then_sum", "nan_policy": "omit", "whitening": Whitening()},
        "trl/rloo": {**_LEAVE_ONE_OUT, "nan_policy": "omit"},
        "trl/rloo_normalized": {**_LEAVE_ONE_OUT, "nan_policy": "omit", "whitening": Whitening()},
        "verl/grpo": _KEEP_SINGLETONS,
        "verl/dr_grpo": {**_KEEP_SINGLETONS, "scale": "none"},
        "verl/rloo": {**_KEEP_SINGLETONS, **_LEAVE_ONE_OUT},
        "openrlhf/group_norm": {"eps": 1e-9},
        "openrlhf/dr_grpo": {"scale": "none"},
        "openrlhf/rloo": _LEAVE_ONE_OUT,
        "openrlhf/reinforce_baseline": {"scale": "none", "whitening": Whitening(ddof=0, eps=0.0, floor=1e-4)},
        "maxrl": {"scale": "mean", "eps": 0.0},
    }
)
"""Keywords of `group_advantages` that reproduce a trainer's advantages. The sources:

- TRL 1.16: `scale_rewards` and `multi_objective_aggregation` of GRPOTrainer; RLOOTrainer with and without
  `normalize_advantages`.
- verl: `adv_estimator`; Dr. GRPO is `norm_adv_by_std_in_grpo=False`.
- OpenRLHF 0.11: `advantage_estimator`; reinforce_baseline also needs `lengths`.

Equal rewards give exactly 0 here. In the trainers, the rounding error of the mean may remain, divided by eps.

Examples:
    >>> rewards = torch.tensor([1.0, 0.0, 2.0, 5.0])
    >>> group_advantages(rewards, group_size=4, **ADVANTAGE_PRESETS["verl/rloo"])
    tensor([-1.3333, -2.6667,  0.0000,  4.0000])
"""
