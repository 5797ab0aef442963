"""NeighborTable: whatever moved, a refreshed table is the table of a fresh search, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ngrpo_ops import NeighborTable, nearest_neighbors
from ngrpo_ops.ops.nearest_neighbors import scores, table
from ngrpo_ops.ops.nearest_neighbors.row_hashes import row_hashes
from ngrpo_ops.testing import DEVICE, METRICS, for_backend, generators, metrics, tables


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Re-scored blocks are padded to one size, two million numbers: too slow for hundreds of tiny searches."""
    monkeypatch.setattr(scores, "_PAIR_ELEMENTS", 2**14)


@pytest.fixture(autouse=True)
def _backend(request, monkeypatch):
    """A table takes the kernels where they run: for a test's backend "triton" also on the CPU, interpreted. They score
    pairs and measure rows. Tables this small are scanned in plain torch; the kernels' scan has tests of its own."""
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def assert_fresh(neighbors: NeighborTable, embedding: Tensor) -> None:
    want = nearest_neighbors(embedding, neighbors.k, metric=neighbors.metric, allowed=neighbors.allowed)
    assert torch.equal(neighbors.ids, want.ids)
    assert torch.equal(neighbors.scores, want.scores)


@given(
    embedding=tables(st.integers(4, 80), st.integers(1, 24)),
    metric=metrics,
    scales=st.lists(st.sampled_from([0.0, 1e-7, 1e-4, 1e-2, 0.1, 1.0, 100.0]), min_size=1, max_size=4),
    share=st.sampled_from([0.05, 0.5, 1.0]),
    use_mask=st.booleans(),
    generator=generators,
)
def test_refresh_is_a_fresh_search(embedding, metric, scales, share, use_mask, generator, backend):
    embedding = for_backend(embedding, backend)
    v = embedding.shape[0]
    allowed = None
    if use_mask:
        allowed = torch.rand(v, generator=generator) < 0.6
        allowed[:3] = True
        allowed = allowed.to(DEVICE)
    k = 2 if v < 10 else 3
    neighbors = NeighborTable(k if allowed is None else 2, metric=metric, candidates=k + 2, allowed=allowed)
    report = neighbors.refresh(embedding)
    assert (report.certified, report.recomputed) == (0, v)
    assert_fresh(neighbors, embedding)
    for scale in scales:
        moved = torch.rand(v, 1, generator=generator) < share
        noise = torch.randn(embedding.shape, generator=generator, dtype=torch.float64) * moved * scale
        embedding = (embedding.double() + noise.to(DEVICE)).to(embedding.dtype)
        report = neighbors.refresh(embedding)
        assert report.certified + report.rescored + report.recomputed == v
        assert_fresh(neighbors, embedding)


