"""The TRL adapter: stock GRPO at rate 0, replayed histories in every scoring forward, its logs, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pandas
import pytest
import snippets
import torch
from datasets import Dataset
from models import EOS, VOCABULARY, tiny_model, tokenizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from processes import assert_same_training, two_processes
from transformers import HfArgumentParser
from trl import GRPOConfig, GRPOTrainer, TrlParser

from ngrpo_ops import MixingConfig, MixRecord, NeighborTable, group_advantages, nearest_neighbors, strategies
from ngrpo_ops.integrations.transformers import NeighborMixing
from ngrpo_ops.integrations.trl import NGRPOConfig, NGRPOTrainer, checks
from ngrpo_ops.integrations.trl import trainer as trainer_module

PARITY = 1e-5
WORDS = torch.arange(VOCABULARY) > 2  # that may be neighbors by default: all tokens but the special ones


def distinct(completions: list[str], **kwargs: Any) -> list[float]:
    return [len(set(text.split())) / 10 for text in completions]


def prompts() -> Dataset:
    texts = [" ".join(f"w{3 + (7 * i + j) % 60}" for j in range(2 + i % 4)) for i in range(16)]
    return Dataset.from_dict({"prompt": texts})


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved model: with beta > 0 TRL loads its reference from the path."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[EOS] = model.lm_head.weight.mean(0) + 0.05  # completions of many lengths
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def train(checkpoint: str, tmp_path: Path) -> Callable[..., GRPOTrainer]:
    def run(trainer: type = NGRPOTrainer, config: type = NGRPOConfig, steps: int = 3, **settings: Any) -> GRPOTrainer:
        trained = make(trainer, config, max_steps=steps, **settings)
        trained.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
        return trained

    def make(trainer: type = NGRPOTrainer, config: type = NGRPOConfig, **settings: Any) -> GRPOTrainer:
        keywords = {
            name: settings.pop(name)
            for name in ("peft_config", "rollout_func", "tools", "environment_factory", "model", "eval_dataset")
            if name in settings
        }
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "max_completion_length": 12,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        return trainer(
            **{"model": checkpoint, "reward_funcs": distinct, "train_dataset": prompts()} | keywords,
            args=config(**defaults | settings),
            processing_class=tokenizer(),
        )

    run.make = make  # type: ignore[attr-defined]
    return run


def logged(trainer: GRPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if entry.get(name) is not None]


# Rate 0 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "beta": 0.04},
        {"repetition_penalty": 1.2, "top_p": 0.9, "temperature": 0.8, "loss_type": "grpo"},
    ],
    ids=["default", "multi-step", "filtered"],
)
def test_rate_zero_is_stock_grpo_bit_for_bit(train: Any, settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(NeighborTable, "refresh")  # nothing is searched
    stock = train(GRPOTrainer, GRPOConfig, **settings)
    ours = train(mixing_rate=0.0, **settings)
    names = [name for name in ("reward", "loss", "grad_norm", "kl", "entropy") if logged(stock, name)]
    assert len(names) >= 4 and len(logged(stock, "loss")) == 3
    for name in names:
        assert logged(ours, name) == logged(stock, name), name
    for (key, a), b in zip(stock.model.state_dict().items(), ours.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


# Replay -----------------------------------------------------------------------------------------------------------

MULTI_STEP = {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "beta": 0.04}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        MULTI_STEP,
        {**MULTI_STEP, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {
            "pad_to_multiple_of": 8,
            "mixing_strategy": "topk",
            "mixing_variant": "released",
            "loss_on_mixed_steps": False,
        },
        {"temperature": 0.7, "mixing_k": 1, "cache_implementation": "static"},
        {
            "mask_truncated_completions": True,
            "max_completion_length": 64,
            "mixing_metric": "l2",
            "importance_sampling_level": "sequence",
        },
        {"mixing_strategy": "topk", "mixing_sampler": "counter_based", "top_p": 0.9},
        {**MULTI_STEP, "mixing_strategy": "gumbel", "mixing_temperature": 0.5},
        {**MULTI_STEP, "mixing_strategy": "gaussian", "mixing_noise_scale": 1.0},
        {"mixing_strategy": "moi", "mixing_moi_beta": 0.5, "top_p": 0.9},
        {**MULTI_STEP, "mixing_strategy": "multiplex", "mixing_sampler": "counter_based"},
        {"mixing_strategy": "anchor", "mixing_entropy_threshold": 4.1, "mixing_sampler": "counter_based"},
    ],
    ids=[
        "default", "multi-step", "reentrant", "non-reentrant", "padded-topk", "anchor-static", "truncated-gspo",
        "topk-ngrpo", "gumbel", "gaussian", "moi", "multiplex-ngrpo", "anchor-ngrpo",
    ],
)  # fmt: skip
def test_the_policy_scores_the_rollouts_own_history(train: Any, settings: dict) -> None:
    trainer = train(mixing_rate=0.5, **settings)
    errors = logged(trainer, "mix/replay_error")
    assert errors and max(errors) <= PARITY


@pytest.fixture
def user_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A strategy in a module of the user's: two draws of the policy's and the likeliest tokens, all of one weight."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ways.py").write_text(
        "import torch\n\n\n"
        "def even(policy):\n"
        "    ids = torch.cat([policy.draws(2), policy.likeliest(policy.k - 2)], dim=-1)\n"
        "    return ids, torch.full(ids.shape, 1 / policy.k, device=ids.device)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(strategies, "_registry", dict(strategies._registry))
    yield "mine.ways:even"
    for name in ("mine", "mine.ways"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("sampler", ["native", "counter_based"])
@pytest.mark.parametrize("loss_on_mixed_steps", [True, False])
def test_a_strategy_of_the_users_trains(
    train: Any, user_strategy: str, loss_on_mixed_steps: bool, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[dict] = []
    generate = NGRPOTrainer._generate_and_score_completions

    def keep(self: Any, inputs: Any) -> Any:
        outputs.append(generate(self, inputs))
        return outputs[-1]

    monkeypatch.setattr(NGRPOTrainer, "_generate_and_score_completions", keep)
    trainer = train(
        steps=2, mixing_rate=0.5, mixing_strategy=user_strategy, mixing_k=4, mixing_sampler=sampler,
        loss_on_mixed_steps=loss_on_mixed_steps,
    )  # fmt: skip
    errors = logged(trainer, "mix/replay_error")
    assert len(errors) == 2 and max(errors) < PARITY
    assert logged(trainer, "mix/anchor_weight") == [0.25, 0.25]
    assert len(outputs) == 2
    for output in outputs:
        live, gate = output["completion_mask"].bool(), output["mix_gate"]
        assert gate.any() and ("tool_mask" in output) is not loss_on_mixed_steps
        scored = live if loss_on_mixed_steps else live & ~gate
        assert int(output["num_items_in_batch"]) == int(scored.sum())


SEQUENCE = {"importance_sampling_level": "sequence"}


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "grpo", **SEQUENCE},  # N-GSPO
        {"loss_type": "bnpo"},
        {"loss_type": "dr_grpo", "off_policy_mask_threshold": 0.1},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "sapo", "top_entropy_quantile": 0.5},
        {"loss_type": "luspo", **SEQUENCE},
        {"loss_type": "vespo"},
    ],
    ids=lambda settings: settings["loss_type"],
)
def test_every_loss_sees_ratios_of_one_at_the_first_update(train: Any, settings: dict) -> None:
    """With old log-probabilities of the rollout: nothing is clipped, off policy or away from the reference then."""
    trainer = train(mixing_rate=0.5, **MULTI_STEP | {"steps": 4, "learning_rate": 1e-2} | settings)
    assert max(logged(trainer, "mix/replay_error")) <= PARITY
    assert logged(trainer, "kl")[0] <= 1e-9 < logged(trainer, "kl")[-1]
    for metric in {name for entry in trainer.state.log_history for name in entry if "clip_ratio" in name}:
        assert logged(trainer, metric)[0] == 0, metric
    assert all(0 < norm < 1e3 for norm in logged(trainer, "grad_norm"))


@pytest.mark.parametrize("settings", [{}, MULTI_STEP], ids=["default", "multi-step"])
def test_without_the_replay_the_error_is_large(train: Any, settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NeighborMixing, "replay", lambda self, record, model=None: nullcontext())
    trainer = train(mixing_rate=0.5, **settings)
    assert max(logged(trainer, "mix/replay_error")) > 1e-2


def test_an_error_beyond_rounding_is_warned_of(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(trainer_module.logger, "warning", said.append)
    train(steps=1, mixing_rate=0.5)
    assert not said
    with monkeypatch.context() as patch:
        patch.setattr(NeighborMixing, "replay", lambda self, record, model=None: nullcontext())
        train(mixing_rate=0.5)
    assert len(said) == 1, "once, not at every step"
    assert "mix/replay_error" in said[0] and "does not embed the mixes" in said[0]
    said.clear()

    class Shifted(NGRPOTrainer):  # scores by another model than it rolls out with, from the first token on
        def _log_replay_error(self, logps: torch.Tensor, *args: Any) -> None:
            super()._log_replay_error(logps - 0.5, *args)

    train(Shifted, steps=1, mixing_rate=0.5)
    assert "0.5 already, so that it is not the replay's" in said[0]
    said.clear()
    model = tiny_model(attention_dropout=0.5)
    train(steps=1, mixing_rate=0.5, model=model)
    assert "dropout (0.5)" in said[0] and "disable_dropout=True" in said[0]


@pytest.mark.parametrize("settings", [{"bf16": True}, {"model_init_kwargs": {"dtype": "bfloat16"}}], ids=str)
def test_rounding_in_bfloat16_is_told_from_a_missing_replay(
    train: Any, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(trainer_module.logger, "warning", said.append)
    for rate in (0.5, 1.0):
        trainer = train(mixing_rate=rate, **settings)
        assert 1e-3 < max(logged(trainer, "mix/replay_error")) < 0.1 and not said
    monkeypatch.setattr(NeighborMixing, "replay", lambda self, record, model=None: nullcontext())
    train(mixing_rate=0.5, **settings)
    assert "does not embed the mixes" in said[0]
    said.clear()

    class Shifted(NGRPOTrainer):
        def _log_replay_error(self, logps: torch.Tensor, *args: Any) -> None:
            super()._log_replay_error(logps - 1, *args)

    train(Shifted, steps=1, mixing_rate=0.5, **settings)
    assert "already, so that it is not the replay's" in said[0]


def test_old_current_and_reference_see_the_same_history(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first update the three models are one: each must give the rollout's own log-probabilities."""
    scored: list[tuple[Any, torch.Tensor]] = []
    score = GRPOTrainer._get_per_token_logps_and_entropies

    def spy(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = score(self, model, *args, **kwargs)
        scored.append((model, result[0].detach().clone()))
        return result

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", spy)
    outputs: list[dict] = []
    generate = NGRPOTrainer._generate_and_score_completions

    def keep(self: Any, inputs: Any) -> Any:
        outputs.append(generate(self, inputs))
        return outputs[-1]

    monkeypatch.setattr(NGRPOTrainer, "_generate_and_score_completions", keep)
    trainer = train(steps=1, mixing_rate=0.5, **MULTI_STEP | {"gradient_accumulation_steps": 4})
    output = outputs[0]
    live = output["completion_mask"].bool()
    rollout = output["mix_logprobs"]
    assert output["mix_gate"].any()
    assert (output["old_per_token_logps"] - rollout)[live].abs().max() <= PARITY
    assert (output["ref_per_token_logps"] - rollout)[live].abs().max() <= PARITY
    assert [model is trainer.ref_model for model, _ in scored[:2]] == [False, True]
    # Current: the four slices of the loss, shuffled rows of the batch, before the one update of this run.
    assert logged(trainer, "kl")[0] <= 1e-9
    current = torch.cat([logps for _, logps in scored[2:]])
    assert current.shape == rollout.shape
    distance = ((current[:, None] - rollout[None]) * live).abs().amax(-1)
    assert (distance.amin(1) <= PARITY).all() and (distance.amin(0) <= PARITY).all()


def test_lora_replays_policy_and_reference(train: Any, checkpoint: str) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "embed_tokens"])
    trainer = train(mixing_rate=0.5, peft_config=lora, **MULTI_STEP)
    assert max(logged(trainer, "mix/replay_error")) <= PARITY
    assert logged(trainer, "kl")[0] <= 1e-9
    assert logged(trainer, "kl")[-1] > 0


