"""The decode step in plain torch, correct in float64: the oracle of its kernels, and what runs where there are none.

Every row is a matter of its own logits, settings and counter alone. Settings are 0-d (the same for all rows) or [B].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .config import DRAWING
from .ops._checks import require_ids_in_range
from .ops._precision import compute_dtype
from .ops.mix_embeddings import mix_embeddings_reference
from .random import bernoulli, gumbel, normal, philox, uniforms

NOT_A_NUMBER, NO_TOKEN, NO_SUCH_CANDIDATE = 1, 2, 4
FAULTS = {
    NOT_A_NUMBER: "its logits hold NaN or +inf",
    NO_TOKEN: "all of its logits are -inf: no token is left to choose",
    NO_SUCH_CANDIDATE: "a neighbour of its anchor is outside the vocabulary",
}

_CHUNK = 1024  # tokens whose masses are summed first when one is drawn


class Step(NamedTuple):
    """The fields of `functional.DecodeStep`."""

    token_ids: Tensor
    gate: Tensor
    ids: Tensor
    weights: Tensor
    embeddings: Tensor
    logprobs: Tensor
    entropy: Tensor
    fault: Tensor


class _Distribution(NamedTuple):
    """softmax(logits / temperature) before it is normalised: top = max z, below = z - top, mass = exp(below)."""

    top: Tensor
    below: Tensor
    mass: Tensor
    total: Tensor
    entropy: Tensor


def column(setting: Tensor, device: torch.device) -> Tensor:
    """A setting, 0-d or [B], so that it broadcasts against [B, V]."""
    return setting[:, None] if setting.dim() else setting.to(device)


def own_temperature(temperature: Tensor) -> Tensor:
    """That of the row's distribution: a greedy row's, 0, counts as 1."""
    return torch.where(temperature == 0, 1, temperature)


def _distribution(logits: Tensor, temperature: Tensor) -> _Distribution:
    dtype = compute_dtype(logits)
    scaled = logits.to(dtype) / column(own_temperature(temperature), logits.device).to(dtype)
    top = scaled.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    below = scaled - top
    mass = below.exp()
    total = mass.sum(-1)
    moment = (mass * below.clamp(min=torch.finfo(below.dtype).min)).sum(-1)  # exp(-inf) times it is 0
    return _Distribution(top, below, mass, total, total.log() - moment / total)


# Candidates -------------------------------------------------------------------------------------------------------


def candidate_weights(logits: Tensor, ids: Tensor, temperature: float, variant: str = "paper") -> Tensor:
    """Softmax over the candidates of their logits / temperature (equation 9), or of their probabilities, "released"."""
    return _candidate_scores(logits, ids, temperature, variant).softmax(-1)


def _candidate_scores(logits: Tensor, ids: Tensor, temperature: float | Tensor, variant: str) -> Tensor:
    dtype = compute_dtype(logits)
    if variant == "released":
        return (logits.to(dtype) / temperature).softmax(-1).gather(-1, ids)
    return logits.gather(-1, ids).to(dtype) / temperature


def _candidates(logits: Tensor, neighbor_ids: Tensor | None, k: int, strategy: str) -> tuple[Tensor, Tensor]:
    """ids [B, k], the argmax first, equal logits by the lower id; and which rows have one outside the vocabulary."""
    anchor = logits.argmax(-1, keepdim=True)
    if strategy == "neighbor" and neighbor_ids is not None:
        neighbors = neighbor_ids[anchor.squeeze(-1)]
        require_ids_in_range(neighbors, logits.shape[-1], "neighbor_ids")
        outside = ((neighbors < 0) | (neighbors >= logits.shape[-1])).any(-1)
        return torch.cat([anchor, neighbors.clamp(0, logits.shape[-1] - 1)], dim=-1), outside
    found = [anchor]
    rest = logits
    for _ in range(k - 1):
        rest = rest.scatter(-1, found[-1], -torch.inf)
        best, token = rest.max(-1, keepdim=True)
        # Where there are fewer than k tokens, the anchor again: like any of probability 0 it will weigh nothing.
        found.append(torch.where(best == -torch.inf, anchor, token))
    return torch.cat(found, dim=-1), torch.zeros_like(anchor.squeeze(-1), dtype=torch.bool)


def _first(ids: Tensor, weights: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Both with `place` [B, 1] first, the others in their order."""
    order = torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape).clone()
    order.scatter_(-1, place, -1)
    order = order.argsort(dim=-1)
    return ids.gather(-1, order), weights.gather(-1, order)


