"""Benchmarks run with `pytest benchmarks --benchmark-only`; peers run beside ours, and the ratio is printed last."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Each group's medians, as ratios to its member named "peer"."""
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, float]] = {}
    for bench in getattr(session, "benchmarks", None) or ():
        if bench.stats.rounds:
            groups.setdefault(bench.group, {})[bench.extra_info["who"]] = bench.stats.median
            notes = {key: value for key, value in bench.extra_info.items() if key != "who"}
            if notes:
                terminalreporter.write_line(f"{bench.group}, {bench.extra_info['who']}: {notes}")
    for group, medians in groups.items():
        if len(medians) > 1:
            ratio = medians["ours"] / medians["peer"]
            terminalreporter.write_line(
                f"{group}: ours {medians['ours']:.4g} s, peer {medians['peer']:.4g} s, ratio {ratio:.2f}"
            )
