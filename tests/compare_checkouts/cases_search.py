"""Cases of nearest_neighbors, NeighborTable and the random numbers."""

from __future__ import annotations

import dataclasses
import io
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from inputs import LAYOUTS, METRICS, Case, Cases, Inputs, dtypes, lay_out, short, text
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ngrpo_ops import NeighborTable, nearest_neighbors
from ngrpo_ops.random import bernoulli, gumbel, normal, philox, uniform


def cases(backend: str) -> Cases:
    yield from search_cases(backend)
    if backend == "eager":
        yield from table_cases()
        yield from random_cases()


def table(inputs: Inputs, v: int, d: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    """Rows of ordinary size, a zero row, equal rows, a large one and a small one."""
    x = inputs.normal(v, d, dtype=torch.float64)
    if v < 5:
        return lay_out(x.to(dtype), layout)
    x[v // 3 : v // 3 + v // 8 + 2] = x[1]
    x[v // 2] = 0
    x[2] *= 1e3
    x[3] *= 1e-3
    return lay_out(x.to(dtype), layout)


# nearest_neighbors ------------------------------------------------------------------------------------------------


def search_cases(backend: str) -> Cases:
    def case(name: str, v: int, d: int, k: int, **options: Any) -> Case:
        return Case("nearest_neighbors", name, partial(searched, v=v, d=d, k=k, backend=backend, **options))

    for metric in METRICS:
        for dtype in dtypes(backend):
            yield case(f"{metric}, {short(dtype)}", 40, 5, 3, metric=metric, dtype=dtype)
        for layout in LAYOUTS[1:]:
            yield case(f"{metric}, {layout}", 40, 6, 2, metric=metric, layout=layout)
        yield case(f"{metric}, k = 1 of 2 rows", 2, 3, 1, metric=metric)
        yield case(f"{metric}, all other rows", 9, 4, 8, metric=metric)
        yield case(f"{metric}, queries", 50, 7, 4, metric=metric, queries=6)
        yield case(f"{metric}, allowed", 50, 7, 4, metric=metric, allowed=0.4)
        yield case(f"{metric}, allowed and queries", 50, 7, 4, metric=metric, allowed=0.4, queries=9)
        yield case(f"{metric}, tiny numbers", 30, 8, 3, metric=metric, scale=1e-19)
        # More columns than a tile has, where kernels search too; few queries where that is slow.
        queries = 8 if backend == "triton" else 40 if metric == "l1" else None
        large = {"queries": queries, "metric": metric}
        yield case(f"{metric}, several tiles", 8300, 8, 3, **large)
        if backend == "eager":
            yield case(f"{metric}, several tiles, allowed", 8300, 8, 3, allowed=0.3, **large)
    if backend == "eager":
        for metric in METRICS[:3]:
            for dtype in dtypes(backend)[1:]:
                options = {"metric": metric, "dtype": dtype, "queries": 64}
                yield case(f"{metric}, low precision, {short(dtype)}", 8300, 512, 5, **options)
        yield Case("nearest_neighbors", "progress", searched_with_progress)
        yield Case("nearest_neighbors", "sharded", searched_in_shards)


def searched(
    inputs: Inputs, v: int, d: int, k: int, metric: str, backend: str, dtype: torch.dtype = torch.float32,
    layout: str = "contiguous", queries: int | None = None, allowed: float | None = None, scale: float = 1.0,
) -> Any:  # fmt: skip
    rows = table(inputs, v, d, dtype, layout)
    if scale != 1:
        rows = rows * scale
    return nearest_neighbors(
        rows, k, metric=metric, backend=backend,
        queries=None if queries is None else inputs.integers(v, queries),
        allowed=None if allowed is None else inputs.mask(allowed, v),
    )  # fmt: skip


def searched_with_progress(inputs: Inputs) -> Any:
    seen: list[tuple[int, int]] = []
    found = nearest_neighbors(table(inputs, 3000, 6), 2, progress=lambda done, total: seen.append((done, total)))
    return found, seen


def searched_in_shards(inputs: Inputs) -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        rows, allowed = table(inputs, 90, 6), inputs.mask(0.5, 90)
        mesh = init_device_mesh("cpu", (1,))
        results: list[Any] = []
        for metric in METRICS:
            for placement in (Shard(0), Replicate()):
                results.append(nearest_neighbors(distribute_tensor(rows, mesh, [placement]), 3, metric=metric))
            results.append(nearest_neighbors(rows, 3, metric=metric, allowed=allowed, group=dist.group.WORLD))
        neighbors = NeighborTable(2)
        report = reported(neighbors.refresh(distribute_tensor(rows, mesh, [Shard(0)])))
        return results, report, neighbors.ids, neighbors.scores
    finally:
        dist.destroy_process_group()


# NeighborTable ----------------------------------------------------------------------------------------------------


def table_cases() -> Cases:
    for metric in METRICS:
        for dtype in dtypes("eager"):
            yield Case("NeighborTable", f"{metric}, {short(dtype)}", partial(refreshed, metric=metric, dtype=dtype))
        yield Case("NeighborTable", f"{metric}, allowed", partial(refreshed, metric=metric, allowed=0.6))
        yield Case("NeighborTable", f"{metric}, few candidates", partial(refreshed, metric=metric, candidates=4))
        yield Case("NeighborTable", f"{metric}, movers", partial(refreshed_movers, metric=metric))
        yield Case("NeighborTable", f"{metric}, ties", partial(refreshed_ties, metric=metric))
    yield Case("NeighborTable", "another shape and dtype", refreshed_otherwise)
    yield Case("NeighborTable", "fewer rows than candidates", refreshed_few)


def reported(report: Any) -> dict[str, Any]:
    return dataclasses.asdict(report) | {"reason": text(report.reason)}


def state_of(neighbors: NeighborTable, report: Any) -> dict[str, Any]:
    tokens = torch.tensor([[0, 3], [1, 1]])
    return {
        "report": reported(report), "ids": neighbors.ids, "scores": neighbors.scores, "nbytes": neighbors.nbytes,
        "lookup": neighbors.lookup(tokens),
    }  # fmt: skip


def refreshed(
    inputs: Inputs, metric: str, dtype: torch.dtype = torch.float32, allowed: float | None = None,
    candidates: int | None = None,
) -> Any:  # fmt: skip
    """A build, drifts of several sizes, and the same from a table that was saved and loaded."""
    v, d = 120, 8
    mask = None if allowed is None else inputs.mask(allowed, v)
    rows = inputs.normal(v, d, dtype=torch.float64)
    neighbors = NeighborTable(3, metric=metric, allowed=mask, candidates=candidates)
    states = [state_of(neighbors, neighbors.refresh(rows.to(dtype)))]
    file = io.BytesIO()
    torch.save(neighbors.state_dict(), file)
    file.seek(0)
    loaded = NeighborTable(3, metric=metric, allowed=mask)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for scale in (0.0, 1e-6, 0.02, 0.1, 1.0):
        rows = rows + scale * inputs.normal(v, d, dtype=torch.float64)
        states.append(state_of(neighbors, neighbors.refresh(rows.to(dtype))))
        if scale <= 0.02:
            states.append(state_of(loaded, loaded.refresh(rows.to(dtype))))
    return states, neighbors.state_dict()


def refreshed_movers(inputs: Inputs, metric: str) -> Any:
    rows = inputs.normal(300, 16)
    neighbors = NeighborTable(3, metric=metric)
    neighbors.refresh(rows)
    moved = rows + 1e-5 * inputs.normal(300, 16)
    moved[[3, 77, 200]] = rows[[50, 60, 70]] + 0.1 * inputs.normal(3, 16)
    return [state_of(neighbors, neighbors.refresh(x)) for x in (moved, rows)]


def refreshed_ties(inputs: Inputs, metric: str) -> Any:
    rows = inputs.normal(200, 32)
    rows[:3] = rows[3]
    rows[10:40] = rows[10].clone()
    neighbors = NeighborTable(2, metric=metric)
    return [state_of(neighbors, neighbors.refresh(rows)) for _ in range(2)]


def refreshed_otherwise(inputs: Inputs) -> Any:
    neighbors = NeighborTable(3)
    tables = [inputs.normal(60, 8), inputs.normal(50, 8), inputs.normal(50, 9), inputs.normal(50, 9).bfloat16()]
    return [state_of(neighbors, neighbors.refresh(x)) for x in tables]


def refreshed_few(inputs: Inputs) -> Any:
    states = []
    for metric in METRICS:
        neighbors = NeighborTable(4, metric=metric)
        states += [state_of(neighbors, neighbors.refresh(inputs.normal(5, 4, scale=s))) for s in (1.0, 100.0)]
    return states


# Random numbers ---------------------------------------------------------------------------------------------------


def random_cases() -> Cases:
    yield Case("random", "philox", words)
    yield Case("random", "bernoulli", lambda inputs: [bernoulli(words(inputs)[0], p) for p in (0, 1e-9, 0.1, 0.5, 1)])
    yield Case("random", "uniform", lambda inputs: uniform(*words(inputs)[1:3]))
    for draw in (gumbel, normal):
        for count in (1, 3, 4, 301):
            yield Case("random", f"{draw.__name__}, {count} a row", partial(drawn, draw=draw, count=count))


def words(inputs: Inputs) -> Any:
    rows = inputs.integers(2**62, 50, 1) - 2**61
    steps = torch.tensor([0, 1, 2**33, -5])
    streams = inputs.integers(2**31 - 1, 50, 1)
    seed = torch.tensor(-(2**62) - 3)
    return [x for part in (0, 1, streams) for x in philox(seed, rows, steps, part)]


def drawn(inputs: Inputs, draw: Any, count: int) -> Any:
    rows = inputs.integers(2**62, 40)
    one = draw(torch.tensor(-3), rows, torch.tensor(7), count)
    return one, draw(inputs.integers(9, 40), rows, torch.arange(40), count)
