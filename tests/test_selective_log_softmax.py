"""selective_log_softmax and its gradients against float64, within budgets of the arithmetic's rounding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ngrpo_ops import selective_log_softmax
from ngrpo_ops.kernels import selective_log_softmax as kernels
from ngrpo_ops.kernels.primitives import forced_int64, recording
from ngrpo_ops.ops import selective_log_softmax as operation
from ngrpo_ops.ops.selective_log_softmax import (
    selective_log_softmax_backward_reference,
    selective_log_softmax_reference,
)
from ngrpo_ops.testing import (
    DEVICE,
    assert_as_accurate,
    assert_within,
    compute_roundoff,
    dtypes,
    for_backend,
    generators,
    integers,
    lay_out,
    layouts,
    normal,
    rounding,
)


def by_hand(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log p [N, V], p and entropy [N] in float64; 0 log 0 = 0."""
    z = logits.double().cpu() / temperature
    top = z.amax(1, keepdim=True)
    log_p = z - top - (z - top).exp().sum(1, keepdim=True).log()
    p = log_p.exp()
    rows = zip(p.tolist(), log_p.tolist(), strict=True)
    entropy = [-math.fsum(q * log for q, log in zip(*row, strict=True) if q > 0) for row in rows]
    return log_p, p, torch.tensor(entropy, dtype=torch.float64)


def gradient_by_hand(
    logits: Tensor, ids: Tensor, temperature: float, grad: Tensor | None, grad_entropy: Tensor | None
) -> Tensor:
    log_p, p, entropy = by_hand(logits, temperature)
    out = torch.zeros_like(p)
    if grad is not None:
        for row, (tokens, slopes) in enumerate(zip(ids.tolist(), grad.double().cpu(), strict=True)):
            for token, slope in zip(tokens, slopes, strict=True):
                out[row] -= slope * p[row]
                out[row, token] += slope
    if grad_entropy is not None:
        surprise = torch.where(p > 0, -log_p, 0) - entropy[:, None]
        out += grad_entropy.double().cpu()[:, None] * p * surprise
    return out / temperature


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    generator, dtype = draw(generators), draw(dtypes)
    n, v = draw(st.integers(1, 7)), draw(st.sampled_from([1, 2, 3, 17, 40, 1024, 1500]))
    logits = normal(generator, n, v) * draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    if draw(st.booleans()):
        cut = normal(generator, n, v) < 0
        cut[torch.arange(n), integers(generator, v, n)] = False
        logits = logits.masked_fill(cut, -torch.inf)
    k = draw(st.sampled_from([None, 1, 2, 5]))
    ids = integers(generator, v, *((n,) if k is None else (n, k)))
    layout = draw(layouts)
    return lay_out(logits.to(dtype), layout), lay_out(ids, layout), draw(st.sampled_from([1.0, 0.7, 0.01, 3.0]))