def mixing_candidates(
    logits: Tensor,
    neighbor_ids: Tensor | None,
    k: int,
    strategy: str,
    variant: str,
    temperature: Tensor,
    mixing_temperature: float | None,
    moi_beta: float,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor,
    step: Tensor,
    row_ids: Tensor | None,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids [B, k], weights [B, k], entropy [B] (or empty), fault [B]. Without the entropy, and but for "released" and
    the strategies that draw, the logits are only looked through for the largest."""
    seed, rows, step = _counter(logits, seed, step, row_ids)
    d = _distribution(logits, temperature) if return_entropy or strategy in DRAWING else None
    draws = None
    if strategy in DRAWING:
        assert d is not None
        count = k if strategy == "multiplex" else 1
        draws = _draws(logits, d, temperature, top_k, top_p, min_p, seed, rows, step, count)
    ids, weights, fault = _weighted_candidates(
        logits, neighbor_ids, k, strategy, variant, temperature, mixing_temperature, moi_beta, seed, rows, step, d,
        draws,
    )  # fmt: skip
    entropy = logits.new_empty(0, dtype=torch.float32)
    if return_entropy:
        assert d is not None
        entropy = d.entropy.float().masked_fill(fault != 0, torch.nan)
    return ids, weights, entropy, fault


def _counter(logits: Tensor, seed: Tensor, step: Tensor, row_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.arange(logits.shape[0], device=logits.device) if row_ids is None else row_ids
    return seed.to(logits.device), rows, step.to(logits.device)


def _weighted_candidates(
    logits: Tensor,
    neighbor_ids: Tensor | None,
    k: int,
    strategy: str,
    variant: str,
    temperature: Tensor,
    mixing_temperature: float | None,
    moi_beta: float,
    seed: Tensor,
    row_ids: Tensor,
    step: Tensor,
    d: _Distribution | None,
    draws: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`d` and `draws` [B, 1 or k], the first the row's sample, are given for the strategies that draw."""
    if strategy == "multiplex":
        assert draws is not None
        ids, outside = draws, torch.zeros_like(draws[:, 0], dtype=torch.bool)
    else:
        ids, outside = _candidates(logits, neighbor_ids, k, strategy)
    repeated = None if strategy == "neighbor" else _is_repeated(ids)
    place = torch.zeros_like(ids[:, :1])  # of the candidate that is emitted
    if strategy == "moi":
        assert draws is not None and repeated is not None
        # Among the likeliest, or instead of the last of them.
        found = (ids == draws) & ~repeated
        place = torch.where(found.any(-1, keepdim=True), found.int().argmax(-1, keepdim=True), k - 1)
        ids = ids.scatter(-1, place, draws)
    dtype = compute_dtype(logits)
    own = column(own_temperature(temperature), logits.device).to(dtype)
    tau = own if mixing_temperature is None else mixing_temperature
    top = logits.amax(-1, keepdim=True).to(dtype) / own
    if strategy == "gumbel":
        noise = gumbel(seed, row_ids, step, k).to(dtype)
        scores = (logits.gather(-1, ids).to(dtype) / own - top + noise) / tau
    else:
        scores = _candidate_scores(logits, ids, tau, variant)
    if repeated is not None:
        scores = scores.masked_fill(repeated, -torch.inf)
    weights = scores.softmax(-1)
    if strategy == "gumbel":
        place = weights.argmax(-1, keepdim=True)
    if strategy == "moi":
        assert d is not None
        share = d.entropy.clamp(min=0)[:, None] / max(math.log(logits.shape[-1]), 1e-9)
        rest = torch.zeros_like(weights).scatter(-1, place, moi_beta + 1 - share)
        weights = (share * weights + rest) / (moi_beta + 1)
    if strategy in ("gumbel", "moi"):
        ids, weights = _first(ids, weights, place)
    top = top.squeeze(-1)
    fault = torch.where(outside, NO_SUCH_CANDIDATE, 0)
    fault = torch.where(top.isnan() | (top == torch.inf), NOT_A_NUMBER, torch.where(top == -torch.inf, NO_TOKEN, fault))
    bad = (fault != 0)[:, None]
    return ids.masked_fill(bad, 0), weights.float().masked_fill(bad, torch.nan), fault.to(torch.int32)


def _is_repeated(ids: Tensor) -> Tensor:
    """Where an id has been there before: the anchor for a token that does not exist, or a token drawn again."""
    same = ids[:, :, None] == ids[:, None, :]
    return same.tril(-1).any(-1)


# Sampling ---------------------------------------------------------------------------------------------------------


def kept(
    logits: Tensor, d: _Distribution, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None,
    min_p: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """bool [B, V]: what top-k, then top-p of what is left, then min-p leave; None: everything.

    Equal logits are kept by the lower id. top_k below 1 or from V on, top_p from 1 on and min_p 0 cut nothing.
    """
    keep = None
    if top_k is not None or top_p is not None:
        if top_k is not None and top_k.dim() == 0 and 1 <= int(top_k) < logits.shape[-1]:
            ordered = logits.topk(int(top_k)).values
        else:
            ordered = logits.sort(dim=-1, descending=True).values
        rank = torch.arange(ordered.shape[-1], device=logits.device).expand(ordered.shape)
        held = torch.ones_like(ordered, dtype=torch.bool)
        if top_k is not None:
            limit = column(top_k, logits.device)
            held = (limit < 1) | (rank < limit)
        if top_p is not None:
            share = column(top_p, logits.device)
            scaled = ordered.to(d.below.dtype) / column(own_temperature(temperature), logits.device).to(d.below.dtype)
            mass = (scaled - d.top).exp().double() * held
            before = mass.cumsum(-1) - mass
            held = held & ((share >= 1) | (before < share * mass.sum(-1, keepdim=True)) | (rank == 0))
        count = held.sum(-1, keepdim=True)
        cut = ordered.gather(-1, count - 1)
        tied = logits == cut
        quota = count - (ordered > cut).sum(-1, keepdim=True)
        keep = (logits > cut) | (tied & (tied.cumsum(-1, dtype=torch.int32) <= quota))
    if min_p is not None:
        likely = d.below >= column(min_p, logits.device).log().to(d.below.dtype)
        keep = likely if keep is None else keep & likely
    return keep


def sample(mass: Tensor, u: Tensor) -> Tensor:
    """Inverse cumulative distribution: the token at which the mass, in id order, first exceeds u times the total.

    First the chunk of tokens is found, then the token in it; sums in float64.
    """
    v = mass.shape[1]
    size = min(v, _CHUNK)
    whole = v // size * size
    sums = mass[:, :whole].unflatten(1, (-1, size)).sum(-1)
    if whole < v:
        sums = torch.cat([sums, mass[:, whole:].sum(-1, keepdim=True)], dim=1)
    sums = sums.double()
    ends = sums.cumsum(-1)
    target = u[:, None] * ends[:, -1:]
    chunk = _first_above(ends, sums, target)
    tokens = chunk * size + torch.arange(size, device=mass.device)
    inside = mass.gather(1, tokens.clamp(max=v - 1)).masked_fill(tokens >= v, 0).double()
    rest = target - (ends - sums).gather(1, chunk)
    return (chunk * size + _first_above(inside.cumsum(-1), inside, rest)).squeeze(1)


def _first_above(ends: Tensor, mass: Tensor, target: Tensor) -> Tensor:
    """[B, 1]: the first place with mass whose end lies above the target; the last one with mass where rounding has
    moved the target past all of them."""
    crossed = (ends > target) & (mass > 0)
    places = torch.arange(mass.shape[1], device=mass.device)
    last = torch.where(mass > 0, places, 0).amax(1, keepdim=True)
    first = crossed.to(torch.uint8).argmax(1, keepdim=True)
    return torch.where(crossed.any(1, keepdim=True), first, last)


def _draws(
    logits: Tensor, d: _Distribution, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None,
    min_p: Tensor | None, seed: Tensor, row_ids: Tensor, step: Tensor, count: int,
) -> Tensor:  # fmt: skip
    """[B, count] independent draws; the first is the row's sample, and that of a greedy row is its argmax."""
    keep = kept(logits, d, temperature, top_k, top_p, min_p)
    mass = d.mass if keep is None else d.mass * keep
    tokens = [sample(mass, u) for u in uniforms(seed, row_ids, step, count)]
    greedy = (temperature == 0).to(logits.device)
    return torch.where(column(greedy, logits.device), logits.argmax(-1)[:, None], torch.stack(tokens, dim=-1))


# The step ---------------------------------------------------------------------------------------------------------


def decode_step(
    logits: Tensor,
    embedding: Tensor,
    neighbor_ids: Tensor | None,
    k: int,
    strategy: str,
    variant: str,
    mixing_rate: float,
    entropy_threshold: float | None,
    noise_scale: float,
    temperature: Tensor,
    mixing_temperature: float | None,
    moi_beta: float,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor,
    step: Tensor,
    row_ids: Tensor | None,
    enabled: Tensor | None,
) -> Step:
    seed, rows, step = _counter(logits, seed, step, row_ids)
    d = _distribution(logits, temperature)
    count = k if strategy == "multiplex" else 1
    draws = _draws(logits, d, temperature, top_k, top_p, min_p, seed, rows, step, count)
    ids, weights, fault = _weighted_candidates(
        logits, neighbor_ids, k, strategy, variant, temperature, mixing_temperature, moi_beta, seed, rows, step, d,
        draws,
    )  # fmt: skip
    bad = fault != 0
    entropy = d.entropy.float().masked_fill(bad, torch.nan)
    gate = bernoulli(philox(seed, rows, step)[0], mixing_rate) & ~bad
    if enabled is not None:
        gate = gate & enabled
    if entropy_threshold is not None:
        gate = gate & (entropy >= entropy_threshold)
    token_ids = torch.where(gate, ids[:, 0], draws[:, 0]).masked_fill(bad, 0)
    mixed = mix_embeddings_reference(embedding, ids, weights)
    if strategy == "gaussian":
        noise = gaussian_noise(mixed, torch.full_like(entropy, noise_scale), seed.expand(rows.shape), rows, step)
        mixed = (mixed.to(noise.dtype) + noise).to(mixed.dtype)
    embeddings = torch.where(gate[:, None], mixed, embedding[token_ids]).masked_fill(bad[:, None], torch.nan)
    logprobs = d.below.gather(1, token_ids[:, None]).squeeze(1) - d.total.log()
    return Step(token_ids, gate, ids, weights, embeddings, logprobs.float().masked_fill(bad, torch.nan), entropy, fault)


def gaussian_noise(mixed: Tensor, scale: Tensor, seed: Tensor, row_ids: Tensor, steps: Tensor) -> Tensor:
    """[M, d], float32 (float64 for float64): scale times the root mean square of each row of `mixed`, times N(0, I)."""
    x = mixed.to(compute_dtype(mixed))
    size = x.square().mean(-1, keepdim=True).sqrt() * scale[:, None]
    return size.to(x.dtype) * normal(seed, row_ids, steps, mixed.shape[1]).to(x.dtype)
