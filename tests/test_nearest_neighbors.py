"""nearest_neighbors against a float64 brute force, and against its own definition where float32 decides."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ngrpo_ops import nearest_neighbors
from ngrpo_ops.ops.nearest_neighbors import bounds, candidates, equal_rows, few, fused, search
from ngrpo_ops.ops.nearest_neighbors import scores as scores_module
from ngrpo_ops.ops.nearest_neighbors.bounds import OptimisticScores
from ngrpo_ops.ops.nearest_neighbors.oracle import brute_force_scores
from ngrpo_ops.ops.nearest_neighbors.scores import ScoredRows
from ngrpo_ops.testing import (
    DEVICE,
    METRICS,
    assert_within,
    exact_tables,
    for_backend,
    generators,
    metrics,
    tables,
    unit_roundoff,
)

U = unit_roundoff(torch.float32)


def brute_force(table: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Scores of all pairs [V, V] in float64, and a bound on the error of their float32 evaluation."""
    x, y = table.double()[:, None], table.double()[None]
    if metric in ("l1", "l2"):
        x, y = table.float().double()[:, None], table.float().double()[None]
        terms = -(x - y).abs() if metric == "l1" else -((x - y) ** 2)
    else:
        terms = x * y
        if metric == "cosine":
            lengths = (x**2).sum(-1).sqrt() * (y**2).sum(-1).sqrt()
            terms = torch.where(lengths[..., None] > 0, terms / lengths[..., None], 0.0)
    return terms.sum(-1), (table.shape[1] + 8) * U * terms.abs().sum(-1) + 1e-44