@given(
    problem=problems(),
    what=st.sampled_from(["logprobs", "entropy", "both"]),
    expanded=st.booleans(),
    generator=generators,
    in_place=st.booleans(),
)
def test_value_and_gradient(backend, problem, what, expanded, generator, in_place):
    logits, ids, temperature = problem
    logits = for_backend(logits, backend)
    n, v = logits.shape
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    options = {"temperature": temperature, "backend": backend}
    logprobs, entropy = selective_log_softmax(leaf, ids, return_entropy=True, in_place_backward=in_place, **options)
    assert torch.equal(selective_log_softmax(leaf.detach(), ids, **options), logprobs)
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert logprobs.dtype == entropy.dtype == compute
    assert logprobs.shape == ids.shape and entropy.shape == (n,)

    log_p, p, exact_entropy = by_hand(logits, temperature)
    u = compute_roundoff(logits.dtype)
    columns = ids.reshape(n, -1)
    # Rounding of logits / temperature and of its difference to the largest; of a sum of V terms; of the result.
    scaled = logits.double().cpu() / temperature
    size = torch.where(scaled.isinf(), 0, scaled).abs().amax(1, keepdim=True)
    error = u * (4 * size + v + 8)
    want = log_p.gather(1, columns.cpu())
    assert_within(logprobs.detach().reshape(n, -1), want, error + 2 * u * want.abs())
    entropy_error = error[:, 0] * (2 + 2 * exact_entropy) + v * u * (1 + exact_entropy)
    assert_within(entropy.detach(), exact_entropy, entropy_error)
    assert bool((entropy >= 0).all())

    def gradient_of(x: Tensor) -> Tensor:
        return (
            normal(generator, 1, dtype=x.dtype).expand(x.shape)
            if expanded
            else normal(generator, *x.shape, dtype=x.dtype)
        )

    chosen = [x for x, name in ((logprobs, "logprobs"), (entropy, "entropy")) if what in (name, "both")]
    grads = [gradient_of(x) for x in chosen]
    (got,) = torch.autograd.grad(chosen, leaf, grads)
    assert got.dtype == logits.dtype and got.shape == logits.shape
    assert (got.data_ptr() == leaf.data_ptr()) == in_place
    grad = None if what == "entropy" else grads[0].reshape(n, -1)
    grad_entropy = None if what == "logprobs" else grads[-1]
    exact, budget = gradient_by_hand(logits, columns, temperature, grad, grad_entropy), torch.zeros_like(p)
    if grad is not None:
        for row, (tokens, slopes) in enumerate(zip(columns.tolist(), grad.double().cpu().abs(), strict=True)):
            for token, slope in zip(tokens, slopes, strict=True):
                budget[row] += slope * (p[row] * (2 * error[row] + 12 * u)) / temperature
                budget[row, token] += 12 * u * slope / temperature
    if grad_entropy is not None:
        scale = p * (torch.where(p > 0, -log_p, 0) + exact_entropy[:, None] + 1)
        terms = 4 * scale * (error + (v + 8) * u) + p * entropy_error[:, None]
        budget += grad_entropy.double().cpu().abs()[:, None] * terms / temperature
    # A probability may underflow in the arithmetic's range: an absolute error of its smallest normal.
    budget += torch.finfo(compute).smallest_normal * 100 / temperature
    assert_within(got, exact, budget + rounding(exact, logits.dtype, backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_against_oracle(dtype):
    """The kernel's layer of the fast tests: as accurate as plain torch, over several tiles."""
    generator, temperature = torch.Generator().manual_seed(0), 0.7
    logits = (3 * normal(generator, 2, 3, 3001)).to(dtype)[:, :, :-1]
    logits[0, 0, 5:], logits[0, 1, :2000] = -torch.inf, -torch.inf
    ids = integers(generator, 3000, 6, 3)
    ids[0], ids[2, 1] = 2, ids[2, 0]
    ids[1, 0] = 2500
    rows = logits.reshape(6, 3000)
    logprobs, entropy, normalizer = kernels.forward(logits, ids, temperature, True)
    eager = selective_log_softmax_reference(logits, ids, temperature, True)
    log_p, _, exact = by_hand(rows, temperature)
    finite = eager[0].isfinite()
    assert torch.equal(logprobs.isfinite(), finite)
    assert_as_accurate(logprobs[finite], eager[0][finite], log_p.gather(1, ids.cpu())[finite.cpu()])
    assert_as_accurate(entropy, eager[1], exact)
    grad = normal(generator, 6, 3, dtype=torch.float32)
    grad_entropy = normal(generator, 6, dtype=torch.float32)
    got = kernels.backward(grad, grad_entropy, logits, ids, entropy, normalizer, temperature, False)
    want = selective_log_softmax_backward_reference(grad, grad_entropy, logits, ids, temperature, True, False)
    assert_as_accurate(got.view(6, -1), want.view(6, -1), gradient_by_hand(rows, ids, temperature, grad, grad_entropy))


def test_logits_that_are_not_numbers(backend):
    """NaN and +inf make their row NaN, as torch.log_softmax does; a row of -inf too."""
    logits = torch.zeros(4, 5, device=DEVICE)
    logits[0, 1], logits[1, 1], logits[2] = torch.nan, torch.inf, -torch.inf
    ids = torch.zeros(4, device=DEVICE).long()
    logprobs, entropy = selective_log_softmax(logits, ids, return_entropy=True, backend=backend)
    assert logprobs.isnan().tolist() == [True, False, True, False] or logprobs.isnan().tolist() == [
        True,
        True,
        True,
        False,
    ]
    assert (
        torch.equal(logprobs[3:], -torch.full((1,), math.log(5), device=DEVICE))
        or abs(logprobs[3] + math.log(5)) < 1e-6
    )
    assert bool(entropy[[0, 2]].isnan().all())


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 2)])
@pytest.mark.parametrize("k", [None, 2])
def test_leading_shapes(backend, shape, k):
    generator = torch.Generator().manual_seed(0)
    logits = normal(generator, *shape, 7, dtype=torch.float32).requires_grad_()
    ids = integers(generator, 7, *shape, *(() if k is None else (k,)))
    logprobs, entropy = selective_log_softmax(logits, ids, return_entropy=True, backend=backend)
    assert logprobs.shape == ids.shape and entropy.shape == shape
    log_p, _, _ = by_hand(logits.detach().reshape(-1, 7), 1.0)
    assert_within(
        logprobs.detach().reshape(log_p.shape[0], -1), log_p.gather(1, ids.cpu().reshape(log_p.shape[0], -1)), 1e-5
    )
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None and logits.grad.shape == logits.shape


