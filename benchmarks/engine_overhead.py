"""What mixing adds to a rollout in vLLM's engine for the CPU, with the interpreter's part apart: `make bench-engines`.

The rollouts are those of bench_vllm.py, taken in turn. vLLM's own kernels are interpreted there, which is most of a
step; their seconds are counted where triton's interpreter is called, and the rest is what mixing could add to on a GPU
too: the host's work, the plain torch operations and the records.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench_vllm import CASES, WHO  # it imports vLLM with its stand-ins, before triton's interpreter is used
from harness import environment
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


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians of the rounds, and of the ratios to the plain engine within a round."""
    out = {}
    for who, rounds in found.items():
        pairs = list(zip(rounds, found[PLAIN], strict=True))
        out[who] = {name: median(one[name] for one in rounds) for name in ("seconds", "interpreter")} | {
            "times_plain": median(a["seconds"] / b["seconds"] for a, b in pairs),
            "rest_times_plain": median(
                (a["seconds"] - a["interpreter"]) / (b["seconds"] - b["interpreter"]) for a, b in pairs
            ),
        }
    return out


def table(medians: dict[str, dict[str, float]]) -> str:
    """In Markdown."""
    lines = ["| | whole | of it interpreted | whole / plain | the rest / plain's rest |", "|---|---|---|---|---|"]
    for who, of in medians.items():
        lines.append(
            f"| {who} | {of['seconds']:.2f} s | {of['interpreter']:.2f} s | {of['times_plain']:.2f} "
            f"| {of['rest_times_plain']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    found = measure(parser.parse_args().rounds)
    results = {"environment": environment("cpu"), "medians": summary(found), "rounds": found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results["medians"]))


if __name__ == "__main__":
    main()