def ranked(scores: Tensor, k: int, queries: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k best columns of each query's row, equal scores by the lower id."""
    scores = scores.clone().fill_diagonal_(-torch.inf)
    if allowed is not None:
        scores[:, ~allowed] = -torch.inf
    best, ids = scores[queries].sort(dim=1, descending=True, stable=True)
    return ids[:, :k], best[:, :k]


def defined_scores(table: Tensor, metric: str, backend: str = "eager") -> Tensor:
    """What the documentation calls scoring every pair in float32: the package's own pair scores, all of them."""
    v = table.shape[0]
    rows = torch.arange(v, device=table.device)[:, None].expand(v, v).contiguous()
    scored = ScoredRows(table, metric, backend=backend)  # type: ignore[arg-type]
    return scored.pair_scores(rows, scored, rows.T.contiguous())


@pytest.mark.parametrize("metric", METRICS)
def test_the_oracle_is_the_formula(metric):
    table = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    table[4] = 0
    exact, error = brute_force(table, metric)
    found = brute_force_scores(table, metric)
    assert found.dtype == torch.float64 and bool((found.diagonal() == -torch.inf).all())
    assert_within(found.fill_diagonal_(0), exact.fill_diagonal_(0), 1e-6 * error.fill_diagonal_(0) + 1e-300)


@st.composite
def requests(draw: st.DrawFn, v: int) -> tuple[int, Tensor | None, Tensor | None]:
    """k, queries (unsorted, repeated) and allowed for a table of v rows."""
    generator = draw(generators)
    allowed = None
    if draw(st.booleans()):
        allowed = torch.rand(v, generator=generator) < draw(st.sampled_from([0.1, 0.5, 0.9]))
        allowed[torch.randperm(v, generator=generator)[:2]] = True
    k = draw(st.integers(1, (v if allowed is None else int(allowed.sum())) - 1))
    if draw(st.booleans()):
        k = min(k, 3)
    queries = torch.randint(v, (draw(st.integers(1, 9)),), generator=generator) if draw(st.booleans()) else None
    return k, None if queries is None else queries.to(DEVICE), None if allowed is None else allowed.to(DEVICE)


def every_row(table: Tensor, queries: Tensor | None = None) -> Tensor:
    return torch.arange(table.shape[0], device=table.device) if queries is None else queries


@pytest.fixture(autouse=True)
def _few_rows_as_many(monkeypatch):
    """A search of few rows would score pairs with the kernels, and scan without them, equal rows each for itself."""
    monkeypatch.setattr(fused, "KERNELS_FROM", 0)
    monkeypatch.setattr(search, "SHARED_FROM", 0)


@pytest.fixture
def small_blocks(monkeypatch):
    """Re-scored blocks are padded to one size, two million numbers: too slow for hundreds of tiny searches."""
    monkeypatch.setattr(scores_module, "_PAIR_ELEMENTS", 2**13)


@pytest.mark.usefixtures("small_blocks")
@given(
    metric=st.sampled_from(["dot", "l2", "l1"]),
    scale=st.sampled_from([1e-15, 1e-18, 1e-19, 1e-20, 1e-21, 1e-23, 1e-30]),
    v=st.integers(5, 40),
    k=st.integers(1, 4),
    ordinary=st.booleans(),
    generator=generators,
)
def test_rows_whose_scores_underflow(metric, scale, v, k, ordinary, generator, backend):
    """The ids are those of the scores float32 gives, ties by the lower id, also where a slack would underflow."""
    table = (scale * torch.randn(v, 8, generator=generator)).to(DEVICE)
    if ordinary:
        table[: v // 3] /= scale
    found = nearest_neighbors(table, k, metric=metric, backend=backend)
    ids, scores = ranked(defined_scores(table, metric, backend), k, every_row(table), None)
    assert torch.equal(found.ids, ids) and torch.equal(found.scores, scores)


def test_rows_that_are_not_finite_are_named():
    table = torch.randn(20, 3)
    table[4, 1], table[17] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"embedding must be finite, got NaN or inf in 2 rows: 4, 17"):
        nearest_neighbors(table, 2)
    table[:] = torch.nan
    with pytest.raises(ValueError, match=r"in 20 rows: 0, 1, 2, 3, 4, 5, 6, 7, \.\.\."):
        nearest_neighbors(table, 2)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("metric", METRICS)
@given(data=st.data())
def test_is_the_brute_force_where_scores_are_exact(metric, data, backend):
    table = for_backend(data.draw(exact_tables(metric, st.integers(2, 70))), backend)
    k, queries, allowed = data.draw(requests(table.shape[0]))
    got = nearest_neighbors(table, k, metric=metric, queries=queries, allowed=allowed, backend=backend)
    ids, scores = ranked(brute_force(table, metric)[0], k, every_row(table, queries), allowed)
    assert torch.equal(got.ids, ids)
    assert torch.equal(got.scores, scores.float()) and got.scores.dtype == torch.float32


@pytest.mark.usefixtures("small_blocks")
@given(data=st.data(), metric=metrics)
def test_nothing_outside_beats_the_kth(data, metric, backend):
    table = for_backend(data.draw(tables(st.integers(2, 60), st.integers(1, 40))), backend)
    k, queries, allowed = data.draw(requests(table.shape[0]))
    ids, scores = nearest_neighbors(table, k, metric=metric, queries=queries, allowed=allowed, backend=backend)
    every = every_row(table, queries)
    exact, error = (x[every] for x in brute_force(table, metric))
    assert_within(scores, exact.gather(1, ids), error.gather(1, ids))
    assert bool((scores[:, 1:] <= scores[:, :-1]).all())
    tied = scores[:, 1:] == scores[:, :-1]
    assert bool((ids[:, 1:] > ids[:, :-1])[tied].all())
    others = torch.ones_like(exact, dtype=torch.bool) if allowed is None else allowed.expand_as(exact).clone()
    others[every_row(every), every] = False
    assert bool(others.gather(1, ids).all())
    assert all(len(set(row)) == k for row in ids.tolist())
    others.scatter_(1, ids, False)
    assert bool(((exact - error)[others] <= scores[:, -1:].double().expand_as(exact)[others]).all())


@pytest.mark.usefixtures("small_blocks")
@given(data=st.data(), metric=metrics, limit=st.sampled_from([1, 7, 40]))
def test_tiles_do_not_show(data, metric, limit, backend):
    table = for_backend(data.draw(tables(st.integers(2, 60), st.integers(1, 9))), backend)
    k, queries, allowed = data.draw(requests(table.shape[0]))
    options = {"metric": metric, "queries": queries, "allowed": allowed, "backend": backend}
    whole = nearest_neighbors(table, k, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few, "serves", lambda *_: False)  # few queries too take the search in tiles
        patch.setattr(search, "_QUERY_TILE", 8 if limit == 7 else 64)
        patch.setattr(search, "_SQUARE_TILE", 16)
        patch.setattr(fused, "_BLOCK_ROWS", 30)
        patch.setattr(fused, "_SPARE_PLACES", limit)
        patch.setattr(fused, "_MOST_PLACES", limit)
        patch.setattr(fused, "_FINISHED_PLACES", 64 * limit)
        patch.setattr(fused, "_PLACES_BYTES", 2**27 if limit == 7 else 64 * limit)  # or for a few queries at a time
        patch.setattr(scores_module, "_COLUMN_TILE", limit)
        patch.setattr(scores_module, "_TILE_ELEMENTS", limit * table.shape[1])
        patch.setattr(scores_module, "_CAST_ELEMENTS", limit)
        patch.setattr(search, "_WORKSPACE_BYTES", 64 * limit * k)  # too few bytes for the triangle, or enough
        patch.setattr(search, "SHARED_FROM", 0 if limit == 7 else 2**60)
        patch.setattr(candidates, "_MAX_GROUPS", limit)
        patch.setattr(equal_rows, "_EXPANDED_PAIRS", limit)
        tiled = nearest_neighbors(table, k, **options)
    assert torch.equal(whole.ids, tiled.ids) and torch.equal(whole.scores, tiled.scores)


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=8)
@given(data=st.data())
def test_small_tiles_are_exact_too(metric, data, backend):
    table = for_backend(data.draw(exact_tables(metric, st.integers(20, 30))), backend)
    k, queries, allowed = data.draw(requests(table.shape[0]))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_QUERY_TILE", 8), ("_SQUARE_TILE", 16)):
            patch.setattr(search, name, value)
        for name, value in (("_BLOCK_ROWS", 16), ("_SPARE_PLACES", 1), ("_MOST_PLACES", 1)):
            patch.setattr(fused, name, value)
        for name, value in (("_COLUMN_TILE", 5), ("_TILE_ELEMENTS", 70), ("_PAIR_ELEMENTS", 50)):
            patch.setattr(scores_module, name, value)
        patch.setattr(candidates, "_MAX_GROUPS", 3)
        got = nearest_neighbors(table, k, metric=metric, queries=queries, allowed=allowed, backend=backend)
    ids, scores = ranked(brute_force(table, metric)[0], k, every_row(table, queries), allowed)
    assert torch.equal(got.ids, ids) and torch.equal(got.scores, scores.float())


