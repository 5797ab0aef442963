"""Reinforcement learning of one arm, through TRL's GRPOTrainer or through NGRPOTrainer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from ngrpo_ops.integrations.trl import NGRPOConfig, NGRPOTrainer

from .model import build_tokenizer
from .task import Problem, Task

PROMPTS = 32
GROUP = 8
LEARNING_RATE = 2e-4
HISTORY = (
    "reward",
    "frac_reward_zero_std",
    "entropy",
    "num_tokens",
    "mix/gated_share",
    "mix/anchor_differs",
    "mix/anchor_weight",
    "mix/cosine",
    "mix/replay_error",
)


def reward_of(task: Task) -> Callable[..., list[float]]:
    """The task's reward function: 1 for a solution, else 0."""

    def reward(completions: list[str], numbers: list, target: list, **kwargs: Any) -> list[float]:
        problems = (Problem(tuple(n), t) for n, t in zip(numbers, target, strict=True))
        return [float(task.is_solution(text, problem)) for text, problem in zip(completions, problems, strict=True)]

    return reward


class _Progress(TrainerCallback):
    def __init__(self, name: str, steps: int) -> None:
        self.bar = tqdm(total=steps, desc=name, unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs and "reward" in logs:
            self.bar.set_postfix(reward=f"{logs['reward']:.3f}", refresh=False)
            self.bar.update()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.bar.close()


def train(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Dataset,
    reward: Callable[..., list[float]],
    *,
    mixing: dict[str, Any] | None,
    steps: int,
    name: str | None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> tuple[PreTrainedModel, dict[str, list[float]]]:
    """Train one arm, of any example, on the CPU, by the plain GRPO loss and without a reference model.

    Args:
        mixing: the fields of NGRPOConfig that the arm sets; None: TRL's own trainer.
        name: the progress bar's; None: no bar.
        resume: go on from the last checkpoint in the output folder.
        callbacks: further ones.
        **settings: further fields of GRPOConfig: its output folder, batch, group, learning rate and so on.

    Returns:
        The trained model, and the history by metric, a value a step.
    """
    settings = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": steps,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "loss_type": "grpo",
        "gradient_checkpointing": False,
    } | settings
    if mixing is None:
        trainer_class, args = GRPOTrainer, GRPOConfig(**settings)
    else:
        trainer_class, args = NGRPOTrainer, NGRPOConfig(**settings, **mixing)
    trainer = trainer_class(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[*callbacks, *([] if name is None else [_Progress(name, steps)])],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    rows = [row for row in trainer.state.log_history if "reward" in row]
    history = {name: [row[name] for row in rows] for name in HISTORY if name in rows[0]}
    history["usable_groups"] = [1.0 - share for share in history.pop("frac_reward_zero_std")]
    return trainer.model.eval(), history


def train_arm(
    task: Task,
    checkpoint: Path,
    held_out: Sequence[Problem],
    output: Path,
    *,
    mixing: dict[str, Any] | None,
    steps: int,
    seed: int,
    temperature: float = 1.0,
    name: str | None = None,
) -> tuple[PreTrainedModel, dict[str, list[float]]]:
    """Train one arm on Countdown.

    Args:
        mixing: the fields of NGRPOConfig that the arm sets; None: TRL's own trainer.
        temperature: of the rollouts, and of the policy in the loss.
        name: the progress bar's; None: no bar.

    Returns:
        The trained model, and the history by metric, a value a step.
    """
    problems = [p for p, _ in itertools.islice(task.training(held_out, f"rl {seed}"), steps * PROMPTS)]
    dataset = Dataset.from_list(
        [{"prompt": p.prompt, "numbers": list(p.numbers), "target": p.target} for p in problems]
    )
    return train(
        AutoModelForCausalLM.from_pretrained(checkpoint),
        build_tokenizer(task),
        dataset,
        reward_of(task),
        mixing=mixing,
        steps=steps,
        name=None if name is None else f"{name}, seed {seed}",
        output_dir=str(output),
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=task.max_tokens,
        learning_rate=LEARNING_RATE,
        temperature=temperature,
        seed=seed,
    )