def test_a_whole_embedding_that_peft_trains_is_searched_and_replayed(train: Any) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    trainer = train(mixing_rate=0.5, learning_rate=1e-1, peft_config=lora, **MULTI_STEP)
    assert max(logged(trainer, "mix/replay_error")) <= PARITY
    assert logged(trainer, "kl")[0] <= 1e-9 < logged(trainer, "kl")[-1]
    trainer.mixing.refresh()
    base, trained = (
        module.weight.detach()
        for name, module in trainer.model.get_input_embeddings().named_modules()
        if isinstance(module, torch.nn.Embedding)
    )
    assert torch.equal(trainer.mixing.table.ids, nearest_neighbors(trained, 2, allowed=WORDS).ids)
    assert not torch.equal(trainer.mixing.table.ids, nearest_neighbors(base, 2, allowed=WORDS).ids)


def test_lora_of_the_embedding_is_searched_merged(train: Any) -> None:
    lora = LoraConfig(r=4, target_modules=["embed_tokens"])
    trainer = train(mixing_rate=0.5, learning_rate=1e-1, peft_config=lora)
    assert max(logged(trainer, "mix/replay_error")) <= PARITY
    trainer.mixing.refresh()
    merged = trainer.model.merge_and_unload().get_input_embeddings().weight.detach()
    assert torch.equal(trainer.mixing.table.ids, nearest_neighbors(merged, 2, allowed=WORDS).ids)


