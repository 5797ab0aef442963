"""Small calls, where the time is that of checks and dispatch."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ngrpo_ops import (
    ADVANTAGE_PRESETS,
    candidate_weights,
    decode_step,
    group_advantages,
    mix_embeddings,
    mixing_candidates,
    selective_log_softmax,
)

SECONDS = 0.4  # for each call
AT_ONCE = 5  # calls between two looks at the clock


def timed(only: str) -> dict[str, list[float]]:
    """Seconds a call, many times over, by the call's name."""
    return {name: measure(call) for name, call in calls().items() if only in name}


def measure(call: Callable[[], object]) -> list[float]:
    for _ in range(20):
        call()
    found = []
    end = time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end:
        for _ in range(AT_ONCE):
            call()
        found.append((time.perf_counter() - start) / AT_ONCE)
    return found


def calls() -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    logits, table, neighbors = torch.randn(4, 1000), torch.randn(1000, 64), torch.randint(1000, (1000, 2))
    one, ids = logits[:1].clone(), torch.randint(1000, (16, 3))
    weights = torch.rand(16, 3).softmax(1)
    leaf_table, leaf_weights = table.clone().requires_grad_(), weights.clone().requires_grad_()
    mixed_grad = torch.randn(16, 64)
    rewards = torch.rand(64)
    scored, scored_ids = torch.randn(8, 1000), torch.randint(1000, (8,))
    leaf_scored = scored.clone().requires_grad_()
    preset = ADVANTAGE_PRESETS["trl/rloo_normalized"]
    assert preset["whitening"] is not None

    def backward(call: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), leaves, grad)

    return {
        "decode_step, B = 4, V = 1000, k = 3": lambda: decode_step(logits, table, neighbors, seed=0, step=1),
        "decode_step, B = 1, V = 1000, k = 3": lambda: decode_step(one, table, neighbors, seed=0, step=1),
        "mixing_candidates, B = 4, V = 1000, k = 3": lambda: mixing_candidates(logits, neighbors),
        "mix_embeddings, [16, 3], d = 64": lambda: mix_embeddings(table, ids, weights),
        "mix_embeddings, [16, 3], d = 64, backward": backward(
            lambda: mix_embeddings(leaf_table, ids, leaf_weights), [leaf_table, leaf_weights], mixed_grad
        ),
        "group_advantages, [64], groups of 8": lambda: group_advantages(rewards, group_size=8),
        "group_advantages, [64], groups of 8, whitened": lambda: group_advantages(rewards, group_size=8, **preset),
        "selective_log_softmax, [8, 1000]": lambda: selective_log_softmax(scored, scored_ids),
        "selective_log_softmax, [8, 1000], backward": backward(
            lambda: selective_log_softmax(leaf_scored, scored_ids), [leaf_scored], torch.ones(8)
        ),
        "candidate_weights, [4, 3] of [4, 1000]": lambda: candidate_weights(logits, ids[:4]),
    }
