"""What a scan keeps: bounds that hold, thresholds that lose nothing, equal rows that share their work."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ngrpo_ops import NeighborTable, nearest_neighbors
from ngrpo_ops.ops.nearest_neighbors import bounds, candidates, equal_rows, fused, row_hashes, search
from ngrpo_ops.ops.nearest_neighbors import scores as scores_module
from ngrpo_ops.ops.nearest_neighbors.bounds import OptimisticScores
from ngrpo_ops.ops.nearest_neighbors.scores import ScoredRows
from ngrpo_ops.testing import METRICS, generators, metrics, tables


@pytest.fixture(autouse=True)
def _small_searches(monkeypatch):
    """Equal rows are looked for in small tables too, and the blocks of re-scored pairs are small."""
    monkeypatch.setattr(search, "SHARED_FROM", 0)
    monkeypatch.setattr(scores_module, "_PAIR_ELEMENTS", 2**13)


def pair_scores(rows: ScoredRows) -> Tensor:
    """float32 [V, V], -inf on the diagonal."""
    every = torch.arange(len(rows))[:, None].expand(len(rows), len(rows)).contiguous()
    return rows.pair_scores(every, rows, every.T.contiguous()).fill_diagonal_(-torch.inf)


@st.composite
def tables_with_copies(draw: st.DrawFn) -> Tensor:
    """Rows of which some are copies, some zero and some nearly equal, in any order."""
    table = draw(tables(st.integers(3, 40), st.integers(1, 12))).float()
    generator = draw(generators)
    sources = min(len(table), draw(st.sampled_from([1, 3, 40])))
    copies = table[torch.randint(sources, (draw(st.integers(0, 40)),), generator=generator)]
    nearly = table[torch.randint(len(table), (draw(st.integers(0, 20)),), generator=generator)]
    nearly = nearly * (1 + 1e-6 * torch.randn(nearly.shape, generator=generator))
    zeros = torch.zeros(draw(st.sampled_from([0, 0, 1, 5])), table.shape[1])
    table = torch.cat([table, copies, nearly, zeros])
    return table[torch.randperm(len(table), generator=generator)]


_SEARCHES: dict[str, Any] = {
    "table": tables_with_copies(),
    "metric": metrics,
    "k": st.integers(1, 3),
    "more": st.integers(0, 6),
    "share": st.booleans(),
    "size": st.sampled_from([5, 16, 2**12]),
    "use_mask": st.booleans(),
    "use_floor": st.booleans(),
    "generator": generators,
}


@given(scan_by=st.sampled_from(["float32", "bfloat16"]), **_SEARCHES)
def test_no_row_outside_the_candidates_is_above_the_bound(scan_by, **search):
    assert_nothing_is_missed(scan_by, **search)


@settings(max_examples=8)
@given(**_SEARCHES)
def test_the_kernels_miss_nothing(**search):
    assert_nothing_is_missed("kernels", **search)


@pytest.mark.slow
@settings(max_examples=40)
@given(**_SEARCHES)
def test_the_kernels_miss_nothing_in_many_searches(**search):
    assert_nothing_is_missed("kernels", **search)


def assert_nothing_is_missed(
    scan_by: str, table: Tensor, metric: Any, k: int, more: int, share: bool, size: int, use_mask: bool,
    use_floor: bool, generator: torch.Generator,
) -> None:  # fmt: skip
    """A search against all scores, and no row outside its candidates above its bounds."""
    rows = ScoredRows(table, metric, backend="triton" if scan_by == "kernels" else "eager")
    true = pair_scores(rows)
    allowed = torch.rand(len(table), generator=generator) < 0.7 if use_mask else torch.ones(len(table), dtype=bool)
    allowed[torch.randperm(len(table), generator=generator)[: k + 1]] = True
    true[:, ~allowed] = -torch.inf
    right, order = true.sort(dim=1, descending=True, stable=True)
    floor = right[:, k - 1].clone() if use_floor else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "SHARED_FROM", 0 if share else 2**60)
        patch.setattr(search, "_SQUARE_TILE", max(16, size))
        patch.setattr(search, "_QUERY_TILE", size)
        patch.setattr(scores_module, "_COLUMN_TILE", size)
        patch.setattr(search, "_TRIANGLE_PAIRS", size)
        patch.setattr(candidates, "_MAX_PAIRS", size)
        patch.setattr(candidates, "_MAX_GROUPS", size)
        patch.setattr(equal_rows, "_EXPANDED_PAIRS", size)
        patch.setattr(fused, "KERNELS_FROM", 0)
        patch.setattr(fused, "_BLOCK_ROWS", max(size, 32))  # interpreted launches take long
        patch.setattr(fused, "_SPARE_PLACES", min(size, 40))
        patch.setattr(fused, "_MOST_PLACES", min(size, 2**10))
        patch.setattr(fused, "_FINISHED_PLACES", 64 * size)
        if scan_by == "bfloat16":
            patch.setattr(bounds, "cpu_multiplies_bfloat16", lambda: True)
            patch.setattr(bounds, "_LOW_PRECISION_FROM", 0)
            patch.setattr(bounds, "_FEW_QUERIES", 0)
        found = search.search(rows, k, k + more, allowed=allowed if use_mask else None, floor=floor)
    assert torch.equal(found.ids, order[:, :k]) and torch.equal(found.scores, right[:, :k])
    assert torch.equal(found.candidates[:, :k], found.ids)
    inside = torch.zeros(true.shape, dtype=torch.bool)
    row, place = (found.candidates >= 0).nonzero(as_tuple=True)
    inside[row, found.candidates[row, place]] = True
    assert int(inside.sum()) == row.numel()  # none twice
    least = torch.full_like(found.bounds, -torch.inf) if floor is None else floor
    others = true.masked_fill(inside, -torch.inf)
    assert bool((others.amax(1) <= torch.maximum(found.bounds, least)).all())
    # A bound of classes may leave out the rows equal to k of the candidates, no others.
    same = (table[:, None] == table[None]).all(2)
    is_covered = (inside.float() @ same.float() >= k) & ~inside
    others.masked_fill_(is_covered, -torch.inf)
    assert bool((others.amax(1) <= torch.maximum(found.class_bounds, least)).all())


@given(
    table=tables_with_copies(),
    metric=metrics,
    k=st.integers(1, 2),
    use_mask=st.booleans(),
    moves=st.lists(st.sampled_from(["together", "apart", "one", "to zero", "to a copy"]), min_size=1, max_size=3),
    scale=st.sampled_from([1e-7, 1e-4, 1e-2, 0.3]),
    generator=generators,
)
def test_a_refreshed_table_with_copies_is_a_fresh_search(table, metric, k, use_mask, moves, scale, generator):
    allowed = None
    if use_mask:
        allowed = torch.rand(len(table), generator=generator) < 0.7
        allowed[:3] = True
    neighbors = NeighborTable(k, metric=metric, candidates=6, allowed=allowed)
    neighbors.refresh(table)
    for move in moves:
        _, which = table.unique(dim=0, return_inverse=True)
        noise = scale * torch.randn(table.shape, generator=generator)
        if move == "together":
            noise = noise[which]
        elif move == "one":
            noise[1:] = 0
        elif move == "to zero":
            noise = torch.where(torch.rand(len(table), 1, generator=generator) < 0.1, -table, 0.0)
        elif move == "to a copy":
            noise = torch.where(torch.rand(len(table), 1, generator=generator) < 0.1, table[:1] - table, 0.0)
        table = table + noise
        neighbors.refresh(table)
        want = nearest_neighbors(table, k, metric=metric, allowed=allowed)
        assert torch.equal(neighbors.ids, want.ids) and torch.equal(neighbors.scores, want.scores)
        restored = NeighborTable(k, metric=metric, allowed=allowed)
        restored.load_state_dict(neighbors.state_dict())
        restored.refresh(table)
        assert torch.equal(restored.ids, want.ids) and torch.equal(restored.scores, want.scores)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("metric", METRICS)
def test_copies_beyond_the_candidates_that_move_apart_are_found(metric, k):
    """More copies than candidates: the nearest of them after a step is one that no list has."""
    generator = torch.Generator().manual_seed(0)
    table = torch.cat([torch.randn(60, 8, generator=generator), torch.randn(2, 8, generator=generator).repeat(30, 1)])
    table[:40] = table[60 + torch.arange(40) % 2] * 1.2 + 0.05 * torch.randn(40, 8, generator=generator)
    table = torch.cat([table, torch.randn(300, 8, generator=generator)])
    neighbors = NeighborTable(k, metric=metric, candidates=5)
    neighbors.refresh(table)
    for scale in (1e-5, 1e-4, 1e-3, 1e-2):
        table = table + scale * torch.randn(table.shape, generator=generator)
        neighbors.refresh(table)
        want = nearest_neighbors(table, k, metric=metric)
        assert torch.equal(neighbors.ids, want.ids) and torch.equal(neighbors.scores, want.scores)


def test_a_class_of_which_too_few_are_candidates_is_below_the_bound():
    """The last candidate is the only one of the query's own copies: the next one may be among the k nearest later."""
    table = torch.tensor([[1.0, 0.0]] * 4 + [[1.000001, 9.0], [3.0, 9.0], [4.0, 9.0], [0.5, 9.0]])
    found = search.search(ScoredRows(table, "dot"), 2, 4)
    assert found.candidates[0].tolist() == [6, 5, 4, 1] and found.candidates[3].tolist() == [6, 5, 4, 0]
    assert bool((found.class_bounds[:4] >= 1).all())