def test_a_slice_of_the_sequence_is_not_copied(backend):
    """logits[:, :-1] of [B, T, V], as every trainer has it."""
    generator = torch.Generator().manual_seed(0)
    logits, ids = normal(generator, 2, 4, 9, dtype=torch.bfloat16), integers(generator, 9, 2, 3)
    sliced = selective_log_softmax(logits[:, :-1], ids, backend=backend)
    assert torch.equal(sliced, selective_log_softmax(logits[:, :-1].contiguous(), ids, backend=backend))
    leaf = logits.clone().requires_grad_()
    out = selective_log_softmax(leaf[:, :-1], ids, in_place_backward=True, backend=backend)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    again = logits.clone().requires_grad_()
    (want,) = torch.autograd.grad(selective_log_softmax(again[:, :-1], ids, backend=backend).sum(), again)
    assert torch.equal(gradient, want) and not want[:, -1].any()


@pytest.mark.parametrize(
    "logits",
    [torch.ones(5).expand(3, 5), torch.ones(1, 3, 5).expand(2, 3, 5), torch.ones(7).unfold(0, 5, 1)],
    ids=["one row", "one batch", "windows"],
)
def test_in_place_backward_of_shared_memory_is_refused(logits):
    ids = torch.zeros(logits.shape[:-1]).long()
    with pytest.raises(ValueError, match="in_place_backward needs logits whose elements lie apart"):
        selective_log_softmax(logits, ids, in_place_backward=True)
    assert torch.isfinite(selective_log_softmax(logits, ids)).all()


def test_a_second_derivative_in_place_is_refused():
    logits = torch.randn(3, 5, requires_grad=True)
    out = selective_log_softmax(logits * 1.0, torch.zeros(3).long(), in_place_backward=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        torch.autograd.grad(out.sum(), logits, create_graph=True)


def test_in_place_backward_overwrites_and_runs_once(backend):
    logits = torch.randn(3, 5).to(DEVICE).requires_grad_()
    hidden = logits * 1.0
    out = selective_log_softmax(hidden, torch.tensor([0, 4, 2], device=DEVICE), in_place_backward=True, backend=backend)
    (want,) = torch.autograd.grad(
        selective_log_softmax(logits, torch.tensor([0, 4, 2], device=DEVICE), backend=backend).sum(), logits
    )
    (gradient,) = torch.autograd.grad(out.sum(), logits, retain_graph=True)
    assert torch.equal(gradient, want) and torch.equal(hidden.detach(), want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), logits)


@pytest.mark.slow
def test_ids_out_of_range_are_nan_in_the_kernel():
    logits = torch.zeros(1, 2, 4, device=DEVICE)
    logprobs, _, _ = kernels.forward(logits, torch.tensor([[4, 0], [-1, 3]], device=DEVICE), 1.0, False)
    assert logprobs.isnan().tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize("entropy", [True, False])
def test_ids_out_of_range_are_nan_without_the_kernel_too(entropy, monkeypatch):
    """On an accelerator, where nothing looks at them first."""
    monkeypatch.setattr(operation, "require_ids_in_range", lambda *args: None)
    logits, ids = torch.zeros(1, 2, 4).double(), torch.tensor([[4, 0], [-1, 3]])
    logprobs, _ = selective_log_softmax_reference(logits, ids, 1.0, entropy)
    assert logprobs.isnan().tolist() == [[True, False], [True, False]]
    grad, of_entropy = torch.ones(2, 2).double(), torch.zeros(2 if entropy else 0).double()
    found = selective_log_softmax_backward_reference(grad, of_entropy, logits, ids, 1.0, entropy, False)
    assert found.tolist() == [[[0.5, -0.5, -0.5, -0.5], [-0.5, -0.5, -0.5, 0.5]]]


