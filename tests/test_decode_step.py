"""decode_step, candidate_weights and their random numbers: every promise of the contract, and the distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

from ngrpo_ops import (
    candidate_weights,
    decode_step,
    gaussian_noise,
    mix_embeddings,
    mixing_candidates,
    raise_faults,
)
from ngrpo_ops.kernels.primitives import forced_int64, recording
from ngrpo_ops.ops._library import load_kernels as kernels
from ngrpo_ops.ops.decode_step import sampling
from ngrpo_ops.random import bernoulli, gumbel, normal, philox, uniform
from ngrpo_ops.testing import (
    DEVICE,
    FLOATS,
    STRATEGIES,
    assert_within,
    compute_roundoff,
    dtypes,
    for_backend,
    generators,
    lay_out,
    layouts,
    rounding,
    unit_roundoff,
)

INT64 = st.integers(-(2**63), 2**63 - 1)


def signed(word: int, bits: int = 64) -> int:
    return word - 2**bits if word >= 2 ** (bits - 1) else word


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 in unbounded integers."""
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(b >> 32) ^ counter[1] ^ key[0], b % 2**32, (a >> 32) ^ counter[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, words):
    c, k, want = ([int(w, 16) for w in x.split()] for x in (counter, key, words))
    seed, step, row = (torch.tensor(signed(lo + (hi << 32))) for lo, hi in (k, c[:2], c[2:]))
    assert [int(w) for w in philox(seed, row[None], step)] == want == philox_by_hand(c, k)


@given(seed=INT64, step=INT64, rows=st.lists(INT64, min_size=1, max_size=4))
def test_philox_is_philox(seed, step, rows):
    words = torch.stack(philox(torch.tensor(seed), torch.tensor(rows), torch.tensor(step)), dim=1)
    for row, got in zip(rows, words.tolist(), strict=True):
        counter = [step % 2**32, (step % 2**64) >> 32, row % 2**32, (row % 2**64) >> 32]
        assert got == philox_by_hand(counter, [seed % 2**32, (seed % 2**64) >> 32])


def test_uniform_and_bernoulli_at_their_ends():
    ends = torch.tensor([0, 2**32 - 1])
    assert uniform(ends, ends).tolist() == [0.0, 1 - 2.0**-53]
    assert uniform(torch.tensor(1 << 31), torch.tensor(0)).item() == 0.5
    assert uniform(torch.tensor(0), torch.tensor(1 << 11)).item() == 2.0**-53
    assert bernoulli(ends, 0.0).tolist() == [False, False]
    assert bernoulli(ends, 1.0).tolist() == [True, True]
    assert bernoulli(torch.tensor([2**31 - 1, 2**31]), 0.5).tolist() == [True, False]


def test_a_draw_at_the_edge_of_a_token():
    """Each token owns [mass before it, mass up to it): one without mass is never drawn, not even by u = 0."""
    scaled = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    draws = {0.0: 1, 0.5 - 2.0**-53: 1, 0.5: 3, 1 - 2.0**-53: 3, 1.0: 3}
    for u, token in draws.items():
        assert sampling.sample(scaled.exp(), torch.tensor([u], dtype=torch.float64)).tolist() == [token]


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


SKEWED = [5.0, 1.0, 4.0, -torch.inf, 2.0, 3.0, 1.5, 0.0, 2.5]
TIED = [1.0, 2.0, 2.0, 2.0, 0.0, 2.0, 1.0, -1.0]


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


@pytest.mark.parametrize(("draw", "name"), [(normal, "norm"), (gumbel, "gumbel_r")])
def test_noise_distribution(draw, name):
    x = draw(torch.tensor(3), torch.arange(1000), torch.tensor(5), 1001)
    assert x.dtype == torch.float32 and x.shape == (1000, 1001) and x.isfinite().all()
    assert kstest(x.flatten().numpy(), name).pvalue > 1e-6
    # Columns, rows, steps and seeds are independent.
    others = [x[:, 1:].flatten(), x[1:].flatten(), draw(torch.tensor(3), torch.arange(1000), torch.tensor(6), 1001)]
    others.append(draw(torch.tensor(4), torch.arange(1000), torch.tensor(5), 1001))
    first = [x[:, :-1].flatten(), x[:-1].flatten(), x.flatten(), x.flatten()]
    for one, other in zip(first, others, strict=True):
        assert abs(torch.corrcoef(torch.stack([one, other.flatten()]))[0, 1]) < 6e-3


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


@st.composite
def steps(draw: st.DrawFn) -> dict:
    """Arguments of a decode step: ties, cut logits, large scales, every dtype and layout; neighbours of any kind."""
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


@given(arguments=steps())
def test_contract(backend, arguments):
    arguments = on(backend, arguments)
    logits, table, neighbors = arguments["logits"], arguments["embedding"], arguments["neighbor_ids"]
    b, v = logits.shape
    state = torch.get_rng_state()
    out = decode_step(**arguments)
    assert torch.equal(torch.get_rng_state(), state)
    assert (out.token_ids.dtype, out.gate.dtype, out.ids.dtype) == (torch.int64, torch.bool, torch.int64)
    assert (out.weights.dtype, out.logprobs.dtype) == (torch.float32, torch.float32)
    assert out.embeddings.dtype == table.dtype and out.embeddings.shape == (b, table.shape[1])
    if arguments["mixing_rate"] in (0.0, 1.0):
        assert bool((out.gate == bool(arguments["mixing_rate"])).all())

    z = logits.double() / arguments["temperature"]
    size = torch.where(z.isinf(), 0, z).abs().amax(1)
    u = compute_roundoff(logits.dtype)
    for row in range(b):
        values = logits[row].tolist()
        anchor = values.index(max(values))
        assert out.ids[row].tolist() == [anchor, *neighbors[anchor].tolist()]
        want = z[row, out.ids[row]].softmax(0)
        assert_within(out.weights[row], want, 1e-6 + 8 * u * size[row])
        token = int(out.token_ids[row])
        mix = (out.weights[row].double()[:, None] * table[out.ids[row]].double()).sum(0)
        if out.gate[row]:
            terms = (out.weights[row].double()[:, None] * table[out.ids[row]].double()).abs().sum(0)
            assert token == anchor
            assert_within(
                out.embeddings[row],
                mix,
                8 * unit_roundoff(torch.float32) * terms + rounding(mix, table.dtype, backend),
            )
        else:
            assert torch.equal(out.embeddings[row], table[token])
            assert cut_by_hand(z[row].softmax(0).tolist(), arguments["top_k"], None)[token] > 0
        exact = z[row].log_softmax(0)[token]
        assert_within(out.logprobs[row], exact, u * (4 * size[row] + v + 8) + 2.0**-23 * exact.abs() + 1e-44)


