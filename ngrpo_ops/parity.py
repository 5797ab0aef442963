"""A trainer's dry run: rollouts of an engine against the policy that is to be trained, before GPUs are reserved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from .config import MixingConfig
from .metrics import mean

PROMPTS = 2
"""The prompts of a dry run."""

TOKENS = 128
"""The tokens of a sample in a dry run, at most."""

PLAIN, REPLAYED, PLAIN_IDS = "plain rollouts", "mixed, replayed", "mixed, plain ids"
"""The rows of a dry run's table."""


def strongly_mixed(config: MixingConfig) -> MixingConfig:
    """The configuration with mixes so strong that a policy which does not replay them shows a difference.

    At the paper's settings the mixes may be within bfloat16's rounding of the anchor.

    Examples:
        >>> from ngrpo_ops import MixingConfig
        >>> from ngrpo_ops.parity import strongly_mixed
        >>> strong = strongly_mixed(MixingConfig(k=5))
        >>> strong.k, strong.mixing_rate, strong.temperature
        (5, 0.5, 4.0)
    """
    return replace(
        config, mixing_rate=max(config.mixing_rate, 0.5), temperature=max(config.temperature or 1.0, 4.0),
        variant="paper", entropy_threshold=None, stop_token_ids=(), loss_on_mixed_steps=True,
    )  # fmt: skip


def parity_table(differences: Mapping[str, Tensor]) -> str:
    """The differences of log-probabilities between engine and policy, a row each.

    Args:
        differences: by `PLAIN`, `REPLAYED` and `PLAIN_IDS`, |engine's - policy's log-probability| of some tokens.

    Examples:
        >>> import torch
        >>> from ngrpo_ops.parity import PLAIN, parity_table
        >>> print(parity_table({PLAIN: torch.tensor([1e-6, 3e-6])}))
        log-probabilities, engine against policy:       tokens  mean |diff|   max |diff|
          plain rollouts                                     2     2.00e-06     3.00e-06
    """
    lines = ["log-probabilities, engine against policy:       tokens  mean |diff|   max |diff|"]
    for title, values in differences.items():
        largest = float(values.max()) if len(values) else float("nan")
        lines.append(f"  {title:44} {len(values):7} {mean(float(values.sum()), len(values)):12.2e} {largest:12.2e}")
    return "\n".join(lines)


def verdict(differences: Mapping[str, Tensor], mixes: bool) -> tuple[int, str]:
    """The exit status of a dry run, and its words.

    Args:
        differences: see `parity_table`.
        mixes: whether a mix is more than the anchor.

    Examples:
        >>> import torch
        >>> from ngrpo_ops.parity import PLAIN, PLAIN_IDS, REPLAYED, verdict
        >>> small, large = torch.tensor([1e-6]), torch.tensor([0.1])
        >>> verdict({PLAIN: small, REPLAYED: small, PLAIN_IDS: large}, mixes=True)
        (0, 'parity: the policy agrees with the engine on mixed rollouts as it does on plain ones')
        >>> verdict({PLAIN: small, REPLAYED: large, PLAIN_IDS: large}, mixes=True)[0]
        1
    """
    plain, replayed, plain_ids = (differences[name] for name in (PLAIN, REPLAYED, PLAIN_IDS))
    if not len(replayed):
        return 1, "no token follows a mixed step: nothing was compared"
    bound = max(2 * float(plain.mean()), 1e-5)
    if not float(replayed.mean()) <= bound:
        return 1, f"NO PARITY: on mixed rollouts the mean is to be at most {bound:.2e}, twice that on plain ones"
    if mixes and not float(plain_ids.mean()) > bound:
        return 1, "INCONCLUSIVE: given plain ids the policy agrees as well, so that a replay cannot be told from none"
    return 0, "parity: the policy agrees with the engine on mixed rollouts as it does on plain ones"
