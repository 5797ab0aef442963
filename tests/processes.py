"""Training on two processes (trainer_worker.py), and what must hold of it however the weights are spread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ngrpo_ops.random import philox

PARITY = 1e-5
WITHOUT = 1e-2  # what plain ids differ by, at the least


def two_processes(folder: Path, parallelism: str, training: str) -> list[dict]:
    """What each rank of `trainer_worker.py` saw."""
    folder.mkdir()
    worker = Path(__file__).parent / "trainer_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(
        [*command, str(worker), str(folder), parallelism, training],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2))
    # One set of weights and one table, which changes with the training.
    assert first["weights"] == second["weights"]
    assert first["tables"] == second["tables"] and first["tables"][0] != first["tables"][1]
    assert first["sharded"] == second["sharded"] == [parallelism in ("fsdp2", "zero3")] * 2
    # Each rank replays its own rollouts, and the gates are those of the rows' places in the global batch.
    for log in first["logs"]:
        assert log["mix/replay_error"] <= PARITY and 0.2 < log["mix/gated_share"] < 0.8 and log["mix/cosine"] < 1
    assert min(first["plain"], second["plain"]) > WITHOUT
    if "kl" in first["logs"][0]:
        assert first["logs"][0]["kl"] <= 1e-9 < first["logs"][1]["kl"]
    seed, step = torch.tensor(9), torch.arange(8)
    for generation in range(2):
        for rank, seen in enumerate((first, second)):
            rows = torch.arange(4) + 8 * generation + 4 * rank
            words = torch.stack([philox(seed, rows, s)[0] for s in step], dim=1)
            assert torch.equal(torch.tensor(seen["gates"][generation]), words < 2**31)
    return [first, second]


def assert_same_training(ours: list[dict], others: list[dict]) -> None:
    """How the weights are spread must make no difference."""
    for log, other in zip(ours[0]["logs"], others[0]["logs"], strict=True):
        assert log.keys() == other.keys()
        for name in {"loss", "kl", "grad_norm", "reward", "mix/anchor_weight", "mix/cosine"} & log.keys():
            assert log[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