@given(arguments=steps(), generator=generators, size=st.integers(1, 4))
def test_a_row_does_not_know_its_batch(backend, arguments, generator, size):
    """Order, batch size and the other rows leave a row's result as it is; the gate ignores even its own logits."""
    arguments = on(backend, arguments)
    b = arguments["logits"].shape[0]
    whole = decode_step(**arguments)
    rows = torch.randperm(b, generator=generator)[:size].to(DEVICE)
    part = decode_step(**{**arguments, "logits": arguments["logits"][rows], "row_ids": arguments["row_ids"][rows]})
    for name in ("token_ids", "gate", "ids"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
    for name in ("weights", "embeddings", "logprobs"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[rows])
    other = torch.randn(arguments["logits"].shape, generator=generator).to(DEVICE)
    assert torch.equal(decode_step(**{**arguments, "logits": other}).gate, whole.gate)
    tensors = {name: torch.tensor(arguments[name]) for name in ("seed", "step")}
    assert all(torch.equal(x, y) for x, y in zip(decode_step(**{**arguments, **tensors}), whole, strict=True))


@pytest.mark.parametrize("options", [{}, {"top_k": 40, "top_p": 0.9}, {"strategy": "gumbel", "k": 3}])
def test_alone_and_among_64(backend, options):
    a = on(backend, {**plain(64, 2000), "mixing_rate": 0.3, "temperature": 0.8, **options})
    if "strategy" in options:
        a["neighbor_ids"] = None
    rows = torch.randint(2**62, (64,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    whole = decode_step(**a, row_ids=rows)
    for row in (0, 17, 63):
        one = {**a, "logits": a["logits"][row : row + 1], "row_ids": rows[row : row + 1]}
        assert all(torch.equal(x[0], y[row]) for x, y in zip(decode_step(**one), whole, strict=True))


def plain(b: int = 4, v: int = 5, **change: object) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(b, v, generator=generator), "embedding": torch.randn(v, 3, generator=generator),
        "neighbor_ids": torch.randint(v, (v, 2), generator=generator), "seed": 0, "step": 0, **change,
    }  # fmt: skip


def test_default_rows_and_the_keys_matter():
    arguments = plain(64, mixing_rate=0.5)
    base = decode_step(**arguments)
    assert torch.equal(base.gate, decode_step(**arguments, row_ids=torch.arange(64)).gate)
    for change in ({"seed": 1}, {"step": 1}, {"seed": 2**32}, {"step": 2**32}, {"row_ids": torch.arange(64) + 2**32}):
        assert not torch.equal(base.gate, decode_step(**{**arguments, **change}).gate)


def test_released_variant_and_no_gradient():
    arguments = plain(logits=torch.randn(4, 5, requires_grad=True), variant="released", temperature=0.5)
    out = decode_step(**arguments)
    assert not out.embeddings.requires_grad and not out.logprobs.requires_grad
    p = (arguments["logits"].detach().double() / 0.5).softmax(1)
    assert_within(out.weights, p.gather(1, out.ids).softmax(1), 1e-6)


def test_a_row_of_nan_is_its_own_affair():
    arguments = plain()
    clean = decode_step(**arguments)
    arguments["logits"][2] = torch.nan
    out = decode_step(**arguments)
    keep = torch.tensor([0, 1, 3])
    assert out.logprobs[2].isnan() and torch.equal(out.token_ids[keep], clean.token_ids[keep])


# candidate_weights ------------------------------------------------------------------------------------------------


@given(
    shape=st.sampled_from([(), (1,), (4,), (2, 3)]),
    v=st.integers(1, 20),
    k=st.integers(1, 6),
    temperature=st.sampled_from([1.0, 0.7, 0.1, 4.0]),
    variant=st.sampled_from(["paper", "released"]),
    dtype=dtypes,
    layout=layouts,
    generator=generators,
)
def test_candidate_weights(shape, v, k, temperature, variant, dtype, layout, generator):
    logits = lay_out((torch.randn(*shape, v, generator=generator) * 3).to(dtype), layout)
    ids = lay_out(torch.randint(v, (*shape, k), generator=generator), layout)
    got = candidate_weights(logits, ids, temperature=temperature, variant=variant)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for z, c, weights in zip(logits.reshape(-1, v), ids.reshape(-1, k), got.reshape(-1, k), strict=True):
        powers = [math.exp(float(x - z.max()) / temperature) for x in z.double()]
        if variant == "released":
            powers = [math.exp(x / math.fsum(powers)) for x in powers]
        picked = [powers[i] for i in c.tolist()]
        want = torch.tensor([x / math.fsum(picked) for x in picked], dtype=torch.float64)
        if math.fsum(picked) > 1e-30:
            assert_within(weights, want, 1e-6)
    assert_within(got.sum(-1), torch.ones(shape), 1e-6)


def test_candidate_weights_where_the_rest_outweighs_them():
    """Candidates far below the maximum are still compared with each other, and a cut one weighs nothing."""
    logits = torch.tensor([[1e4, 0.0, 1.0, -torch.inf]])
    got = candidate_weights(logits, torch.tensor([[1, 2, 3]]))
    assert_within(got, torch.tensor([[0.0, 1.0, -torch.inf]]).double().softmax(1), 1e-6)
    leaf = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: candidate_weights(z, torch.tensor([[0, 1], [4, 4]])), (leaf,))


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"logits": [1.0]}, TypeError, "logits"),
        ({"ids": [0]}, TypeError, "ids"),
        ({"ids": torch.zeros(2, 1)}, TypeError, "ids"),
        ({"ids": torch.zeros(2).long()}, ValueError, "ids"),
        ({"ids": torch.zeros(3, 1).long()}, ValueError, "ids"),
        ({"ids": torch.zeros(2, 0).long()}, ValueError, "ids"),
        ({"ids": torch.zeros(2, 1, device="meta").long()}, ValueError, "ids"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"variant": "official"}, ValueError, "variant"),
    ],
)
def test_candidate_weights_bad_input_is_named(change, error, name):
    with pytest.raises(error, match=name):
        candidate_weights(**{"logits": torch.ones(2, 4), "ids": torch.zeros(2, 1).long(), **change})


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"logits": 1}, TypeError, "logits"),
        ({"logits": torch.ones(5)}, ValueError, "logits"),
        ({"logits": torch.ones(4, 5).long()}, ValueError, "logits"),
        ({"logits": torch.ones(0, 5)}, ValueError, "logits"),
        ({"embedding": 1}, TypeError, "embedding"),
        ({"embedding": torch.ones(0, 3)}, ValueError, "embedding"),
        ({"embedding": torch.ones(6, 3)}, ValueError, "embedding"),
        ({"embedding": torch.ones(5, 3, device="meta")}, ValueError, "embedding"),
        ({"neighbor_ids": [0]}, TypeError, "neighbor_ids"),
        ({"neighbor_ids": torch.zeros(5, 2)}, TypeError, "neighbor_ids"),
        ({"neighbor_ids": torch.zeros(5).long()}, ValueError, "neighbor_ids"),
        ({"neighbor_ids": torch.zeros(4, 2).long()}, ValueError, "neighbor_ids"),
        ({"neighbor_ids": torch.zeros(5, 2, device="meta").long()}, ValueError, "neighbor_ids"),
        ({"mixing_rate": -0.1}, ValueError, "mixing_rate"),
        ({"mixing_rate": 1.5}, ValueError, "mixing_rate"),
        ({"mixing_rate": math.nan}, ValueError, "mixing_rate"),
        ({"temperature": -0.1}, ValueError, "temperature"),
        ({"temperature": math.inf}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_p": 1.1}, ValueError, "top_p"),
        ({"top_p": math.nan}, ValueError, "top_p"),
        ({"variant": "official"}, ValueError, "variant"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"temperature": -0.1}, ValueError, "temperature"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature"),
        ({"temperature": torch.tensor([1.0, 1.0, -1.0, 1.0])}, ValueError, "temperature"),
        ({"temperature": torch.ones(4).long()}, TypeError, "temperature"),
        ({"temperature": "1"}, TypeError, "temperature"),
        ({"top_k": 1.5}, TypeError, "top_k"),
        ({"top_k": torch.ones(4)}, TypeError, "top_k"),
        ({"top_p": torch.tensor([0.5, 0.5, 1.5, 0.5])}, ValueError, "top_p"),
        ({"min_p": -0.1}, ValueError, "min_p"),
        ({"min_p": 1.1}, ValueError, "min_p"),
        ({"enabled": torch.ones(4)}, TypeError, "enabled"),
        ({"enabled": torch.ones(3, dtype=torch.bool)}, ValueError, "enabled"),
        ({"strategy": "neighbour"}, ValueError, "strategy"),
        ({"strategy": "topk", "k": 2}, ValueError, "neighbor_ids"),
        ({"neighbor_ids": None}, ValueError, "neighbor_ids"),
        ({"neighbor_ids": None, "strategy": "topk"}, TypeError, "k must"),
        ({"neighbor_ids": None, "strategy": "topk", "k": 6}, ValueError, "k must"),
        ({"neighbor_ids": None, "strategy": "anchor", "k": 2}, ValueError, "k must"),
        ({"neighbor_ids": None, "strategy": "gumbel", "k": 2, "variant": "released"}, ValueError, "variant"),
        ({"neighbor_ids": None, "strategy": "moi", "k": 2, "variant": "released"}, ValueError, "variant"),
        ({"neighbor_ids": None, "strategy": "multiplex", "k": 2, "moi_beta": 1.0}, ValueError, "moi_beta"),
        ({"neighbor_ids": None, "strategy": "moi", "k": 2, "moi_beta": -1.0}, ValueError, "moi_beta"),
        ({"k": 2}, ValueError, "k must"),
        ({"mixing_temperature": 0.0}, ValueError, "mixing_temperature"),
        ({"noise_scale": 0.1}, ValueError, "noise_scale"),
        ({"entropy_threshold": -1.0}, ValueError, "entropy_threshold"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"step": "0"}, TypeError, "step"),
        ({"seed": torch.tensor(1.0)}, TypeError, "seed"),
        ({"seed": torch.tensor([1])}, ValueError, "seed"),
        ({"step": torch.tensor(1).int()}, TypeError, "step"),
        ({"step": torch.tensor([1])}, ValueError, "step"),
        ({"seed": torch.zeros((), device="meta").long()}, ValueError, "seed"),
        ({"step": torch.zeros((), device="meta").long()}, ValueError, "step"),
        ({"step": torch.zeros(4, device="meta").long()}, ValueError, "step"),
        ({"row_ids": [0, 1, 2, 3]}, TypeError, "row_ids"),
        ({"row_ids": torch.zeros(4)}, TypeError, "row_ids"),
        ({"row_ids": torch.zeros(3).long()}, ValueError, "row_ids"),
        ({"row_ids": torch.zeros(4, device="meta").long()}, ValueError, "row_ids"),
    ],
)
def test_bad_input_is_named(change, error, name):
    with pytest.raises(error, match=name):
        decode_step(**plain(**change))


