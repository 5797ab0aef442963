"""The study from start to end: supervised checkpoint, the arms, evaluation, table, results.json and a picture."""

from __future__ import annotations

import argparse
import hashlib
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

from .evaluate import sample_solutions, summarize
from .model import build_tokenizer
from .report import draw, print_table
from .rl import train_arm
from .supervised import BATCH, LEARNING_RATE, supervised_checkpoint
from .task import held_out_problems

KS = (1, 4, 16, 32, 64)
NUMBERS, LARGEST_NUMBER = 4, 12


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
    vocabulary = len(build_tokenizer())
    if arguments.k > vocabulary:
        parser.error(f"--k must be at most {vocabulary}, the size of the vocabulary, got {arguments.k}")
    if any(path.exists() and not path.is_dir() for path in (arguments.out, *arguments.out.parents)):
        parser.error(f"--out must be a folder or a place for one, got {arguments.out}")
    return arguments


def _checkpoint(arguments: argparse.Namespace, held_out: list, settings: dict[str, Any]) -> Path:
    """The supervised checkpoint of these settings, from the cache if it is there."""
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = arguments.out / "supervised" / name
    done = folder / "settings.json"  # written last: a run that was cut off leaves none
    if done.exists() and not arguments.fresh:
        print(f"supervised checkpoint from the cache: {folder} (--fresh trains it again)")
        return folder
    keys = ("numbers", "largest", "steps", "tied", "seed")
    supervised_checkpoint(folder, held_out, **{key: settings[key] for key in keys})
    done.write_text(json.dumps(settings, indent=1))
    return folder


def main() -> None:
    arguments = _arguments()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of TRL's calls into transformers
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    quick = arguments.quick
    steps = min(arguments.steps, 3) if quick else arguments.steps
    ks, samples = ((1, 4, 16), 16) if quick else (KS, max(KS))
    supervised = {
        "numbers": NUMBERS,
        "largest": LARGEST_NUMBER,
        "steps": 30 if quick else 900,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "tied": arguments.tied,
        "seed": 0,
    }
    held_out = held_out_problems(16 if quick else 200, NUMBERS, LARGEST_NUMBER, seed=0)
    checkpoint = _checkpoint(arguments, held_out, supervised | {"held_out": len(held_out)})
    seconds = {"supervised": time.perf_counter() - started}

    tokenizer = build_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    right, unique = sample_solutions(model, tokenizer, held_out, samples, seed=0, name="supervised")
    arms: dict[str, Any] = {"supervised": summarize([right], [unique], ks)}
    for arm in arguments.arms:
        begun = time.perf_counter()
        scored, histories = [], []
        for seed in range(arguments.seeds):
            model, history = train_arm(
                arm,
                checkpoint,
                held_out,
                arguments.out / "trainer",
                numbers=NUMBERS,
                largest=LARGEST_NUMBER,
                steps=steps,
                k=arguments.k,
                rate=arguments.rate,
                seed=seed,
            )
            scored.append(sample_solutions(model, tokenizer, held_out, samples, seed=0, name=arm))
            histories.append(history)
        rights, uniques = zip(*scored, strict=True)
        arms[arm] = summarize(rights, uniques, ks) | {"history": histories}
        seconds[arm] = time.perf_counter() - begun
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
