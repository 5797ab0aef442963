"""Where the time of a training step on the real model goes, and what mixing adds to it.

    python -m examples.real_model.step_times

TRL's own trainer and ours train on the same word problems, in turn. The parts of a step are timed where they are
called. The first step of a run is not counted. step_times.json keeps every step; the table is printed as it stands in
this folder's README.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import TrainerCallback
from trl import GRPOTrainer

from ngrpo_ops._patching import replaced
from ngrpo_ops.files import write_json
from ngrpo_ops.integrations.transformers import NeighborMixing
from ngrpo_ops.integrations.transformers.hooks import EmbeddingMixer
from ngrpo_ops.integrations.transformers.rollout import RolloutProcessor

from ..countdown.arms import ARMS
from ..countdown.rl import train
from ..measure import markdown_table
from .load import load_model
from .study import as_command, shared_settings
from .tasks import WORD_PROBLEMS
from .train_study import PRESETS as STUDIES
from .train_study import dataset_of, problems_of, reward, training_settings

RESULTS = Path(__file__).parent / "step_times.json"
STEP, ROLLOUT, TABLE, MIXING = "step", "rollout", "table of neighbors", "deciding and embedding mixes"
FORWARD, BACKWARD, UPDATE = "forward of the loss, with the replay", "backward", "optimizer"
PARTS = {
    ROLLOUT: [(GRPOTrainer, "_generate_single_turn")],
    TABLE: [(NeighborMixing, "refresh")],
    MIXING: [(RolloutProcessor, "__call__"), (EmbeddingMixer, "_append_candidates"), (EmbeddingMixer, "_write_mixes")],
    FORWARD: [(GRPOTrainer, "_get_per_token_logps_and_entropies")],
    BACKWARD: [(Accelerator, "backward")],
    UPDATE: [(torch.optim.AdamW, "step")],
}
WITHIN_ROLLOUT = (TABLE, MIXING)


class Stopwatch:
    """Seconds of the parts of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now = dict.fromkeys(PARTS, 0.0)
        self._in_rollout = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part, methods in PARTS.items():
                for owner, name in methods:
                    stack.enter_context(replaced(owner, name, self._timed(part, getattr(owner, name))))
            yield

    def _timed(self, part: str, method: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if part == MIXING and not self._in_rollout:  # the embedding hooks of a replay are of its forward
                return method(*args, **kwargs)
            self._in_rollout |= part == ROLLOUT
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._now[part] += time.perf_counter() - began
                self._in_rollout &= part != ROLLOUT

        return timed

    def callback(self) -> TrainerCallback:
        watch = self

        class Steps(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                watch._now = dict.fromkeys(PARTS, 0.0)
                self.began = time.perf_counter()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                watch.steps.append({STEP: time.perf_counter() - self.began, **watch._now})

        return Steps()


def measure(load: Callable[[], tuple[Any, Any]], steps: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """The steps that are counted, of each arm."""
    preset = STUDIES["full"]
    problems = problems_of(preset, 0)[1]
    found: dict[str, list[dict[str, float]]] = {"grpo": [], "ngrpo": []}
    for arm in tqdm([*found] * rounds, desc="step times", unit="run"):
        model, tokenizer = load()
        watch = Stopwatch()
        with tempfile.TemporaryDirectory() as folder, watch.watching():
            train(
                model, tokenizer, dataset_of(problems, tokenizer), reward, mixing=ARMS[arm].mixing, steps=steps + 1,
                name=None, callbacks=[watch.callback()], output_dir=folder, **training_settings(preset, seed=0),
            )  # fmt: skip
        found[arm] += watch.steps[1:]
    return found


def table(results: Mapping[str, Any]) -> str:
    """In Markdown: medians of the steps."""
    arms = results["arms"]
    medians = {
        arm: {part: median(step[part] for step in steps) for part in (STEP, *PARTS)} for arm, steps in arms.items()
    }
    whole = medians["ngrpo"][STEP]
    rows = [
        [
            ("&nbsp;&nbsp;of it " if part in WITHIN_ROLLOUT else "") + part,
            "" if part in WITHIN_ROLLOUT else f"{medians['grpo'][part]:.2f}",
            f"{medians['ngrpo'][part]:.2f}",
            f"{medians['ngrpo'][part] / whole:.1%}",
        ]
        for part in (STEP, *PARTS)
    ]
    return markdown_table(["seconds", "GRPO", "N-GRPO", "of its step"], rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.real_model.step_times", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", help="a folder or a hub name; default: SmolLM2, dequantized from 4 bits")
    parser.add_argument("--steps", type=int, default=3, help="that are counted, of a run; default: 3")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each trainer; default: 2")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file; default: step_times.json beside this")
    given = parser.parse_args(arguments)
    for name in ("steps", "rounds"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(given, name)}")
    with as_command(arguments is None, os.cpu_count() or 1):
        arms = measure(lambda: load_model(given.model), given.steps, given.rounds)
    settings = shared_settings(given.model, WORD_PROBLEMS) | {
        "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    results = json.loads(json.dumps(settings | {"arms": arms}))
    write_json(given.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