def test_the_device_of_noise_seeds_is_named():
    mixed, rows = torch.ones(3, 4), torch.zeros(3).long()
    for seed in (torch.zeros((), device="meta").long(), torch.zeros(3, device="meta").long()):
        with pytest.raises(ValueError, match="seed is on meta"):
            gaussian_noise(mixed, 0.1, seed=seed, row_ids=rows, steps=rows)


@pytest.mark.parametrize("name", ["decode_step", "mixing_candidates", "nearest_neighbors"])
def test_what_reads_numbers_on_the_host_stays_out_of_graphs_of_the_compiler(name):
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.ngrpo, name).default.tags


@pytest.mark.parametrize("neighbor", [-1, 5])
def test_neighbors_out_of_range_are_refused(neighbor):
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        decode_step(**plain(neighbor_ids=torch.full((5, 2), neighbor)))
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        candidate_weights(torch.ones(1, 5), torch.tensor([[neighbor]]))


def test_shapes_on_meta():
    arguments = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in plain().items()}
    out = decode_step(**{**arguments, "embedding": arguments["embedding"].half()})
    assert [tuple(x.shape) for x in out] == [(4,), (4,), (4, 3), (4, 3), (4, 3), (4,), (4,), (4,)]
    want = [torch.int64, torch.bool, torch.int64, *[torch.float32, torch.float16], *[torch.float32] * 2, torch.int32]
    assert [x.dtype for x in out] == want


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, implementation):
    a = plain()
    logits, table = a["logits"].to(dtype).T.contiguous().T, a["embedding"].to(dtype)
    counter = (torch.tensor(3), torch.tensor(4), torch.arange(4))
    t, k, p, m = torch.tensor(0.7), torch.tensor([1, 3, 9, 0]), torch.tensor(0.9), torch.tensor([0.0, 0.1, 0.5, 1.0])
    step, candidates = torch.ops.ngrpo.decode_step.default, torch.ops.ngrpo.mixing_candidates.default
    cut = (t.expand(4).clone(), 0.5, 1.0, k, p, m, *counter, torch.ones(4, dtype=torch.bool))
    torch.library.opcheck(
        step, (logits, table, a["neighbor_ids"], 3, "neighbor", "paper", 0.5, 0.1, 0.3, *cut, implementation)
    )
    whole = (t, None, 1.0, None, None, None, *counter[:2], None, None)
    torch.library.opcheck(
        step, (logits, table, None, 2, "gaussian", "released", 1.0, None, 0.3, *whole, implementation)
    )
    torch.library.opcheck(step, (logits, table, None, 2, "moi", "paper", 1.0, None, 0.3, *cut, implementation))
    rest = (*[None] * 3, *counter)
    torch.library.opcheck(candidates, (logits, None, 2, "gumbel", "paper", t, 0.5, 1.0, *rest, True, implementation))
    torch.library.opcheck(candidates, (logits, None, 1, "anchor", "paper", t, None, 1.0, *rest, False, implementation))
    rest = (k, p, m, *counter)
    torch.library.opcheck(
        candidates, (logits, None, 3, "multiplex", "paper", t, None, 1.0, *rest, True, implementation)
    )
    noise = (table[:4], torch.ones(4), *(torch.arange(4) for _ in range(3)), implementation)
    torch.library.opcheck(torch.ops.ngrpo.gaussian_noise.default, noise)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "mixing_rate": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.01}]
)
def test_compiles(options, implementation):
    torch._dynamo.reset()
    options = {**options, "backend": implementation}

    def call(logits: Tensor, table: Tensor, neighbors: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        return (*decode_step(logits, table, neighbors, seed=1, step=step, **options), step)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, v in ((4, 5), (7, 9)):
        a = plain(b, v)
        arguments = (a["logits"], a["embedding"], a["neighbor_ids"], torch.tensor(b))
        assert all(torch.equal(x, y) for x, y in zip(compiled(*arguments), call(*arguments), strict=True))


@pytest.mark.slow
def test_candidate_weights_compiles():
    torch._dynamo.reset()
    compiled = torch.compile(candidate_weights, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, v, temperature in ((4, 5, 1.0), (7, 9, 0.7)):
        logits, ids = torch.randn(b, v), torch.randint(v, (b, 2))
        got = compiled(logits, ids, temperature=temperature)
        torch.testing.assert_close(got, candidate_weights(logits, ids, temperature=temperature))


# Strategies, settings by row, faults ------------------------------------------------------------------------------


def exact_weights(z: Tensor, ids: Tensor) -> Tensor:
    return z.double().gather(1, ids).softmax(1)


@pytest.mark.parametrize("mixing_temperature", [None, 0.4])
def test_topk_mixes_the_likeliest(backend, mixing_temperature):
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0, -torch.inf]], device=DEVICE)
    table = torch.eye(5, device=DEVICE)
    out = decode_step(
        logits, table, strategy="topk", k=3, mixing_rate=1.0, temperature=0.5, mixing_temperature=mixing_temperature,
        seed=0, step=0, backend=backend,
    )  # fmt: skip
    assert out.ids.tolist() == [[1, 3, 4], [0, 1, 2]] and out.token_ids.tolist() == [1, 0]
    want = exact_weights(logits.double() / (mixing_temperature or 0.5), out.ids)
    assert_within(out.weights, want, 1e-6)
    mixed = torch.zeros(2, 5, device=DEVICE).scatter(1, out.ids, want.float())
    assert_within(out.embeddings, mixed, 1e-6)