def test_dropping_pairs_loses_none_of_the_nearest(monkeypatch):
    """Nearly equal rows in many small tiles: more pairs reach the thresholds than may be held, again and again."""
    monkeypatch.setattr(search, "_TRIANGLE_PAIRS", 0)
    monkeypatch.setattr(search, "_SQUARE_TILE", 32)
    monkeypatch.setattr(candidates, "_MAX_PAIRS", 0)
    drops = []
    original = candidates.Candidates._drop_all_but_the_best
    monkeypatch.setattr(
        candidates.Candidates, "_drop_all_but_the_best", lambda self: drops.append(len(self)) or original(self)
    )
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1, 16, generator=generator) + 1e-4 * torch.randn(400, 16, generator=generator)
    for metric in METRICS:
        right, order = pair_scores(ScoredRows(table, metric)).sort(dim=1, descending=True, stable=True)
        for kept in (3, 7):
            found = search.search(ScoredRows(table, metric), 3, kept)
            assert torch.equal(found.ids, order[:, :3]) and torch.equal(found.scores, right[:, :3])
            outside = pair_scores(ScoredRows(table, metric)).scatter(1, found.candidates, -torch.inf)
            assert bool((outside.amax(1) <= found.bounds).all())
    assert len(drops) > 20


@pytest.fixture
def work(monkeypatch) -> dict[str, int]:
    """Counts the scores of tiles and of single pairs that are computed."""
    counted = {"tiles": 0, "pairs": 0}
    write_tile, scored = OptimisticScores.write_tile, ScoredRows.pair_scores

    def counting_tile(self, queries, columns, out):
        counted["tiles"] += queries.shape[0] * columns.rows.shape[0]
        return write_tile(self, queries, columns, out)

    def counting_pairs(self, rows, others, columns):
        counted["pairs"] += rows.numel()
        return scored(self, rows, others, columns)

    monkeypatch.setattr(OptimisticScores, "write_tile", counting_tile)
    monkeypatch.setattr(ScoredRows, "pair_scores", counting_pairs)
    return counted


