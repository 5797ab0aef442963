"""What a call costs before the GPU does anything: the host's side of each operation beside an operation that is empty.

The kernels are compiled and bound by triton for a GPU that is not there (fake_driver.py). `python
benchmarks/bench_launch.py` prints the processor's time of each call, taken in turn.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fake_driver import fake_gpu, launches
from harness import Case, compare

import ngrpo_ops

EMPTY = "an empty operation"
ROUNDS, CALLS = 15, 40


@functools.cache
def calls() -> dict[str, Callable[[], Any]]:
    """Calls at a rollout's shapes. The sizes of the tensors alone matter, so the tables are rows that repeat."""
    b, v, d, k = 64, 151_936, 1536, 3
    float32 = {"dtype": torch.float32, "device": "cpu"}
    logits = torch.zeros(b, v, dtype=torch.bfloat16, device="cpu")
    table = torch.zeros(1, 1, dtype=torch.bfloat16, device="cpu").expand(v, d)
    neighbors = torch.zeros(1, 1, dtype=torch.int64, device="cpu").expand(v, k - 1)
    rows = torch.arange(b, dtype=torch.int64, device="cpu")
    settings = {"seed": 1, "step": rows, "row_ids": rows, "temperature": torch.ones(b, **float32)}
    cuts = {"top_k": torch.full((b,), 50, dtype=torch.int64, device="cpu"), "top_p": torch.full((b,), 0.9, **float32)}
    ids, weights = rows[:, None].expand(b, k).contiguous(), torch.ones(b, k, **float32)
    rewards = torch.zeros(b, **float32)
    torch.library.define("ngrpo_benchmark::nothing", "(Tensor x) -> Tensor")
    torch.library.impl("ngrpo_benchmark::nothing", "default", lambda x: torch.empty(1, **float32))
    return {
        EMPTY: lambda: torch.ops.ngrpo_benchmark.nothing.default(rewards),
        "decode_step": lambda: ngrpo_ops.decode_step(logits, table, neighbors, **settings),
        "decode_step, numbers": lambda: ngrpo_ops.decode_step(logits, table, neighbors, seed=1, step=3),
        "decode_step, cut": lambda: ngrpo_ops.decode_step(logits, table, neighbors, **settings, **cuts),
        "mix_embeddings": lambda: ngrpo_ops.mix_embeddings(table, ids, weights),
        "group_advantages": lambda: ngrpo_ops.group_advantages(rewards, group_size=8),
        "selective_log_softmax": lambda: ngrpo_ops.selective_log_softmax(logits, rows),
    }


OURS = ("decode_step", "decode_step, numbers", "decode_step, cut", "mix_embeddings", "group_advantages",
        "selective_log_softmax")  # fmt: skip


def _case(name: str, device: str, who: str) -> Case:
    call = calls()[name if who == "ours" else EMPTY]

    def many() -> None:
        for _ in range(CALLS):
            call()

    return Case("launch", f"the host's side of {CALLS} calls of {name}", "-", 0, many, ROUNDS)


CASES = {name: (partial(_case, name), ("ours", EMPTY)) for name in OURS}


def bench_launch(benchmark: Any, case_name: str, who: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("this is about a GPU that is not there")
    make, _ = CASES[case_name]
    with fake_gpu():
        compare(benchmark, make, who, device)


def main() -> None:
    torch.set_num_threads(1)
    with fake_gpu():
        for call in calls().values():
            call()
        best = dict.fromkeys(calls(), float("inf"))
        for _ in range(ROUNDS):
            for name, call in calls().items():
                began = time.process_time()
                for _ in range(CALLS):
                    call()
                best[name] = min(best[name], (time.process_time() - began) / CALLS)
        print(f"{'call':<24} {'host us':>8} {'of an empty operation':>22} {'launches':>9}")
        for name, call in calls().items():
            with launches() as made:
                call()
            print(f"{name:<24} {1e6 * best[name]:8.1f} {best[name] / best[EMPTY]:22.1f} {len(made):9}")


if __name__ == "__main__":
    main()