@pytest.mark.parametrize("strategy", ["topk", "gumbel", "gaussian"])
def test_fewer_tokens_than_candidates(backend, strategy):
    """What is not there weighs nothing and is never NaN."""
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf]], device=DEVICE)
    out = decode_step(
        logits, torch.eye(5, device=DEVICE), strategy=strategy, k=4, mixing_rate=1.0, seed=0, step=0, backend=backend
    )
    assert sorted(out.ids[0, :2].tolist()) == [1, 3] and not out.weights[0, 2:].any() and out.fault.item() == 0
    assert_within(out.weights.sum(1), torch.ones(1), 1e-6)
    assert out.embeddings.isfinite().all()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_gumbel_weights_are_those_of_the_noised_logits(backend, temperature):
    generator = torch.Generator().manual_seed(0)
    b, v, k, tau = 40, 2100, 5, 0.3
    logits = (2 * torch.randn(b, v, generator=generator)).to(DEVICE)
    rows = torch.randint(2**62, (b,), generator=generator).to(DEVICE)
    out = mixing_candidates(
        logits, strategy="gumbel", k=k, temperature=temperature, mixing_temperature=tau, seed=5, step=9, row_ids=rows,
        backend=backend,
    )  # fmt: skip
    likeliest = logits.topk(k).indices
    noise = gumbel(torch.tensor(5), rows.cpu(), torch.tensor(9), k).to(DEVICE).double()
    weights = ((logits.double().gather(1, likeliest) / temperature + noise) / tau).softmax(1)
    where = (out.ids[:, :, None] == likeliest[:, None, :]).to(torch.uint8).argmax(2)
    assert torch.equal(likeliest.gather(1, where), out.ids)
    assert_within(out.weights, weights.gather(1, where), 3e-5)
    assert (out.weights.argmax(1) == 0).all() and (where[:, 0] != 0).any()