def tie(table: Tensor, which: str) -> Tensor:
    table = table.clone()
    if which == "zero":
        table[::4] = 0
    elif which == "equal":
        table[::3] = table[1].clone()
    return table


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("which", ["zero", "equal"])
def test_tied_rows_cost_no_more_than_others(which, metric, work):
    """A build and a refresh do at most 1.3 times the work that they do for random rows (kind 1)."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(2000, 16, generator=generator)
    step = 1e-5 * torch.randn(2000, 16, generator=generator)
    used = []
    for table in (random, tie(random, which)):
        step = tie(step, which) if table is not random else step
        neighbors = NeighborTable(2, metric=metric)
        for embedding in (table, table + step):
            work.update(tiles=0, pairs=0)
            report = neighbors.refresh(embedding)
            used.append(work["tiles"] + 200 * work["pairs"])  # a pair by itself takes that much longer
        assert report.recomputed == 0  # equal and zero rows are certified
    assert used[2] <= 1.3 * used[0] and used[3] <= 1.3 * used[1], used


@pytest.mark.parametrize("metric", METRICS)
def test_every_query_is_settled_by_one_scan(metric, work):
    """Rows in clusters, as of a trained embedding: no row of the table is multiplied twice."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(40, 16, generator=generator).repeat_interleave(50, 0)
    table = centers + 1e-3 * torch.randn(2000, 16, generator=generator)
    nearest_neighbors(table, 3, metric=metric)
    assert work["tiles"] <= 2000 * 2000


