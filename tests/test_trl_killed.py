"""A run that is killed, at random moments and while it saves, ends as the run that is not.

KILLS=10 in the environment kills it ten times; each start takes some ten seconds. All steps are within an epoch.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import tiny_model

WORKER = Path(__file__).with_name("killed_worker.py")
STEPS, KILLS = 40, int(os.environ.get("KILLS", "3"))


def start(model: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, str(WORKER), str(model), str(out), str(STEPS)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), str(WORKER.parent)])}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_the_one_that_is_not(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    whole = start(model, tmp_path / "whole")
    said, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    chance, said, kills = random.Random(5), "", 0
    for _ in range(4 * KILLS):
        process = start(model, tmp_path / "killed")
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if line == "training\n":
                break
        time.sleep(chance.uniform(0, 0.4))
        if kills < KILLS and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        said += process.communicate(timeout=300)[0]
        break
    assert process.returncode == 0 and kills == KILLS, said
    one, other = (torch.load(tmp_path / name / "final.pt") for name in ("whole", "killed"))
    assert one["rows"] == other["rows"] == STEPS * 4
    for name, value in one["weights"].items():
        assert torch.equal(value, other["weights"][name]), f"{name}\n{said}"
    assert "mixing_state.json is missing" not in said