def test_gumbel_emits_draws_from_the_top_of_the_policy():
    n = 200_000
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5], device=DEVICE)
    out = decode_step(logits.expand(n, 5), None, strategy="gumbel", k=3, mixing_rate=1.0, seed=3, step=4)
    p = torch.tensor(cut_by_hand(logits.double().softmax(0).tolist(), 3, None), dtype=torch.float64)
    assert_distributed(out.token_ids.cpu().bincount(minlength=5), p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gaussian_noise_is_drawn_again(backend, dtype):
    """The embedding of a step and the same noise put on its mix: what a replay does."""
    generator = torch.Generator().manual_seed(0)
    b, v, d, scale = 6, 50, 301, 0.5
    table = torch.randn(v, d, generator=generator).to(dtype).to(DEVICE)
    rows = torch.arange(b, device=DEVICE) + 2**40
    out = decode_step(
        torch.randn(b, v, generator=generator).to(DEVICE), table, strategy="gaussian", k=3, mixing_rate=0.6,
        noise_scale=scale, seed=-3, step=7, row_ids=rows, backend=backend,
    )  # fmt: skip
    gate = out.gate
    assert gate.any() and not gate.all() and torch.equal(out.embeddings[~gate], table[out.token_ids[~gate]])
    mixed = mix_embeddings(table, out.ids, out.weights, backend=backend)[gate]
    steps = torch.full_like(rows[gate], 7)
    again = gaussian_noise(mixed, scale, seed=-3, row_ids=rows[gate], steps=steps, backend=backend)
    by_hand = normal(torch.tensor(-3), rows[gate].cpu(), steps.cpu(), d).to(DEVICE).double()
    by_hand = mixed.double() + scale * mixed.double().square().mean(1, keepdim=True).sqrt() * by_hand
    for embedded in (out.embeddings[gate], again):
        assert_within(embedded, by_hand, 4e-6 + 2 * rounding(by_hand, dtype, backend))
    shifted = gaussian_noise(mixed, scale, seed=-3, row_ids=rows[gate], steps=steps + 1, backend=backend)
    assert (shifted != again).float().mean() > 0.9


def test_gaussian_noise_is_a_constant_to_the_gradient(backend):
    mixed = torch.randn(3, 7, device=DEVICE, requires_grad=True)
    ids = torch.arange(3, device=DEVICE)
    scales, seeds = torch.tensor([0.0, 0.5, 1.0], device=DEVICE), torch.tensor([1, 2, 3], device=DEVICE)
    out = gaussian_noise(mixed, scales, seed=seeds, row_ids=ids, steps=ids, backend=backend)
    assert torch.equal(out[0], mixed[0]) and not torch.equal(out[1], mixed[1])
    out.sum().backward()
    assert torch.equal(mixed.grad, torch.ones_like(mixed))
    assert gaussian_noise(mixed[:0], 1.0, seed=0, row_ids=ids[:0], steps=ids[:0]).shape == (0, 7)


def draws_by_hand(p: Tensor, seed: int, rows: Tensor, step: int, count: int) -> Tensor:
    """[B, count]: the first by the words of the step's sample, the others by the streams from 1 on, two words each."""
    words = [philox(torch.tensor(seed), rows, torch.tensor(step), stream) for stream in range(1 + count // 2)]
    pairs = [words[0][1:3], *(pair for four in words[1:] for pair in (four[:2], four[2:]))]
    ends = p.cumsum(1)
    tokens = [torch.searchsorted(ends, uniform(*pair)[:, None] * ends[:, -1:], right=True) for pair in pairs[:count]]
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize("beta", [None, 0.0, 2.5])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_moi_mixes_the_sample_into_the_distribution(backend, beta, k):
    generator = torch.Generator().manual_seed(0)
    b, v, seed, step = 60, 2100, 5, 9
    logits = (3 * torch.randn(b, v, generator=generator)).to(DEVICE)
    rows = torch.randint(2**62, (b,), generator=generator).to(DEVICE)
    found = mixing_candidates(
        logits, strategy="moi", k=k, temperature=0.7, moi_beta=beta, seed=seed, step=step, row_ids=rows, backend=backend
    )
    p = (logits.double().cpu() / 0.7).softmax(1)
    share = -(p * p.log()).sum(1) / math.log(v)
    beta = 1.0 if beta is None else beta
    outside = 0
    for row, drawn in enumerate(draws_by_hand(p, seed, rows.cpu(), step, 1)[:, 0].tolist()):
        likeliest = p[row].topk(k).indices.tolist()
        if drawn not in likeliest:
            likeliest[-1], outside = drawn, outside + 1
        ids = [drawn, *(token for token in likeliest if token != drawn)]
        assert found.ids[row].tolist() == ids
        want = share[row] * p[row, ids] / p[row, ids].sum()
        want[0] += beta + 1 - share[row]
        assert_within(found.weights[row], want / (beta + 1), 3e-6)
    assert 0 < outside < b  # both cases were met
    assert_within(found.weights.sum(1), torch.ones(b), 1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_multiplex_mixes_what_it_draws(backend, k):
    generator = torch.Generator().manual_seed(0)
    b, v, seed, step = 60, 2100, 5, 9
    logits = (4 * torch.randn(b, v, generator=generator)).to(DEVICE)
    rows = torch.randint(2**62, (b,), generator=generator).to(DEVICE)
    found = mixing_candidates(
        logits, strategy="multiplex", k=k, temperature=0.7, seed=seed, step=step, row_ids=rows, backend=backend
    )
    p = (logits.double().cpu() / 0.7).softmax(1)
    draws = draws_by_hand(p, seed, rows.cpu(), step, k)
    assert torch.equal(found.ids.cpu(), draws)
    again = 0
    for row in range(b):
        distinct = [i for i in range(k) if draws[row, i] not in draws[row, :i]]
        want = torch.zeros(k, dtype=torch.float64)
        want[distinct] = p[row, draws[row, distinct]] / p[row, draws[row, distinct]].sum()
        assert_within(found.weights[row], want, 3e-6)
        again += len(distinct) < k
    assert k == 1 or again > 5


@pytest.mark.parametrize("strategy", ["moi", "multiplex"])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 4, "top_p": 0.9}])
def test_drawing_strategies_emit_the_sample(backend, strategy, cuts):
    """Mixed or not the row's own sample, which the cuts hold for, and at temperature 0 the argmax."""
    a = on(backend, {**plain(64, 1300, mixing_rate=0.5), "neighbor_ids": None, "strategy": strategy, "k": 3, **cuts})
    a["temperature"] = torch.tensor([0.8, 0.0] * 32, device=DEVICE)
    out = decode_step(**a)
    sampled = decode_step(**a | {"strategy": "anchor", "k": None, "mixing_rate": 0.0}).token_ids
    assert out.gate.any() and not out.gate.all()
    assert torch.equal(out.token_ids, sampled) and torch.equal(out.ids[:, 0], sampled)
    assert torch.equal(out.token_ids[1::2], a["logits"][1::2].argmax(1))
    if strategy == "multiplex":
        assert torch.equal(out.weights[1::2].cpu(), torch.tensor([[1.0, 0.0, 0.0]]).expand(32, 3))
        assert not cuts or all(
            set(ids) <= set(row.topk(4).indices.tolist())
            for ids, row in zip(out.ids.tolist(), a["logits"], strict=True)
        )
    for name in ("embedding", "mixing_rate"):
        a.pop(name)
    found = mixing_candidates(**a)
    assert torch.equal(found.ids, out.ids) and torch.equal(found.weights, out.weights)


def test_draws_of_multiplex_are_independent():
    n = 200_000
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5], device=DEVICE)
    out = decode_step(logits.expand(n, 5), None, strategy="multiplex", k=4, mixing_rate=1.0, top_k=3, seed=3, step=4)
    p = torch.tensor(cut_by_hand(logits.double().softmax(0).tolist(), 3, None), dtype=torch.float64)
    for one in range(4):
        for other in range(one):
            pairs = (out.ids[:, one] * 5 + out.ids[:, other]).cpu()
            assert_distributed(pairs.bincount(minlength=25), (p[:, None] * p).flatten())


