"""NGRPOTrainer with a colocated vLLM engine: rollouts, weight syncs and replays in a real training loop."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_engine import SETTINGS, SHAPE, mixer_of, on_two_ranks
from datasets import Dataset
from models import EOS, tiny_model, tokenizer
from peft import LoraConfig
from plain_ids import ScoresPlainIds
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation
from vllm.v1.worker.worker_base import WorkerBase

from ngrpo_ops.integrations.transformers import NeighborMixing
from ngrpo_ops.integrations.trl import NGRPOConfig, NGRPOTrainer
from ngrpo_ops.integrations.trl import trainer as trainer_module
from ngrpo_ops.random import philox

PARITY = 1e-4
WITHOUT = 1e-2  # what plain ids differ by, at the least


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What TRL has no setting for."""
    start = vllm_generation.LLM.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs |= {name: SETTINGS[name] for name in ("enforce_eager", "dtype")} | {"enable_prefix_caching": False}
        start(self, *args, **kwargs)

    monkeypatch.setattr(vllm_generation.LLM, "__init__", init)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(**SHAPE)
    with torch.no_grad():
        model.lm_head.weight[EOS] = model.lm_head.weight.mean(0) + 0.05  # completions of many lengths
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def train(checkpoint: str, tmp_path: Path) -> Any:
    trainers: list[Any] = []

    def run(trainer: type = NGRPOTrainer, config: type = NGRPOConfig, steps: int = 3, **settings: Any) -> Any:
        keywords = {name: settings.pop(name) for name in ("peft_config", "eval_dataset") if name in settings}
        defaults = {
            "output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": "none",
            "use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 64,
            "vllm_gpu_memory_utilization": 0.1, "num_generations": 4, "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8, "max_completion_length": 10, "learning_rate": 1e-2, "max_steps": steps,
            "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        }  # fmt: skip
        texts = [" ".join(f"w{3 + (7 * i + j) % 60}" for j in range(2 + i % 4)) for i in range(16)]
        trained = trainer(
            model=checkpoint,
            reward_funcs=lambda completions, **kwargs: [len(set(text.split())) / 10 for text in completions],
            train_dataset=Dataset.from_dict({"prompt": texts}),
            args=config(**defaults | settings),
            processing_class=tokenizer(),
            **keywords,
        )
        trainers.append(trained)
        trained.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
        return trained

    yield run
    for trained in trainers:
        trained.vllm_generation.llm.llm_engine.engine_core.shutdown()


def logged(trainer: GRPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if entry.get(name) is not None]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixing_strategy": "gaussian", "num_iterations": 2, "gradient_accumulation_steps": 2, "beta": 0.04},
        {
            "mixing_sampler": "counter_based",
            "top_p": 0.9,
            "temperature": 0.8,
            "mixing_stop_token_ids": [20, 21, 22, 23],
        },
        {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]), "beta": 0.04},
    ],
    ids=["default", "gaussian-multi-step", "ngrpo", "lora"],
)
def test_the_engine_and_the_policy_agree(train: Any, settings: dict, difference: Any) -> None:
    """Over three steps with weight syncs between, by TRL's own metric and by ours."""
    trainer = train(ScoresPlainIds, mixing_rate=0.5, **settings)
    metric = logged(trainer, "sampling/sampling_logp_difference/max")
    errors = logged(trainer, "mix/replay_error")
    generations = 3 if "num_iterations" not in settings else 2
    assert len(metric) == generations and errors
    if "top_p" not in settings:  # else TRL's compares with the log-probabilities of what the cut left
        difference("trl, colocated", max(metric), trainer.plain_difference)
        assert max(metric) <= PARITY
    assert max(errors) <= PARITY and trainer.plain_difference > WITHOUT
    assert all(0.2 < share < 0.8 for share in logged(trainer, "mix/gated_share"))
    for name in ("anchor_differs", "anchor_weight", "cosine"):
        assert len(logged(trainer, f"mix/{name}")) >= generations, name