@pytest.mark.parametrize("metric", METRICS)
def test_the_certificate_works_for_its_keep(metric, backend):
    """Tiny drifts are certified for most rows, larger ones search some rows anew; never at the price of the answer."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(150, 12, generator=generator).to(DEVICE)
    seen = []
    for scale in (0.0, 1e-6, 0.02, 1.0):
        neighbors = NeighborTable(2, metric=metric, candidates=6)
        neighbors.refresh(embedding)
        moved = embedding + scale * torch.randn(embedding.shape, generator=generator).to(DEVICE)
        report = neighbors.refresh(moved)
        assert_fresh(neighbors, moved)
        seen.append((report.certified, report.recomputed))
    assert seen[0] == seen[1] == (150, 0)
    assert any(certified and recomputed for certified, recomputed in seen)
    assert seen[-1] == (0, 150)


def test_stored_bounds_do_not_drift():
    """Forty small steps add up to a large one: each is certified against the build, not against the last step."""
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(120, 6, generator=generator)
    direction = torch.randn(embedding.shape, generator=generator) * 0.02
    neighbors = NeighborTable(2, candidates=8)
    neighbors.refresh(embedding)
    recomputed = 0
    for _ in range(40):
        embedding = embedding + direction
        recomputed += neighbors.refresh(embedding).recomputed
        assert_fresh(neighbors, embedding)
    assert recomputed > 0


@pytest.mark.parametrize("metric", METRICS)
def test_a_distant_row_that_jumps_next_to_a_query(metric):
    """The query and its candidates stay where they are: only the largest movement of all tells."""
    generator = torch.Generator().manual_seed(2)
    embedding = torch.randn(200, 8, generator=generator)
    neighbors = NeighborTable(2, metric=metric, candidates=6)
    neighbors.refresh(embedding)
    target = 17
    distant = int(nearest_neighbors(embedding, 199, metric=metric).ids[target, -1])
    moved = embedding.clone()
    moved[distant] = 1.5 * embedding[target] if metric == "dot" else embedding[target]
    neighbors.refresh(moved)
    assert neighbors.ids[target, 0] == distant
    assert_fresh(neighbors, moved)
    neighbors.refresh(embedding)
    assert_fresh(neighbors, embedding)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_rows_are_never_certified_wrongly(metric, backend):
    embedding = torch.randn(10, 8, generator=torch.Generator().manual_seed(3)).repeat(30, 1).to(DEVICE)
    neighbors = NeighborTable(3, metric=metric)
    neighbors.refresh(embedding)
    assert_fresh(neighbors, embedding)
    embedding = embedding.clone()
    embedding[::7] *= 1.001
    neighbors.refresh(embedding)
    assert_fresh(neighbors, embedding)


def test_some_rows_searched_anew(monkeypatch):
    """Only the open rows are searched when few are, and all of them again beyond the rebuild fraction."""
    generator = torch.Generator().manual_seed(4)
    embedding = torch.cat([torch.randn(150, 8, generator=generator), torch.randn(50, 8, generator=generator) * 50])
    neighbors = NeighborTable(2, metric="l2", candidates=10)
    neighbors.refresh(embedding)
    moved = embedding.clone()
    moved[:150] += 0.05 * torch.randn(150, 8, generator=generator)
    searched = []
    report = neighbors.refresh(moved, progress=lambda done, total: searched.append((done, total)))
    assert 0 < report.recomputed < 100 and report.certified + report.rescored == 200 - report.recomputed
    assert searched[-1] == (report.recomputed, report.recomputed)
    assert_fresh(neighbors, moved)
    monkeypatch.setattr(table, "_REBUILD_FRACTION", 0.0)
    assert neighbors.refresh(moved + 0.01).recomputed == 200
    assert_fresh(neighbors, moved + 0.01)


def test_another_shape_or_dtype_rebuilds():
    embedding = torch.randn(60, 8)
    neighbors = NeighborTable(3)
    neighbors.refresh(embedding)
    for changed in (embedding[:50], torch.randn(50, 9), torch.randn(50, 9).bfloat16(), torch.randn(50, 9)):
        assert neighbors.refresh(changed).recomputed == changed.shape[0]
        assert_fresh(neighbors, changed)


def test_movement_is_measured_in_the_metrics_own_norm(monkeypatch):
    """A small step in every coordinate is short in l2 and long in l1: 4 and 32 for the row that jumps here."""
    monkeypatch.setattr(table, "_REBUILD_FRACTION", 1.0)
    embedding = torch.zeros(11, 64)
    embedding[:8, 0] = torch.arange(8.0)
    embedding[8:] = 0.5
    neighbors = NeighborTable(2, metric="l1", candidates=7)
    neighbors.refresh(embedding)
    embedding[10] = 0.0
    neighbors.refresh(embedding)
    assert neighbors.ids[0].tolist() == [10, 1]
    assert_fresh(neighbors, embedding)


@pytest.mark.parametrize("metric", METRICS)
def test_in_place_updates_are_seen(metric):
    """The trainer's optimizer writes into the very tensor the table was built from."""
    embedding = torch.randn(60, 8, requires_grad=True)
    neighbors = NeighborTable(3, metric=metric)
    neighbors.refresh(embedding)
    with torch.no_grad():
        embedding.copy_(torch.randn(60, 8))
    neighbors.refresh(embedding)
    assert_fresh(neighbors, embedding.detach())
    embedding.data.copy_(torch.randn(60, 8))  # no version counter tells of this one
    neighbors.refresh(embedding)
    assert not neighbors.scores.requires_grad
    assert_fresh(neighbors, embedding.detach())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_few_rows_that_move_far_are_taken_apart(metric, masked, backend):
    """New tokens being learned, say: they must not cost the certificates of all other rows."""
    generator = torch.Generator().manual_seed(5)
    embedding = torch.randn(400, 16, generator=generator).to(DEVICE)
    movers = torch.tensor([3, 77, 200], device=DEVICE)
    allowed = None
    if masked:
        allowed = torch.ones(400, dtype=torch.bool, device=DEVICE)
        allowed[[77, 5, 399]] = False
    neighbors = NeighborTable(3, metric=metric, allowed=allowed)
    neighbors.refresh(embedding)
    moved = embedding + 1e-5 * torch.randn(400, 16, generator=generator).to(DEVICE)
    moved[movers] = embedding[[50, 60, 70]] + 0.1 * torch.randn(3, 16, generator=generator).to(DEVICE)
    report = neighbors.refresh(moved)
    assert report.movers == 4 and report.recomputed <= 8  # a power of two of them
    assert f"{report.movers} further" in report.reason
    assert_fresh(neighbors, moved)
    assert neighbors.ids[50, 0] == 3 or metric == "dot"
    neighbors.refresh(embedding)
    assert_fresh(neighbors, embedding)