@pytest.mark.parametrize("strategy", ["moi", "multiplex"])
def test_drawing_strategies_of_few_tokens(backend, strategy):
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf], [-torch.inf] * 4 + [3.0]], device=DEVICE)
    for step in range(8):
        out = decode_step(
            logits, torch.eye(5, device=DEVICE), strategy=strategy, k=4, mixing_rate=1.0, seed=0, step=step,
            backend=backend,
        )  # fmt: skip
        assert not out.fault.any() and out.token_ids[0] in (1, 3) and out.token_ids[1] == 4
        assert_within(out.weights.sum(1), torch.ones(2), 1e-6)
        assert_within(out.embeddings[0, [1, 3]].sum(), torch.ones(()), 1e-6)
        assert torch.equal(out.embeddings[1].cpu(), torch.eye(5)[4])
    alone = decode_step(
        torch.ones(1, 1, device=DEVICE), None, strategy=strategy, k=1, mixing_rate=1.0, seed=0, step=0, backend=backend
    )
    assert alone.weights.item() == 1 and alone.token_ids.item() == 0


def test_cuts_of_candidates_are_refused_where_nothing_is_drawn():
    with pytest.raises(ValueError, match="top_p is read by the strategies"):
        mixing_candidates(torch.ones(1, 5), strategy="topk", k=2, top_p=0.9)


def test_the_anchor_alone(backend):
    a = on(backend, plain(8, mixing_rate=0.5))
    control = decode_step(**{**a, "neighbor_ids": None, "strategy": "anchor"})
    one = decode_step(**{**a, "neighbor_ids": a["neighbor_ids"][:, :0]})
    assert all(torch.equal(x, y) for x, y in zip(control, one, strict=True))
    assert torch.equal(control.token_ids[control.gate], a["logits"].argmax(1)[control.gate])
    assert torch.equal(control.embeddings, a["embedding"][control.token_ids]) and (control.weights == 1).all()


def test_settings_by_row_are_those_of_each_row_alone(backend):
    b, v = 12, 1500
    generator = torch.Generator().manual_seed(3)
    arguments = on(backend, {**plain(b, v), "logits": torch.randn(b, v, generator=generator) * 2, "mixing_rate": 0.3})
    settings = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0] * 3),
        "top_k": torch.tensor([0, 1, 5, v, v + 3, 40] * 2),
        "top_p": torch.tensor([1.0, 0.9, 0.5, 1e-6] * 3),
        "min_p": torch.tensor([0.0, 0.01, 0.2, 1.0, 0.0, 0.5] * 2),
    }
    settings = {name: x.to(DEVICE) for name, x in settings.items()}
    rows = torch.arange(b, device=DEVICE)
    whole = decode_step(**arguments, row_ids=rows, **settings)
    for row in range(b):
        alone = {name: x[row].item() for name, x in settings.items()}
        alone["top_k"] = alone["top_k"] or None
        part = {**arguments, "logits": arguments["logits"][row : row + 1], "row_ids": rows[row : row + 1], **alone}
        for x, y in zip(decode_step(**part), whole, strict=True):
            assert torch.equal(x[0], y[row])
    greedy = settings["temperature"] == 0
    assert torch.equal(whole.token_ids[greedy], arguments["logits"][greedy].argmax(1))
    want = arguments["logits"][greedy].double().log_softmax(1).gather(1, whole.token_ids[greedy, None])[:, 0]
    assert_within(whole.logprobs[greedy], want, 4e-6)


def test_rows_switched_off_and_certain_rows_are_not_mixed(backend):
    a = on(backend, plain(64, 7, mixing_rate=1.0))
    enabled = (torch.arange(64) % 3 > 0).to(DEVICE)
    out = decode_step(**a, enabled=enabled)
    assert torch.equal(out.gate, enabled)
    assert torch.equal(out.token_ids[~enabled], decode_step(**{**a, "mixing_rate": 0.0}).token_ids[~enabled])
    entropy = -(a["logits"].double().softmax(1) * a["logits"].double().log_softmax(1)).sum(1)
    assert_within(out.entropy, entropy, 4e-6)
    threshold = float(entropy.sort().values[20:22].mean())
    by_entropy = decode_step(**a, entropy_threshold=threshold)
    assert torch.equal(by_entropy.gate, entropy >= threshold)
    both = decode_step(**{**a, "mixing_rate": 0.5}, entropy_threshold=threshold)
    assert torch.equal(both.gate, decode_step(**{**a, "mixing_rate": 0.5}).gate & by_entropy.gate)


