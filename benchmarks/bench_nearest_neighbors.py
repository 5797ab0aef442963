"""Full-vocabulary search for a batch of queries, against a tiled matmul + topk in the same run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from harness import Case, compare
from peers import tiled_matmul_topk
from shapes import QUERIES, QWEN2_5_0_5B

from ngrpo_ops import nearest_neighbors

K = 2  # the paper's k = 3: the anchor and two neighbours


def _case(device: str, who: str) -> Case:
    v, d = QWEN2_5_0_5B
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(v, d, generator=generator).to(device)
    queries = torch.randperm(v, generator=generator)[:QUERIES].to(device)
    run = {
        "ours": partial(nearest_neighbors, embedding, K, queries=queries),
        "tiled matmul + topk": partial(tiled_matmul_topk, embedding, queries, K),
    }[who]
    moved = embedding.numel() * 4
    return Case("nearest_neighbors", f"V={v} d={d} Q={QUERIES} k={K}", "float32", moved, run, rounds=3)


CASES = {"queries": (_case, ("ours", "tiled matmul + topk"))}


def bench_search(benchmark: Any, case_name: str, who: str, device: str) -> None:
    make, _ = CASES[case_name]
    compare(benchmark, make, who, device)
