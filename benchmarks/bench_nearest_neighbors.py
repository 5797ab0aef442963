"""The search over a vocabulary: a batch of queries, a whole table, and a refresh after a weight update.

The figures are checked before they are timed: what ours finds is what the peer finds, but for scores that are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from harness import Case, compare
from peers import faiss_index, tiled_matmul_topk
from shapes import QUERIES, QWEN2_5_0_5B, SMALL_VOCABULARY
from torch import Tensor

from ngrpo_ops import NeighborTable, nearest_neighbors

K = 2  # the paper's k = 3: the anchor and two neighbors
STD = 0.02  # of the entries of an embedding, as models are initialized and stay
LR = 1e-6


def _embedding(device: str, v: int, d: int, std: float = 1.0) -> Tensor:
    return torch.randn(v, d, generator=torch.Generator().manual_seed(0)).mul_(std).to(device)


def _same_but_for_ties(ids: Tensor, embedding: Tensor, queries: Tensor) -> None:
    """The ids have the scores of ours, in float64 and to the rounding of a float32 score."""
    ours = nearest_neighbors(embedding, K, queries=queries)
    row, place = (ids.to(ours.ids.device) != ours.ids).nonzero(as_tuple=True)
    unit = torch.nn.functional.normalize(embedding.double()[queries[row]], dim=1)
    for found in (ids.to(ours.ids.device), ours.ids):
        others = torch.nn.functional.normalize(embedding.double()[found[row, place]], dim=1)
        assert torch.allclose((unit * others).sum(1), ours.scores[row, place].double(), rtol=0, atol=1e-6)


def _queries(count: int, device: str, who: str) -> Case:
    v, d = QWEN2_5_0_5B
    embedding = _embedding(device, v, d)
    queries = torch.randperm(v, generator=torch.Generator().manual_seed(1))[:count].to(device)
    run = _members(embedding, queries)[who]()
    if who != "ours":
        _same_but_for_ties(run(), embedding, queries)
    moved = embedding.numel() * embedding.element_size()
    return Case("nearest_neighbors", f"V={v} d={d} Q={count} k={K}", "float32", moved, run, rounds=5)


def _whole_table(device: str, who: str) -> Case:
    v, d = SMALL_VOCABULARY
    embedding = _embedding(device, v, d)
    every = torch.arange(v, device=device)
    if who == "ours":
        run: Callable[[], Any] = partial(nearest_neighbors, embedding, K)
    elif who == "ours, plain sweep":  # every row against every tile, as for given queries
        run = partial(nearest_neighbors, embedding, K, queries=every)
    else:
        run = _members(embedding, every)[who]()
        _same_but_for_ties(run()[::64], embedding, every[::64])
    moved = embedding.numel() * embedding.element_size()
    return Case("nearest_neighbors", f"V={v} d={d} whole table k={K}", "float32", moved, run, rounds=3)


def _members(embedding: Tensor, queries: Tensor) -> dict[str, Callable[[], Callable[[], Any]]]:
    return {
        "ours": lambda: partial(nearest_neighbors, embedding, K, queries=queries),
        "tiled matmul + topk": lambda: partial(tiled_matmul_topk, embedding, queries, K),
        "faiss IndexFlatIP": lambda: faiss_index(embedding, queries, K),
    }


def _refresh(device: str, who: str) -> Case:
    """After an optimizer's step of `LR` into a random direction, of every entry of every row."""
    v, d = SMALL_VOCABULARY
    embedding = _embedding(device, v, d, STD)
    table = NeighborTable(K)
    table.refresh(embedding)
    moved = embedding + LR * torch.randn(v, d, generator=torch.Generator().manual_seed(2)).sign().to(device)
    every = torch.arange(v, device=device)
    run = {
        "ours": partial(table.refresh, moved),
        "ours, rebuilt": partial(nearest_neighbors, moved, K),
        "ours, plain sweep": partial(nearest_neighbors, moved, K, queries=every),
    }[who]
    if who == "ours":
        report, rebuilt = table.refresh(moved), nearest_neighbors(moved, K)
        assert report.recomputed < v / 100 and torch.equal(table.ids, rebuilt.ids)
        assert torch.equal(table.scores, rebuilt.scores)
    shape = f"V={v} d={d} k={K} after a step of {LR:g}"
    return Case("NeighborTable.refresh", shape, "float32", 2 * embedding.numel() * 4, run, rounds=3)


ALL = ("ours", "tiled matmul + topk", "faiss IndexFlatIP")
CASES = {
    "queries": (partial(_queries, QUERIES), ALL),
    "few queries": (partial(_queries, 16), ALL),
    "whole table": (_whole_table, (*ALL, "ours, plain sweep")),
    "refresh": (_refresh, ("ours", "ours, rebuilt", "ours, plain sweep")),
}


def bench_search(benchmark: Any, case_name: str, who: str, device: str) -> None:
    if who.startswith("faiss"):
        pytest.importorskip("faiss")
        if device != "cpu":
            pytest.skip("this peer is the faiss of the CPU")
    make, _ = CASES[case_name]
    compare(benchmark, make, who, device)
