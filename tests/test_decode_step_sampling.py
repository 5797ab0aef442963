"""The samples and gates of decode_step are distributed as the contract says."""

from __future__ import annotations

import pytest
import torch
from decode_steps import assert_binomial, assert_distributed, cut_by_hand
from scipy.stats import kstest

from ngrpo_ops import (
    decode_step,
)
from ngrpo_ops.kernels import decode_step as decode_step_kernels
from ngrpo_ops.ops.decode_step import sampling
from ngrpo_ops.testing import (
    DEVICE,
)

SKEWED = [5.0, 1.0, 4.0, -torch.inf, 2.0, 3.0, 1.5, 0.0, 2.5]
TIED = [1.0, 2.0, 2.0, 2.0, 0.0, 2.0, 1.0, -1.0]


def test_a_draw_at_the_edge_of_a_token():
    """Each token owns [mass before it, mass up to it): one without mass is never drawn, not even by u = 0."""
    scaled = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    draws = {0.0: 1, 0.5 - 2.0**-53: 1, 0.5: 3, 1 - 2.0**-53: 3, 1.0: 3}
    for u, token in draws.items():
        assert sampling.sample(scaled.exp(), torch.tensor([u], dtype=torch.float64)).tolist() == [token]


def test_a_number_that_filters_nothing_is_no_filter(backend, monkeypatch):
    """It would sort every row, or read it again. Tensors are not looked at."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 40, generator=generator).to(DEVICE)
    table, neighbors = torch.randn(40, 2, generator=generator).to(DEVICE), torch.zeros(40, 1, dtype=torch.int64)

    def step(**filters):
        return decode_step(
            logits, table, neighbors.to(DEVICE), mixing_rate=0.5, seed=3, step=1, backend=backend, **filters
        )

    plain, ones = step(), torch.ones(6, dtype=torch.float64, device=DEVICE)
    assert torch.equal(step(top_p=ones).token_ids, plain.token_ids)

    def filtered(*_):
        raise AssertionError("rows are filtered")

    monkeypatch.setattr(sampling, "largest_mask", filtered)
    monkeypatch.setattr(decode_step_kernels.decode_gather_kernel, "fn", filtered)
    for filters in ({"top_p": 1.0}, {"top_p": 1}, {"top_k": 40}, {"top_k": 99}, {"min_p": 0.0}, {"min_p": 0}):
        for got, want in zip(step(**filters), plain, strict=True):
            assert torch.equal(got, want)


def test_gate_rate_over_rows_and_steps():
    n, steps = 400, 100
    logits, table, neighbors = torch.zeros(n, 3), torch.zeros(3, 1), torch.zeros(3, 0).long()
    for rate in (0.1, 0.5):
        gates = torch.stack([
            decode_step(logits, table, neighbors, mixing_rate=rate, seed=3, step=step).gate for step in range(steps)
        ])  # fmt: skip
        assert_binomial(int(gates.sum()), n * steps, rate)
        assert_binomial(int((gates[1:] & gates[:-1]).sum()), n * (steps - 1), rate**2)
        assert_binomial(int((gates[:, 1:] & gates[:, :-1]).sum()), (n - 1) * steps, rate**2)


@pytest.mark.parametrize(
    ("logits", "temperature", "top_k", "top_p", "min_p"),
    [
        (SKEWED, 1.0, None, None, None),
        (SKEWED, 2.0, None, None, None),
        (SKEWED, 2.0, 4, None, None),
        (SKEWED, 2.0, None, 0.7, None),
        (SKEWED, 3.0, 5, 0.6, None),
        (SKEWED, 2.0, None, None, 0.3),
        (SKEWED, 3.0, 6, 0.9, 0.5),
        ([0.0] * 16, 1.0, None, None, None),
        ([0.0] * 16, 1.0, 5, None, None),
        ([0.0] * 16, 1.0, 5, 0.55, None),
        (TIED, 1.0, 2, None, None),
        (TIED, 1.0, 5, None, None),
        (TIED, 1.0, None, 0.5, None),
        (SKEWED, 1.0, 1, None, None),
        (SKEWED, 1.0, None, 1e-9, None),
        (SKEWED, 1.0, None, None, 1.0),
        (SKEWED, 2.0, 100, 1.0, 0.0),
    ],
)
def test_sampling_distribution(logits, temperature, top_k, top_p, min_p):
    """A million rows of one distribution, none mixed; the tokens' counts are those of the cut distribution."""
    n, v = 1_000_000, len(logits)
    out = decode_step(
        torch.tensor(logits, device=DEVICE).expand(n, v), None, strategy="anchor", mixing_rate=0.0,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=11, step=5,
    )  # fmt: skip
    p = torch.tensor(logits, dtype=torch.float64).div(temperature).softmax(0).tolist()
    want = torch.tensor(cut_by_hand(p, top_k, top_p, min_p), dtype=torch.float64)
    assert_distributed(out.token_ids.cpu().bincount(minlength=v), want)


@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize(
    ("v", "cuts"), [(400, {}), (60, {"top_k": 40, "top_p": 0.9, "min_p": 1e-3})], ids=["whole", "cut"]
)
def test_sampling_distribution_function(scale, v, cuts):
    """A million draws from ten thousand distributions: where a token lies in its distribution function, spread over the
    token's own share, is uniform (Kolmogorov and Smirnov)."""
    n, repeats = 10_000, 100
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(n, v, generator=generator) * scale).to(DEVICE)
    p = [cut_by_hand(row, *cuts.values()) for row in logits.double().softmax(1).tolist()] if cuts else None
    p = logits.double().softmax(1) if p is None else torch.tensor(p, dtype=torch.float64, device=DEVICE)
    ends = p.cumsum(1)
    ranks = []
    for step in range(repeats):
        out = decode_step(logits, None, strategy="anchor", mixing_rate=0.0, seed=step % 7, step=step, **cuts)
        share = p.gather(1, out.token_ids[:, None])
        assert (share > 0).all()
        u = torch.rand(n, 1, generator=generator, dtype=torch.float64).to(DEVICE)
        ranks.append(ends.gather(1, out.token_ids[:, None]) - share * u)
    assert kstest(torch.cat(ranks).flatten().cpu().numpy(), "uniform").pvalue > 1e-6


def test_steps_and_seeds_are_draws_too_and_the_gate_is_no_hint():
    v, n = 6, 500
    logits, tables = torch.linspace(0, 2, v), (torch.zeros(v, 1), torch.zeros(v, 0).long())
    counts, agree, before = torch.zeros(v, dtype=torch.int64), 0, None
    for draw in range(100):
        keys = {"seed": draw, "step": 7} if draw % 2 else {"seed": 7, "step": draw + 1000}
        out = decode_step(logits.expand(n, v), *tables, mixing_rate=0.5, **keys)
        tokens = decode_step(logits.expand(n, v), *tables, mixing_rate=0.0, **keys).token_ids
        assert torch.equal(out.token_ids[~out.gate], tokens[~out.gate])
        counts += tokens[out.gate].bincount(minlength=v)  # the sample that a gated row did not use
        agree += 0 if before is None else int((tokens == before).sum())
        before = tokens
    p = logits.double().softmax(0)
    assert_distributed(counts, p)
    assert_binomial(agree, n * 99, float((p**2).sum()))
