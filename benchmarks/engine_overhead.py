"""What mixing adds to a rollout in vLLM's engine for the CPU, with the interpreter's part apart: `make bench-engines`.

The rollouts are those of bench_vllm.py, taken in turn. vLLM's own kernels are interpreted there, which is most of a
step; their seconds are counted where triton's interpreter is called, and the rest is what mixing could add to on a GPU
too: the host's work, the plain torch operations and the records.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench_vllm import CASES, WHO  # it imports vLLM with its stand-ins, before triton's interpreter is used
from tqdm import tqdm
from triton.runtime.interpreter import GridExecutor

RESULTS = Path(__file__).parent / "results" / "engine_overhead.json"
PLAIN = "plain engine"


class Interpreter:
    """The seconds that kernels are interpreted."""

    def __init__(self) -> None:
        self.seconds = 0.0
        launch = GridExecutor.__call__

        def timed(executor: Any, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return launch(executor, *args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        GridExecutor.__call__ = timed


def measure(rounds: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of every round, whole and in the interpreter."""
    (make,) = (make for make, _ in CASES.values())
    runs = {who: partial(make, "cpu", who)().run for who in WHO}
    interpreter = Interpreter()
    found: dict[str, list[dict[str, float]]] = {who: [] for who in WHO}
    for run in runs.values():
        run()
    for _ in tqdm(range(rounds), desc="rounds"):
        for who, run in runs.items():
            interpreter.seconds = 0.0
            began = time.perf_counter()
            run()
            found[who].append({"seconds": time.perf_counter() - began, "interpreter": interpreter.seconds})
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Medians, and medians of the ratios within a round, in Markdown."""
    lines = ["| | whole | of it interpreted | whole / plain | the rest / plain's rest |", "|---|---|---|---|---|"]
    for who, rounds in found.items():
        pairs = list(zip(rounds, found[PLAIN], strict=True))
        whole = median(a["seconds"] / b["seconds"] for a, b in pairs)
        rest = median((a["seconds"] - a["interpreter"]) / (b["seconds"] - b["interpreter"]) for a, b in pairs)
        seconds, inside = (median(one[name] for one in rounds) for name in ("seconds", "interpreter"))
        lines.append(f"| {who} | {seconds:.2f} s | {inside:.2f} s | {whole:.2f} | {rest:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    found = measure(parser.parse_args().rounds)
    machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    RESULTS.write_text(json.dumps(machine | {"rounds": found}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
