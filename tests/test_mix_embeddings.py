"""mix_embeddings (equation 10) and its gradients, each against loops in float64 within its error budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

import ngrpo_ops
from ngrpo_ops import mix_embeddings
from ngrpo_ops.kernels import mix_embeddings as kernels
from ngrpo_ops.kernels.primitives import forced_int64, recording
from ngrpo_ops.ops import mix_embeddings as operation
from ngrpo_ops.ops.mix_embeddings import (
    mix_embeddings_cpu,
    mix_embeddings_grad_embedding_reference,
    mix_embeddings_grad_weights_cpu,
    mix_embeddings_grad_weights_reference,
    mix_embeddings_reference,
)
from ngrpo_ops.testing import (
    DEVICE,
    FLOATS,
    assert_as_accurate,
    assert_within,
    compute_roundoff,
    dtypes,
    for_backend,
    generators,
    gradient_kinds,
    gradients,
    integers,
    lay_out,
    layouts,
    normal,
    rounding,
    tables,
)

SHAPES = [(), (1,), (3,), (2, 3), (1, 1, 4), (2, 1, 2), (40,)]


def by_hand(embedding: Tensor, ids: Tensor, weights: Tensor, grad: Tensor, padding_id: int | None) -> list[Tensor]:
    """Mix, gradient of the table and of the weights, [n, ...] in float64, each followed by the sum of its terms' sizes;
    candidate by candidate."""
    x, w, g = (
        embedding.double().cpu(),
        weights.detach().double().cpu(),
        grad.double().cpu().reshape(-1, embedding.shape[1]),
    )
    n, k = g.shape[0], ids.shape[-1]
    out, table, of_weights = torch.zeros_like(g), torch.zeros_like(x), torch.zeros(n, k).double()
    sizes = [torch.zeros_like(y) for y in (out, table, of_weights)]
    for row, (row_ids, row_weights) in enumerate(zip(ids.reshape(-1, k).tolist(), w.reshape(-1, k), strict=True)):
        for c, (token, weight) in enumerate(zip(row_ids, row_weights, strict=True)):
            if token == padding_id:
                continue
            terms = (weight * x[token], weight * g[row]) if weight != 0 else (torch.zeros_like(g[row]),) * 2
            for total, size, index, term in ((out, sizes[0], row, terms[0]), (table, sizes[1], token, terms[1])):
                total[index] += term
                size[index] += term.abs()
            of_weights[row, c], sizes[2][row, c] = (g[row] * x[token]).sum(), (g[row] * x[token]).abs().sum()
    return [out, sizes[0], table, sizes[1], of_weights, sizes[2]]


@given(
    embedding=tables(st.integers(1, 30), st.integers(1, 17)),
    shape=st.sampled_from(SHAPES),
    k=st.integers(1, 9),
    weight_dtype=dtypes,
    layout=layouts,
    few=st.booleans(),
    grad_kind=gradient_kinds,
    generator=generators,
    sparse=st.booleans(),
    padding=st.sampled_from([None, 0, -1]),
    deterministic=st.booleans(),
)
def test_value_and_gradients(
    backend, embedding, shape, k, weight_dtype, layout, few, grad_kind, generator, sparse, padding, deterministic
):
    embedding = for_backend(embedding, backend)
    v, d = embedding.shape
    ids = integers(generator, 1 if few else v, *shape, k)
    weights = normal(generator, *shape, k, dtype=weight_dtype)
    if sparse:
        weights = torch.where(normal(generator, *shape, k) > 0, weights, 0)
    if padding == -1:
        ids = torch.where(normal(generator, *shape, k) > 0, ids, -1)
    table, weights = embedding.detach().requires_grad_(), lay_out(weights, layout).detach().requires_grad_()
    options = {"padding_id": padding, "deterministic": deterministic, "backend": backend}
    out = mix_embeddings(table, lay_out(ids, layout), weights, **options)
    grad = gradients(generator, out, grad_kind)
    grad_table, grad_weights = torch.autograd.grad(out, (table, weights), grad)
    assert (out.dtype, grad_table.dtype, grad_weights.dtype) == (table.dtype, table.dtype, weights.dtype)

    want, size, want_table, size_table, want_weights, size_weights = by_hand(embedding, ids, weights, grad, padding)
    u = compute_roundoff(table.dtype)
    assert_within(out.detach().view(-1, d), want, (k + 3) * u * size + rounding(want, out.dtype, backend))
    terms = ids.numel() + 3
    assert_within(grad_table, want_table, terms * u * size_table + rounding(want_table, table.dtype, backend))
    budget = (d + 3) * u * size_weights + rounding(want_weights, weights.dtype, backend)
    assert_within(grad_weights.reshape(-1, k), want_weights, budget)


@settings(max_examples=6)
@given(
    embedding=tables(st.sampled_from([5, 40]), st.sampled_from([3, 130])),
    n=st.sampled_from([1, 7, 90]),
    k=st.sampled_from([1, 3, 32]),
    hot=st.booleans(),
    generator=generators,
)
def test_kernel_against_oracle(embedding, n, k, hot, generator):
    """The kernel's layer of the fast tests: as accurate as plain torch. `hot` makes segments longer than a tile."""
    embedding = for_backend(embedding, "triton")
    ids, weights = integers(generator, embedding.shape[0], n, k), normal(generator, n, k, dtype=torch.float32)
    if hot:
        ids[normal(generator, n, k) > -1] = 2
    grad = normal(generator, n, embedding.shape[1], dtype=embedding.dtype)
    exact = by_hand(embedding, ids, weights, grad, None)[::2]
    eager = (
        mix_embeddings_reference(embedding, ids, weights),
        mix_embeddings_grad_embedding_reference(grad, embedding, ids, weights),
        mix_embeddings_grad_weights_reference(grad, embedding, ids, weights),
    )
    kernel = (
        kernels.forward(embedding, ids, weights, None),
        kernels.grad_embedding(grad, embedding, ids, weights, None, True),
        kernels.grad_weights(grad, embedding, ids, weights, None),
    )
    for ours, theirs, truth in zip(kernel, eager, exact, strict=True):
        assert_as_accurate(ours, theirs, truth)
    assert_as_accurate(kernels.grad_embedding(grad, embedding, ids, weights, None, False), eager[1], exact[1])


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_fast_cpu_form_agrees_with_the_oracle(dtype):
    """Over more than one block of positions, every weight counting and some of 0."""
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(50, 33, generator=generator).to(dtype)
    ids = torch.randint(50, (700, 3), generator=generator)
    grad = torch.randn(700, 33, generator=generator).to(dtype)
    for weights in (torch.rand(700, 3, generator=generator), torch.randn(700, 3, generator=generator).relu()):
        for layout in ("contiguous", "transposed"):
            x = lay_out(table, layout)
            exact = by_hand(x, ids, weights, grad, None)
            assert_as_accurate(
                mix_embeddings_cpu(x, ids, weights, None), mix_embeddings_reference(x, ids, weights), exact[0]
            )
            ours = mix_embeddings_grad_weights_cpu(grad, x, ids, weights, None)
            assert_as_accurate(ours, mix_embeddings_grad_weights_reference(grad, x, ids, weights), exact[4])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["one token", "two tokens", "a long run between short ones", "each twice"])
