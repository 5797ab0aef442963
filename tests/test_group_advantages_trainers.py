"""The presets of group_advantages against the advantages that the installed trainers really compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from models import tiny_model, tokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from ngrpo_ops import ADVANTAGE_PRESETS, group_advantages
from ngrpo_ops.testing import assert_within

G = 4
NAN = float("nan")
REWARDS = torch.tensor(
    [
        [1.0, 0.25], [0.0, NAN], [0.5, 0.75], [NAN, NAN],
        [2.0, 1.0], [2.0, 0.5], [NAN, 3.0], [-1.0, 0.0],
        [0.0, NAN], [NAN, NAN], [NAN, NAN], [NAN, NAN],
    ]
)  # fmt: skip
WEIGHTS = [1.0, 0.5]


def trl_advantages(trainer: type, config: type, folder: Path, rewards: torch.Tensor, **settings: Any) -> torch.Tensor:
    """What TRL hands to its loss when the reward functions return these columns; None where NaN."""

    def column(c: int) -> Any:
        def reward(completions: list[str], **kwargs: Any) -> list[float | None]:
            return [None if x != x else x for x in rewards[: len(completions), c].tolist()]

        reward.__name__ = f"reward_{c}"
        return reward

    arguments = config(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", num_generations=G, max_completion_length=2,
        per_device_train_batch_size=len(rewards), reward_weights=WEIGHTS[: rewards.shape[1]], **settings,
    )  # fmt: skip
    dataset = Dataset.from_dict({"prompt": ["w3 w4"] * 8})
    made = trainer(
        tiny_model(), reward_funcs=[column(c) for c in range(rewards.shape[1])], args=arguments,
        train_dataset=dataset, processing_class=tokenizer(),
    )  # fmt: skip
    made.model.train()
    return made._generate_and_score_completions([{"prompt": "w3 w4"}] * len(rewards))["advantages"].detach()


@pytest.mark.parametrize("functions", [1, 2])
@pytest.mark.parametrize(
    ("preset", "trainer", "config", "settings"),
    [
        ("trl/grpo", GRPOTrainer, GRPOConfig, {"scale_rewards": "group"}),
        ("trl/grpo_batch", GRPOTrainer, GRPOConfig, {"scale_rewards": "batch"}),
        ("trl/dr_grpo", GRPOTrainer, GRPOConfig, {"scale_rewards": "none"}),
        ("trl/gdpo", GRPOTrainer, GRPOConfig, {"multi_objective_aggregation": "normalize_then_sum"}),
        ("trl/rloo", RLOOTrainer, RLOOConfig, {"beta": 0.0}),
        ("trl/rloo_normalized", RLOOTrainer, RLOOConfig, {"beta": 0.0, "normalize_advantages": True}),
    ],
)
def test_trl(tmp_path, backend, preset, trainer, config, settings, functions):
    rewards = REWARDS[:, :functions]
    theirs = trl_advantages(trainer, config, tmp_path, rewards, **settings)
    weights = torch.tensor(WEIGHTS[:functions])
    ours = group_advantages(rewards, group_size=G, reward_weights=weights, backend=backend, **ADVANTAGE_PRESETS[preset])
    assert_within(ours, theirs, 1e-6 * (1 + theirs.double().abs()))


@pytest.mark.parametrize(
    ("preset", "function", "settings"),
    [
        ("verl/grpo", "compute_grpo_outcome_advantage", {}),
        ("verl/dr_grpo", "compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": False}),
        ("verl/rloo", "compute_rloo_outcome_advantage", {}),
    ],
)
def test_verl(backend, preset, function, settings):
    """Runs where verl is installed, which it is not by the extras here (it brings Ray); else see test_presets."""
    algorithms = pytest.importorskip(
        "verl.trainer.ppo.core_algos", reason="verl is not installed", exc_type=ImportError
    )
    labels = numpy.array([0, 0, 3, 0, 3, 5, 0])
    rewards = torch.tensor([0.0, 1.0, 0.5, 0.25, -2.0, 3.0, 1.0])
    theirs, _ = getattr(algorithms, function)(rewards[:, None].clone(), torch.ones(7, 1), labels, **settings)
    ours = group_advantages(rewards, group_ids=torch.from_numpy(labels), backend=backend, **ADVANTAGE_PRESETS[preset])
    assert_within(ours, theirs[:, 0], 1e-6 * (1 + theirs[:, 0].double().abs()))