@pytest.mark.parametrize(
    ("ranks", "path"), [(2, "trl, colocated, tensor parallel"), (1, "trl, colocated, two engines")]
)
def test_two_ranks(checkpoint: str, tmp_path: Path, difference: Any, ranks: int, path: str) -> None:
    """One engine over both ranks, or one for each: every rank gets the records of its own rows."""
    (tmp_path / "model").symlink_to(checkpoint)
    on_two_ranks("two_rank_trainer.py", tmp_path, str(ranks))
    for rank in range(2):
        seen = json.loads((tmp_path / f"trainer{rank}.json").read_text())
        for log in seen["logs"]:
            assert max(log["mix/replay_error"], log["sampling/sampling_logp_difference/max"]) <= PARITY
            difference(path, log["sampling/sampling_logp_difference/max"], seen["plain"])
        assert seen["plain"] > WITHOUT
        for generation, gates in enumerate(seen["gates"]):
            rows = torch.arange(4) + 8 * generation + 4 * rank
            words = torch.stack([philox(torch.tensor(9), rows, torch.tensor(step))[0] for step in range(8)], dim=1)
            assert torch.equal(torch.tensor(gates), words < 2**31)


def test_without_the_replay_both_metrics_are_large(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(trainer_module.logger, "warning", said.append)
    monkeypatch.setattr(NeighborMixing, "replay", lambda self, record, model=None: nullcontext())
    trainer = train(mixing_rate=0.5)
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) > 1e-2
    assert max(logged(trainer, "mix/replay_error")) > 1e-2
    assert "does not embed the mixes" in said[0]


def test_a_stale_engine_is_named(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(trainer_module.logger, "warning", said.append)
    monkeypatch.setattr(vllm_generation.VLLMGeneration, "sync_weights", lambda self: None)
    trainer = train(mixing_rate=0.5)
    assert max(logged(trainer, "mix/replay_error")) > 1e-3
    assert "other weights" in said[0]


def test_rate_zero_is_stock(train: Any) -> None:
    """The engine too; only what samples by itself, "ngrpo", needs one of ours."""
    stock = train(GRPOTrainer, GRPOConfig, steps=2)
    ours = train(mixing_rate=0.0, steps=2)
    runner = ours.vllm_generation.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert type(runner.model_state).__name__ == "DefaultModelState"
    for name in ("reward", "loss", "grad_norm"):
        assert logged(ours, name) == logged(stock, name), name
    for (key, a), b in zip(stock.model.state_dict().items(), ours.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    own = train(mixing_rate=0.0, mixing_sampler="counter_based", steps=1)
    assert mixer_of(own.vllm_generation.llm).table is None  # nothing is searched
    assert logged(own, "mix/gated_share") == [0.0] and logged(own, "mix/replay_error")[0] <= PARITY


def test_an_engine_without_the_plugin_stops_the_start(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(WorkerBase, "take_mix_records")  # as VLLM_PLUGINS without ngrpo_ops leaves it
    with pytest.raises(ValueError, match="VLLM_PLUGINS"):
        train(mixing_rate=0.5)


@pytest.mark.parametrize("settings", [{}, {"mixing_sampler": "counter_based"}], ids=["native", "counter_based"])
def test_a_resumed_run_is_the_uninterrupted_one(train: Any, tmp_path: Path, settings: dict) -> None:
    settings = {"mixing_rate": 0.5, "save_strategy": "steps", "save_steps": 2, "steps": 4} | settings
    whole = train(**settings)
    resumed = train(**settings, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for name in ("loss", "grad_norm", "reward", "mix/gated_share", "mix/replay_error"):
        assert logged(resumed, name)[-2:] == logged(whole, name)[-2:], name
    for (key, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_evaluation_does_not_mix_and_the_table_has_its_column(train: Any, tmp_path: Path) -> None:
    import pandas

    data = Dataset.from_dict({"prompt": ["w3 w4", "w5"]})
    trainer = train(
        mixing_rate=1.0, steps=2, log_completions=True, eval_dataset=data, eval_strategy="steps", eval_steps=2
    )
    assert logged(trainer, "eval_reward")
    assert logged(trainer, "mix/gated_share") == [1.0, 1.0]
    assert not any(name.startswith("eval_mix/") for entry in trainer.state.log_history for name in entry)
    (path,) = (tmp_path / "out" / "completions").glob("*00001.parquet")
    assert (pandas.read_parquet(path)["mix_share"] == 1.0).all()


def test_settings_under_which_nothing_would_mix_are_refused(train: Any) -> None:
    with pytest.raises(ValueError, match="generation_kwargs"):
        train(generation_kwargs={"n": 2})