def test_long_segments(pattern, dtype):
    """Entries of one token over many tiles of the sorted list, beginning and ending inside and on the edge of one."""
    generator, segment = torch.Generator().manual_seed(3), kernels.SEGMENT
    for m in (segment, segment + 1, 2 * segment, 5 * segment + 7):
        counts = {
            "one token": [m],
            "two tokens": [m // 2, m - m // 2],
            "a long run between short ones": [3, 1, m, 2],
            "each twice": [2] * (m // 2),
        }[pattern]
        tokens = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        ids = tokens[torch.randperm(len(tokens), generator=generator)][:, None].to(DEVICE)
        table = torch.zeros(len(counts) + 2, 5, dtype=dtype, device=DEVICE)
        weights = normal(generator, len(tokens), 1, dtype=torch.float32)
        grad = normal(generator, len(tokens), 5, dtype=dtype)
        got = kernels.grad_embedding(grad, table, ids, weights, None, True)
        again = kernels.grad_embedding(grad, table, ids, weights, None, True)
        _, _, want, size, _, _ = by_hand(table, ids, weights, grad, None)
        assert_within(got, want, (m + 3) * 2**-24 * size + rounding(want, dtype, "triton"))
        assert torch.equal(got, again)


def test_a_zero_weight_adds_nothing(backend):
    """Whatever is in its row; and an infinite or NaN row that does count is seen."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        table = torch.ones(4, 3, dtype=dtype, device=DEVICE)
        table[1], table[2] = torch.inf, torch.nan
        ids = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 0, 1], [0, 1, 1]], device=DEVICE)
        weights = torch.tensor([[0.3, 0, 0], [1.0, 0, 0], [0.5, 0.5, 0], [1.0, -0.0, -0.7]], device=DEVICE)
        out = mix_embeddings(table, ids, weights, backend=backend)
        assert_within(out[0], torch.full((3,), 0.3), rounding(out[0], dtype, backend))
        assert out[1].tolist() == [torch.inf] * 3 and bool(out[2].isnan().all()) and out[3].tolist() == [-torch.inf] * 3


def test_weights_that_are_not_finite(backend):
    table = torch.tensor([[1.0, -2.0, 4.0]], device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        weights = torch.tensor([[torch.inf, 1.0], [torch.nan, 0.0], [3e38, 0.0]], device=DEVICE)
        out = mix_embeddings(table.to(dtype), torch.zeros(3, 2, device=DEVICE).long(), weights, backend=backend)
        assert not out[0].isfinite().any() and bool(out[1].isnan().all())
        assert out[2, 0].isfinite() and out[2, 2] == torch.inf


def test_padded_candidates_are_not_there(backend):
    table = normal(torch.Generator().manual_seed(0), 5, 4, dtype=torch.float32).requires_grad_()
    weights = torch.ones(2, 3, device=DEVICE, requires_grad=True)
    ids = torch.tensor([[1, 2, -1], [-1, -1, -1]], device=DEVICE)
    out = mix_embeddings(table, ids, weights, padding_id=-1, backend=backend)
    assert_within(out[0].detach(), (table[1] + table[2]).detach(), 1e-6)
    assert not out[1].any()
    out.sum().backward()
    assert table.grad is not None and table.grad.sum(1).tolist() == [0, 4, 4, 0, 0]
    assert weights.grad is not None and not weights.grad[ids < 0].any() and bool((weights.grad[ids >= 0] != 0).all())


def test_only_the_rows_asked_for(backend):
    generator = torch.Generator().manual_seed(0)
    table = normal(generator, 9, 4, dtype=torch.float32).requires_grad_()
    ids, weights = integers(generator, 9, 2, 3, 2), normal(generator, 2, 3, 2, dtype=torch.float32).requires_grad_()
    rows = torch.tensor([5, 0, 0], device=DEVICE)
    out = mix_embeddings(table, ids, weights, out_rows=rows, backend=backend)
    assert_within(out.detach(), mix_embeddings(table, ids, weights).view(6, 4)[rows].detach(), 1e-6)
    out.sum().backward()
    assert weights.grad is not None and weights.grad.view(6, 2).any(1).tolist() == [True, *[False] * 4, True]


@pytest.mark.slow
def test_ids_out_of_range_are_nan_in_the_kernel():
    table, weights = torch.ones(3, 4, device=DEVICE), torch.ones(3, 2, device=DEVICE)
    ids = torch.tensor([[0, 3], [-1, 1], [2, 2]], device=DEVICE)
    out = kernels.forward(table, ids, weights, None)
    assert out.isnan().all(1).tolist() == [True, True, False]
    grad = torch.ones(3, 4, device=DEVICE)
    for deterministic in (True, False):
        got = kernels.grad_embedding(grad, table, ids, weights, None, deterministic)
        assert got[:, 0].tolist() == [1, 1, 2]
    assert kernels.grad_weights(grad, table, ids, weights, None).tolist() == [[4, 0], [0, 4], [4, 4]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ids_out_of_range_are_nan_without_the_kernel_too(dtype, monkeypatch):
    """On an accelerator, where nothing looks at them first."""
    monkeypatch.setattr(operation, "require_ids_in_range", lambda *args: None)
    table, weights = torch.ones(3, 4, dtype=dtype), torch.ones(3, 2, dtype=dtype)
    ids = torch.tensor([[0, 3], [-1, 1], [2, 2]])
    assert mix_embeddings_reference(table, ids, weights).isnan().all(1).tolist() == [True, True, False]
    grad = torch.ones(3, 4, dtype=dtype)
    assert mix_embeddings_grad_embedding_reference(grad, table, ids, weights)[:, 0].tolist() == [1, 1, 2]
    assert mix_embeddings_grad_weights_reference(grad, table, ids, weights).tolist() == [[4, 0], [0, 4], [4, 4]]
    unused = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=dtype)
    assert mix_embeddings_reference(table, ids, unused).isfinite().all()


def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched from here on."""
    names: list[str] = []
    launch = kernels.launch
    monkeypatch.setattr(
        kernels, "launch", lambda kernel, *a, **k: (names.append(kernel.__name__), launch(kernel, *a, **k))
    )
    return names


def test_the_gradient_is_deterministic_where_torch_says_so(monkeypatch):
    names = launched(monkeypatch)

    def backward() -> None:
        names.clear()
        table = torch.ones(5, 4, device=DEVICE, requires_grad=True)
        ids, weights = torch.zeros(3, 2, device=DEVICE).long(), torch.ones(3, 2, device=DEVICE)
        mix_embeddings(table, ids, weights, deterministic=False, backend="triton").sum().backward()

    backward()
    assert "mix_grad_atomic_kernel" in names
    torch.use_deterministic_algorithms(True)
    try:
        backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert "mix_grad_atomic_kernel" not in names and "mix_grad_embedding_kernel" in names


def test_offsets_are_64_bits_wide_where_they_must_be():
    """A [300,000, 8,192] table: 2.4e9 elements. And the 64-bit kernels compute what the others do."""
    ids, weights = torch.empty(7, 3, device="meta").long(), torch.empty(7, 3, device="meta")
    for v, wide in ((300_000, True), (200_000, False)):
        table = torch.empty(v, 8192, device="meta", dtype=torch.bfloat16)
        grad = torch.empty(7, 8192, device="meta", dtype=torch.bfloat16)
        with recording() as launches:
            kernels.forward(table, ids, weights, None)
            kernels.grad_weights(grad, table, ids, weights, None)
            kernels.grad_embedding(grad, table, ids, weights, None, True)
            kernels.grad_embedding(grad, table, ids, weights, None, False)
        of_rows = [launch for launch in launches if "d" in launch.arguments]
        assert [launch.arguments["INT64"] for launch in of_rows] == [wide] * 4
        with recording() as launches:  # a row of the table is far from the first although few are read
            kernels.forward(table[:2], ids, weights, None)
            kernels.forward(torch.empty(2, 4, device="meta").as_strided((2, 4), (2**31, 1)), ids, weights, None)
        assert [launch.arguments["INT64"] for launch in launches] == [False, True]


@pytest.mark.slow
def test_64_bit_kernels_agree():
    generator = torch.Generator().manual_seed(1)
    table, grad = normal(generator, 11, 6, dtype=torch.float32), normal(generator, 300, 6, dtype=torch.float32)
    ids, weights = integers(generator, 11, 300, 2) // 4, normal(generator, 300, 2, dtype=torch.float32)

    def run() -> list[Tensor]:
        return [
            kernels.forward(table, ids, weights, None),
            kernels.grad_weights(grad, table, ids, weights, None),
            kernels.grad_embedding(grad, table, ids, weights, None, True),
        ]

    narrow = run()
    with forced_int64():
        assert all(torch.equal(a, b) for a, b in zip(run(), narrow, strict=True))


def test_a_backend_that_cannot_be_used_is_refused():
    table, ids, weights = torch.ones(4, 2), torch.zeros(1, 33).long(), torch.ones(1, 33)
    with pytest.raises(ValueError, match=r"backend='triton'.*k <= 32"):
        mix_embeddings(table.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE), backend="triton")
    with pytest.raises(ValueError, match=r"backend='triton'.*float64"):
        mix_embeddings(table.double(), ids[:, :2], weights[:, :2], backend="triton")
    with pytest.raises(ValueError, match=r"backend must be one of"):
        mix_embeddings(table, ids, weights, backend="cuda")
    assert mix_embeddings(table, ids, weights).tolist() == [[33.0, 33.0]]


def test_only_the_gradient_asked_for():
    table, ids, weights = torch.randn(5, 3), torch.tensor([[0, 4]]), torch.rand(1, 2)
    for a, b in ((True, False), (False, True)):
        x, w = table.clone().requires_grad_(a), weights.clone().requires_grad_(b)
        mix_embeddings(x, ids, w).sum().backward()
        assert (x.grad is not None, w.grad is not None) == (a, b)
    assert not mix_embeddings(table, ids, weights).requires_grad


def test_repeated_ids_and_rows_add_up():
    table = torch.eye(3, dtype=torch.float64, requires_grad=True)
    out = mix_embeddings(table, torch.full((100, 2), 1), torch.ones(100, 2, dtype=torch.float64))
    out.sum().backward()
    assert out[7].tolist() == [0.0, 2.0, 0.0]
    assert table.grad is not None and table.grad.tolist() == [[0.0] * 3, [200.0] * 3, [0.0] * 3]


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_hot_weights_copy_the_row(dtype):
    table = torch.randn(9, 7).to(dtype)
    ids = torch.tensor([[4, 1, 2], [0, 8, 8]])
    assert torch.equal(mix_embeddings(table, ids, torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])), table[[4, 8]])


