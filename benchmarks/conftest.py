"""Benchmarks run with `pytest benchmarks --benchmark-only`: ours and its peers beside it, in the same run.

Each runs on the CPU, and on the GPU where there is one. The last lines are the ratios. With NGRPO_OPS_RESULTS naming a
folder, the figures are kept there in a CSV named by device and versions, with the commit that was measured.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
from harness import COMMIT, DEVICES, file_name, keep_freed_memory
from peers import NOT_THE_SAME

keep_freed_memory()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark_disable", False):
        os.environ["NGRPO_OPS_VOCABULARY_DIVISOR"] = "16"  # read by shapes.py, which the benchmarks import later


COLUMNS = (
    "op", "shape", "dtype", "device", "who", "q20_s", "median_s", "q80_s", "peak_mib", "gb", "gb_per_s",
    "times_ours", "best_times_ours", "speed_to_best_peer", "scored_pairs", "commit",
)  # fmt: skip


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, list[dict[str, Any]]] = {}
    for bench in getattr(session, "benchmarks", None) or ():
        if bench.stats.rounds:
            groups.setdefault(bench.group, []).append(_row(bench))
    for group, rows in groups.items():
        terminalreporter.write_line(group)
        for row in sorted(rows, key=lambda row: row["median_s"]):
            ratio = ""
            if row["times_ours"] is not None:
                ratio = f"  {row['times_ours']:.2f} x ours, taken in turn ({row['best_times_ours']:.3f} best to best)"
            if row["scored_pairs"] is not None:
                ratio += f"  {row['scored_pairs']:.2f} pairs scored a query"
            terminalreporter.write_line(
                f"    {row['who']:<38} {1e3 * row['median_s']:9.3f} ms ({1e3 * row['q20_s']:.3f} to "
                f"{1e3 * row['q80_s']:.3f})  {row['gb_per_s']:7.1f} GB/s  peak {row['peak_mib']:4.0f} MiB{ratio}"
            )
        peers = [
            r["times_ours"]
            for r in rows
            if r["times_ours"] and not r["who"].startswith("ours") and r["who"] not in NOT_THE_SAME
        ]
        ours = next((row for row in rows if row["who"] == "ours"), None)
        if peers and ours:
            ours["speed_to_best_peer"] = min(peers)
    folder = os.environ.get("NGRPO_OPS_RESULTS")
    if folder and groups:
        _keep(Path(folder), [row for rows in groups.values() for row in rows])


def _row(bench: Any) -> dict[str, Any]:
    times = sorted(bench.stats.data)
    at = {f"q{q}": times[min(len(times) - 1, int(q / 100 * len(times)))] for q in (20, 50, 80)}
    info = bench.extra_info
    return {
        **{name: info[name] for name in ("op", "shape", "dtype", "device", "who", "peak_mib", "gb")},
        **{name: info.get(name) for name in ("times_ours", "best_times_ours", "scored_pairs")},
        "q20_s": at["q20"], "median_s": at["q50"], "q80_s": at["q80"], "gb_per_s": info["gb"] / at["q50"],
    }  # fmt: skip


def _keep(folder: Path, rows: list[dict[str, Any]]) -> None:
    """In the file of this device and these versions, in the place of what it has of the same operations."""
    folder.mkdir(parents=True, exist_ok=True)
    for device in DEVICES:
        mine = [row | {"commit": COMMIT} for row in rows if row["device"] == device]
        if not mine:
            continue
        path = folder / f"{file_name(device)}.csv"
        measured = {row["op"] for row in mine}
        others = []
        if path.exists():
            with path.open(newline="") as file:
                others = [row for row in csv.DictReader(file) if row["op"] not in measured]
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            table.writerows([*others, *mine])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark that takes `case_name`, `who` and `device` runs once for each of its module's `CASES` and members."""
    if "case_name" in metafunc.fixturenames:
        members = [
            (name, who, device)
            for device in DEVICES
            for name, (_, whos) in metafunc.module.CASES.items()
            for who in whos
            if device != "cuda" or "loop" not in who
        ]
        metafunc.parametrize(("case_name", "who", "device"), members)
