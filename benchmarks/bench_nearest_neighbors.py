"""The search over a vocabulary: a batch of queries, a whole table, and a refresh after a weight update.

Random rows of several shapes, and the table of a real model, SmolLM2-135M-Instruct: the rows of a trained embedding lie
in clusters, and some were never trained. `NGRPO_OPS_TABLE` names another checkpoint, by path or hub name.

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
from shapes import DIVISOR, QUERIES, QWEN2_5_0_5B, SMALL_VOCABULARY, SMOLLM2, TIED_TABLE
from tables import REAL_LR, ModelUnavailableError, real_tables, scored_pairs
from torch import Tensor

from ngrpo_ops import NeighborTable, nearest_neighbors

K = 2  # the paper's k = 3: the anchor and two neighbors
STD = 0.02  # of the entries of an embedding, as models are initialized and stay
LR = 1e-6
TIES = {"500 zero rows": 500 // DIVISOR, "2,000 equal rows": 2000 // DIVISOR, "500 nearly equal rows": 500 // DIVISOR}


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


def _table(device: str, shape: tuple[int, int] | None, std: float = 1.0) -> tuple[str, Tensor]:
    """A random table of a shape, or the real one, and what it is called."""
    if shape is None:
        name, embedding, _ = real_tables()
        return f"{name} V={embedding.shape[0]} d={embedding.shape[1]}", embedding.to(device)
    return f"V={shape[0]} d={shape[1]}", _embedding(device, *shape, std)


def _queries(count: int, shape: tuple[int, int] | None, device: str, who: str) -> Case:
    called, embedding = _table(device, shape)
    v = embedding.shape[0]
    queries = torch.randperm(v, generator=torch.Generator().manual_seed(1))[:count].to(device)
    run = _members(embedding, queries)[who]()
    if who != "ours":
        _same_but_for_ties(run(), embedding, queries)
    moved = embedding.numel() * embedding.element_size()
    scored = scored_pairs(run) / count if who == "ours" else None
    return Case("nearest_neighbors", f"{called} Q={count} k={K}", "float32", moved, run, rounds=5, scored=scored)


def _whole_table(shape: tuple[int, int] | None, device: str, who: str) -> Case:
    called, embedding = _table(device, shape)
    v = embedding.shape[0]
    every = torch.arange(v, device=device)
    if who == "ours":
        run: Callable[[], Any] = partial(nearest_neighbors, embedding, K)
    elif who == "ours, plain sweep":  # every row against every tile, as for given queries
        run = partial(nearest_neighbors, embedding, K, queries=every)
    else:
        run = _members(embedding, every)[who]()
        _same_but_for_ties(run()[::64], embedding, every[::64])
    moved = embedding.numel() * embedding.element_size()
    scored = scored_pairs(run) / v if who.startswith("ours") else None
    return Case("nearest_neighbors", f"{called} whole table k={K}", "float32", moved, run, rounds=3, scored=scored)


def _members(embedding: Tensor, queries: Tensor) -> dict[str, Callable[[], Callable[[], Any]]]:
    return {
        "ours": lambda: partial(nearest_neighbors, embedding, K, queries=queries),
        "tiled matmul + topk": lambda: partial(tiled_matmul_topk, embedding, queries, K),
        "faiss IndexFlatIP": lambda: faiss_index(embedding, queries, K),
    }


def _refresh(shape: tuple[int, int] | None, device: str, who: str) -> Case:
    """After an optimizer's step: of the real model, or of `LR` into a random direction, of every entry of every row."""
    called, embedding = _table(device, shape, STD)
    if shape is None:
        moved, lr = real_tables()[2].to(device), REAL_LR
    else:
        direction = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(2)).sign()
        moved, lr = embedding + LR * direction.to(device), LR
    every = torch.arange(embedding.shape[0], device=device)
    if who == "ours":
        table = NeighborTable(K)
        table.refresh(embedding)
        report, rebuilt = table.refresh(moved), nearest_neighbors(moved, K)
        assert DIVISOR > 1 or report.recomputed < embedding.shape[0] / 50, report
        assert torch.equal(table.ids, rebuilt.ids) and torch.equal(table.scores, rebuilt.scores)
        run: Callable[[], Any] = partial(table.refresh, moved)
    elif who == "tiled matmul + topk":
        run = partial(tiled_matmul_topk, moved, every, K)
    elif who == "ours, rebuilt":
        run = partial(nearest_neighbors, moved, K)
    else:
        run = partial(nearest_neighbors, moved, K, queries=every)
    shape_and_step = f"{called} k={K} after a step of {lr:g}"
    scored = scored_pairs(run) / embedding.shape[0] if who.startswith("ours") else None
    moved_bytes = 2 * embedding.numel() * 4
    return Case("NeighborTable.refresh", shape_and_step, "float32", moved_bytes, run, rounds=3, scored=scored)


