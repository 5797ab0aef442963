"""The weighted gather and its gradients, at k = 3 (the paper's)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from harness import Case, compare
from peers import compiled, embedding_bag, gather_einsum, plain_mix
from shapes import POSITIONS, mix_backward_bytes, mix_bytes

from ngrpo_ops import mix_embeddings
from ngrpo_ops.ops.mix_embeddings import mix_embeddings_cpu, mix_embeddings_reference

K = 3
# embedding_bag wants the weights in the table's dtype: for a bfloat16 table it computes something coarser.
BAG = {torch.float32: "F.embedding_bag", torch.bfloat16: "F.embedding_bag, weights of 8 bits"}
FORWARD = ("ours", "ours, its CPU form alone", "gather + einsum", "torch.compile of the oracle", "the oracle")
BACKWARD = ("ours", "torch.compile of the oracle", "gather + einsum", "ours, atomic")


@lru_cache(maxsize=1)  # the same memory for every member: pages and their size matter to a gather
def _inputs(dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, (v, d) = POSITIONS[device]
    generator = torch.Generator(device).manual_seed(0)
    embedding = torch.randn(v, d, generator=generator, device=device).to(dtype)
    ids = torch.randint(v, (n, K), generator=generator, device=device)
    return embedding, ids, torch.rand(n, K, generator=generator, device=device).softmax(-1)


def _shape(device: str) -> str:
    n, (v, d) = POSITIONS[device]
    return f"N={n} k={K} V={v} d={d}"


def _forward(dtype: torch.dtype, device: str, who: str) -> Case:
    inputs = _inputs(dtype, device)
    n, d = inputs[1].shape[0], inputs[0].shape[1]
    if who == "ours, its CPU form alone" and device != "cpu":
        pytest.skip("for the CPU only")
    run: Callable[[], Any] = {
        "ours": lambda: partial(mix_embeddings, *inputs),
        "ours, its CPU form alone": lambda: partial(mix_embeddings_cpu, *inputs, None),
        BAG[dtype]: lambda: partial(embedding_bag, *inputs),
        "gather + einsum": lambda: partial(gather_einsum, *inputs),
        "torch.compile of the oracle": lambda: compiled(plain_mix, *inputs),
        "the oracle": lambda: partial(mix_embeddings_reference, *inputs),
    }[who]()
    moved = mix_bytes(n, K, d, dtype.itemsize)
    return Case("mix_embeddings", _shape(device), str(dtype).removeprefix("torch."), moved, run)


def _backward(dtype: torch.dtype, device: str, who: str) -> Case:
    embedding, ids, weights = _inputs(dtype, device)
    table, w = embedding.detach().requires_grad_(), weights.detach().requires_grad_()
    if who == BAG[dtype]:
        w = weights.detach().to(dtype).requires_grad_()
    forward: Callable[[], torch.Tensor] = {
        "ours": lambda: mix_embeddings(table, ids, w),
        "ours, atomic": lambda: mix_embeddings(table, ids, w, deterministic=False),
        BAG[dtype]: lambda: embedding_bag(table, ids, w),
        "gather + einsum": lambda: gather_einsum(table, ids, w),
        "torch.compile of the oracle": lambda: compiled(plain_mix, table, ids, w)(),
    }[who]
    if who == BAG[dtype] and device == "cuda" and dtype != torch.float32:
        pytest.skip("torch's CUDA embedding_bag has no bfloat16 gradient of per_sample_weights")
    if who == "ours, atomic" and device == "cpu":
        pytest.skip("there is no atomic path on the CPU")
    out = forward()
    grad = torch.randn_like(out)
    n, d = out.shape
    moved = mix_backward_bytes(n, K, embedding.shape[0], d, dtype.itemsize)
    return Case(
        "mix_embeddings backward", _shape(device), str(dtype).removeprefix("torch."), moved,
        lambda: torch.autograd.grad(out, (table, w), grad, retain_graph=True), rounds=7,
    )  # fmt: skip


CASES = {
    **{
        f"forward {dtype}": (partial(_forward, dtype), (*FORWARD, BAG[dtype]))
        for dtype in (torch.float32, torch.bfloat16)
    },
    **{
        f"backward {dtype}": (partial(_backward, dtype), (*BACKWARD, BAG[dtype]))
        for dtype in (torch.float32, torch.bfloat16)
    },
}


def bench_mix(benchmark: Any, case_name: str, who: str, device: str) -> None:
    make, _ = CASES[case_name]
    compare(benchmark, make, who, device)
