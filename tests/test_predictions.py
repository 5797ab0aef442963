"""What is predicted for an H100 from the table of resources, and that it is never taken for a measurement."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu
import predictions
import report
from triton import Config

from ngrpo_ops.kernels.primitives import Launch

ROW = {"instructions": 1000, "loop": 400}


def _launch(programs: int, warps: int) -> Launch:
    return Launch(None, {}, Config({}, num_warps=warps), (programs, 1))


def test_instructions_are_those_of_the_busiest_multiprocessor():
    cycle = 1 / predictions.CLOCK
    once = predictions.busiest(_launch(132, 4), ROW, trips=1)
    assert once == pytest.approx(1000 * cycle)  # 4 warps, a scheduler each
    assert predictions.busiest(_launch(1, 4), ROW, trips=1) == once
    assert predictions.busiest(_launch(133, 4), ROW, trips=1) == pytest.approx(2 * once)
    assert predictions.busiest(_launch(132, 8), ROW, trips=1) == pytest.approx(2 * once)
    assert predictions.busiest(_launch(132, 4), ROW, trips=10) == pytest.approx(4600 * cycle)
    assert predictions.busiest(_launch(132, 4), ROW, 1, flops=4096 * 500) == pytest.approx(1500 * cycle)


def test_a_kernel_that_others_measured_otherwise_takes_all_times_away(monkeypatch):
    good = {"predicted_s": 1.0, "published_s": 1.9}
    assert predictions.trusted([good, {"predicted_s": 1.9, "published_s": 1.0}])
    for bad in ({"predicted_s": 1.0, "published_s": 2.1}, {"predicted_s": 2.1, "published_s": 1.0}):
        assert not predictions.trusted([good, bad])
    monkeypatch.setattr(predictions, "calibrate", lambda: [{"predicted_s": 9.0, "published_s": 1.0}])
    monkeypatch.setattr(predictions, "operations", lambda: [1])
    monkeypatch.setattr(predictions, "predict", lambda operation, table: {"floor_s": 1.0, "predicted_s": 2.0})
    assert predictions.rows()[1:] == [{"floor_s": 1.0}]


@pytest.mark.slow
def test_the_file_is_of_the_table_of_resources():
    """`make resources` has written both; the kernels of others' are compiled again."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, predictions.__file__, "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_every_prediction_has_a_floor_below_it():
    with predictions.RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == predictions.COLUMNS
    for row in rows:
        if row["predicted_s"]:
            assert float(row["predicted_s"]) >= max(float(row["floor_s"]), float(row["instructions_s"]))


def test_predictions_stand_beside_measurements_and_are_called_what_they_are(tmp_path):
    ours = {"op": "decode_step", "shape": "B=64 V=10", "dtype": "bfloat16", "launches": 2, "floor_s": 1e-6,
            "instructions_s": 2e-6, "predicted_s": 6e-6, "published_s": "", "source": ""}  # fmt: skip
    other = {**ours, "op": "plain softmax", "predicted_s": 2e-3, "published_s": 1e-3, "source": "somewhere"}
    with (tmp_path / "predictions_h100.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, predictions.COLUMNS)
        table.writeheader()
        table.writerows([other, ours, {**ours, "op": "mine", "instructions_s": "", "predicted_s": ""}])
    text = report.write(tmp_path).read_text().split("## Predicted for an H100, and not measured")[1]
    assert "| `decode_step` B=64 V=10 bfloat16 | 1.00 µs | 2.00 µs | 2 | 6.00 µs |" in text
    assert "| `mine` B=64 V=10 bfloat16 | 1.00 µs | - | 2 | - |" in text
    assert "| plain softmax B=64 V=10 | 2.00 ms | 1.00 ms | 2.00 | somewhere |" in text


def test_make_gpu_knows_the_predictions_by_the_names_of_the_benchmarks():
    predicted = gpu.predictions()
    for who, op, shape, dtype in predicted:
        assert who == "ours" and op and shape and dtype in ("float32", "bfloat16")
    assert ("ours", "decode_step", "B=64 V=151936", "bfloat16") in predicted
    assert all(float(text) > 0 for text in predicted.values())
