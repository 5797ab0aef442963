"""NGRPOTrainer under DeepSpeed on two processes, without an engine: it is built in the engines' environment alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from processes import assert_same_training, two_processes


@pytest.mark.parametrize(
    ("training", "stages"), [("full", ["zero2"]), ("alone", ["zero3"]), ("lora", ["zero2", "zero3"])]
)
def test_deepspeed_on_two_processes(tmp_path: Path, training: str, stages: list[str], difference: Any) -> None:
    """ZeRO-2 and ZeRO-3 are DDP with the weights spread: the same rollouts, the same training."""
    ddp = two_processes(tmp_path / "ddp", "ddp", training)
    for stage in stages:
        ranks = two_processes(tmp_path / stage, stage, training)
        assert_same_training(ranks, ddp)
        difference(f"trl, {stage}", max(log["mix/replay_error"] for log in ranks[0]["logs"]), ranks[0]["plain"])
