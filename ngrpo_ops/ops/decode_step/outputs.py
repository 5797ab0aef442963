"""What a decode step returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DecodeStep(NamedTuple):
    """What one decode step leaves behind; see `decode_step`.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import DecodeStep, decode_step
        >>> step = decode_step(torch.zeros(2, 5), None, strategy="anchor", seed=0, step=0)
        >>> isinstance(step, DecodeStep), step.token_ids.shape
        (True, torch.Size([2]))
    """

    token_ids: Tensor
    gate: Tensor
    ids: Tensor
    weights: Tensor
    embeddings: Tensor
    logprobs: Tensor
    entropy: Tensor
    fault: Tensor


class MixingCandidates(NamedTuple):
    """What a step of each row would mix; see `mixing_candidates`.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import MixingCandidates, mixing_candidates
        >>> found = mixing_candidates(torch.zeros(2, 5), strategy="topk", k=2)
        >>> isinstance(found, MixingCandidates), found.weights.tolist()
        (True, [[0.5, 0.5], [0.5, 0.5]])
    """

    ids: Tensor
    weights: Tensor
    fault: Tensor
    entropy: Tensor | None
