"""One rank of a sharded search, started by torchrun: compares what it gets with a search of the whole table."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ngrpo_ops import NeighborTable, nearest_neighbors
from ngrpo_ops.ops.nearest_neighbors import scores, sharded
from ngrpo_ops.testing import METRICS

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
group = dist.group.WORLD
generator = torch.Generator().manual_seed(0)
sizes: list[tuple[int, int]] = []  # rows scored here against how many at once


def noted(rows, *arguments, columns=None, **options):
    if columns is not None:
        sizes.append((len(rows), len(columns)))
    return sharded_search(rows, *arguments, columns=columns, **options)


sharded_search, sharded.search = sharded.search, noted
sharded._BROADCAST_ROWS = 50
scores._PAIR_ELEMENTS = 2**14  # blocks are padded: too slow for many small searches


def same(got, want):
    assert torch.equal(got.ids, want.ids) and torch.equal(got.scores, want.scores)


def refused(message, *arguments, **options):
    try:
        nearest_neighbors(*arguments, **options)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


table = torch.randn(211, 24, generator=generator)
table[40:75] = table[120].clone()  # ties across the shards
table[[7, 150]] = 0
for shares in ([5, 120, 86], [211, 0, 0], [0, 3, 208], [70, 70, 71]):
    counts = shares if ranks == 3 else [shares[0], shares[1] + shares[2]]
    mine = table.split(counts)[rank]
    for metric in METRICS:
        for dtype in (torch.float32, torch.bfloat16):
            for k, allowed in ((2, None), (32, None), (5, torch.rand(211, generator=generator) < 0.3)):
                sizes.clear()
                got = nearest_neighbors(mine.to(dtype), k, metric=metric, allowed=allowed, group=group)
                assert all(rows == counts[rank] and columns <= 50 for rows, columns in sizes)
                same(got, nearest_neighbors(table.to(dtype), k, metric=metric, allowed=allowed))

seen: list[tuple[int, int]] = []
nearest_neighbors(mine, 2, group=group, progress=lambda *done: seen.append(done))
assert seen[-1] == (211, 211) and seen == sorted(seen)

mesh = init_device_mesh("cpu", (ranks,))
spread = distribute_tensor(table, mesh, [Shard(0)])
same(nearest_neighbors(spread, 3), nearest_neighbors(table, 3))
tiny = distribute_tensor(table[: ranks - 1], mesh, [Shard(0)])  # the last rank has no rows
if ranks > 2:
    same(nearest_neighbors(tiny, 1), nearest_neighbors(table[: ranks - 1], 1))
same(nearest_neighbors(distribute_tensor(table, mesh, [Replicate()]), 3), nearest_neighbors(table, 3))
copies = init_device_mesh("cpu", (1, ranks))  # HSDP
same(nearest_neighbors(distribute_tensor(table, copies, [Replicate(), Shard(0)]), 3), nearest_neighbors(table, 3))

neighbors = NeighborTable(3, metric="l2")
for recomputed, reason in ((211, "first build"), (0, "compared with the last build")):
    report = neighbors.refresh(spread)
    assert report.recomputed == recomputed or reason != "first build", report
    assert report.reason.startswith(reason), report
    same(neighbors, nearest_neighbors(table, 3, metric="l2"))
# A refresh certifies, and finds what a search finds: small steps, a few rows that move far, rows that become equal or
# zero, and steps after which a rebuild is due. The report is that of all ranks.
distinct = torch.randn(211, 24, generator=generator)
for shares in ([5, 120, 86], [211, 0, 0], [0, 3, 208], [70, 70, 71]):
    counts = shares if ranks == 3 else [shares[0], shares[1] + shares[2]]
    for metric in METRICS:
        for allowed in (None, torch.rand(211, generator=generator) < 0.5):
            neighbors, whole = (NeighborTable(3, metric=metric, allowed=allowed) for _ in range(2))
            now = distinct.clone()
            for step in ("build", "small", "movers", "equal", "small", "zero", "large", "small"):
                if step == "small":
                    now = now + 1e-5 * torch.randn(211, 24, generator=generator)
                elif step == "movers":
                    now[[3, 130]] += torch.randn(2, 24, generator=generator)
                elif step == "equal":
                    now[[2, 90, 200]] = now[50].clone()
                elif step == "zero":
                    now[[8, 190]] = 0
                elif step == "large":
                    now = now + torch.randn(211, 24, generator=generator)
                report = neighbors.refresh(now.split(counts)[rank], group=group)
                in_one = whole.refresh(now)
                same(neighbors, nearest_neighbors(now, 3, metric=metric, allowed=allowed))
                assert report.certified + report.rescored + report.recomputed == 211
                if step == "small" and report.reason.startswith("compared"):
                    assert report.recomputed <= 20 and in_one.recomputed <= 20, (report, in_one)
            assert report.reason.startswith("compared") and report.certified > 150, report
# Another sharding begins anew, on every rank.
neighbors = NeighborTable(3)
neighbors.refresh(distinct.split([70, 141] if ranks == 2 else [70, 70, 71])[rank], group=group)
report = neighbors.refresh(distinct.split([100, 111] if ranks == 2 else [70, 71, 70])[rank], group=group)
assert report.recomputed == 211 and ("sharding" in report.reason or "ranks begin anew" in report.reason), report
same(neighbors, nearest_neighbors(distinct, 3))
# Rows equal to another, on whatever rank, are left out, also after they were trained apart.
with_copies = table.clone()
with_copies[[0, 80, 200, 209]] = with_copies[100].clone()
left = ~torch.isin(torch.arange(211), torch.tensor([0, 7, *range(40, 75), 80, 100, 120, 150, 200, 209]))
for shares in ([5, 120, 86], [211, 0, 0], [70, 70, 71]):
    counts = shares if ranks == 3 else [shares[0], shares[1] + shares[2]]
    for allowed in (None, torch.arange(211) % 4 > 0):
        neighbors = NeighborTable(3, allowed=allowed, exclude_equal_rows=True)
        for trained in (with_copies, with_copies + torch.randn(211, 24, generator=generator)):
            neighbors.refresh(trained.split(counts)[rank], group=group)
            assert torch.equal(neighbors.equal_rows, ~left)
            same(neighbors, nearest_neighbors(trained, 3, allowed=left if allowed is None else left & allowed))
neighbors = NeighborTable(3, exclude_equal_rows=True)
neighbors.refresh(distribute_tensor(with_copies, mesh, [Shard(0)]))
same(neighbors, nearest_neighbors(with_copies, 3, allowed=left))
same_rows = NeighborTable(3, exclude_equal_rows=True)
try:
    same_rows.refresh(torch.ones(20, 4), group=group)
except ValueError as error:
    assert f"got 0: {20 * ranks} of {20 * ranks} rows are equal" in str(error), error
else:
    raise AssertionError("not refused: equal rows alone")

neighbors = NeighborTable(3, metric="l2")
neighbors.refresh(table)
assert neighbors.refresh(table).recomputed < 211

# What is wrong on one rank is raised on every rank, by name; nobody is left waiting.
mine = table.split(counts)[rank].clone()
mine[-1, 3] = torch.nan if rank == ranks - 1 else 0
refused(f"rank {ranks - 1}: embedding must be finite, got NaN or inf in 1 rows: 210", mine, 2, group=group)
refused("same width", table[:5, : 8 + rank], 2, group=group)
refused("k must", table[:5], 5 * ranks, group=group)
refused("allowed must have shape", table[:5], 2, group=group, allowed=torch.ones(5, dtype=torch.bool))
refused("allowed must have at least", table[:5], 2, group=group, allowed=torch.arange(5 * ranks) < 2)
refused("queries", table[:5], 2, group=group, queries=torch.tensor([0]))
refused("Shard(dim=1)", DTensor.from_local(table, mesh, [Shard(1)]), 2)

(Path(sys.argv[1]) / f"rank{rank}").touch()
dist.destroy_process_group()
os._exit(0)  # what is to be tested is done; at the interpreter's exit gloo's threads abort one run in many
