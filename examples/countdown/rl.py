"""The arms: the same checkpoint, prompts and seeds through TRL's GRPOTrainer and through NGRPOTrainer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from ngrpo_ops.integrations.trl import NGRPOConfig, NGRPOTrainer

from .model import build_tokenizer
from .task import Problem, is_solution, training_stream

PROMPTS = 32
GROUP = 8
MAX_COMPLETION = 14
HISTORY = (
    "reward",
    "frac_reward_zero_std",
    "entropy",
    "mix/gated_share",
    "mix/anchor_differs",
    "mix/anchor_weight",
    "mix/cosine",
    "mix/replay_error",
)


def reward(completions: list[str], numbers: list, target: list, **kwargs: Any) -> list[float]:
    """1 for a solution, else 0."""
    problems = (Problem(tuple(n), t) for n, t in zip(numbers, target, strict=True))
    return [float(is_solution(text, problem)) for text, problem in zip(completions, problems, strict=True)]


class _Progress(TrainerCallback):
    def __init__(self, name: str, steps: int) -> None:
        self.bar = tqdm(total=steps, desc=name, unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs and "reward" in logs:
            self.bar.set_postfix(reward=f"{logs['reward']:.3f}", refresh=False)
            self.bar.update()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.bar.close()


def train_arm(
    arm: str,
    checkpoint: Path,
    held_out: Sequence[Problem],
    output: Path,
    *,
    numbers: int,
    largest: int,
    steps: int,
    k: int,
    rate: float,
    seed: int,
) -> tuple[PreTrainedModel, dict[str, list[float]]]:
    """Train one arm.

    Args:
        arm: "grpo" (TRL's own trainer), "ngrpo", or "anchor" (N-GRPO with k = 1: only emits the argmax).

    Returns:
        The trained model, and the history by metric, a value a step.
    """
    stream = itertools.islice(training_stream(held_out, numbers, largest, f"rl {seed}"), steps * PROMPTS)
    problems = [problem for problem, _ in stream]
    dataset = Dataset.from_list(
        [{"prompt": p.prompt, "numbers": list(p.numbers), "target": p.target} for p in problems]
    )
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": steps,
        "per_device_train_batch_size": PROMPTS * GROUP,
        "num_generations": GROUP,
        "max_completion_length": MAX_COMPLETION,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "temperature": 1.0,
        "beta": 0.0,
        "loss_type": "grpo",
        "gradient_checkpointing": False,
        "seed": seed,
    }
    if arm == "grpo":
        trainer_class, args = GRPOTrainer, GRPOConfig(**settings)
    else:
        trainer_class = NGRPOTrainer
        args = NGRPOConfig(**settings, mixing_k=1 if arm == "anchor" else k, mixing_rate=rate)
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(checkpoint),
        reward_funcs=reward,
        args=args,
        train_dataset=dataset,
        processing_class=build_tokenizer(),
        callbacks=[_Progress(f"{arm}, seed {seed}", steps)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    history = {name: [row[name] for row in rows] for name in HISTORY if name in rows[0]}
    history["usable_groups"] = [1.0 - share for share in history.pop("frac_reward_zero_std")]
    return trainer.model.eval(), history