def test_offsets_are_64_bits_wide_where_they_must_be():
    """Logits of 40 GB, 131,072 x 151,936 in bfloat16, on meta; a slice whose rows are far apart counts too."""
    for rows, wide in ((131_072, True), (8_192, False)):
        logits = torch.empty(1, rows, 151_936, dtype=torch.bfloat16, device="meta")
        ids = torch.empty(rows, 1, device="meta").long()
        with recording() as launches:
            logprobs, entropy, normalizer = kernels.forward(logits, ids, 1.0, False)
            kernels.backward(logprobs, entropy, logits, ids, entropy, normalizer, 1.0, False)
            kernels.forward(logits[:, -2:], ids[-2:], 1.0, False)
        assert [launch.arguments["INT64"] for launch in launches] == [wide] * 3 + [False] * 2


@pytest.mark.slow
def test_64_bit_kernels_agree():
    logits, ids = torch.randn(2, 3, 1100).to(DEVICE), torch.randint(1100, (6, 2)).to(DEVICE)

    def run() -> list[Tensor]:
        logprobs, entropy, normalizer = kernels.forward(logits, ids, 0.7, True)
        gradient = kernels.backward(logprobs, entropy, logits, ids, entropy, normalizer, 0.7, False)
        return [logprobs, entropy, gradient]

    narrow = run()
    with forced_int64():
        assert all(torch.equal(a, b) for a, b in zip(run(), narrow, strict=True))


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
        monkeypatch.setattr(operation, "ROW_BLOCK_ELEMENTS", elements)
        out = selective_log_softmax(logits, ids, return_entropy=True)
        results.append((*out, *torch.autograd.grad((out[0].sum(), out[1].sum()), logits)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_gradcheck(shape, temperature):
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(5, shape)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        return selective_log_softmax(x, ids, temperature=temperature, return_entropy=True)

    assert torch.autograd.gradcheck(call, (logits,))
    assert torch.autograd.gradcheck(lambda x: selective_log_softmax(x, ids, temperature=temperature), (logits,))


def test_a_second_derivative_is_refused(backend):
    logits = torch.randn(3, 5).to(DEVICE).requires_grad_()
    out = selective_log_softmax(logits, torch.zeros(3, device=DEVICE).long(), backend=backend)
    (first,) = torch.autograd.grad(out.sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="selective_log_softmax can be differentiated once"):
        torch.autograd.grad(first.square().sum(), logits)


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"logits": [[1.0]]}, TypeError, "logits"),
        ({"logits": torch.tensor(1.0)}, ValueError, "logits"),
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
        ({"temperature": "1"}, TypeError, "temperature"),
        ({"temperature": True}, TypeError, "temperature"),
        ({"temperature": 1e-39}, ValueError, "temperature"),
        ({"return_entropy": "no"}, TypeError, "return_entropy"),
        ({"in_place_backward": 1}, TypeError, "in_place_backward"),
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
@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_opcheck(entropy, implementation):
    ops = torch.ops.ngrpo
    logits, ids = torch.randn(2, 5, 4).bfloat16().to(DEVICE).mT, torch.randint(5, (8, 2)).to(DEVICE)
    options = (0.7, entropy, False, implementation)
    torch.library.opcheck(ops.selective_log_softmax.default, (logits.requires_grad_(), ids, *options))
    logprobs, entropies, normalizer = ops.selective_log_softmax(logits.detach(), ids, *options)
    arguments = (logprobs, entropies, logits.detach(), ids, entropies, normalizer, 0.7, implementation)
    torch.library.opcheck(ops.selective_log_softmax_backward.default, arguments)
    torch.library.opcheck(ops.selective_log_softmax_backward_.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_compiles(entropy, options, implementation):
    torch._dynamo.reset()
    options = {**options, "backend": implementation, "in_place_backward": True}

    def call(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        out = selective_log_softmax(logits, ids, return_entropy=entropy, **options)  # type: ignore[call-overload]
        return out if entropy else (out,)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, v in ((3, 7), (5, 11)):
        logits, ids = torch.randn(n, v, device=DEVICE, requires_grad=True), torch.randint(v, (n,)).to(DEVICE)
        got, want = compiled(logits, ids), call(logits, ids)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        gradients = [torch.autograd.grad(sum(x.sum() for x in out), logits)[0] for out in (got, want)]
        assert torch.equal(*gradients)
