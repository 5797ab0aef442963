"""Full-vocabulary search for a batch of queries, against a tiled matmul + topk in the same run."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch
from peers import tiled_matmul_topk
from shapes import QUERIES, QWEN2_5_0_5B

from ngrpo_ops import nearest_neighbors

K = 2  # the paper's k = 3: the anchor and two neighbours
GROUP = f"nearest_neighbors V={QWEN2_5_0_5B[0]} d={QWEN2_5_0_5B[1]} Q={QUERIES} k={K} float32"


@pytest.fixture(scope="module")
def table() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(QWEN2_5_0_5B, generator=generator)
    return embedding, torch.randperm(QWEN2_5_0_5B[0], generator=generator)[:QUERIES]


@pytest.mark.benchmark(group=GROUP)
@pytest.mark.parametrize("who", ["ours", "peer"])
def bench_search(benchmark: Any, table: tuple[torch.Tensor, torch.Tensor], who: str) -> None:
    embedding, queries = table
    run = {
        "ours": lambda: nearest_neighbors(embedding, K, queries=queries).ids,
        "peer": lambda: tiled_matmul_topk(embedding, queries, K),
    }[who]
    nearest_neighbors(embedding[:4096], K)  # threads and libraries are up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ids = benchmark.pedantic(run, rounds=3, warmup_rounds=0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    benchmark.extra_info |= {"who": who, "peak MiB beyond what was resident": round(peak / 1024)}
    assert ids.shape == (QUERIES, K)
