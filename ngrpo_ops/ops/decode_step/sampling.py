"""The policy's distribution, what top-k, top-p and min-p leave of it, and exact draws from that."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...random import uniforms
from .._precision import compute_dtype
from .._ties import largest_mask
from .settings import Settings

_CHUNK = 1024  # tokens whose probabilities are summed first when one is drawn


class Distribution(NamedTuple):
    """softmax(logits / temperature) before it is normalized.

    With z = logits / temperature: max_logit [B, 1] is max z (0 for a row of -inf), shifted [B, V] is z - max_logit,
    exp_shifted [B, V] its exponential, exp_sum [B] the sum of that, entropy [B] in nats.
    """

    max_logit: Tensor
    shifted: Tensor
    exp_shifted: Tensor
    exp_sum: Tensor
    entropy: Tensor


def column(setting: Tensor, device: torch.device) -> Tensor:
    """A setting, 0-d or [B], so that it broadcasts against [B, V]."""
    return setting[:, None] if setting.dim() else setting.to(device)


def sampling_temperature(temperature: Tensor) -> Tensor:
    """The temperature of a row's distribution. A greedy row's, 0, counts as 1."""
    return torch.where(temperature == 0, 1, temperature)


def scaled_logits(logits: Tensor, temperature: Tensor) -> Tensor:
    """[B, V]: logits / temperature in the compute dtype."""
    dtype = compute_dtype(logits)
    return logits.to(dtype) / column(sampling_temperature(temperature), logits.device).to(dtype)


def distribution(logits: Tensor, temperature: Tensor) -> Distribution:
    scaled = scaled_logits(logits, temperature)
    max_logit = scaled.amax(-1, keepdim=True)
    max_logit = torch.where(max_logit == -torch.inf, 0, max_logit)
    shifted = scaled - max_logit
    exp_shifted = shifted.exp()
    exp_sum = exp_shifted.sum(-1)
    # exp(-inf) times the least number is 0.
    weighted = (exp_shifted * shifted.clamp(min=torch.finfo(shifted.dtype).min)).sum(-1)
    return Distribution(max_logit, shifted, exp_shifted, exp_sum, exp_sum.log() - weighted / exp_sum)


def filter_mask(logits: Tensor, d: Distribution, settings: Settings) -> Tensor | None:
    """bool [B, V]: what top-k, then top-p of what is left, then min-p leave; None: everything.

    Equal logits are kept by the lower id. top_k below 1 or from V on, top_p from 1 on and min_p 0 filter nothing.
    """
    top_k, top_p, min_p = settings.top_k, settings.top_p, settings.min_p
    mask = None
    if top_k is not None or top_p is not None:
        if top_k is not None and top_k.dim() == 0:  # a number, which filters something
            ordered = logits.topk(int(top_k)).values
        else:
            ordered = logits.sort(dim=-1, descending=True).values
        rank = torch.arange(ordered.shape[-1], device=logits.device).expand(ordered.shape)
        kept = torch.ones_like(ordered, dtype=torch.bool)
        if top_k is not None:
            limit = column(top_k, logits.device)
            kept = (limit < 1) | (rank < limit)
        if top_p is not None:
            fraction = column(top_p, logits.device)
            scaled = scaled_logits(ordered, settings.temperature)
            mass = (scaled - d.max_logit).exp().double() * kept
            before = mass.cumsum(-1) - mass
            kept = kept & ((fraction >= 1) | (before < fraction * mass.sum(-1, keepdim=True)) | (rank == 0))
        mask = largest_mask(logits, ordered, kept.sum(-1, keepdim=True))
    if min_p is not None:
        likely = d.shifted >= column(min_p, logits.device).log().to(d.shifted.dtype)
        mask = likely if mask is None else mask & likely
    return mask


def sample(mass: Tensor, u: Tensor) -> Tensor:
    """Inverse cumulative distribution: the token at which the mass, in id order, first exceeds u times the total.

    First the chunk of tokens is found, then the token in it. Sums are float64.

    Args:
        mass: [B, V], not negative: probabilities up to a factor.
        u: float64 [B], in [0, 1).
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
    """[B, 1]: the first place with mass whose end lies above the target. Where rounding has moved the target past
    all ends, the last place with mass."""
    crossed = (ends > target) & (mass > 0)
    places = torch.arange(mass.shape[1], device=mass.device)
    last = torch.where(mass > 0, places, 0).amax(1, keepdim=True)
    first = crossed.to(torch.uint8).argmax(1, keepdim=True)
    return torch.where(crossed.any(1, keepdim=True), first, last)


def draws(
    logits: Tensor,
    d: Distribution,
    settings: Settings,
    counter: tuple[Tensor, Tensor, Tensor],
    count: int,
    first_stream: int,
) -> Tensor:
    """[B, count] independent draws from what the filters leave. The first is the row's sample. A greedy row draws its
    argmax every time."""
    mask = filter_mask(logits, d, settings)
    mass = d.exp_shifted if mask is None else d.exp_shifted * mask
    tokens = [sample(mass, u) for u in uniforms(*counter, count, first_stream)]
    greedy = column((settings.temperature == 0).to(logits.device), logits.device)
    return torch.where(greedy, logits.argmax(-1)[:, None], torch.stack(tokens, dim=-1))