def test_accumulates_above_half_precision():
    """256 + 1 + ... + 1 in bfloat16 would stay 256."""
    table = torch.tensor([[256.0], [1.0]]).bfloat16()
    ids = torch.tensor([0] + [1] * 256)
    assert mix_embeddings(table, ids, torch.ones(257)).item() == 512
    table.requires_grad_()
    mix_embeddings(table, torch.ones(512, 1).long(), torch.ones(512, 1)).sum().backward()
    assert table.grad is not None and table.grad[1].item() == 512


def test_gradcheck():
    table = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 3, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(6, (2, 3, 2))
    assert torch.autograd.gradcheck(lambda x, w: mix_embeddings(x, ids, w), (table, weights))


def test_a_second_derivative_is_refused(backend):
    table = torch.ones(6, 4, device=DEVICE, requires_grad=True)
    weights = torch.ones(3, 2, device=DEVICE, requires_grad=True)
    out = mix_embeddings(table, torch.zeros(3, 2, device=DEVICE).long(), weights, backend=backend).square().sum()
    for first in torch.autograd.grad(out, (table, weights), create_graph=True):
        with pytest.raises(NotImplementedError, match="mix_embeddings can be differentiated once"):
            torch.autograd.grad(first.sum(), weights, retain_graph=True)


