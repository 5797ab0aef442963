"""decode_step, candidate_weights and their random numbers: every promise of the contract, and the distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ngrpo_ops import candidate_weights, decode_step, reference
from ngrpo_ops.random import bernoulli, philox, uniform
from ngrpo_ops.testing import (
    assert_within,
    compute_roundoff,
    dtypes,
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
        assert reference.sample(scaled, torch.tensor([u], dtype=torch.float64)).tolist() == [token]


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


def cut_by_hand(p: list[float], top_k: int | None, top_p: float | None) -> list[float]:
    """Top-k, then top-p of what is left: the fewest tokens that hold a mass of top_p; equal ones by the lower id."""
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[:top_k]
    total, kept, mass = math.fsum(p[i] for i in order), [], 0.0
    for i in order:
        if top_p is not None and kept and mass >= top_p * total:
            break
        kept.append(i)
        mass += p[i]
    return [p[i] / mass if i in kept else 0.0 for i in range(len(p))]


SKEWED = [5.0, 1.0, 4.0, -torch.inf, 2.0, 3.0, 1.5, 0.0, 2.5]
TIED = [1.0, 2.0, 2.0, 2.0, 0.0, 2.0, 1.0, -1.0]


@pytest.mark.parametrize(
    ("logits", "temperature", "top_k", "top_p"),
    [
        (SKEWED, 1.0, None, None),
        (SKEWED, 2.0, None, None),
        (SKEWED, 2.0, 4, None),
        (SKEWED, 2.0, None, 0.7),
        (SKEWED, 3.0, 5, 0.6),
        ([0.0] * 16, 1.0, None, None),
        ([0.0] * 16, 1.0, 5, None),
        (TIED, 1.0, 2, None),
        (TIED, 1.0, 5, None),
        (TIED, 1.0, None, 0.5),
        (SKEWED, 1.0, 1, None),
        (SKEWED, 1.0, None, 1e-9),
        (SKEWED, 2.0, 100, 1.0),
    ],
)
def test_sampling_distribution(logits, temperature, top_k, top_p):
    """200,000 rows of one distribution, none mixed; the tokens' counts are those of the cut distribution."""
    n, v = 200_000, len(logits)
    out = decode_step(
        torch.tensor(logits).expand(n, v), torch.zeros(v, 1), torch.zeros(v, 0).long(),
        mixing_rate=0.0, temperature=temperature, top_k=top_k, top_p=top_p, seed=11, step=5,
    )  # fmt: skip
    p = torch.tensor(logits, dtype=torch.float64).div(temperature).softmax(0).tolist()
    want = torch.tensor(cut_by_hand(p, top_k, top_p), dtype=torch.float64)
    assert_distributed(out.token_ids.bincount(minlength=v), want)


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


@given(arguments=steps())
def test_contract(arguments):
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
                out.embeddings[row], mix, 8 * unit_roundoff(torch.float32) * terms + rounding(mix, table.dtype)
            )
        else:
            assert torch.equal(out.embeddings[row], table[token])
            assert cut_by_hand(z[row].softmax(0).tolist(), arguments["top_k"], None)[token] > 0
        exact = z[row].log_softmax(0)[token]
        assert_within(out.logprobs[row], exact, u * (4 * size[row] + v + 8) + 2.0**-23 * exact.abs() + 1e-44)


@given(arguments=steps(), generator=generators, size=st.integers(1, 4))
def test_a_row_does_not_know_its_batch(arguments, generator, size):
    """Order, batch size and the other rows leave a row's result as it is; the gate ignores even its own logits."""
    b = arguments["logits"].shape[0]
    whole = decode_step(**arguments)
    rows = torch.randperm(b, generator=generator)[:size]
    part = decode_step(**{**arguments, "logits": arguments["logits"][rows], "row_ids": arguments["row_ids"][rows]})
    for name in ("token_ids", "gate", "ids"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
    for name in ("weights", "embeddings", "logprobs"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[rows])
    other = torch.randn(arguments["logits"].shape, generator=generator)
    assert torch.equal(decode_step(**{**arguments, "logits": other}).gate, whole.gate)
    tensors = {name: torch.tensor(arguments[name]) for name in ("seed", "step")}
    assert all(torch.equal(x, y) for x, y in zip(decode_step(**{**arguments, **tensors}), whole, strict=True))


def plain(b: int = 4, v: int = 5, k: int = 3, **change: object) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(b, v, generator=generator), "embedding": torch.randn(v, 3, generator=generator),
        "neighbor_ids": torch.randint(v, (v, k - 1), generator=generator), "seed": 0, "step": 0, **change,
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
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": math.inf}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_p": 1.1}, ValueError, "top_p"),
        ({"top_p": math.nan}, ValueError, "top_p"),
        ({"variant": "official"}, ValueError, "variant"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"seed": torch.tensor(1.0)}, TypeError, "seed"),
        ({"seed": torch.tensor([1])}, ValueError, "seed"),
        ({"step": torch.tensor(1).int()}, TypeError, "step"),
        ({"step": torch.tensor([1])}, ValueError, "step"),
        ({"row_ids": [0, 1, 2, 3]}, TypeError, "row_ids"),
        ({"row_ids": torch.zeros(4)}, TypeError, "row_ids"),
        ({"row_ids": torch.zeros(3).long()}, ValueError, "row_ids"),
        ({"row_ids": torch.zeros(4, device="meta").long()}, ValueError, "row_ids"),
    ],
)
def test_bad_input_is_named(change, error, name):
    with pytest.raises(error, match=name):
        decode_step(**plain(**change))


@pytest.mark.parametrize("neighbor", [-1, 5])
def test_neighbors_out_of_range_are_refused(neighbor):
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        decode_step(**plain(neighbor_ids=torch.full((5, 2), neighbor)))
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        candidate_weights(torch.ones(1, 5), torch.tensor([[neighbor]]))


def test_shapes_on_meta():
    arguments = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in plain().items()}
    out = decode_step(**{**arguments, "embedding": arguments["embedding"].half()})
    assert [tuple(x.shape) for x in out] == [(4,), (4,), (4, 3), (4, 3), (4, 3), (4,)]
    want = [torch.int64, torch.bool, torch.int64, torch.float32, torch.float16, torch.float32]
    assert [x.dtype for x in out] == want


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    a = plain()
    tensors = (a["logits"].to(dtype).T.contiguous().T, a["embedding"].to(dtype), a["neighbor_ids"])
    keys = (torch.tensor(3), torch.tensor(4), torch.arange(4))
    op = torch.ops.ngrpo.decode_step.default
    torch.library.opcheck(op, (*tensors, 0.5, 0.7, 3, 0.9, *keys, "paper"))
    torch.library.opcheck(op, (*tensors[:2], torch.zeros(5, 0).long(), 1.0, 1.0, None, None, *keys, "released"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "mixing_rate": 0.5, "top_k": 3, "top_p": 0.9}])
def test_compiles(options):
    torch._dynamo.reset()

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