def near_ties(v: int, d: int, scale: float, generator: torch.Generator) -> Tensor:
    """Copies of a few rows, most of them with one coordinate moved by one unit in the last place."""
    table = torch.randn(4, d, generator=generator)[torch.randint(4, (v,), generator=generator)] * scale
    row = torch.arange(0, v, 2)
    column = torch.randint(d, row.shape, generator=generator)
    table[row, column] = table[row, column].nextafter(torch.tensor(torch.inf))
    return table


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-12])
@pytest.mark.parametrize("metric", METRICS)
def test_near_ties_are_told_apart(metric, scale, backend):
    table = near_ties(400, 33, scale, torch.Generator().manual_seed(1)).to(DEVICE)
    got = nearest_neighbors(table, 5, metric=metric, backend=backend)
    ids, scores = ranked(defined_scores(table, metric, backend), 5, every_row(table), None)
    assert torch.equal(got.scores, scores)
    assert torch.equal(got.ids, ids)


@pytest.mark.parametrize("metric", ["dot", "l2", "l1"])
@pytest.mark.parametrize("scale", [1e-19, 1e-21, 1e-22])
def test_scores_that_underflow(metric, scale, backend):
    """Products below float32's normal range: rounding errors are absolute there, and ties the rule."""
    table = torch.randn(300, 24, generator=torch.Generator().manual_seed(2)).to(DEVICE) * scale
    got = nearest_neighbors(table, 3, metric=metric, backend=backend)
    ids, scores = ranked(defined_scores(table, metric, backend), 3, every_row(table), None)
    assert torch.equal(got.scores, scores)
    assert torch.equal(got.ids, ids)


