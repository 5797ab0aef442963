"""The training study: GRPO and N-GRPO, then the anchor-only control and Gaussian noise, on the word problems.

    python -m examples.real_model.train_study --preset full

Every run, an arm with a seed, leaves a file; one that is interrupted goes on from its last checkpoint. GRPO is TRL's
own trainer, the others are NGRPOTrainer. The arms of a seed get the same prompts. Held-out problems are answered
without mixing, at the temperature of the rollouts, before and after. `--report` adds the figures to a rollout study's
report.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from tqdm import tqdm

from ngrpo_ops import MixingConfig
from ngrpo_ops.files import read_json, write_json
from ngrpo_ops.integrations.transformers import NeighborMixing

from ..countdown.arms import ARMS
from ..countdown.rl import train
from .load import NAME, load_model
from .sample import encode, sample
from .study import TEMPERATURE, as_command, check_settings, shared_settings
from .tasks import WORD_PROBLEMS, Problem, WordProblems

HELD_OUT_SEED = 1000  # of the problems
LEARNING_RATE = 2e-6
_SAVE_STEPS = 5
_FORWARDS = 4  # of a step's rows: the logits of 64 rows at once, with their gradients, take more than 20 GB


@dataclass(frozen=True)
class Preset:
    """How large a study is.

    Args:
        arms: their names, those of the question first.
        seeds: of each arm.
        steps: of training.
        prompts, group: of a step.
        tokens: of a completion, at most.
        held_out, samples: of the evaluation: problems, and completions of each.
    """

    arms: tuple[str, ...]
    seeds: int
    steps: int
    prompts: int
    group: int
    tokens: int
    held_out: int
    samples: int


PRESETS = {
    "full": Preset(("grpo", "ngrpo", "anchor", "gaussian"), 2, 20, 8, 8, 40, held_out=40, samples=16),
    "quick": Preset(("grpo", "ngrpo"), 1, 2, 2, 4, 16, held_out=2, samples=4),
}


class Job(NamedTuple):
    arm: str
    seed: int


def jobs_of(preset: Preset) -> list[Job]:
    """Seed by seed, and the first two arms before the others, so that a study cut short is balanced."""
    first, rest = preset.arms[:2], preset.arms[2:]
    return [Job(arm, seed) for arms in (first, rest) for seed in range(preset.seeds) for arm in arms]


def problems_of(preset: Preset, seed: int) -> tuple[list[Problem], list[Problem]]:
    """The held-out problems, and those that a seed is trained on, which are others."""
    task = WordProblems()
    held_out = task.problems(preset.held_out, HELD_OUT_SEED)
    known = {problem.prompt for problem in held_out}
    drawn = task.problems(preset.steps * preset.prompts + preset.held_out, seed)
    return held_out, [problem for problem in drawn if problem.prompt not in known][: preset.steps * preset.prompts]


def reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """1 for the right answer, else 0. Completions are texts, or chats of one message."""
    task = WordProblems()
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [
        float(task.is_right(task.answer(text), Problem("", right))) for text, right in zip(texts, answer, strict=True)
    ]


def dataset_of(problems: list[Problem], tokenizer: Any) -> Dataset:
    """Prompts as chats where the tokenizer has a template for them, with the right answers."""

    def prompt(problem: Problem) -> Any:
        has_template = getattr(tokenizer, "chat_template", None)
        return [{"role": "user", "content": problem.prompt}] if has_template else problem.prompt

    return Dataset.from_list([{"prompt": prompt(problem), "answer": problem.answer} for problem in problems])


def evaluate(model: Any, tokenizer: Any, problems: list[Problem], preset: Preset, seed: int) -> list[int]:
    """How many samples of each problem are right, of plain sampling."""
    task, mixing = (
        WordProblems(),
        NeighborMixing(model, MixingConfig(mixing_rate=0.0, sampler="counter_based", seed=seed)),
    )
    correct = []
    try:
        for first in range(0, len(problems), 10):
            part = problems[first : first + 10]
            rows = torch.arange(first * preset.samples, (first + len(part)) * preset.samples, device="cpu")
            batch = encode(tokenizer, [problem.prompt for problem in part])
            rollouts = sample(mixing, batch, preset.samples, TEMPERATURE, preset.tokens, rows)
            texts = [
                tokenizer.decode(row[live], skip_special_tokens=True)
                for row, live in zip(rollouts.completions, rollouts.live, strict=True)
            ]
            for i, problem in enumerate(part):
                answers = map(task.answer, texts[i * preset.samples : (i + 1) * preset.samples])
                correct.append(sum(task.is_right(answer, problem) for answer in answers))
    finally:
        mixing.remove()
    return correct


def training_settings(preset: Preset, seed: int) -> dict[str, Any]:
    """The fields of GRPOConfig that every training on the word problems sets."""
    return {
        "per_device_train_batch_size": preset.prompts * preset.group // _FORWARDS,
        "gradient_accumulation_steps": _FORWARDS,
        "num_generations": preset.group,
        "max_completion_length": preset.tokens,
        "learning_rate": LEARNING_RATE,
        "temperature": TEMPERATURE,
        "seed": seed,
    }


def run_job(job: Job, preset: Preset, load: Callable[[], tuple[Any, Any]], out: Path) -> dict[str, Any]:
    """One arm, one seed: trained, from its last checkpoint if there is one, and evaluated."""
    begun = time.perf_counter()
    model, tokenizer = load()
    held_out, training = problems_of(preset, job.seed)
    folder = out / "checkpoints" / f"{job.arm}-{job.seed}"
    resume = any(folder.glob("checkpoint-*"))
    model, history = train(
        model,
        tokenizer,
        dataset_of(training, tokenizer),
        reward,
        mixing=ARMS[job.arm].mixing,
        steps=preset.steps,
        name=f"{job.arm}, seed {job.seed}",
        resume=resume,
        output_dir=str(folder),
        **training_settings(preset, job.seed),
        save_strategy="steps",
        save_steps=_SAVE_STEPS,
        save_total_limit=1,
    )
    correct = evaluate(model, tokenizer, held_out, preset, seed=1000 + job.seed)
    return job._asdict() | {
        "samples": preset.samples,
        "correct": correct,
        "history": history,
        "resumed": resume,
        "seconds": time.perf_counter() - begun,
    }


def run(preset: Preset, load: Callable[[], tuple[Any, Any]], name: str | None, out: Path) -> None:
    """All runs that are not there yet."""
    model, tokenizer = load()  # before anything is written
    check_settings(asdict(preset) | {"learning_rate": LEARNING_RATE} | shared_settings(name, WORD_PROBLEMS), out)
    before = out / "before.json"
    if not before.exists():
        held_out, _ = problems_of(preset, 0)
        correct = evaluate(model, tokenizer, held_out, preset, seed=999)
        write_json(before, {"samples": preset.samples, "correct": correct})
    del model
    paths = {job: out / "runs" / f"{job.arm}-{job.seed}.json" for job in jobs_of(preset)}
    (out / "runs").mkdir(exist_ok=True)
    for path in (path for path in paths.values() if path.exists()):
        read_json(path)  # damaged: now, and not after the hours of the others
    for job, path in tqdm(paths.items(), desc="training study", unit="run"):
        if not path.exists():
            write_json(path, run_job(job, preset, load, out))
            shutil.rmtree(out / "checkpoints" / f"{job.arm}-{job.seed}", ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.real_model.train_study", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--preset", choices=list(PRESETS), default="quick")
    parser.add_argument("--model", help=f"a folder or a hub name; default: {NAME}, dequantized from 4 bits")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: runs/real_model/training-<preset>")
    parser.add_argument("--report", type=Path, help="folder of a rollout study's report, which this one is added to")
    parser.add_argument("--report-only", action="store_true", help="run nothing; report what is there")
    given = parser.parse_args(arguments)
    out = given.out or Path("runs/real_model") / f"training-{given.preset}"
    if given.report_only and given.report is None:
        parser.error("--report-only needs --report")
    if given.report is not None and not (given.report / "results.json").exists():
        parser.error(f"--report {given.report} must hold the results.json of a rollout study")
    with as_command(arguments is None, os.cpu_count() or 1):
        if not given.report_only:
            run(PRESETS[given.preset], lambda: load_model(given.model), given.model, out)
        elif not (out / "settings.json").exists():
            sys.exit(f"--report-only: there is no training study in {out}")
        if given.report is not None:
            from .report import add_training

            print(add_training(out, given.report))


if __name__ == "__main__":
    main()