def test_rate_zero_samples_with_our_sampler_too(train: Any) -> None:
    trainer = train(steps=1, mixing_rate=0.0, mixing_sampler="counter_based")
    assert logged(trainer, "mix/gated_share") == [0.0] and trainer.mixing.table is None


def test_a_rollout_that_bypasses_generate_stops_the_run(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = train.make(max_steps=1)
    monkeypatch.setattr(
        GRPOTrainer, "_generate_single_turn", lambda self, prompt_ids, *a, **k: ([[3, EOS] for _ in prompt_ids], None)
    )
    with pytest.raises(RuntimeError, match="nothing would be mixed"):
        trainer.train()


# Logs, evaluation, loss mask --------------------------------------------------------------------------------------


def test_metrics_and_completions_table(train: Any, tmp_path: Path) -> None:
    trainer = train(mixing_rate=0.5, log_completions=True, eval_dataset=prompts(), eval_strategy="steps", eval_steps=2)
    shares = logged(trainer, "mix/gated_share")
    assert len(shares) == 3 and all(0.3 < share < 0.7 for share in shares)
    for name, low in (("anchor_differs", 0.0), ("anchor_weight", 1 / 3), ("cosine", 0.3)):
        values = logged(trainer, f"mix/{name}")
        assert len(values) == 3 and all(low < value <= 1 for value in values), name
    assert not any(name.startswith("eval_mix/") for entry in trainer.state.log_history for name in entry)
    (path,) = (tmp_path / "out" / "completions").glob("*00001.parquet")
    table = pandas.read_parquet(path)
    assert len(table) == 8 and table["mix_share"].between(0, 1).all() and table["mix_share"].max() > 0


def test_anchor_metrics_are_those_of_the_gated_steps(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[MixRecord] = []
    log = NGRPOTrainer._log_rollout

    def keep(self: Any, record: MixRecord, lengths: torch.Tensor) -> None:
        records.append(record)
        log(self, record, lengths)

    monkeypatch.setattr(NGRPOTrainer, "_log_rollout", keep)
    trainer = train(steps=1, mixing_rate=0.5)
    record = records[0]
    assert logged(trainer, "mix/anchor_differs")[0] == pytest.approx(
        float((1 - record.logprobs[record.gate].exp()).mean()), rel=1e-5
    )
    assert logged(trainer, "mix/anchor_weight")[0] == pytest.approx(float(record.weights[record.gate][:, 0].mean()))


def test_evaluation_does_not_mix(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = []
    monkeypatch.setattr(NeighborMixing, "_generate", lambda self, *a, **k: mixed.append(1))
    ours = train.make(mixing_rate=1.0, eval_dataset=prompts())
    stock = train.make(GRPOTrainer, GRPOConfig, eval_dataset=prompts())
    results = []
    for trainer in (ours, stock):
        torch.manual_seed(3)
        results.append(trainer.evaluate())
    assert not mixed
    assert results[0]["eval_reward"] == results[1]["eval_reward"]
    assert results[0]["eval_loss"] == results[1]["eval_loss"]


def test_loss_on_mixed_steps_false_leaves_exactly_the_gated_tokens_out(train: Any, monkeypatch: Any) -> None:
    outputs: list[dict] = []
    generate = NGRPOTrainer._generate_and_score_completions

    def keep(self: Any, inputs: Any) -> Any:
        outputs.append(generate(self, inputs))
        return outputs[-1]

    monkeypatch.setattr(NGRPOTrainer, "_generate_and_score_completions", keep)
    train(steps=1, mixing_rate=0.5, loss_on_mixed_steps=False)
    output = outputs[0]
    live = output["completion_mask"].bool()
    assert torch.equal(output["tool_mask"].bool()[live], ~output["mix_gate"][live])
    assert int(output["num_items_in_batch"]) == int((live & ~output["mix_gate"]).sum())
    train(steps=1, mixing_rate=0.5)
    assert "tool_mask" not in outputs[1]


def test_advantages_equal_our_own(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL computes advantages inline; `group_advantages` with its defaults is the same function."""
    outputs: list[tuple[dict, torch.Tensor]] = []
    rewards: list[torch.Tensor] = []
    score = GRPOTrainer._calculate_rewards

    def spy(self: Any, *args: Any) -> Any:
        rewards.append(score(self, *args))
        return rewards[-1]

    monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", spy)
    generate = NGRPOTrainer._generate_and_score_completions

    def keep(self: Any, inputs: Any) -> Any:
        outputs.append((generate(self, inputs), rewards[-1]))
        return outputs[-1][0]

    monkeypatch.setattr(NGRPOTrainer, "_generate_and_score_completions", keep)
    for scale, ours in (("group", "std"), ("batch", "batch_std"), ("none", "none")):
        train(steps=1, scale_rewards=scale)
        output, reward = outputs[-1]
        expected = group_advantages(reward[:, 0], group_size=4, scale=ours)
        assert torch.allclose(output["advantages"], expected, atol=1e-5, rtol=1e-5), scale


# Checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixing_sampler": "counter_based", "mixing_strategy": "gumbel"},
        {"mixing_strategy": "gaussian", "num_iterations": 2, "beta": 0.04, "learning_rate": 1e-4},
        {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])},
    ],
    ids=["default", "gumbel-ngrpo", "gaussian-iterations", "lora"],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    train: Any, tmp_path: Path, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: gates, tokens, losses and weights of steps 3 and 4 after a restart at 2."""
    rollouts: list[tuple[torch.Tensor, torch.Tensor]] = []
    generate = NGRPOTrainer._generate_and_score_completions

    def keep(self: Any, inputs: Any) -> Any:
        output = generate(self, inputs)
        rollouts.append((output["mix_gate"], output["completion_ids"]))
        return output

    monkeypatch.setattr(NGRPOTrainer, "_generate_and_score_completions", keep)
    settings = {"mixing_rate": 0.5, "save_strategy": "steps", "save_steps": 2, "max_steps": 4} | settings
    whole = train.make(**settings)
    whole.train()
    expected, rollouts[:] = list(rollouts), []
    saved = tmp_path / "out" / "checkpoint-2"
    rows = 8 if "num_iterations" in settings else 16
    state = json.loads((saved / "mixing_state.json").read_text())
    assert state["next_row"] == rows and state["config"]["mixing_rate"] == 0.5
    resumed = train.make(**settings)
    resumed.train(resume_from_checkpoint=str(saved))
    assert len(rollouts) == len(expected) // 2
    for ours, theirs in zip(rollouts, expected[len(rollouts) :], strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    for name in ("loss", "grad_norm", "reward", "mix/gated_share", "mix/replay_error"):
        assert logged(resumed, name)[-2:] == logged(whole, name)[-2:], name
    for (key, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_a_stock_run_that_resumes_in_a_later_epoch_takes_the_first_one_s_order(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/trl.md says of TRL. When this fails, TRL has mended it, and a resume is exact in every epoch."""
    order: list[str] = []
    generate = GRPOTrainer._generate_and_score_completions

    def keep(self: Any, inputs: list[dict]) -> Any:
        order.append(inputs[0]["prompt"])
        return generate(self, inputs)

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", keep)
    settings = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 17, "max_steps": 20}
    settings |= {"max_completion_length": 1, "trainer": GRPOTrainer, "config": GRPOConfig}
    train.make(**settings).train()  # 16 prompts: an epoch is 16 steps
    whole, order[:] = list(order), []
    train.make(**settings).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-17"))
    assert len(order) == 3 and order != whole[17:20] and order == whole[1:4]


# Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_transformers_continuous_batching": True}, "continuous_batching"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams"),
        ({"generation_kwargs": {"use_cache": False}}, "use_cache"),
        ({"generation_kwargs": {"prompt_lookup_num_tokens": 2}}, "assisted"),
        ({"generation_kwargs": {"guidance_scale": 2.0}}, "guidance_scale"),
        ({"cache_implementation": "paged"}, "paged"),
        ({"generation_kwargs": {"temperature": 0.5}}, "generation_kwargs"),
        ({"generation_kwargs": {"eos_token_id": [5]}}, "generation_kwargs"),
        ({"generation_kwargs": {"typical_p": 0.5}, "mixing_sampler": "counter_based"}, "typical_p"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, "peft_config"),
        ({"rollout_func": lambda prompts, trainer: {}}, "rollout_func"),
        ({"tools": [len]}, "tools"),
        ({"environment_factory": object}, "environment_factory"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_settings_under_which_nothing_would_mix_are_refused(train: Any, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train.make(**settings)


def test_a_loss_of_liger_s_is_refused(train: Any, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It scores by a forward of its own, past `_compute_loss`. TRL 1.9.2 has one, TRL 1.16 none."""
    bare = NGRPOConfig("out", use_cpu=True, bf16=False, use_liger_kernel=True)
    given = {"model": checkpoint}
    monkeypatch.delattr(GRPOTrainer, "compute_liger_loss", raising=False)
    checks.refuse_settings(bare, given)
    monkeypatch.setattr(GRPOTrainer, "compute_liger_loss", lambda self, model, inputs: None, raising=False)
    with pytest.raises(
        ValueError, match=r"^use_liger_kernel=True is not supported by NGRPOTrainer: TRL \S+ scores in Liger's own loss"
    ):
        checks.refuse_settings(bare, given)
    with pytest.raises(ValueError, match="use_liger_kernel"):
        train.make(use_liger_kernel=True)
    checks.refuse_settings(NGRPOConfig("out", use_cpu=True, bf16=False), given)


@pytest.mark.parametrize("method", ["compute_loss", "_compute_loss"])
@pytest.mark.parametrize("where", ["TRL", "subclass"])
def test_a_loss_past_the_replay_stops(train: Any, monkeypatch: pytest.MonkeyPatch, method: str, where: str) -> None:
    """As a setting of a later TRL may choose one, or a trainer of the user's own."""

    def bypass(self: Any, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        return model(input_ids=ids).logits.float().mean()

    trainer = type("Own", (NGRPOTrainer,), {method: bypass} if where == "subclass" else {})
    if where == "TRL":
        monkeypatch.setattr(GRPOTrainer, method, bypass)
    with pytest.raises(RuntimeError, match=r"^a training step of TRL \S+ did not replay its mixed rollout"):
        train(trainer, steps=1, mixing_rate=0.5, beta=0.04)  # a reference, whose forward in the rollout does replay
    train(trainer, steps=1, mixing_rate=0.0)


def test_models_that_cannot_be_replayed_are_refused(train: Any) -> None:
    for family in ("gpt2", "xglm"):
        with pytest.raises(ValueError, match="absolute positions"):
            train.make(model=tiny_model(family))
    train.make(model=tiny_model("opt"))  # numbers its positions by the mask
    prompt = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="peft_config"):
        train.make(model=prompt)
    trainer = train.make(beta=0.1)
    trainer.ref_model.resize_token_embeddings(VOCABULARY + 3)
    with pytest.raises(ValueError, match="same vocabulary"):
        trainer.mixing.attach(tiny_larger())


def tiny_larger() -> Any:
    model = tiny_model()
    model.resize_token_embeddings(VOCABULARY + 3)
    return model


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mixing_k", 0),
        ("mixing_rate", 1.5),
        ("mixing_temperature", 0.0),
        ("mixing_metric", "euclid"),
        ("mixing_strategy", "random"),
        ("mixing_variant", "mine"),
        ("mixing_sampler", "theirs"),
        ("mixing_entropy_threshold", -1.0),
        ("mixing_noise_scale", 0.5),
        ("mixing_stop_token_ids", [-1]),
        ("mixing_allowed_token_ids", [1]),
        ("loss_on_mixed_steps", "no"),
    ],
)
def test_bad_fields_name_themselves(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} "):
        NGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{field: value})


def test_a_plain_config_is_refused_and_none_makes_our_own(train: Any, checkpoint: str, monkeypatch: Any) -> None:
    with pytest.raises(TypeError, match="args must be an NGRPOConfig"):
        train.make(NGRPOTrainer, GRPOConfig)

    class OnCPU(NGRPOConfig):
        def __post_init__(self) -> None:
            self.use_cpu, self.bf16 = True, False
            super().__post_init__()

    monkeypatch.setattr(trainer_module, "NGRPOConfig", OnCPU)
    seen = {}
    monkeypatch.setattr(GRPOTrainer, "__init__", lambda self, *a, **k: seen.update(k, positional=a) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        NGRPOTrainer(tiny_model(), distinct, None, prompts())
    assert isinstance(seen["positional"][2], NGRPOConfig)


def test_fields_are_those_of_the_mixing_config() -> None:
    """Their names, defaults and help; three defaults are the trainer's."""
    ours = {f.name: f for f in fields(NGRPOConfig)}
    added = ours.keys() - {f.name for f in fields(GRPOConfig)}
    theirs = {
        f.name if f.name.startswith("mixing_") or f.name == "loss_on_mixed_steps" else f"mixing_{f.name}": f
        for f in fields(MixingConfig)
    }
    assert added == theirs.keys()
    notes = {
        "mixing_seed": " None: the trainer's `seed`.",
        "mixing_stop_token_ids": " None: no token.",
        "mixing_excluded_token_ids": " Here 'special' by default; 'none' is None.",
    }
    defaults = {"mixing_seed": None, "mixing_stop_token_ids": None, "mixing_excluded_token_ids": MISSING}
    assert NGRPOConfig("unused", use_cpu=True, bf16=False).mixing_excluded_token_ids == "special"  # by a factory
    for name in added:
        assert ours[name].default == defaults.get(name, theirs[name].default), name
        assert ours[name].metadata["help"] == theirs[name].metadata["help"] + notes.get(name, ""), name


def test_every_field_reaches_the_mixing_config(tmp_path: Path) -> None:
    given = {
        "mixing_k": 5, "mixing_rate": 0.2, "mixing_temperature": 0.7, "mixing_metric": "dot",
        "mixing_strategy": "neighbor", "mixing_variant": "released", "mixing_entropy_threshold": 0.5,
        "mixing_sampler": "counter_based", "mixing_seed": 7, "mixing_stop_token_ids": [3, 4],
        "mixing_allowed_token_ids": [5, 6, 7, 8, 9], "mixing_excluded_token_ids": [2, 3], "loss_on_mixed_steps": False,
    }  # fmt: skip
    mixing = NGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **given).mixing()
    assert mixing == MixingConfig(
        k=5, mixing_rate=0.2, temperature=0.7, metric="dot", strategy="neighbor", variant="released",
        entropy_threshold=0.5, sampler="counter_based", seed=7, stop_token_ids=[3, 4],
        allowed_token_ids=[5, 6, 7, 8, 9], excluded_token_ids=[2, 3], loss_on_mixed_steps=False,
    )  # fmt: skip
    options = {"mixing_noise_scale": ("gaussian", 0.5), "mixing_moi_beta": ("moi", 2.0)}
    for name, (strategy, value) in options.items():
        config = NGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, mixing_strategy=strategy, **{name: value})
        assert config.mixing().options[name.removeprefix("mixing_")] == value


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "--mixing_k 4 --mixing_rate 0.3 --mixing_temperature 0.5 --mixing_metric l2 "
            "--mixing_strategy mine.ways:even --mixing_variant paper --mixing_entropy_threshold 0.1 "
            "--mixing_sampler counter_based --mixing_seed 3 --mixing_stop_token_ids 8 9 --loss_on_mixed_steps false",
            {
                "k": 4, "mixing_rate": 0.3, "temperature": 0.5, "metric": "l2", "strategy": "mine.ways:even",
                "variant": "paper", "entropy_threshold": 0.1, "sampler": "counter_based", "seed": 3,
                "stop_token_ids": (8, 9), "loss_on_mixed_steps": False,
            },
        ),
        ("--mixing_strategy gaussian --mixing_noise_scale 0.5", {"strategy": "gaussian", "noise_scale": 0.5}),
        ("--mixing_strategy moi --mixing_moi_beta 0.5", {"strategy": "moi", "moi_beta": 0.5}),
        ("--mixing_allowed_token_ids 5 6 7", {"allowed_token_ids": (5, 6, 7)}),
        ("--mixing_rate 0.2", {"excluded_token_ids": "special"}),
        ("--mixing_excluded_token_ids special", {"excluded_token_ids": "special"}),
        ("--mixing_excluded_token_ids none", {"excluded_token_ids": None}),
        ("--mixing_excluded_token_ids 5 6 7", {"excluded_token_ids": (5, 6, 7)}),
    ],
    ids=["most", "gaussian", "moi", "allowed", "default", "special", "none", "excluded"],
)  # fmt: skip
def test_fields_are_flags_of_a_command_line(tmp_path: Path, user_strategy: str, flags: str, expected: dict) -> None:
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", *flags.split()]
    (parsed,) = HfArgumentParser(NGRPOConfig).parse_args_into_dataclasses(words)
    mixing = parsed.mixing()
    assert {name: getattr(mixing, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [("special", "special"), ("none", None), ("null", None), ("[5, 6]", (5, 6)), ("5", (5,)), ("['5']", (5,))],
)
def test_excluded_token_ids_are_read_from_yaml(tmp_path: Path, written: str, expected: object) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nmixing_excluded_token_ids: {written}\n")
    (by_trl,) = TrlParser(NGRPOConfig).parse_args_and_config(["--config", str(file)])
    (by_transformers,) = HfArgumentParser(NGRPOConfig).parse_yaml_file(str(file))
    for parsed in (by_trl, by_transformers):
        assert parsed.mixing().excluded_token_ids == expected
        assert parsed.mixing_excluded_token_ids == (list(expected) if isinstance(expected, tuple) else expected)


def test_rows_that_no_token_stands_for_are_not_mixed_by_default(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that leans one way, with 8 rows that a resize has added: near to everything, and no token's."""
    shares = {}
    for setting in ("special", None):
        model = tiny_model()
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(4 * torch.randn(32, generator=torch.Generator().manual_seed(1)))
            mean = model.get_input_embeddings().weight.mean(0)
            model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
            model.get_input_embeddings().weight[VOCABULARY:] = mean
            model.get_input_embeddings().weight[VOCABULARY:] += 1e-3 * torch.randn(8, 32)
        seen: list[torch.Tensor] = []
        log = NGRPOTrainer._log_rollout

        def note(self: Any, record: Any, lengths: Any, seen: list = seen, log: Any = log) -> None:
            seen.append(record.ids[record.gate][:, 1:])
            log(self, record, lengths)

        with monkeypatch.context() as patched:
            patched.setattr(NGRPOTrainer, "_log_rollout", note)
            chosen = {} if setting == "special" else {"mixing_excluded_token_ids": setting}
            train(model=model, steps=1, mixing_rate=0.9, **chosen)
        neighbors = torch.cat(seen)
        assert len(neighbors)
        shares[setting] = float((neighbors >= VOCABULARY).any(1).double().mean())
    assert shares["special"] == 0 and shares[None] > 0.5


def test_the_samplers_old_name_works_and_warns_once(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="'ngrpo' is called 'counter_based' now") as warned:
        config = NGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, mixing_sampler="ngrpo")
        assert config.mixing().sampler == config.mixing_sampler == "counter_based"
    assert len([one for one in warned if one.category is DeprecationWarning]) == 1


def test_the_number_of_candidates_follows_the_strategy(tmp_path: Path) -> None:
    for strategy, k in (("neighbor", 3), ("anchor", 1)):
        assert NGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, mixing_strategy=strategy).mixing_k == k


