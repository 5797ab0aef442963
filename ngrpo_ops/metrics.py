"""The metrics that every trainer logs as ``mix/*``, from the sums of its records."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .record import MixRecord, SparseRecord

REPLAY_ERROR = "mix/replay_error"
REPLAY_OUTLIERS = "mix/replay_outliers"
COSINE = "mix/cosine"
ROLLOUT_METRICS = ("mix/gated_share", "mix/anchor_differs", "mix/anchor_weight")
"""What `rollout_metrics` returns."""


def rollout_sums(record: MixRecord | SparseRecord, tokens: Tensor | int) -> Tensor:
    """float64 [4]: what `rollout_metrics` is made of, to be added over records and ranks.

    Args:
        record: of a rollout, with its log-probabilities.
        tokens: the number of completion tokens.

    Raises:
        ValueError: a record without log-probabilities.
    """
    if record.logprobs is None:
        raise ValueError("record must hold its log-probabilities, got logprobs None")
    if isinstance(record, MixRecord):
        logprobs, anchor_weights = record.logprobs[record.gate], record.weights[..., 0][record.gate]
    else:
        logprobs, anchor_weights = record.logprobs[record.steps], record.weights[:, 0]
    gated = torch.tensor(len(logprobs), device=logprobs.device)
    sums = [gated, torch.as_tensor(tokens), (1 - logprobs.exp()).sum(), anchor_weights.sum()]
    return torch.stack([value.double().to(logprobs.device) for value in sums])


def rollout_metrics(sums: Tensor) -> dict[str, float]:
    """What the records of a whole rollout tell.

    mix/gated_share is the share of completion tokens that were mixed. Over mixed steps, mix/anchor_differs is the
    probability that a sample would have differed from the anchor, and mix/anchor_weight the anchor's weight in the mix.
    Both are NaN where no step was mixed, and all are of no tokens.
    """
    gated, tokens, differs, weight = sums.tolist()
    found = mean(gated, tokens), mean(differs, gated), mean(weight, gated)
    return dict(zip(ROLLOUT_METRICS, found, strict=True))


# The replay -------------------------------------------------------------------------------------------------------


def replay_tolerance(dtype: torch.dtype) -> float:
    """What rounding may make of a log-probability: 1e-3 in float32, 4e-3 in float16, 0.031 in bfloat16.

    A cached and a full forward of a trained model differ by some 1e-5 in float32; the rest of the 1e-3 is for kernels.
    """
    return max(1e-3, 4 * torch.finfo(dtype).eps)


class ReplayErrors(NamedTuple):
    """How far replayed log-probabilities are from the rollout's.

    Attributes:
        largest: the largest |difference|. One token whose experts were chosen otherwise makes it large.
        largest_before: the largest of the tokens that no mixed step of their row precedes. No replay gets these wrong.
        outliers: of the tokens after a mixed step of their row, the share that differs by more than the tolerance.
        outliers_before: the same of the tokens that no mixed step precedes.

    All are NaN of no tokens.
    """

    largest: float
    largest_before: float
    outliers: float
    outliers_before: float


def replay_sums(differences: Tensor, gate: Tensor, compared: Tensor, tolerance: float) -> Tensor:
    """float64 [6]: what `replay_errors` is made of, for rows of [B, T].

    Args:
        differences: replayed less rollout's log-probabilities.
        gate: bool, the mixed steps. The mix of a step is embedded after it.
        compared: which tokens are compared.
        tolerance: see `replay_tolerance`.
    """
    errors, compared = differences.abs(), compared.bool()
    if not errors.numel():
        return torch.tensor([-math.inf, -math.inf, 0, 0, 0, 0], dtype=torch.float64, device=errors.device)
    after = gate.cumsum(1) - gate.long() > 0
    off = ~(errors <= tolerance)  # NaN too
    counts = [(mask & compared).sum() for mask in (after & off, after, ~after & off, ~after)]
    largest = [errors.masked_fill(~mask, -math.inf).amax() for mask in (compared, compared & ~after)]
    return torch.stack([value.double() for value in (*largest, *counts)])


def sample_replay_sums(record: SparseRecord, replayed: Tensor, compared: Tensor, tolerance: float) -> Tensor:
    """float64 [6] on the CPU: `replay_sums` of one sample.

    Args:
        record: its record.
        replayed: [T], the policy's log-probability of every generated token.
        compared: [T], which tokens are compared.
        tolerance: see `replay_tolerance`.

    Examples:
        >>> import torch
        >>> from ngrpo_ops.metrics import replay_errors, sample_replay_sums
        >>> from ngrpo_ops.record import SparseRecord
        >>> ids, weights = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[0.75, 0.25]])
        >>> record = SparseRecord(1, torch.tensor([0]), ids, weights, logprobs=torch.zeros(2))
        >>> sums = sample_replay_sums(record, torch.tensor([0.0, -0.5]), torch.ones(2), tolerance=1e-3)
        >>> replay_errors(sums[None]).largest
        0.5
    """
    difference = replayed.float().cpu() - record.logprobs
    gate = torch.zeros_like(difference, dtype=torch.bool).index_fill(0, record.steps, True)
    return replay_sums(difference[None], gate[None], compared.cpu()[None], tolerance)


def replay_errors(sums: Tensor) -> ReplayErrors:
    """What the rows of all batches and ranks tell.

    Args:
        sums: [N, 6], `replay_sums` of each.

    Examples:
        >>> import torch
        >>> from ngrpo_ops.metrics import replay_errors, replay_sums
        >>> gate = torch.tensor([[False, True, False, False]])
        >>> off = torch.tensor([[0.0, 0.0, 0.5, 0.0]])
        >>> replay_errors(replay_sums(off, gate, torch.ones(1, 4), 1e-3)[None])
        ReplayErrors(largest=0.5, largest_before=0.0, outliers=0.5, outliers_before=0.0)
    """
    off_after, after, off_before, before = sums[:, 2:].sum(0).tolist()
    largest, largest_before = (math.nan if x == -math.inf else x for x in sums[:, :2].amax(0).tolist())
    return ReplayErrors(largest, largest_before, mean(off_after, after), mean(off_before, before))


def mean(total: float, count: float) -> float:
    """total / count, and NaN of nothing: a metric that was not measured must not read as a good one."""
    return total / count if count else float("nan")