def test_rows_that_seem_equal_are_compared(monkeypatch):
    """Two rows with one hash, which random rows never have, are not taken for equal."""
    monkeypatch.setattr(row_hashes, "row_hashes", lambda rows: torch.zeros(len(rows), 2, dtype=torch.int64))
    table = torch.tensor([[1.0, 2.0], [3.0, 1.0], [1.0, 2.0], [0.0, -0.0], [-0.0, 0.0]])
    found = row_hashes.first_equal_rows(table, row_hashes.suspected_rows(table))
    assert found is not None and found.tolist() == [0, 1, 0, 3, 4]  # compared with the first of their hash alone
    monkeypatch.undo()
    found = row_hashes.first_equal_rows(table, row_hashes.suspected_rows(table))
    assert found is not None and found.tolist() == [0, 1, 0, 3, 3]
    assert row_hashes.first_equal_rows(table[:2], row_hashes.suspected_rows(table[:2])) is None


def test_ids_and_scores_stay_in_place():
    """A captured CUDA graph reads the memory that the table had when it was captured."""
    table = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    neighbors = NeighborTable(2)
    neighbors.refresh(table)
    places = neighbors.ids.data_ptr(), neighbors.scores.data_ptr()
    handed_out = neighbors.ids
    for embedding in (table.flip(0), table.flip(0) + 1e-6, table):
        neighbors.refresh(embedding)
        assert (neighbors.ids.data_ptr(), neighbors.scores.data_ptr()) == places
        assert torch.equal(handed_out, nearest_neighbors(embedding, 2).ids)
    with torch.inference_mode():
        fresh = NeighborTable(2)
        fresh.refresh(table)
    state = neighbors.state_dict()
    with torch.inference_mode():
        neighbors.refresh(table.flip(0))  # a tensor made outside, within
    assert neighbors.ids.data_ptr() == places[0] and torch.equal(handed_out, nearest_neighbors(table.flip(0), 2).ids)
    assert torch.equal(state["ids"], nearest_neighbors(table, 2).ids)  # a state that is kept does not change
    fresh.refresh(table.flip(0))  # an inference tensor is written in place too
    assert torch.equal(fresh.ids, nearest_neighbors(table.flip(0), 2).ids)


def test_progress_reaches_the_end_in_order():
    seen: list[tuple[int, int]] = []
    table = torch.randn(700, 8, generator=torch.Generator().manual_seed(0))
    table[100:200] = table[0].clone()
    nearest_neighbors(table, 2, progress=lambda *done: seen.append(done))
    assert seen == sorted(seen) and seen[-1] == (700, 700)
    assert seen[0][0] < 700


@pytest.mark.parametrize(
    ("table", "call"),
    [
        ("torch.randn(60_000, 64)", "nearest_neighbors(table, 100)"),  # kind 22
        ("torch.randn(20_000, 256)", "NeighborTable(2).refresh(table)"),
        ("torch.randn(1, 64) + 1e-4 * torch.randn(3000, 64)", "nearest_neighbors(table, 2)"),
    ],
    ids=["many neighbors", "build", "nearly equal"],
)
@pytest.mark.slow
def test_peak_memory(table, call):
    """At most 256 MiB beyond the inputs, the outputs and what a table keeps."""
    script = f"""
        import resource, torch
        from ngrpo_ops import NeighborTable, nearest_neighbors
        torch.set_num_threads(2)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        nearest_neighbors(torch.randn(600, 512), 3)
        NeighborTable(2).refresh(torch.ones(600, 8))
        table = {table}
        kept = 12 * 60_000 * 100 if "100" in "{call}" else 3 * table.numel() * 4
        before = peak()
        out = {call}
        print(peak() - before - kept / 2**20)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 256
