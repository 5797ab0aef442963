"""The remaining operations against what a user would write in plain torch, in the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import QWEN2_5_0_5B

from ngrpo_ops import group_advantages, mix_embeddings, selective_log_softmax

V, D = QWEN2_5_0_5B


def _mix() -> dict[str, Callable[[], Any]]:
    embedding, ids = torch.randn(V, D), torch.randint(V, (4096, 3))
    weights = torch.rand(4096, 3).softmax(-1)
    return {
        "ours": lambda: mix_embeddings(embedding, ids, weights),
        "peer": lambda: torch.nn.functional.embedding_bag(ids, embedding, per_sample_weights=weights, mode="sum"),
    }


def _log_softmax() -> dict[str, Callable[[], Any]]:
    logits, ids = torch.randn(64, V), torch.randint(V, (64,))
    return {
        "ours": lambda: selective_log_softmax(logits, ids, temperature=0.7),
        "peer": lambda: (logits / 0.7).log_softmax(-1).gather(1, ids[:, None]),
    }


def _advantages() -> dict[str, Callable[[], Any]]:
    rewards = torch.rand(4096)

    def trl() -> torch.Tensor:
        grouped = rewards.view(-1, 8)
        return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()

    return {"ours": lambda: group_advantages(rewards, group_size=8), "peer": trl}


CASES = {
    f"mix_embeddings N=4096 k=3 V={V} d={D} float32": _mix,
    f"selective_log_softmax N=64 V={V} float32": _log_softmax,
    "group_advantages N=4096 G=8": _advantages,
}


@pytest.mark.parametrize("who", ["ours", "peer"])
@pytest.mark.parametrize("case", CASES)
def bench_op(benchmark: Any, case: str, who: str) -> None:
    torch.manual_seed(0)
    both = CASES[case]()
    benchmark.group = case
    benchmark.extra_info["who"] = who
    benchmark.pedantic(both[who], rounds=10, warmup_rounds=2)
    torch.testing.assert_close(both["ours"]().flatten(), both["peer"]().flatten(), rtol=1e-4, atol=1e-4)
