"""The TRL adapter's judgments: what is refused by which name, what rate 0 leaves alone, what a replay's error says."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import EOS, PAD, VOCABULARY, tiny_model
from test_trl_adapter import checkpoint, logged, train  # noqa: F401 (fixtures)
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer

from ngrpo_ops.integrations.transformers import NeighborMixing
from ngrpo_ops.integrations.trl import NGRPOTrainer
from ngrpo_ops.integrations.trl import trainer as trainer_module
from ngrpo_ops.metrics import replay_errors, replay_sums, replay_tolerance

# Rate 0 is the trainer's own path -----------------------------------------------------------------------------------


def own_generate(model: Any) -> Any:
    """A model whose generate is replaced by one that never calls ours."""

    def generate(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.cat([input_ids, input_ids[:, -1:].repeat(1, 5), torch.full_like(input_ids[:, -1:], EOS)], dim=1)

    model.generate = generate
    return model


def echo(text: str) -> str:
    """Says it again.

    Args:
        text: what to say.

    Returns:
        The text.
    """
    return text


@pytest.mark.parametrize(
    "settings",
    [
        {"generation_kwargs": {"num_beams": 2}},
        {"generation_kwargs": {"temperature": 0.5, "eos_token_id": [5]}},
        {"generation_kwargs": {"guidance_scale": 1.5}},
        {"neftune_noise_alpha": 5.0},
        {"max_completion_length": 5, "mask_truncated_completions": True},
    ],
    ids=["beams", "unscored", "guidance", "neftune", "truncated"],
)
def test_rate_zero_takes_what_the_stock_trainer_takes(train: Any, settings: dict) -> None:  # noqa: F811
    stock, ours = train(GRPOTrainer, GRPOConfig, steps=2, **settings), train(steps=2, mixing_rate=0.0, **settings)
    for name in ("loss", "grad_norm", "reward"):
        assert logged(ours, name) == logged(stock, name)
    for a, b in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(a, b)
    hooks = ours.model.get_input_embeddings()._forward_hooks.values()
    assert not [hook for hook in hooks if hook.__module__.startswith("ngrpo_ops")]


def test_a_rate_that_draws_no_step_trains_as_rate_zero(train: Any) -> None:  # noqa: F811
    """By our path, records and replays included: the baseline that docs/trl.md has for LoRA with a server."""
    plain, ours = train(steps=2, mixing_rate=0.0), train(steps=2, mixing_rate=1e-9)
    assert logged(ours, "mix/gated_share") == [0.0, 0.0] and max(logged(ours, "mix/replay_error")) < 1e-5
    for a, b in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rate_zero_leaves_a_replaced_generate_alone(train: Any) -> None:  # noqa: F811
    trainer = train(steps=1, mixing_rate=0.0, model=own_generate(tiny_model()))
    assert len(logged(trainer, "loss")) == 1
    with pytest.raises(RuntimeError, match="generate did not call its logits processors"):
        train(steps=1, mixing_rate=0.5, model=own_generate(tiny_model()))


def test_rate_zero_reads_no_mixing_at_all(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(NeighborMixing, "__init__", refuse)
    trainer = train(steps=1, mixing_rate=0.0, save_strategy="steps", save_steps=1)
    saved = trainer.args.output_dir + "/checkpoint-1"
    resumed = train(steps=2, mixing_rate=0.0, resume_from_checkpoint=saved)
    assert resumed.state.global_step == 2 and "mixing" not in vars(resumed)
    train.make(mixing_rate=0.0, rollout_func=lambda prompts, trainer: {})


def test_a_trainer_made_without_its_init_takes_trls_own_path(train: Any) -> None:  # noqa: F811
    """As TRL's own tests make one. It has what TRL's has, and nothing of ours."""
    stock = train.make(GRPOTrainer, GRPOConfig, beta=0.1)
    ours = object.__new__(NGRPOTrainer)
    vars(ours).update(vars(stock))
    scored = []
    for trainer in (stock, ours):
        torch.manual_seed(0)
        scored.append(trainer._generate_and_score_completions([{"prompt": "w5 w6 w7"}] * 8))
    assert scored[0].keys() == scored[1].keys()
    for name, value in scored[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(scored[1][name])), name


# Settings that differ, and are named --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "harmless",
    [
        {"do_sample": True},
        {"temperature": 1.0},
        {"num_return_sequences": 1},
        {"eos_token_id": EOS},
        {"num_beams": 1},
        {"guidance_scale": 1.0},
        {"use_cache": True},
    ],
    ids=str,
)
def test_settings_of_the_trainers_own_value_pass(train: Any, harmless: dict) -> None:  # noqa: F811
    model = tiny_model()
    model.generation_config.eos_token_id = EOS
    trainer = train.make(mixing_rate=0.5, model=model, generation_kwargs=harmless)
    assert trainer.mixing.config.mixing_rate == 0.5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"do_sample": False}, r"generation_kwargs \{'do_sample': False\} is not supported"),
        ({"temperature": 0.5}, r"generation_kwargs \{'temperature': 0\.5\} .* set it in NGRPOConfig"),
        ({"num_return_sequences": 2}, r"\{'num_return_sequences': 2\}"),
        ({"eos_token_id": [5]}, r"\{'eos_token_id': \[5\]\}"),
        ({"num_beams": 2}, r"num_beams=2 \(generation mode 'beam_sample'\)"),
        ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": False}, "do_sample"),
        ({"dola_layers": "high"}, "dola_layers"),
        ({"guidance_scale": 1.5}, r"guidance_scale=1\.5"),
    ],
    ids=str,
)
def test_a_setting_that_differs_is_named(train: Any, setting: dict, message: str) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=message):
        train.make(mixing_rate=0.5, generation_kwargs=setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"use_cache": False}, "use_cache"),
    ],
    ids=str,
)
def test_the_models_own_generation_config_is_read_at_construction(train: Any, setting: dict, message: str) -> None:  # noqa: F811
    model = tiny_model()
    model.generation_config = GenerationConfig(**model.generation_config.to_diff_dict() | setting)
    with pytest.raises(ValueError, match=message):
        train.make(mixing_rate=0.5, model=model)


# Verdicts -----------------------------------------------------------------------------------------------------------


def test_of_no_compared_token_there_is_no_error(train: Any) -> None:  # noqa: F811
    """Every completion is truncated and masked: with and without the replay."""
    settings = {"mask_truncated_completions": True, "max_completion_length": 3, "model": tiny_model()}
    trainer = train(steps=2, mixing_rate=0.5, **settings)
    assert logged(trainer, "completions/clipped_ratio") == [1.0, 1.0]
    assert logged(trainer, "mix/replay_error") == logged(trainer, "mix/replay_outliers") == []
    assert all("mix/replay_error" in entry for entry in trainer.state.log_history[:2]), "logged, as unknown"


def test_the_errors_of_rows_and_ranks() -> None:
    """Against a loop over tokens."""
    generator = torch.Generator().manual_seed(0)
    gate = torch.rand(6, 9, generator=generator) < 0.3
    difference = torch.randn(6, 9, generator=generator) * 10.0 ** torch.randint(-5, 0, (6, 9), generator=generator)
    mask = torch.rand(6, 9, generator=generator) < 0.8
    off: dict[bool, list[float]] = {True: [], False: []}
    for row in range(6):
        for column in range(9):
            if mask[row, column]:
                off[bool(gate[row, :column].any())].append(abs(float(difference[row, column])))
    parts = [slice(0, 2), slice(2, 6)]
    found = replay_errors(torch.stack([replay_sums(difference[p], gate[p], mask[p], 1e-3) for p in parts]))
    assert found.largest == max(off[True] + off[False]) and found.largest_before == max(off[False])
    for share, values in ((found.outliers, off[True]), (found.outliers_before, off[False])):
        assert share == pytest.approx(sum(value > 1e-3 for value in values) / len(values))
    nothing = replay_errors(replay_sums(difference, gate, torch.zeros_like(mask), 1e-3)[None])
    assert all(value != value for value in nothing)
    unknown = replay_errors(replay_sums(difference * torch.nan, gate, mask, 1e-3)[None])
    assert unknown.outliers == unknown.outliers_before == 1 and unknown.largest != unknown.largest
    assert replay_tolerance(torch.float32) == 1e-3 and replay_tolerance(torch.bfloat16) == 2.0**-5


def mixture_of_experts(seed: int) -> Any:
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2,
            pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model


@pytest.mark.parametrize("seed", range(6))
def test_experts_chosen_otherwise_are_told_from_a_missing_replay(
    train: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """In bfloat16 a router chooses other experts for some tokens, which are then off by far more than rounding."""
    said: list[str] = []
    monkeypatch.setattr(trainer_module.logger, "warning", said.append)
    settings = {"steps": 2, "bf16": True, "seed": seed, "max_completion_length": 24, "learning_rate": 1e-6}
    trainer = train(mixing_rate=0.5, model=mixture_of_experts(seed), **settings)
    assert not said
    assert max(logged(trainer, "mix/replay_outliers")) < 0.05
    train(mixing_rate=0.0, model=mixture_of_experts(seed), **settings)
    assert not said
    monkeypatch.setattr(NeighborMixing, "replay", lambda self, record, model=None: nullcontext())
    trainer = train(mixing_rate=0.5, model=mixture_of_experts(seed), **settings)
    assert len(said) == 1 and "does not embed the mixes" in said[0]
    assert min(logged(trainer, "mix/replay_outliers")) > 0.3