def test_the_seed_keys_the_gates_unless_one_is_given(tmp_path: Path) -> None:
    settings = {"use_cpu": True, "bf16": False}
    assert NGRPOConfig(str(tmp_path), seed=11, **settings).mixing().seed == 11
    assert NGRPOConfig(str(tmp_path), seed=11, mixing_seed=5, **settings).mixing().seed == 5


@pytest.mark.parametrize("name", sorted(checks.EXPECTED_PARAMETERS))
def test_a_changed_trl_stops_the_import(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(GRPOTrainer, name, lambda self, something_else: None)
    with pytest.raises(ImportError, match=name):
        checks.check_trl()
    monkeypatch.setattr(GRPOTrainer, name, None)
    with pytest.raises(ImportError, match=name):
        checks.check_trl()


def test_the_script_of_the_page_trains(checkpoint: str, tmp_path: Path) -> None:
    script = next(block for block in snippets.blocks(snippets.ROOT / "docs/trl.md") if "NGRPOTrainer(" in block)
    assert len(script.strip().splitlines()) <= 25
    for old, new in (
        ('model="Qwen/Qwen2.5-0.5B-Instruct",', f"model={checkpoint!r}, processing_class=tokenizer(),"),
        (
            'output_dir="out",',
            f"output_dir={str(tmp_path)!r}, use_cpu=True, bf16=False, report_to='none', max_steps=1,",
        ),
    ):
        assert old in script
        script = script.replace(old, new)
    names: dict[str, Any] = {"tokenizer": tokenizer}
    exec(script, names)
    assert max(logged(names["trainer"], "mix/replay_error")) <= PARITY


# Several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("training", ["full", "lora"])
def test_two_processes(tmp_path: Path, training: str) -> None:
    ddp = two_processes(tmp_path / "ddp", "ddp", training)
    assert_same_training(two_processes(tmp_path / "fsdp2", "fsdp2", training), ddp)
