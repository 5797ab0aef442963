"""The metrics that every trainer logs as ``mix/*``, from the sums of its records."""

from __future__ import annotations

import torch
from torch import Tensor

from .record import MixRecord, SparseRecord

REPLAY_ERROR = "mix/replay_error"
COSINE = "mix/cosine"


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
    Both are NaN where no step was mixed.
    """
    gated, tokens, differs, weight = sums.tolist()
    return {
        "mix/gated_share": gated / tokens,
        "mix/anchor_differs": mean(differs, gated),
        "mix/anchor_weight": mean(weight, gated),
    }


def mean(total: float, count: float) -> float:
    """total / count, and NaN of nothing: a metric that was not measured must not read as a good one."""
    return total / count if count else float("nan")