def test_faulty_rows_are_flagged_and_nothing_is_sampled_from_them(backend):
    a = on(backend, plain(6, 2200, mixing_rate=1.0))
    clean = decode_step(**a)
    a["logits"][1, 2100] = torch.nan
    a["logits"][2] = -torch.inf
    a["logits"][4, 7] = torch.inf
    anchor = int(a["logits"][5].argmax())
    if backend == "triton":  # on the CPU plain torch raises at once
        a["neighbor_ids"][anchor, 1] = 2200
    for options in ({}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}, {"mixing_rate": 0.0}):
        out = decode_step(**{**a, **options})
        good = [0, 3] if backend == "triton" else [0, 3, 5]
        assert out.fault.tolist() == [0, 1, 2, 0, 1, 4 if backend == "triton" else 0]
        bad = out.fault != 0
        assert not out.gate[bad].any() and not out.token_ids[bad].any() and not out.ids[bad].any()
        for name in ("weights", "embeddings", "logprobs", "entropy"):
            assert getattr(out, name)[bad].isnan().all() and getattr(out, name)[~bad].isfinite().all()
        if not options:
            assert all(torch.equal(x[good], y[good]) for x, y in zip(out, clean, strict=True))
    found = mixing_candidates(a["logits"], a["neighbor_ids"], backend=backend)
    assert torch.equal(found.fault, out.fault) and torch.equal(found.ids, out.ids)
    for strategy in ("topk", "gumbel", "gaussian", "moi", "multiplex"):
        step = decode_step(
            a["logits"], a["embedding"], strategy=strategy, k=3, seed=0, step=0, mixing_rate=1.0, backend=backend
        )
        assert step.fault.tolist() == [0, 1, 2, 0, 1, 0] and step.embeddings[[0, 3, 5]].isfinite().all()


def test_faults_are_raised_with_row_and_step():
    raise_faults(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"row 1: its logits hold NaN"):
        raise_faults(torch.tensor([0, 1, 0]))
    steps = torch.tensor([[0, 0, 2], [0, 4, 0]])
    with pytest.raises(RuntimeError, match=r"row 70, step 1 \(and 1 more\): a neighbour of its anchor"):
        raise_faults(steps, row_ids=torch.tensor([60, 70]))
    with pytest.raises(RuntimeError, match=r"row 0, step 2: all of its logits are -inf"):
        raise_faults(steps[:1])


def test_candidates_are_those_of_the_step(backend):
    a = on(backend, plain(9, 1300, temperature=0.7, variant="released"))
    out = decode_step(**a)
    for name in ("seed", "step", "embedding"):
        a.pop(name)
    assert mixing_candidates(**a).entropy is None
    found = mixing_candidates(**a, return_entropy=True)
    assert all(torch.equal(x, getattr(out, name)) for name, x in found._asdict().items())


@pytest.mark.parametrize("strategy", ["neighbor", "gumbel", "gaussian", "moi", "multiplex"])
def test_rows_at_steps_of_their_own_are_those_of_each_step(backend, strategy):
    a = on(backend, plain(6, 1300, mixing_rate=0.5, k=3))
    a |= {"strategy": strategy, "row_ids": torch.arange(6, device=DEVICE) + 5}
    if strategy != "neighbor":
        a["neighbor_ids"] = None
    steps = torch.tensor([0, 9, 2**33, 0, 7, 1], device=DEVICE)
    out = decode_step(**a | {"step": steps})
    strided = torch.stack([steps, steps + 1], dim=1)[:, 0]
    assert all(torch.equal(x, y) for x, y in zip(out, decode_step(**a | {"step": strided}), strict=True))
    of_candidates = {name: x for name, x in a.items() if name not in ("embedding", "mixing_rate")}
    assert torch.equal(mixing_candidates(**of_candidates | {"step": steps}).weights, out.weights)
    for row, step in enumerate(steps.tolist()):
        alone = decode_step(**a | {"step": step})
        for name, value in alone._asdict().items():
            assert torch.equal(value[row], getattr(out, name)[row]), (name, row)


# The kernels against the oracle -----------------------------------------------------------------------------------


@st.composite
def wide_steps(draw: st.DrawFn) -> dict:
    """Steps over several pieces of the vocabulary, with ties at the cuts and every setting."""
    generator, b, v, d = (
        draw(generators),
        draw(st.integers(1, 6)),
        draw(st.integers(900, 3300)),
        draw(st.integers(1, 150)),
    )
    k = draw(st.integers(1, 6))
    strategy = draw(st.sampled_from(STRATEGIES))
    scale = draw(st.sampled_from([0.0, 0.3, 3.0, 30.0]))
    logits = (torch.randn(b, v, generator=generator, dtype=torch.float64) * scale).round(
        decimals=draw(st.integers(0, 3))
    )
    if draw(st.booleans()):
        cut = torch.rand(b, v, generator=generator) < draw(st.sampled_from([0.3, 0.999]))
        cut[:, draw(st.integers(0, v - 1))] = False
        logits = logits.masked_fill(cut, -torch.inf)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    per_row = st.booleans()

    def setting(values: list) -> object:
        if draw(per_row):
            chosen = [draw(st.sampled_from(values)) for _ in range(b)]
            return None if None in chosen else torch.tensor(chosen)
        return draw(st.sampled_from([None, *values]))

    temperature, table = setting([1.0, 0.7, 2.5, 0.0]), torch.randn(v, d, generator=generator)
    return {
        "logits": lay_out(logits.to(dtype), draw(layouts)),
        "embedding": lay_out(table.to(draw(st.sampled_from(FLOATS[1:]))), draw(layouts)),
        "neighbor_ids": torch.randint(v, (v, k - 1), generator=generator) if strategy == "neighbor" else None,
        "strategy": strategy,
        "k": None if strategy in ("neighbor", "anchor") else k,
        "moi_beta": draw(st.sampled_from([None, 0.0, 3.0])) if strategy == "moi" else None,
        "mixing_rate": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "temperature": 1.0 if temperature is None else temperature,
        "mixing_temperature": draw(st.sampled_from([None, 0.5])),
        "top_k": setting([1, 3, 50, v]),
        "top_p": setting([0.3, 0.9, 1.0]),
        "min_p": setting([0.001, 0.2]),
        "enabled": torch.rand(b, generator=generator) < 0.8 if draw(per_row) else None,
        "seed": draw(INT64),
        "step": draw(st.integers(0, 2**40)),
        "row_ids": torch.randint(2**62, (b,), generator=generator),
    }  # fmt: skip


near_a_boundary = [0, 0]  # draws whose token differs from the oracle's, and draws


