"""What a search costs the host of a GPU: torch operations, launches and waits, none of which may grow unnoticed.

The kernels are replaced by functions that do nothing, so the counts are those of a search in which no query runs out of
places. They do not depend on the values. The shape is that of a model with 1,536 columns: 8 are there, and blocks have
as many rows as with 1,536.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ngrpo_ops import NeighborTable
from ngrpo_ops.kernels import nearest_neighbors as kernels
from ngrpo_ops.ops.nearest_neighbors import api, drift, few, fused, row_hashes, scores, table

V = 151_936
# `lift_fresh` makes a tensor of a list: on a GPU a copy from the host, which waits.
WAITS = {"lift_fresh", "nonzero", "equal", "_unique2", "unique_dim", "unique_consecutive", "bincount", "masked_select"}
READS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__"}
FREE = {
    "view", "slice", "unsqueeze", "squeeze", "expand", "select", "t", "transpose", "permute", "as_strided", "detach",
    "alias", "_unsafe_view", "split", "unbind", "empty", "new_empty", "empty_like", "_reshape_alias", "reshape",
    "split_with_sizes", "empty_strided",
}  # fmt: skip


class Cost(NamedTuple):
    """Of one call: torch operations that launch something, launches of our kernels, and waits for the device."""

    operations: int
    launches: int
    waits: int


# Measured when they were last changed. What costs more must say why; what costs less is noted here. A mask is read
# twice, to see that enough rows are allowed, and which.
BUDGETS = {
    "whole table": Cost(1014, 439, 2),
    "whole table, some rows allowed": Cost(1035, 439, 4),
    "64 anchors": Cost(60, 6, 1),
    "96 anchors": Cost(151, 48, 2),
    "build": Cost(1213, 565, 2),
    "refresh, every row certified": Cost(137, 4, 2),
    "refresh, some rows searched": Cost(313, 52, 4),
}


class _Reads(TorchFunctionMode):
    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.waits[name] += name in READS
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        by_mask = any(isinstance(x, Tensor) and x.dtype == torch.bool for x in indices)
        self.operations[name] += name not in FREE
        self.waits[name] += name in WAITS or by_mask or (name == "repeat_interleave" and len(args) == 1)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch) -> Counter[str]:
    """The launches of the kernels, which do nothing."""
    counted: Counter[str] = Counter()

    def fake(name: str, result: Any = lambda *_, **__: None) -> Any:
        def called(*arguments: Any, **options: Any) -> Any:
            counted[name] += 1
            with torch.utils._python_dispatch._disable_current_modes():
                return result(*arguments, **options)

        return called

    def statistics(x: Tensor, metric: str) -> tuple[Tensor, ...]:
        one = torch.ones(len(x), dtype=torch.float32)
        return one, one.clone(), torch.zeros_like(one), one > 0

    def pair_scores(x: Tensor, x_scales: Tensor, rows: Tensor, *_: Any) -> Tensor:
        return torch.where(rows % 500 == 0, 0.5, 1.0)

    def keep_best(pairs: kernels.Pairs, metric: str, thresholds: Tensor, *_: Any, **__: Any) -> None:
        if len(pairs.counts) <= 64:  # few queries, which are settled where no other bound reaches a threshold
            thresholds.fill_(torch.inf)

    def score_few(x: Tensor, x_norms: Tensor, x_roundoffs: Tensor, y: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        values = torch.ones(len(y), dtype=torch.float32)
        return torch.rand(len(x_norms), len(y)), values, values, torch.zeros(len(y), dtype=torch.int32)

    modules = {
        "nearest_neighbors_few": SimpleNamespace(score_few=fake("score_few", score_few)),
        "nearest_neighbors": SimpleNamespace(
            Pairs=kernels.Pairs,
            no_pairs=kernels.no_pairs,
            append_pairs=fake("append_pairs"),
            append_pairs_symmetric=fake("append_pairs_symmetric"),
            keep_best=fake("keep_best", keep_best),
            pair_scores=fake("pair_scores", pair_scores),
        ),
        "nearest_neighbors_rows": SimpleNamespace(
            row_statistics=fake("row_statistics", statistics),
            prepare_rows=fake("prepare_rows", lambda *_, **__: torch.empty(0)),
            row_movements=fake("row_movements", lambda old, _, new, *__: torch.zeros(len(new), dtype=torch.float32)),
        ),
    }
    for module in (scores, fused, drift, few):
        monkeypatch.setattr(module, "load_kernels", modules.__getitem__)
    monkeypatch.setattr(api, "require_ids_in_range", lambda *_: None)  # which only reads ids on a CPU
    for module in (api, table):
        monkeypatch.setattr(module, "choose_backend", lambda *_: "triton")
    row_hashes.suspected_rows(torch.zeros(2, 8, dtype=torch.float32))  # constants that are made once
    monkeypatch.setattr(fused, "_BLOCK_ROWS", fused._BLOCK_ELEMENTS // 1536)
    return counted


def cost(launches: Counter[str], call: Any) -> Cost:
    launches.clear()
    waits: Counter[str] = Counter()
    operations = _Operations(waits)
    with _Reads(waits), operations:
        call()
    return Cost(operations.operations.total(), launches.total(), waits.total())


def search_table(embedding: Tensor, queries: Tensor | None = None, allowed: Tensor | None = None) -> None:
    """What `nearest_neighbors` calls, within an operation that the counts do not see through."""
    api._search_table(embedding, api._Request(2, "cosine", queries, allowed, "triton"))


@pytest.mark.parametrize("name", BUDGETS)
def test_a_search_waits_for_a_gpu_once_or_twice(name, launches):
    embedding = torch.randn(V, 8, generator=torch.Generator().manual_seed(0))
    allowed = torch.rand(V, generator=torch.Generator().manual_seed(1)) < 0.99
    if name.startswith("whole table"):
        allowed = allowed if name.endswith("allowed") else None
        found = cost(launches, lambda: search_table(embedding, allowed=allowed))
    elif name.endswith("anchors"):
        found = cost(launches, lambda: search_table(embedding, queries=torch.arange(int(name.split()[0]))))
    else:
        built = NeighborTable(2)
        found = cost(launches, lambda: built.refresh(embedding))
        if name.startswith("refresh"):
            build = built._build
            certified = name.endswith("certified")
            # What the build would have found: certificates that hold, or do not for the rows that score less.
            build.next_scores.fill_(0.4)
            build.bounds.fill_(0.4 if certified else 0.5)
            build.candidates.fill_(0)
            if not certified:
                build.next_scores.fill_(0.5)
            reports = []
            found = cost(launches, lambda: reports.append(built.refresh(embedding)))
            assert reports[0].recomputed == (0 if certified else -(-V // 500)) and not reports[0].movers
    budget = BUDGETS[name]
    assert all(got <= most for got, most in zip(found, budget, strict=True)), f"{name}: {found}, budget {budget}"