def _tied(which: str, refresh: bool, device: str, who: str) -> Case:
    """A build or a refresh of a table with tied rows, beside the same of random rows."""
    v, d = TIED_TABLE
    embedding = _embedding(device, v, d, STD)
    step = LR * torch.randn(v, d, generator=torch.Generator().manual_seed(2)).sign().to(device)
    chosen = torch.randperm(v, generator=torch.Generator().manual_seed(3)).to(device)
    tied = chosen[: TIES[which]]
    if who == "ours" and "zero" in which:
        embedding[tied] = step[tied] = 0
    elif who == "ours" and "nearly" not in which:
        embedding[tied], step[tied] = embedding[chosen[0]].clone(), step[chosen[0]].clone()
    elif who == "ours":
        noise = torch.randn(len(tied), d, generator=torch.Generator().manual_seed(4)).to(device)
        embedding[tied] = embedding[chosen[0]] + 1e-4 * STD * noise
    table = NeighborTable(K)
    table.refresh(embedding)

    def build() -> None:
        NeighborTable(K).refresh(embedding)

    run = partial(table.refresh, embedding + step) if refresh else build
    shape = f"V={v} d={d} k={K} {which}"
    name = "NeighborTable.refresh" if refresh else "NeighborTable, first build"
    return Case(name, shape, "float32", 2 * embedding.numel() * 4, run, rounds=3)


ALL = ("ours", "tiled matmul + topk", "faiss IndexFlatIP")
CASES = {
    "queries": (partial(_queries, QUERIES, QWEN2_5_0_5B), ALL),
    "few queries": (partial(_queries, 16, QWEN2_5_0_5B), ALL),
    "whole table": (partial(_whole_table, SMALL_VOCABULARY), (*ALL, "ours, plain sweep")),
    "refresh": (partial(_refresh, SMALL_VOCABULARY), ("ours", "ours, rebuilt", "ours, plain sweep")),
    "queries of the real table's shape": (partial(_queries, QUERIES, SMOLLM2), ALL),
    "real table, queries": (partial(_queries, QUERIES, None), ALL),
    "real table, few queries": (partial(_queries, 16, None), ALL),
    "real table, whole": (partial(_whole_table, None), ("ours", "tiled matmul + topk", "ours, plain sweep")),
    "real table, refresh": (partial(_refresh, None), ("ours", "tiled matmul + topk", "ours, rebuilt")),
    **{f"build, {ties}": (partial(_tied, ties, False), ("ours", "ours, random rows")) for ties in TIES},
    **{f"refresh, {ties}": (partial(_tied, ties, True), ("ours", "ours, random rows")) for ties in TIES},
}


def bench_search(benchmark: Any, case_name: str, who: str, device: str) -> None:
    if who.startswith("faiss"):
        pytest.importorskip("faiss")
        if device != "cpu":
            pytest.skip("this peer is the faiss of the CPU")
    make, _ = CASES[case_name]
    try:
        compare(benchmark, make, who, device)
    except ModelUnavailableError as error:
        pytest.skip(str(error))
