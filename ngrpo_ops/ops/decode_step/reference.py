"""The step in plain torch, correct in float64: the oracle of the kernels, and what runs where there are none.

Every row depends on its own logits, settings and counter alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...random import gates
from ...strategies import Strategy, get_strategy
from .._checks import FLOATING, within
from .._precision import ROW_BLOCK_ELEMENTS
from ..gaussian_noise import gaussian_noise_reference
from ..mix_embeddings import mix_embeddings_reference
from .faults import BAD_IDS, BAD_WEIGHTS, NO_SUCH_CANDIDATE, NO_TOKEN, NOT_A_NUMBER
from .outputs import DecodeStep
from .policy import Policy
from .settings import Settings

_SUM_TOLERANCE = 1e-3  # of the weights that a user's strategy returns, or the spacing of their dtype where it is larger


def mixing_candidates(
    logits: Tensor, settings: Settings, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids and weights [B, k], entropy [B] (or empty), fault [B].

    Without the entropy, most strategies only look through the logits for the largest.
    """
    policy = _policy(logits, settings)
    ids, weights, fault = _candidates(policy, settings)
    if not return_entropy:
        return ids, weights, logits.new_empty(0, dtype=torch.float32), fault
    return ids, weights, policy.entropy.float().masked_fill(fault != 0, torch.nan), fault


def decode_step(logits: Tensor, embedding: Tensor, settings: Settings) -> DecodeStep:
    policy = _policy(logits, settings)
    d = policy.distribution
    ids, weights, fault = _candidates(policy, settings)
    bad = fault != 0
    entropy = d.entropy.float().masked_fill(bad, torch.nan)
    seed, rows, step = policy.counter
    gate = gates(seed, rows, step, settings.mixing_rate) & ~bad
    if settings.enabled is not None:
        gate = gate & settings.enabled
    if settings.entropy_threshold is not None:
        gate = gate & (entropy >= settings.entropy_threshold)
    token_ids = torch.where(gate, ids[:, 0], policy.sample()[:, 0]).masked_fill(bad, 0)
    mixed = mix_embeddings_reference(embedding, ids, weights)
    if (scale := policy.options.get("noise_scale")) is not None:
        scales = torch.full_like(entropy, scale)
        noise = gaussian_noise_reference(mixed, scales, seed.expand(rows.shape), rows, step)
        mixed = (mixed.to(noise.dtype) + noise).to(mixed.dtype)
    embeddings = torch.where(gate[:, None], mixed, embedding[token_ids]).masked_fill(bad[:, None], torch.nan)
    logprobs = (d.shifted.gather(1, token_ids[:, None]).squeeze(1) - d.exp_sum.log()).float()
    return DecodeStep(token_ids, gate, ids, weights, embeddings, logprobs.masked_fill(bad, torch.nan), entropy, fault)


def decode_step_cpu(logits: Tensor, embedding: Tensor, settings: Settings) -> DecodeStep:
    """`decode_step` by blocks of rows whose logits stay in the cache."""
    count, block = logits.shape[0], max(1, ROW_BLOCK_ELEMENTS // logits.shape[1])
    if count <= block:
        return decode_step(logits, embedding, settings)
    blocks = [slice(start, min(start + block, count)) for start in range(0, count, block)]
    steps = [decode_step(logits[rows], embedding, settings.of_rows(rows, count)) for rows in blocks]
    return DecodeStep(*map(torch.cat, zip(*steps, strict=True)))


def _policy(logits: Tensor, settings: Settings) -> Policy:
    return Policy(logits, settings, get_strategy(settings.strategy))


def _candidates(policy: Policy, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """ids, weights and fault of each row. A faulty row has ids of 0 and weights of NaN."""
    strategy, top = get_strategy(settings.strategy), policy.max_logit
    found = strategy.function(policy)
    ids, weights = found if strategy.has_kernel else _checked_form(strategy, found, len(top), policy.k, top.device)
    top = top.squeeze(-1)
    fault = torch.zeros_like(ids[:, 0]) if policy.outside is None else torch.where(policy.outside, NO_SUCH_CANDIDATE, 0)
    if not strategy.has_kernel:
        ids, fault = _checked_values(ids, weights, policy.vocabulary, fault)
    fault = torch.where(top.isnan() | (top == torch.inf), NOT_A_NUMBER, torch.where(top == -torch.inf, NO_TOKEN, fault))
    bad = (fault != 0)[:, None]
    return ids.masked_fill(bad, 0), weights.float().masked_fill(bad, torch.nan), fault.to(torch.int32)


def _checked_form(strategy: Strategy, found: Any, rows: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a strategy of a user returned, its types, shapes and devices checked: these make no host wait.

    Raises:
        TypeError: not a pair of tensors, or of other dtypes. ValueError: another shape or device.
    """
    promise = f"strategy {strategy.name!r} must return ids int64 and floating-point weights, each [B, k] = {(rows, k)}"
    if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(x, Tensor) for x in found)):
        raise TypeError(f"{promise}, got {type(found).__name__}")
    ids, weights = found
    if ids.dtype != torch.int64 or weights.dtype not in FLOATING:
        raise TypeError(f"{promise}, got {ids.dtype} and {weights.dtype}")
    if tuple(ids.shape) != (rows, k) or tuple(weights.shape) != (rows, k):
        raise ValueError(f"{promise}, got {tuple(ids.shape)} and {tuple(weights.shape)}")
    if ids.device != device or weights.device != device:
        raise ValueError(f"{promise} on {device}, got them on {ids.device} and {weights.device}")
    return ids, weights


def _checked_values(ids: Tensor, weights: Tensor, vocabulary: int, fault: Tensor) -> tuple[Tensor, Tensor]:
    """The ids within the vocabulary, and the fault of rows whose ids or weights are not what a strategy promises."""
    outside = (~within(ids, vocabulary)).any(-1)
    tolerance = max(_SUM_TOLERANCE, torch.finfo(weights.dtype).eps)
    sums = (weights.float().sum(-1) - 1).abs() <= tolerance  # False for NaN
    fault = fault | torch.where(outside, BAD_IDS, 0) | torch.where(sums & (weights >= 0).all(-1), 0, BAD_WEIGHTS)
    return ids.clamp(0, vocabulary - 1), fault