@pytest.fixture
def drops(monkeypatch) -> list[int]:
    """The pairs each time that more were held than fit, and all but the best were dropped. Few fit."""
    monkeypatch.setattr(search, "_TRIANGLE_PAIRS", 0)
    monkeypatch.setattr(candidates, "_MAX_PAIRS", 0)
    held: list[int] = []
    original = candidates.Candidates._drop_all_but_the_best
    monkeypatch.setattr(
        candidates.Candidates,
        "_drop_all_but_the_best",
        lambda self: held.append(self._pairs.rows.numel()) or original(self),
    )
    return held


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("metric", METRICS)
def test_thousands_of_equal_rows(metric, shared, backend, monkeypatch, drops):
    """More equal rows than can be held: the lowest ids are found whether they share a search or not."""
    monkeypatch.setattr(search, "SHARED_FROM", 0 if shared else 2**60)
    table = torch.randn(3000, 16, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    table[500:2900] = table[2950].clone()
    queries = torch.tensor([2950, 500, 501, 2899, 3, 0], device=DEVICE)
    got = nearest_neighbors(table, 4, metric=metric, queries=queries, backend=backend)
    assert shared or drops
    assert got.ids[0].tolist() == [500, 501, 502, 503]
    assert got.ids[1].tolist() == [501, 502, 503, 504]
    assert got.ids[2].tolist() == [500, 502, 503, 504]
    assert got.ids[3].tolist() == [500, 501, 502, 503]
    allowed = torch.ones(3000, dtype=torch.bool, device=DEVICE)
    allowed[500:1000] = False
    got = nearest_neighbors(table, 4, metric=metric, queries=queries, allowed=allowed, backend=backend)
    assert got.ids[0].tolist() == [1000, 1001, 1002, 1003]


@pytest.mark.parametrize("metric", METRICS)
def test_equal_rows_everywhere(metric, backend):
    """Hundreds of groups of equal rows (resized vocabularies), the zero row among them, against the definition."""
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(12, 8, generator=generator, dtype=torch.float64).bfloat16()
    table[5] = 0
    table = table[torch.randint(12, (600,), generator=generator)].to(DEVICE)
    got = nearest_neighbors(table, 20, metric=metric, backend=backend)
    ids, scores = ranked(defined_scores(table, metric, backend), 20, every_row(table), None)
    assert torch.equal(got.ids, ids) and torch.equal(got.scores, scores)


@pytest.mark.parametrize("metric", METRICS)
def test_matmul_precision_changes_nothing(metric):
    table = near_ties(300, 65, 1.0, torch.Generator().manual_seed(5)).to(DEVICE)
    table[:100] = torch.randn(100, 65, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    before = torch.get_float32_matmul_precision()
    highest = nearest_neighbors(table, 4, metric=metric)
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            got = nearest_neighbors(table, 4, metric=metric)
            assert torch.equal(got.ids, highest.ids) and torch.equal(got.scores, highest.scores)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("precision", ["highest", "medium", "bfloat16"])
@pytest.mark.parametrize("metric", METRICS)
@given(data=st.data())
def test_optimistic_scores_are_optimistic(metric, precision, data):
    """None below the score it stands for, on any device: matmuls may round their inputs to bfloat16 ("medium"), tiles
    may be bfloat16 altogether, and the columns of few queries are multiplied as they are; and none further above than
    `error_bound` says."""
    table = data.draw(tables(st.integers(2, 40), st.integers(1, 70)))
    are_few = precision != "bfloat16" and data.draw(st.booleans())
    rows = ScoredRows(table, metric)
    every = every_row(table)
    before = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch:
        if precision == "bfloat16":
            patch.setattr(bounds, "cpu_multiplies_bfloat16", lambda: True)
            patch.setattr(bounds, "_LOW_PRECISION_FROM", 0)
        patch.setattr(bounds, "_FEW_QUERIES", len(rows) + 1 if are_few else 0)
        try:
            torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
            optimistic = OptimisticScores(rows, rows, len(rows))
        finally:
            torch.set_float32_matmul_precision(before)
    queries, columns = optimistic.prepared_queries(every), optimistic.prepared_columns(every)
    if precision == "medium" and metric != "l1":  # as a device would round them
        queries = queries.bfloat16().float()
        columns = columns._replace(rows=columns.rows.bfloat16().float())  # the extra columns are bfloat16 numbers
    tile = torch.empty(len(rows), len(rows), dtype=optimistic.dtype, device=table.device)
    optimistic.write_tile(queries, columns, tile)
    true, upper_bounds = defined_scores(table, metric), optimistic.upper_bound(tile)
    assert bool((upper_bounds >= true).all())
    left, right = every[:, None].expand_as(true), every.expand_as(true)
    assert bool((upper_bounds - optimistic.error_bound(upper_bounds, left, right) <= true).all())
    beaten = tile[None] <= optimistic.threshold_below(true.reshape(-1, 1, 1)[:200])
    assert not bool((beaten & (true >= true.reshape(-1, 1, 1)[:200])).any())


@pytest.fixture
def bfloat16_scan(monkeypatch):
    """Low-precision tiles whatever the processor and the size of the table."""
    if DEVICE.type != "cpu":
        pytest.skip("low-precision tiles are for CPUs: GPUs have the kernels")
    monkeypatch.setattr(bounds, "cpu_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(bounds, "_LOW_PRECISION_FROM", 0)
    monkeypatch.setattr(bounds, "_FEW_QUERIES", 0)
    used = []
    original = OptimisticScores.__init__

    def noted(self, *arguments):
        original(self, *arguments)
        used.append(self.dtype)

    monkeypatch.setattr(OptimisticScores, "__init__", noted)
    yield
    assert torch.bfloat16 in used


@pytest.mark.usefixtures("small_blocks", "bfloat16_scan")
@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
@given(data=st.data())
def test_a_bfloat16_scan_changes_nothing(metric, data):
    """Near-ties one unit in the last place apart, hundreds of duplicates, norms from 1e-6 to 1e6, zero rows."""
    generator = data.draw(generators)
    v, d = data.draw(st.integers(20, 150)), data.draw(st.sampled_from([1, 7, 64, 130]))
    table = torch.randn(data.draw(st.sampled_from([2, 5, v])), d, generator=generator)
    table = table[torch.randint(len(table), (v,), generator=generator)]
    if data.draw(st.booleans()):
        table = table.bfloat16()
        ulp = table[:: data.draw(st.sampled_from([1, 3]))]
        column = torch.randint(d, (len(ulp),), generator=generator)
        ulp[torch.arange(len(ulp)), column] = ulp[torch.arange(len(ulp)), column].nextafter(
            torch.tensor(torch.inf).bfloat16()
        )
    if data.draw(st.booleans()):
        table = table * 10.0 ** torch.randint(-6, 7, (v, 1), generator=generator)
    table[torch.rand(v, generator=generator) < data.draw(st.sampled_from([0.0, 0.3]))] = 0
    k, queries, allowed = data.draw(requests(v))
    got = nearest_neighbors(table, k, metric=metric, queries=queries, allowed=allowed)
    every = torch.arange(v) if queries is None else queries
    ids, scores = ranked(defined_scores(table, metric), k, every, allowed)
    assert torch.equal(got.ids, ids) and torch.equal(got.scores, scores)


def test_progress_reaches_the_total():
    table, seen = torch.randn(50, 4), []
    got = nearest_neighbors(table, 2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (50, 50)
    assert torch.equal(got.ids, nearest_neighbors(table, 2).ids)


def test_detached_and_pure():
    table = torch.randn(20, 4, requires_grad=True)
    copy = table.detach().clone()
    assert not nearest_neighbors(table, 2).scores.requires_grad
    assert torch.equal(table, copy)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "k", "queries"),
    [
        ("torch.randn(60_000, 512)", 3, "torch.arange(1024)"),
        ("torch.randn(20_000, 512).bfloat16()", 3, None),
        ("torch.randn(6000, 4096)", 32, None),
        ("torch.randn(300, 8).repeat(100, 1)", 3, "torch.arange(100)"),
        ("torch.ones(4096, 8)", 64, "torch.arange(256)"),
    ],
    ids=["random", "whole table", "wide rows", "hundreds of copies", "all equal"],
)
def test_peak_memory(table, k, queries):
    """A search stays below 256 MiB beyond its inputs and outputs, ties or not."""
    script = f"""
        import resource, torch
        from ngrpo_ops import nearest_neighbors
        torch.set_num_threads(2)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        nearest_neighbors(torch.randn(300, 512), 3)
        nearest_neighbors(torch.ones(100, 8), 3)
        table = {table}
        before = peak()
        out = nearest_neighbors(table, {k}, queries={queries})
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 256


BAD = [
    ({"embedding": [1.0]}, TypeError, "embedding"),
    ({"embedding": torch.ones(4, 2).long()}, ValueError, "embedding"),
    ({"embedding": torch.ones(4)}, ValueError, "embedding"),
    ({"embedding": torch.ones(0, 2)}, ValueError, "embedding"),
    ({"embedding": torch.full((4, 2), torch.nan)}, ValueError, "embedding"),
    ({"embedding": torch.full((4, 2), -torch.inf)}, ValueError, "embedding"),
    ({"embedding": torch.full((4, 2), 1e30), "metric": "dot"}, ValueError, "embedding"),
    ({"k": 0}, ValueError, "k must"),
    ({"k": 4}, ValueError, "k must"),
    ({"k": True}, ValueError, "k must"),
    ({"k": 1.0}, ValueError, "k must"),
    ({"metric": "angle"}, ValueError, "metric"),
    ({"backend": "cuda"}, ValueError, "backend"),
    ({"queries": [0]}, TypeError, "queries"),
    ({"queries": torch.zeros(1, dtype=torch.int32)}, TypeError, "queries"),
    ({"queries": torch.zeros(0, dtype=torch.int64)}, ValueError, "queries"),
    ({"queries": torch.zeros(1, 1, dtype=torch.int64)}, ValueError, "queries"),
    ({"queries": torch.tensor([4])}, ValueError, "queries"),
    ({"queries": torch.tensor([-1])}, ValueError, "queries"),
    ({"queries": torch.zeros(1, dtype=torch.int64, device="meta")}, ValueError, "queries"),
    ({"allowed": [True] * 4}, TypeError, "allowed"),
    ({"allowed": torch.ones(4)}, TypeError, "allowed"),
    ({"allowed": torch.ones(5, dtype=torch.bool)}, ValueError, "allowed"),
    ({"allowed": torch.ones(4, dtype=torch.bool, device="meta")}, ValueError, "allowed"),
    ({"allowed": torch.tensor([True, True, False, False])}, ValueError, "allowed"),
]


@pytest.mark.parametrize(("change", "error", "name"), BAD)
def test_bad_input_is_named(change, error, name):
    with pytest.raises(error, match=name):
        nearest_neighbors(**{"embedding": torch.arange(8.0).view(4, 2), "k": 2, **change})


def test_shapes_on_meta():
    ids, scores = nearest_neighbors(torch.empty(50, 8, device="meta"), 3, queries=torch.empty(7, device="meta").long())
    assert ids.shape == scores.shape == (7, 3)
    assert ids.dtype == torch.int64 and scores.dtype == torch.float32
    assert nearest_neighbors(torch.empty(50, 8, device="meta", dtype=torch.bfloat16), 3).scores.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, backend):
    table = torch.randn(20, 6, device=DEVICE).to(dtype)
    op = torch.ops.ngrpo.nearest_neighbors.default
    torch.library.opcheck(op, (table, 3, "cosine", None, None, backend))
    strided, odd = table.T.contiguous().T, torch.arange(20, device=DEVICE) % 2 == 1
    torch.library.opcheck(op, (strided, 3, "l2", torch.tensor([3, 1], device=DEVICE), odd, backend))


@pytest.mark.slow
def test_compiles(backend):
    torch._dynamo.reset()
    call = lambda x, q: nearest_neighbors(x, 2, queries=q, backend=backend)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for v, q in ((20, 5), (31, 9)):
        table, queries = torch.randn(v, 6, device=DEVICE), torch.randint(v, (q,), device=DEVICE)
        got, want = compiled(table, queries), call(table, queries)
        assert torch.equal(got.ids, want.ids) and torch.equal(got.scores, want.scores)
