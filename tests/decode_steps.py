"""Decode steps for the tests: settings, arguments and the distributions that draws are held to."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from ngrpo_ops.ops.decode_step.settings import Settings
from ngrpo_ops.random import philox, uniform
from ngrpo_ops.strategies import get_strategy
from ngrpo_ops.testing import (
    DEVICE,
    dtypes,
    for_backend,
    generators,
    lay_out,
    layouts,
)

INT64 = st.integers(-(2**63), 2**63 - 1)


def assert_binomial(count: int, n: int, p: float) -> None:
    """Inside the central 1 - 1e-6 interval of Binomial(n, p), by its exact probabilities."""
    x = torch.arange(n + 1, dtype=torch.float64)
    log_pmf = math.lgamma(n + 1) - (x + 1).lgamma() - (n - x + 1).lgamma() + x * math.log(p) + (n - x) * math.log1p(-p)
    pmf = log_pmf.exp()
    assert pmf[: count + 1].sum() > 5e-7 and pmf[count:].sum() > 5e-7, f"{count} of {n}, expected {n * p}"


def assert_distributed(counts: Tensor, p: Tensor) -> None:
    """Chi-square below its 1 - 1e-6 quantile (Wilson and Hilferty); what has no probability never occurs."""
    n, possible = counts.sum().double(), p > 0
    assert not counts[~possible].any()
    if (free := int(possible.sum()) - 1) > 0:
        expected = (n * p)[possible]
        assert expected.min() > 5
        statistic = ((counts[possible] - expected) ** 2 / expected).sum()
        limit = free * (1 - 2 / (9 * free) + 4.7534 * math.sqrt(2 / (9 * free))) ** 3
        assert statistic < limit, f"{statistic:.1f} with {free} degrees of freedom, at most {limit:.1f}"


def cut_by_hand(p: list[float], top_k: int | None, top_p: float | None, min_p: float | None = None) -> list[float]:
    """Top-k, then top-p of what is left: the fewest tokens that hold a mass of top_p; equal ones by the lower id. Then
    what has at least min_p of the largest probability."""
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[:top_k]
    total, kept, mass = math.fsum(p[i] for i in order), [], 0.0
    for i in order:
        if top_p is not None and kept and mass >= top_p * total:
            break
        kept.append(i)
        mass += p[i]
    if min_p is not None:
        kept = [i for i in kept if p[i] >= min_p * max(p)]
        mass = math.fsum(p[i] for i in kept)
    return [p[i] / mass if i in kept else 0.0 for i in range(len(p))]


@st.composite
def steps(draw: st.DrawFn) -> dict:
    """Arguments of a decode step: ties, cut logits, large scales, every dtype and layout; neighbors of any kind."""
    generator, layout = draw(generators), draw(layouts)
    b, v, d, k = draw(st.integers(1, 9)), draw(st.integers(1, 30)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    scale = draw(st.sampled_from([0.0, 1.0, 10.0, 1e4]))
    logits = (torch.randn(b, v, generator=generator, dtype=torch.float64) * scale).round(decimals=1)
    if draw(st.booleans()):
        cut = torch.rand(b, v, generator=generator) < 0.4
        cut[:, int(torch.randint(v, (), generator=generator))] = False
        logits = logits.masked_fill(cut, -torch.inf)
    return {
        "logits": lay_out(logits.to(draw(dtypes)), layout),
        "embedding": lay_out(torch.randn(v, d, generator=generator).to(draw(dtypes)), layout),
        "neighbor_ids": lay_out(torch.randint(v, (v, k), generator=generator), layout)[:, : k - 1],
        "mixing_rate": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "temperature": draw(st.sampled_from([1.0, 0.7, 2.5])),
        "top_k": draw(st.sampled_from([None, 1, 3, 50])),
        "top_p": draw(st.sampled_from([None, 0.3, 0.9, 1.0])),
        "seed": draw(INT64),
        "step": draw(st.integers(0, 2**40)),
        "row_ids": torch.randint(2**62, (b,), generator=generator),
    }


def on(backend: str, arguments: dict) -> dict:
    """The arguments where and as the backend takes them."""
    move = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    move |= {name: for_backend(move[name], backend) for name in ("logits", "embedding") if name in move}
    return {**move, "backend": backend}


def plain(b: int = 4, v: int = 5, **change: object) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(b, v, generator=generator), "embedding": torch.randn(v, 3, generator=generator),
        "neighbor_ids": torch.randint(v, (v, 2), generator=generator), "seed": 0, "step": 0, **change,
    }  # fmt: skip


def draws_by_hand(p: Tensor, seed: int, rows: Tensor, step: int, count: int) -> Tensor:
    """[B, count]: the first by the words of the step's sample, the others by the streams from 1 on, two words each."""
    words = [philox(torch.tensor(seed), rows, torch.tensor(step), stream) for stream in range(1 + count // 2)]
    pairs = [words[0][1:3], *(pair for four in words[1:] for pair in (four[:2], four[2:]))]
    ends = p.cumsum(1)
    tokens = [torch.searchsorted(ends, uniform(*pair)[:, None] * ends[:, -1:], right=True) for pair in pairs[:count]]
    return torch.cat(tokens, dim=1)


def settings_of(**changes: object) -> Settings:
    """The settings of a step as the operations take them: strategy "neighbor" without neighbors, but for changes."""
    entry = get_strategy(changes.get("strategy", "neighbor"))
    usual = {
        "neighbor_ids": None, "k": 3, "strategy": "neighbor", "options": entry.option_values({}), "variant": "paper",
        "temperature": torch.tensor(1.0), "mixing_temperature": None, "top_k": None, "top_p": None, "min_p": None,
        "seed": torch.tensor(0), "step": torch.tensor(0), "row_ids": None,
    }  # fmt: skip
    return Settings(**usual | changes)