def test_what_a_refresh_had_to_do():
    """Rows whose k-th and next neighbor are a tie need all their candidates, rows tied beyond these a search."""
    generator = torch.Generator().manual_seed(6)
    embedding = torch.randn(200, 32, generator=generator)
    embedding[:3] = embedding[3]  # among four equal rows, k = 2 of the three others
    embedding[10:40] = embedding[10].clone()
    neighbors = NeighborTable(2)
    report = neighbors.refresh(embedding)
    assert (report.certified, report.rescored, report.recomputed, report.reason) == (0, 0, 200, "first build")
    report = neighbors.refresh(embedding)
    assert report.rescored >= 4 and report.recomputed >= 30
    assert report.certified == 200 - report.rescored - report.recomputed > 150
    assert_fresh(neighbors, embedding)


def test_state_dict(tmp_path):
    generator = torch.Generator().manual_seed(7)
    embedding = torch.randn(100, 8, generator=generator)
    allowed = torch.arange(100) != 4
    neighbors = NeighborTable(2, metric="l2", allowed=allowed)
    with pytest.raises(RuntimeError, match="refresh"):
        neighbors.state_dict()
    neighbors.refresh(embedding)
    torch.save(neighbors.state_dict(), tmp_path / "table.pt")
    again = NeighborTable(2, metric="l2", allowed=allowed.clone())
    again.load_state_dict(torch.load(tmp_path / "table.pt", weights_only=True))
    assert torch.equal(again.ids, neighbors.ids) and torch.equal(again.scores, neighbors.scores)
    moved = embedding + 1e-4 * torch.randn(100, 8, generator=generator)
    assert again.refresh(moved) == neighbors.refresh(moved)
    assert again.refresh(moved).certified > 0
    assert_fresh(again, moved)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (NeighborTable(3), "k = 3"),
        (NeighborTable(2, metric="dot"), "metric = 'dot'"),
        (NeighborTable(2, allowed=torch.ones(30, dtype=torch.bool)), "allowed"),
    ],
)
def test_a_state_of_another_table_is_refused(other, name):
    neighbors = NeighborTable(2)
    neighbors.refresh(torch.randn(30, 4))
    with pytest.raises(ValueError, match=name):
        other.load_state_dict(neighbors.state_dict())


