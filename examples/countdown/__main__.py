"""The study from start to end: supervised checkpoint, the arms, evaluation, table, results.json and a picture."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers
import trl
from transformers import AutoModelForCausalLM

import ngrpo_ops

from .arms import ARMS
from .evaluate import sample_solutions, summarize
from .model import build_tokenizer
from .report import draw, print_table
from .rl import train_arm
from .supervised import cached_checkpoint
from .task import EQUATION

KS = (1, 4, 16, 32, 64)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.countdown", description=__doc__)
    parser.add_argument("--arms", nargs="+", default=["grpo", "ngrpo"], choices=["grpo", "ngrpo", "anchor"])
    parser.add_argument("--seeds", type=int, default=1, help="runs of each arm, with seeds 0, 1, ...")
    parser.add_argument("--steps", type=int, default=100, help="reinforcement learning steps")
    parser.add_argument("--k", type=int, default=3, help="candidates of a mix, the anchor counted (arm ngrpo)")
    parser.add_argument("--rate", type=float, default=0.1, help="mixing rate (arms ngrpo and anchor)")
    parser.add_argument("--tied", action="store_true", help="tie input and output embeddings")
    parser.add_argument("--out", type=Path, default=Path("runs/countdown"), help="folder of results and cache")
    parser.add_argument("--fresh", action="store_true", help="train the supervised checkpoint again")
    parser.add_argument("--quick", action="store_true", help="a miniature, to see that everything runs")
    arguments = parser.parse_args()
    for name, least in (("seeds", 1), ("steps", 1), ("k", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    if not 0 <= arguments.rate <= 1:
        parser.error(f"--rate must be within [0, 1], got {arguments.rate}")
    # These would otherwise fail only after minutes of training.
    vocabulary = len(build_tokenizer(EQUATION))
    if arguments.k > vocabulary:
        parser.error(f"--k must be at most {vocabulary}, the size of the vocabulary, got {arguments.k}")
    if any(path.exists() and not path.is_dir() for path in (arguments.out, *arguments.out.parents)):
        parser.error(f"--out must be a folder or a place for one, got {arguments.out}")
    return arguments


def main() -> None:
    arguments = _arguments()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of TRL's calls into transformers
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    quick = arguments.quick
    steps = min(arguments.steps, 3) if quick else arguments.steps
    ks, samples = ((1, 4, 16), 16) if quick else (KS, max(KS))
    task = EQUATION
    held_out = task.held_out(16 if quick else 200, seed=0)
    checkpoint, supervised = cached_checkpoint(
        arguments.out / "supervised",
        task,
        held_out,
        steps=30 if quick else 900,
        tied=arguments.tied,
        fresh=arguments.fresh,
    )
    seconds = {"supervised": time.perf_counter() - started}

    tokenizer = build_tokenizer(task)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    scored = sample_solutions(model, tokenizer, task, held_out, samples, seed=0, name="supervised")
    arms: dict[str, Any] = {"supervised": summarize([scored], ks)}
    for name in arguments.arms:
        begun = time.perf_counter()
        mixing = ARMS[name].mixing
        if mixing is not None:
            k = 1 if name == "anchor" else arguments.k
            mixing = mixing | {"mixing_k": k, "mixing_rate": arguments.rate}
        runs, histories = [], []
        for seed in range(arguments.seeds):
            model, history = train_arm(
                task,
                checkpoint,
                held_out,
                arguments.out / "trainer",
                mixing=mixing,
                steps=steps,
                seed=seed,
                name=name,
            )
            runs.append(sample_solutions(model, tokenizer, task, held_out, samples, seed=0, name=name))
            histories.append(history)
        arms[name] = summarize(runs, ks) | {"history": histories}
        seconds[name] = time.perf_counter() - begun
    seconds["total"] = time.perf_counter() - started

    print_table(arms, ks)
    results = {
        "settings": {
            "supervised": supervised,
            "steps": steps,
            "seeds": arguments.seeds,
            "k": arguments.k,
            "rate": arguments.rate,
            "held_out": len(held_out),
            "samples": samples,
        },
        "versions": {
            "ngrpo_ops": ngrpo_ops.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "python": platform.python_version(),
        },
        "arms": arms,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1))
    draw(arms, ks, arguments.out / "countdown.png")
    print(f"{arguments.out / 'results.json'} and {arguments.out / 'countdown.png'} in {seconds['total']:.0f} s")
    print(
        f"{arguments.seeds} seed(s) on a toy task: arms whose intervals overlap are not told apart by this run, and "
        "the intervals are over problems, not over runs."
    )


if __name__ == "__main__":
    main()