def test_no_rows():
    table = torch.randn(5, 3, requires_grad=True)
    out = mix_embeddings(table, torch.zeros(0, 2).long(), torch.zeros(0, 2))
    assert out.shape == (0, 3)
    out.sum().backward()
    assert table.grad is not None and not table.grad.any()


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"embedding": 1}, TypeError, "embedding"),
        ({"embedding": torch.ones(4, 2).int()}, ValueError, "embedding"),
        ({"embedding": torch.ones(2, 2, 2)}, ValueError, "embedding"),
        ({"embedding": torch.ones(4, 0)}, ValueError, "embedding"),
        ({"ids": [[0, 1]]}, TypeError, "ids"),
        ({"ids": torch.zeros(1, 2)}, TypeError, "ids"),
        ({"ids": torch.zeros(1, 2).int()}, TypeError, "ids"),
        ({"ids": torch.tensor(1)}, ValueError, "ids"),
        ({"ids": torch.zeros(1, 0).long()}, ValueError, "ids"),
        ({"ids": torch.tensor([[0, 4]])}, ValueError, "ids"),
        ({"ids": torch.tensor([[-1, 0]])}, ValueError, "ids"),
        ({"ids": torch.zeros(1, 2, device="meta").long()}, ValueError, "ids"),
        ({"ids": torch.tensor([[0, 99]]), "weights": torch.tensor([[1.0, 0.0]])}, ValueError, "ids"),
        ({"padding_id": 0.5}, TypeError, "padding_id"),
        ({"padding_id": 2**63}, ValueError, "padding_id"),
        ({"deterministic": "no"}, TypeError, "deterministic"),
        ({"out_rows": torch.tensor([1])}, ValueError, "out_rows"),
        ({"out_rows": torch.tensor([0.0])}, TypeError, "out_rows"),
        ({"weights": [1.0]}, TypeError, "weights"),
        ({"weights": torch.ones(1, 2).long()}, TypeError, "weights"),
        ({"weights": torch.ones(2)}, ValueError, "weights"),
        ({"weights": torch.ones(1, 2, device="meta")}, ValueError, "weights"),
    ],
)
def test_bad_input_is_named(change, error, name):
    good = {"embedding": torch.ones(4, 2), "ids": torch.tensor([[0, 1]]), "weights": torch.ones(1, 2)}
    with pytest.raises(error, match=name):
        mix_embeddings(**{**good, **change})