def test_an_unusable_state_is_refused():
    neighbors = NeighborTable(2)
    neighbors.refresh(torch.randn(30, 4))
    state = neighbors.state_dict()
    with pytest.raises(ValueError, match="without snapshot, bounds"):
        NeighborTable(2).load_state_dict({n: x for n, x in state.items() if n not in ("snapshot", "bounds")})
    with pytest.raises(ValueError, match=r"state\['scores'\] must be of 30 rows"):
        NeighborTable(2).load_state_dict({**state, "scores": state["scores"][:7]})


def test_memory_is_stated():
    neighbors = NeighborTable(2, candidates=16)
    neighbors.refresh(torch.randn(300, 64).bfloat16())
    assert neighbors.nbytes == 300 * (64 * 2 + 12 * 2 + 4 * 16 + 16)


def test_a_refused_refresh_leaves_the_table_as_it_was():
    embedding = torch.randn(60, 8)
    neighbors = NeighborTable(3)
    neighbors.refresh(embedding)
    ids = neighbors.ids.clone()
    with pytest.raises(ValueError, match="embedding"):
        neighbors.refresh(torch.full((60, 8), torch.nan))
    assert torch.equal(neighbors.ids, ids)
    neighbors.refresh(embedding + 1e-3)
    assert_fresh(neighbors, embedding + 1e-3)


def test_an_interrupted_rebuild_is_not_believed():
    """Whatever stops a long rebuild (here its progress callback), the next refresh must not trust half of it."""
    embedding, other = torch.randn(60, 8), torch.randn(60, 8)
    neighbors = NeighborTable(3)
    neighbors.refresh(embedding)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        neighbors.refresh(other, progress=interrupt)
    neighbors.refresh(other)
    assert_fresh(neighbors, other)


def test_lookup():
    neighbors = NeighborTable(3)
    for use in (lambda: neighbors.ids, lambda: neighbors.scores, lambda: neighbors.lookup(torch.tensor([0]))):
        with pytest.raises(RuntimeError, match="refresh"):
            use()
    neighbors.refresh(torch.randn(30, 4))
    tokens = torch.randint(30, (2, 5))
    assert torch.equal(neighbors.lookup(tokens), neighbors.ids[tokens])
    assert neighbors.ids.shape == neighbors.scores.shape == (30, 3)
    with pytest.raises(TypeError, match="token_ids"):
        neighbors.lookup(tokens.int())


