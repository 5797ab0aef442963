"""mix_embeddings (equation 10) and its gradients, each against loops in float64 within its error budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    FLOATS,
    assert_within,
    compute_roundoff,
    dtypes,
    generators,
    lay_out,
    layouts,
    rounding,
    tables,
)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

import ngrpo_ops
from ngrpo_ops import mix_embeddings

SHAPES = [(), (1,), (3,), (2, 3), (1, 1, 4), (2, 1, 2), (40,)]


@given(
    embedding=tables(st.integers(1, 30), st.integers(1, 17)),
    shape=st.sampled_from(SHAPES),
    k=st.integers(1, 9),
    weight_dtype=dtypes,
    layout=layouts,
    few=st.booleans(),
    grad_kind=st.sampled_from(["dense", "expanded", "transposed"]),
    generator=generators,
)
def test_value_and_gradients(embedding, shape, k, weight_dtype, layout, few, grad_kind, generator):
    v, d = embedding.shape
    ids = lay_out(torch.randint(1 if few else v, (*shape, k), generator=generator), layout)
    weights = lay_out((torch.randn(*shape, k, generator=generator)).to(weight_dtype), layout)
    table, weights = embedding.detach().requires_grad_(), weights.detach().requires_grad_()
    out = mix_embeddings(table, ids, weights)
    grad = torch.randn(d, generator=generator).to(out.dtype).expand(out.shape)
    if grad_kind != "expanded":
        layout = "contiguous" if grad_kind == "dense" else "transposed"
        grad = lay_out(torch.randn(out.shape, generator=generator).to(out.dtype), layout)
    grad_table, grad_weights = torch.autograd.grad(out, (table, weights), grad)
    assert (out.dtype, grad_table.dtype, grad_weights.dtype) == (table.dtype, table.dtype, weights.dtype)

    x, w, g = embedding.double(), weights.detach().double(), grad.double().reshape(-1, d)
    want, size = torch.zeros(*shape, d).double().view(-1, d), torch.zeros(*shape, d).double().view(-1, d)
    want_table, size_table = torch.zeros_like(x), torch.zeros_like(x)
    want_weights, size_weights = torch.zeros(len(g), k).double(), torch.zeros(len(g), k).double()
    for row, (row_ids, row_weights) in enumerate(zip(ids.reshape(-1, k), w.reshape(-1, k), strict=True)):
        for c, (token, weight) in enumerate(zip(row_ids, row_weights, strict=True)):
            want[row] += weight * x[token]
            size[row] += (weight * x[token]).abs()
            want_table[token] += weight * g[row]
            size_table[token] += (weight * g[row]).abs()
            want_weights[row, c] = (g[row] * x[token]).sum()
            size_weights[row, c] = (g[row] * x[token]).abs().sum()
    u = compute_roundoff(table.dtype)
    assert_within(out.detach().view(-1, d), want, (k + 3) * u * size + rounding(want, out.dtype))
    terms = ids.numel() + 3
    assert_within(grad_table, want_table, terms * u * size_table + rounding(want_table, table.dtype))
    budget = (d + 3) * u * size_weights + rounding(want_weights, weights.dtype)
    assert_within(grad_weights.reshape(-1, k), want_weights, budget)


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


def test_gradcheck_once_only():
    table = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 3, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(6, (2, 3, 2))
    assert torch.autograd.gradcheck(lambda x, w: mix_embeddings(x, ids, w), (table, weights))
    (first,) = torch.autograd.grad(mix_embeddings(table, ids, weights).square().sum(), table, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(first.sum(), weights)


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
        ("embedding", lambda x, i: ngrpo_ops.nearest_neighbors(x, 1)),
        ("embedding", lambda x, i: mix_embeddings(x, i, torch.ones(2, 2))),
        ("embedding", lambda x, i: ngrpo_ops.NeighborTable(1).refresh(x)),
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
def test_opcheck(dtype):
    ops, table = torch.ops.ngrpo, torch.randn(7, 4).to(dtype)
    ids, weights = torch.randint(7, (2, 3)), torch.rand(3, 2).T
    torch.library.opcheck(ops.mix_embeddings.default, (table.requires_grad_(), ids, weights.requires_grad_()))
    arguments: tuple[Tensor, ...] = (torch.randn(4).to(dtype).expand(2, 4), table.detach(), ids, weights.detach())
    torch.library.opcheck(ops.mix_embeddings_grad_embedding.default, arguments)
    torch.library.opcheck(ops.mix_embeddings_grad_weights.default, arguments)


@pytest.mark.slow
def test_compiles():
    torch._dynamo.reset()
    compiled = torch.compile(mix_embeddings, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, k in ((3, 2), (5, 4)):
        table, weights = torch.randn(9, 4, requires_grad=True), torch.rand(n, k, requires_grad=True)
        ids, grad = torch.randint(9, (n, k)), torch.randn(n, 4)
        got, want = compiled(table, ids, weights), mix_embeddings(table, ids, weights)
        assert torch.equal(got, want)
        pairs = (torch.autograd.grad(y, (table, weights), grad) for y in (got, want))
        assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