@pytest.fixture(scope="module")
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("embedding", lambda x, i: mix_embeddings(x, i, torch.ones(2, 2))),
        ("logits", lambda x, i: ngrpo_ops.candidate_weights(x, i)),
        ("logits", lambda x, i: ngrpo_ops.selective_log_softmax(x, i)),
        ("logits", lambda x, i: ngrpo_ops.decode_step(x, torch.ones(2, 2), i, seed=0, step=0)),
        ("embedding", lambda x, i: ngrpo_ops.decode_step(torch.ones(2, 2), x, i, seed=0, step=0)),
        ("rewards", lambda x, i: ngrpo_ops.group_advantages(x, group_size=1)),
    ],
)
def test_sharded_tensors_are_refused(mesh, name, call):
    sharded = DTensor.from_local(torch.ones(2, 2), mesh, [Replicate()])
    with pytest.raises(TypeError, match=rf"{name}.*DTensor"):
        call(sharded, torch.zeros(2, 2).long())


def test_shapes_on_meta():
    table = torch.empty(50, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.empty(2, 5, 3, device="meta", requires_grad=True)
    out = mix_embeddings(table, torch.empty(2, 5, 3, device="meta").long(), weights)
    assert out.shape == (2, 5, 8) and out.dtype == torch.bfloat16
    out.sum().backward()
    assert table.grad is not None and table.grad.shape == (50, 8)
    assert weights.grad is not None and weights.grad.shape == (2, 5, 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_opcheck(dtype, implementation):
    ops, table = torch.ops.ngrpo, torch.randn(7, 4).to(dtype).to(DEVICE)
    ids, weights = torch.randint(7, (3, 6)).to(DEVICE).T, torch.rand(3, 6).to(DEVICE).T
    options = (2, True, implementation)
    arguments: tuple[object, ...] = (table.requires_grad_(), ids, weights.requires_grad_(), *options)
    torch.library.opcheck(ops.mix_embeddings.default, arguments)
    grad = torch.randn(4).to(dtype).to(DEVICE).expand(6, 4)
    arguments = (grad, table.detach(), ids, weights.detach(), *options)
    torch.library.opcheck(ops.mix_embeddings_grad_embedding.default, arguments)
    torch.library.opcheck(ops.mix_embeddings_grad_weights.default, (*arguments[:5], implementation))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_compiles(implementation):
    torch._dynamo.reset()

    def call(table: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return mix_embeddings(table, ids, weights, backend=implementation)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, k in ((3, 2), (5, 4)):
        table = torch.randn(9, 4, device=DEVICE, requires_grad=True)
        weights = torch.rand(n, k, device=DEVICE, requires_grad=True)
        ids, grad = torch.randint(9, (n, k)).to(DEVICE), torch.randn(n, 4, device=DEVICE)
        got, want = compiled(table, ids, weights), call(table, ids, weights)
        assert torch.equal(got, want)
        pairs = (torch.autograd.grad(y, (table, weights), grad) for y in (got, want))
        for a, b in zip(*pairs, strict=True):
            assert_within(a, b, 1e-6)  # plain torch adds atomically on a GPU