@given(arguments=wide_steps())
@settings(max_examples=30)
def test_kernel_against_oracle(arguments):
    """Gates, candidates and faults the same; tokens too, unless the draw lies within rounding of a token's edge."""
    ours, oracle = (decode_step(**on(backend, arguments)) for backend in ("triton", "eager"))
    a = on("triton", arguments)
    double = decode_step(**{**a, "backend": "eager", "logits": a["logits"].double()})
    assert torch.equal(ours.gate, oracle.gate) and torch.equal(ours.fault, oracle.fault)
    same = ours.token_ids == oracle.token_ids
    if arguments["strategy"] == "multiplex":  # each candidate is a draw
        same = (ours.ids == oracle.ids).all(1)
    elif arguments["strategy"] != "gumbel":  # of which two may weigh the same to the last bit
        assert torch.equal(ours.ids[same], oracle.ids[same])
    near_a_boundary[0] += int((~same).sum())
    near_a_boundary[1] += same.numel()
    assert near_a_boundary[0] <= 1 + near_a_boundary[1] // 100
    for row in (~same).nonzero()[:, 0].tolist():
        draws = [[step.token_ids[row], *(step.ids[row] if arguments["strategy"] == "multiplex" else [])]
                 for step in (ours, oracle)]  # fmt: skip
        for one, other in zip(*draws, strict=True):
            if one != other:
                assert_neighbouring_draws(a, row, int(one), int(other))
    z = torch.where(a["logits"].isinf(), 0, a["logits"].double()).abs().amax(1).clamp(min=1)
    roundoff = 4e-7 * z[same] / 0.3
    if arguments["strategy"] != "gumbel":
        assert_within(ours.weights[same], double.weights[same], 1e-6 + roundoff[:, None])
    assert_within(ours.entropy[same], double.entropy[same], 2e-5 + 20 * roundoff)
    assert_within(ours.logprobs[same], double.logprobs[same], 2e-5 + 2 * roundoff)
    exact = torch.where(
        ours.gate[:, None],
        (ours.weights.double()[..., None] * a["embedding"].double()[ours.ids]).sum(1),
        a["embedding"].double()[ours.token_ids],
    )
    if arguments["strategy"] != "gaussian":
        assert_within(ours.embeddings, exact, 4e-6 + rounding(exact, a["embedding"].dtype, "triton"))


def assert_neighbouring_draws(a: dict, row: int, one: int, other: int) -> None:
    """Between the two tokens there is next to no mass, so either edge is within rounding of the draw."""
    low, high = sorted((one, other))
    t = a["temperature"]
    t = float(t[row] if isinstance(t, Tensor) else t)
    p = (a["logits"][row].double() / t).softmax(0)
    assert p[low + 1 : high].sum() < 1e-4 and p[one] > 0 and p[other] > 0


@pytest.mark.slow
def test_words_of_the_kernel_are_philox():
    """Through the gate: at every rate the same rows, for keys and counters of all 64 bits."""
    generator = torch.Generator().manual_seed(0)
    for seed, step in ((0, 0), (-1, 2**40 + 5), (2**63 - 1, 3), (-(2**63), -1)):
        rows = torch.randint(-(2**63), 2**63 - 1, (64,), generator=generator)
        word = philox(torch.tensor(seed), rows, torch.tensor(step))[0]
        for rate in (0.1, 0.5, 0.9):
            out = decode_step(
                torch.zeros(64, 3, device=DEVICE), None, strategy="anchor", mixing_rate=rate, backend="triton",
                seed=torch.tensor(seed, device=DEVICE), step=torch.tensor(step, device=DEVICE), row_ids=rows.to(DEVICE),
            )  # fmt: skip
            assert torch.equal(out.gate.cpu(), bernoulli(word, rate))


@pytest.mark.slow
@given(generator=generators, dtype=st.sampled_from(FLOATS[1:]), layout=layouts)
def test_64_bit_kernels_agree(generator, dtype, layout):
    a = plain(3, 1500, top_p=0.8)
    a["logits"], a["embedding"] = (lay_out(a[name].to(dtype), layout) for name in ("logits", "embedding"))
    a["seed"] = int(torch.randint(1000, (), generator=generator))
    for strategy in ({}, {"strategy": "multiplex", "neighbor_ids": None, "k": 3}):
        narrow = decode_step(**on("triton", a | strategy))
        with forced_int64():
            wide = decode_step(**on("triton", a | strategy))
        assert all(torch.equal(x, y) for x, y in zip(wide, narrow, strict=True))


def test_offsets_are_64_bits_wide_where_they_must_be():
    """On meta tensors: too many logits, a table too large, a neighbour table too large."""

    def launched(b: int = 4, v: int = 1000, d: int = 8, k: int = 3, strategy: str = "neighbor") -> list[bool]:
        meta = {"device": "meta"}
        zero = torch.tensor(0)
        neighbors = torch.empty(v, k - 1, dtype=torch.int64, **meta) if strategy == "neighbor" else None
        with recording() as launches:
            kernels("decode_step").decode_step(
                torch.empty(b, v, **meta), torch.empty(v, d, **meta), neighbors, k, strategy, "paper",
                0.1, None, 0.3, torch.tensor(1.0), None, 1.0, zero + 5, None, None, zero, zero, None, None,
            )  # fmt: skip
        return [launch.arguments["INT64"] for launch in launches]

    assert launched() == [False, False, False]
    assert launched(b=20_000, v=262_144) == [True, True, True]
    assert launched(v=262_144, d=8200) == [False, False, True]
    assert launched(strategy="moi") == [False] * 4
    assert launched(b=20_000, v=262_144, strategy="multiplex") == [True] * 4


@pytest.mark.slow
def test_two_launches_three_with_a_cut_and_no_other_work():
    """The launches of a step, and that nothing depends on the values: a CUDA graph could hold it."""
    a = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in plain(4, 1000).items()}
    tensors = {"seed": torch.empty((), dtype=torch.int64, device="meta")}
    tensors["step"] = tensors["seed"]
    for cut, names in (({}, ["partials", "choice"]), ({"top_k": 5, "top_p": 0.5}, ["partials", "filter", "choice"])):
        with recording() as launches:
            kernels("decode_step").decode_step(
                a["logits"], a["embedding"], a["neighbor_ids"], 3, "neighbor", "paper", 0.1, None, 0.3,
                torch.tensor(1.0), None, 1.0, *(torch.tensor(x) for x in cut.values()), *[None] * (3 - len(cut)),
                tensors["seed"], tensors["step"], None, None,
            )  # fmt: skip
        assert [launch.kernel.__name__ for launch in launches] == [f"decode_{name}_kernel" for name in names]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a CUDA graph needs a GPU (NGRPO_OPS_TEST_DEVICE=cuda)")
@pytest.mark.parametrize("cuts", [{}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}])
def test_a_captured_graph_goes_on_with_its_step(cuts):
    a = on("triton", plain(32, 5000, mixing_rate=0.3, **cuts))
    a["seed"], a["step"] = (torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(2))
    decode_step(**a)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_step(**a)
    for step in range(5):
        a["step"].fill_(step)
        a["logits"].normal_()
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(out, decode_step(**a), strict=True))
