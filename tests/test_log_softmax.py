"""selective_log_softmax and its gradients against float64, within budgets of the arithmetic's rounding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_within, compute_roundoff, dtypes, generators, lay_out, layouts, rounding
from torch import Tensor

from ngrpo_ops import reference, selective_log_softmax


def by_hand(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log p [N, V], p and entropy [N] in float64; 0 log 0 = 0."""
    z = logits.double() / temperature
    top = z.amax(1, keepdim=True)
    log_p = z - top - (z - top).exp().sum(1, keepdim=True).log()
    p = log_p.exp()
    rows = zip(p.tolist(), log_p.tolist(), strict=True)
    entropy = [-math.fsum(q * log for q, log in zip(*row, strict=True) if q > 0) for row in rows]
    return log_p, p, torch.tensor(entropy, dtype=torch.float64)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    generator, dtype = draw(generators), draw(dtypes)
    n, v = draw(st.integers(1, 7)), draw(st.integers(1, 40))
    logits = torch.randn(n, v, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    if draw(st.booleans()):
        cut = torch.rand(n, v, generator=generator) < 0.5
        cut[torch.arange(n), torch.randint(v, (n,), generator=generator)] = False
        logits = logits.masked_fill(cut, -torch.inf)
    k = draw(st.sampled_from([None, 1, 2, 5]))
    ids = torch.randint(v, (n,) if k is None else (n, k), generator=generator)
    layout = draw(layouts)
    return lay_out(logits.to(dtype), layout), lay_out(ids, layout), draw(st.sampled_from([1.0, 0.7, 0.01, 3.0]))


@given(
    problem=problems(),
    what=st.sampled_from(["logprobs", "entropy", "both"]),
    expanded=st.booleans(),
    generator=generators,
)
def test_value_and_gradient(problem, what, expanded, generator):
    logits, ids, temperature = problem
    n, v = logits.shape
    leaf = logits.detach().requires_grad_()
    logprobs, entropy = selective_log_softmax(leaf, ids, temperature=temperature, return_entropy=True)
    plain = selective_log_softmax(logits, ids, temperature=temperature)
    assert torch.equal(plain, logprobs)
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert logprobs.dtype == entropy.dtype == compute
    assert logprobs.shape == ids.shape and entropy.shape == (n,)

    log_p, p, exact_entropy = by_hand(logits, temperature)
    u = compute_roundoff(logits.dtype)
    columns = ids.reshape(n, -1)
    # Rounding of logits / temperature and of its difference to the largest; of a sum of V terms; of the result.
    size = torch.where(logits.isinf(), 0, logits.double() / temperature).abs().amax(1, keepdim=True)
    error = u * (4 * size + v + 8)
    want = log_p.gather(1, columns)
    assert_within(logprobs.detach().reshape(n, -1), want, error + 2 * u * want.abs())
    entropy_error = error[:, 0] * (2 + 2 * exact_entropy) + v * u * (1 + exact_entropy)
    assert_within(entropy.detach(), exact_entropy, entropy_error)
    assert bool((entropy >= 0).all())

    def gradient_of(x: Tensor) -> Tensor:
        g = torch.randn(1, generator=generator, dtype=x.dtype).expand(x.shape)
        return g if expanded else torch.randn(x.shape, generator=generator, dtype=x.dtype)

    chosen = [x for x, name in ((logprobs, "logprobs"), (entropy, "entropy")) if what in (name, "both")]
    grads = [gradient_of(x) for x in chosen]
    (got,) = torch.autograd.grad(chosen, leaf, grads)
    assert got.dtype == logits.dtype and got.shape == logits.shape
    exact, budget = torch.zeros(n, v, dtype=torch.float64), torch.zeros(n, v, dtype=torch.float64)
    if what != "entropy":
        g = grads[0].double().reshape(n, -1)
        for row in range(n):
            for c, token in enumerate(columns[row]):
                exact[row] -= g[row, c] * p[row] / temperature
                exact[row, token] += g[row, c] / temperature
                budget[row] += g[row, c].abs() * (p[row] * (2 * error[row] + 12 * u)) / temperature
                budget[row, token] += 12 * u * g[row, c].abs() / temperature
    if what != "logprobs":
        g = grads[-1].double()[:, None]
        surprise = torch.where(p > 0, -log_p, 0) - exact_entropy[:, None]
        exact += g * p * surprise / temperature
        scale = p * (torch.where(p > 0, -log_p, 0) + exact_entropy[:, None] + 1)
        budget += g.abs() * (4 * scale * (error + (v + 8) * u) + p * entropy_error[:, None]) / temperature
    # A probability may underflow in the arithmetic's range: an absolute error of its smallest normal.
    budget += torch.finfo(compute).smallest_normal * 100 / temperature
    assert_within(got, exact, budget + rounding(exact, logits.dtype))


def test_a_cut_token_is_minus_infinity_and_gets_no_nan():
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [-torch.inf, -torch.inf, 5.0]], requires_grad=True)
    logprobs, entropy = selective_log_softmax(logits, torch.tensor([1, 2]), return_entropy=True)
    assert logprobs.tolist() == [-math.inf, 0.0]
    assert entropy[1] == 0
    (gradient,) = torch.autograd.grad((logprobs[1], entropy.sum()), logits)
    assert bool(gradient.isfinite().all()) and gradient[:, 1].tolist() == [0.0, 0.0]


