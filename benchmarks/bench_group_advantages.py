"""Advantages of 65,536 rewards in groups of 8, by group size and by label."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import Case, compare
from peers import compiled, openrlhf_group_norm, trl_advantages, verl_loop
from shapes import REWARDS

from ngrpo_ops import group_advantages

G = 8
EQUAL = ("ours", "TRL's formula", "OpenRLHF's group_norm", "torch.compile of TRL's formula", "an empty launch")
LABELS = ("ours", "verl's loop")


def _case(labeled: bool, device: str, who: str) -> Case:
    rewards = torch.rand(REWARDS, generator=torch.Generator().manual_seed(0)).to(device)
    labels = (torch.arange(REWARDS) // G).to(device)
    plain = labels.tolist()
    run: Callable[[], Any] = {
        "ours": lambda: partial(group_advantages, rewards, **({"group_ids": labels} if labeled else {"group_size": G})),
        "TRL's formula": lambda: partial(trl_advantages, rewards, G),
        "OpenRLHF's group_norm": lambda: partial(openrlhf_group_norm, rewards, G),
        "torch.compile of TRL's formula": lambda: compiled(trl_advantages, rewards, G),
        "an empty launch": lambda: partial(torch.zeros, 1, device=device),
        "verl's loop": lambda: partial(verl_loop, rewards, plain),
    }[who]()
    shape = f"N={REWARDS} groups of {G}" + (", by label" if labeled else "")
    rounds = 3 if who == "verl's loop" else 50
    return Case("group_advantages", shape, "float32", 8 * REWARDS, run, rounds)


CASES = {"equal": (partial(_case, False), EQUAL), "labels": (partial(_case, True), LABELS)}


def bench_advantages(benchmark: Any, case_name: str, who: str, device: str) -> None:
    make, _ = CASES[case_name]
    compare(benchmark, make, who, device)