def test_fewer_rows_than_candidates():
    for metric in METRICS:
        embedding = torch.randn(5, 4)
        neighbors = NeighborTable(4, metric=metric)
        neighbors.refresh(embedding)
        assert_fresh(neighbors, embedding)
        moved = torch.randn(5, 4) * 100
        report = neighbors.refresh(moved)
        assert report.certified + report.rescored + report.recomputed == 5
        assert_fresh(neighbors, moved)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"k": 0}, "k must"),
        ({"k": True}, "k must"),
        ({"k": 2.0}, "k must"),
        ({"k": 2, "metric": "angle"}, "metric"),
        ({"k": 2, "candidates": 2}, "candidates"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        NeighborTable(**arguments)


@pytest.mark.parametrize(
    ("embedding", "allowed", "error", "name"),
    [
        (torch.ones(2, 4), None, ValueError, "k must"),
        (torch.ones(4), None, ValueError, "embedding"),
        (torch.ones(0, 4), None, ValueError, "embedding"),
        ([1.0], None, TypeError, "embedding"),
        (torch.ones(9, 4), torch.ones(8, dtype=torch.bool), ValueError, "allowed"),
        (torch.ones(9, 4), torch.ones(9), TypeError, "allowed"),
        (torch.ones(9, 4), torch.arange(9) < 2, ValueError, "allowed"),
    ],
)
def test_bad_refreshes_are_named(embedding, allowed, error, name):
    with pytest.raises(error, match=name):
        NeighborTable(2, allowed=allowed).refresh(embedding)


# Equal rows -------------------------------------------------------------------------------------------------------


def equal_by_pairs(embedding: Tensor) -> Tensor:
    """bool [V]: rows of which another one has the values, each pair by itself."""
    rows = embedding.float()
    return torch.tensor([any(i != j and bool((a == b).all()) for j, b in enumerate(rows)) for i, a in enumerate(rows)])


def table_with_equal_rows(dtype: torch.dtype = torch.float32) -> Tensor:
    embedding = torch.randn(60, 6, generator=torch.Generator().manual_seed(2)).to(dtype)
    embedding[[3, 20, 41]] = embedding[7].clone()
    embedding[[11, 12]] = 0.0
    embedding[12, 2] = -0.0  # the same value
    embedding[30], embedding[31] = embedding[29], embedding[29]
    embedding[31, 5] = -embedding[31, 5]  # one sign off: another row
    embedding[33] = embedding[32]
    embedding[33, 0] = torch.nextafter(embedding[32, 0].float(), torch.tensor(9e9)) if dtype == torch.float32 else 3.0
    return embedding


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_equal_rows_are_left_out(metric, dtype, masked):
    embedding = table_with_equal_rows(dtype)
    equal = equal_by_pairs(embedding)
    assert equal.nonzero().flatten().tolist() == [3, 7, 11, 12, 20, 29, 30, 41]
    allowed = torch.arange(60) % 5 != 1 if masked else None
    neighbors = NeighborTable(3, metric=metric, allowed=allowed, exclude_equal_rows=True)
    with pytest.raises(RuntimeError, match="refresh"):
        _ = neighbors.equal_rows
    neighbors.refresh(embedding)
    assert torch.equal(neighbors.equal_rows, equal)
    left = ~equal if allowed is None else ~equal & allowed
    want = nearest_neighbors(embedding, 3, metric=metric, allowed=left)
    assert torch.equal(neighbors.ids, want.ids) and torch.equal(neighbors.scores, want.scores)
    plain = NeighborTable(3, metric=metric, allowed=allowed)
    plain.refresh(embedding)
    assert plain.equal_rows is None and torch.isin(plain.ids, equal.nonzero()).any()


@pytest.mark.parametrize("step", [1e-4, 0.05, 10.0])
def test_a_row_left_out_stays_out_when_training_moves_it(step):
    embedding = table_with_equal_rows()
    neighbors = NeighborTable(3, exclude_equal_rows=True)
    neighbors.refresh(embedding)
    equal = neighbors.equal_rows.clone()
    for seed in range(3):
        embedding = embedding + step * torch.randn(60, 6, generator=torch.Generator().manual_seed(seed))
        neighbors.refresh(embedding)
        assert torch.equal(neighbors.equal_rows, equal) and not equal_by_pairs(embedding).any()
        want = nearest_neighbors(embedding, 3, allowed=~equal)
        assert torch.equal(neighbors.ids, want.ids) and torch.equal(neighbors.scores, want.scores)


def test_equal_rows_of_weights_that_replace_placeholders_are_left_out():
    """As in an engine that starts with random weights and is sent the trainer's."""
    neighbors = NeighborTable(3, exclude_equal_rows=True)
    neighbors.refresh(torch.randn(60, 6, generator=torch.Generator().manual_seed(9)))
    assert not neighbors.equal_rows.any()
    embedding = table_with_equal_rows()
    neighbors.refresh(embedding)
    assert torch.equal(neighbors.equal_rows, equal_by_pairs(embedding))
    want = nearest_neighbors(embedding, 3, allowed=~neighbors.equal_rows)
    assert torch.equal(neighbors.ids, want.ids)


def test_too_few_rows_that_are_not_equal():
    neighbors = NeighborTable(2, exclude_equal_rows=True)
    message = "exclude_equal_rows=True must leave at least 3 rows .*, got 2: 28 of 30 rows are equal to another row"
    embedding = torch.ones(30, 4)
    embedding[:2] = torch.randn(2, 4)
    with pytest.raises(ValueError, match=message):
        neighbors.refresh(embedding)
    embedding[2] = 3.0
    neighbors.refresh(embedding)
    assert neighbors.ids[:3].tolist() == [
        [*sorted({0, 1, 2} - {i}, key=neighbors.ids[i].tolist().index)] for i in (0, 1, 2)
    ]
    with pytest.raises(ValueError, match="k must be below"):
        NeighborTable(30, exclude_equal_rows=True).refresh(embedding)


def test_the_state_of_a_table_without_equal_rows(tmp_path):
    embedding = table_with_equal_rows()
    neighbors = NeighborTable(3, exclude_equal_rows=True)
    neighbors.refresh(embedding)
    torch.save(neighbors.state_dict(), tmp_path / "table.pt")
    again = NeighborTable(3, exclude_equal_rows=True)
    again.load_state_dict(torch.load(tmp_path / "table.pt", weights_only=True))
    moved = embedding + 1e-4 * torch.randn(60, 6, generator=torch.Generator().manual_seed(3))
    assert again.refresh(moved) == neighbors.refresh(moved)
    assert torch.equal(again.ids, neighbors.ids) and torch.equal(again.equal_rows, equal_by_pairs(embedding))
    with pytest.raises(ValueError, match="exclude_equal_rows = False"):
        NeighborTable(3).load_state_dict(neighbors.state_dict())
    older = {name: value for name, value in neighbors.state_dict().items() if name != "equal_rows"}
    with pytest.raises(ValueError, match="exclude_equal_rows = True"):
        NeighborTable(3, exclude_equal_rows=True).load_state_dict(older)
    plain = NeighborTable(3)
    plain.load_state_dict(older)
    assert plain.nbytes + 2 * 60 == neighbors.nbytes


def test_hashes_tell_rows_apart_that_differ_little():
    """Rows of a power of two's multiples, as bfloat16 has them: one bit of one or two elements apart."""
    base = torch.randn(1, 16, generator=torch.Generator().manual_seed(5)).bfloat16()
    rows = [base[0]]
    for i in range(16):
        for bit in (0, 6, 7, 14, 15):
            changed = base.clone().view(torch.int16)
            changed[0, i] ^= (
                torch.tensor(1 << bit).to(torch.int16) if bit < 15 else torch.tensor(-(2**15)).to(torch.int16)
            )
            rows.append(changed.view(torch.bfloat16)[0])
    swapped = base[0].clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    table_of = torch.stack([*rows, swapped])
    for half in range(2):
        assert len(row_hashes(table_of)[:, half].unique()) == len(table_of)


def test_a_table_does_not_see_what_the_caller_changes_later() -> None:
    """Its mask, the embedding and a state that it has loaded: a certificate is of the values that were there."""
    generator = torch.Generator().manual_seed(4)
    embedding, allowed = torch.randn(300, 8, generator=generator), torch.rand(300, generator=generator) < 0.9
    kept, mask = embedding.clone(), allowed.clone()
    table = NeighborTable(3, allowed=allowed)
    allowed[:] = True
    table.refresh(embedding)
    assert torch.equal(table.ids, nearest_neighbors(kept, 3, allowed=mask).ids)
    embedding.mul_(-1).add_(torch.randn(300, 8, generator=generator))
    assert table.refresh(kept).certified == 300
    state = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in table.state_dict().items()}
    restored = NeighborTable(3, allowed=mask)
    restored.load_state_dict(state)
    for value in state.values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    assert restored.refresh(kept).certified == 300 and torch.equal(restored.ids, table.ids)