def test_equal_logits_are_uniform():
    logprobs, entropy = selective_log_softmax(torch.zeros(2, 8), torch.tensor([0, 7]), return_entropy=True)
    assert_within(logprobs, torch.full((2,), -math.log(8)), 2**-22)
    assert_within(entropy, torch.full((2,), math.log(8)), 2**-22)


def test_blocks_of_rows_do_not_show(monkeypatch):
    logits = torch.randn(11, 13, requires_grad=True)
    ids = torch.randint(13, (11, 2))
    results = []
    for elements in (2**24, 30):
        monkeypatch.setattr(reference, "_ROW_BLOCK_ELEMENTS", elements)
        out = selective_log_softmax(logits, ids, return_entropy=True)
        results.append((*out, *torch.autograd.grad((out[0].sum(), out[1].sum()), logits)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_gradcheck_once_only(shape, temperature):
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(5, shape)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        return selective_log_softmax(x, ids, temperature=temperature, return_entropy=True)

    assert torch.autograd.gradcheck(call, (logits,))
    assert torch.autograd.gradcheck(lambda x: selective_log_softmax(x, ids, temperature=temperature), (logits,))
    (first,) = torch.autograd.grad(call(logits)[1].sum(), logits, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(first.square().sum(), logits)


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"logits": [[1.0]]}, TypeError, "logits"),
        ({"logits": torch.ones(4)}, ValueError, "logits"),
        ({"logits": torch.ones(2, 4).long()}, ValueError, "logits"),
        ({"logits": torch.ones(0, 4)}, ValueError, "logits"),
        ({"logits": torch.ones(2, 0)}, ValueError, "logits"),
        ({"ids": [0, 1]}, TypeError, "ids"),
        ({"ids": torch.zeros(2).int()}, TypeError, "ids"),
        ({"ids": torch.zeros(3).long()}, ValueError, "ids"),
        ({"ids": torch.zeros(2, 0).long()}, ValueError, "ids"),
        ({"ids": torch.zeros(2, 1, 1).long()}, ValueError, "ids"),
        ({"ids": torch.tensor([0, 4])}, ValueError, "ids"),
        ({"ids": torch.tensor([-1, 0])}, ValueError, "ids"),
        ({"ids": torch.zeros(2, device="meta").long()}, ValueError, "ids"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": math.inf}, ValueError, "temperature"),
        ({"temperature": math.nan}, ValueError, "temperature"),
    ],
)
def test_bad_input_is_named(change, error, name):
    with pytest.raises(error, match=name):
        selective_log_softmax(**{"logits": torch.ones(2, 4), "ids": torch.tensor([0, 1]), **change})


def test_shapes_on_meta():
    logits = torch.empty(6, 9, device="meta", dtype=torch.bfloat16, requires_grad=True)
    logprobs, entropy = selective_log_softmax(logits, torch.empty(6, 2, device="meta").long(), return_entropy=True)
    assert logprobs.shape == (6, 2) and entropy.shape == (6,)
    assert logprobs.dtype == entropy.dtype == torch.float32
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None and logits.grad.shape == (6, 9)


@pytest.mark.slow
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck(entropy):
    logits, ids, ops = torch.randn(5, 4).bfloat16().T, torch.randint(5, (4, 2)), torch.ops.ngrpo
    torch.library.opcheck(ops.selective_log_softmax.default, (logits.requires_grad_(), ids, 0.7, entropy))
    grads = torch.randn(4, 2), torch.randn(4 if entropy else 0)
    torch.library.opcheck(ops.selective_log_softmax_backward.default, (*grads, logits.detach(), ids, 0.7, entropy))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}])
@pytest.mark.parametrize("entropy", [False, True])
def test_compiles(entropy, options):
    torch._dynamo.reset()

    def call(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        out = selective_log_softmax(logits, ids, return_entropy=entropy, **options)  # type: ignore[call-overload]
        return out if entropy else (out,)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, v in ((3, 7), (5, 11)):
        logits, ids = torch.randn(n, v, requires_grad=True), torch.randint(v, (n,))
        got, want = compiled(logits, ids), call(logits, ids)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        gradients = [torch.autograd.grad(sum(x.sum() for x in out), logits)[0] for out in (got, want)]
        assert torch.equal(*gradients)
