"""The verl adapter: replayed forwards and gradients, what stops a start, and runs of the real training loop."""

from __future__ import annotations

import asyncio
import copy
import doctest
import functools
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_engine import SHAPE
from models import EOS, byte_tokenizer, tiny_model
from torch import Tensor, nn

_FOLDER = Path(__file__).with_name("verl_cpu")
sys.path.insert(0, str(_FOLDER))

from verl_cpu.runs import OURS, PATH, PLATFORM, SAMPLES, STOCK, TOKENS, Run, arguments, make_inputs, run  # noqa: E402

os.environ |= PLATFORM
# What the runs' processes load at their start: here for verl's own imports.
_spec = importlib.util.spec_from_file_location("verl_stand_ins", _FOLDER / "sitecustomize.py")
assert _spec is not None and _spec.loader is not None
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))

from hydra import compose, initialize_config_module  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from tensordict import NonTensorStack, TensorDict  # noqa: E402
from transfer_queue.utils import serial_utils  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from verl.experimental.agent_loop.agent_loop import DictConfigWrap  # noqa: E402
from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.trainer.ppo.padding_utils import construct_minimal_padding_template  # noqa: E402
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ  # noqa: E402
from verl.utils import tensordict_utils, ulysses  # noqa: E402
from verl.utils.metric import reduce_metrics  # noqa: E402
from verl.workers.config import (  # noqa: E402
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine.base import EngineRegistry  # noqa: E402
from verl.workers.engine_workers import TrainingWorker  # noqa: E402
from verl.workers.rollout.replica import RolloutReplicaRegistry, TokenOutput  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402
from verl.workers.utils.padding import response_from_nested  # noqa: E402

from ngrpo_ops import MixRecord, gaussian_noise  # noqa: E402
from ngrpo_ops._patching import resolve  # noqa: E402
from ngrpo_ops.integrations.verl import checks, settings  # noqa: E402
from ngrpo_ops.integrations.verl import samples as sample_module  # noqa: E402
from ngrpo_ops.integrations.verl.agent import AGENT, FIRST_ROW, MixingAgentLoop  # noqa: E402
from ngrpo_ops.integrations.verl.dry_run import Rollout, training_batch, unmixed  # noqa: E402
from ngrpo_ops.integrations.verl.engine import ReplayingFSDPEngine  # noqa: E402
from ngrpo_ops.integrations.verl.launcher import complete, verl_arguments  # noqa: E402
from ngrpo_ops.integrations.verl.manager import MixingAgentLoopManager  # noqa: E402
from ngrpo_ops.integrations.verl.registration import register  # noqa: E402
from ngrpo_ops.integrations.verl.samples import BatchRecords, pack_record, unpack_record  # noqa: E402
from ngrpo_ops.integrations.verl.server import MixingHttpServer, MixingReplica  # noqa: E402
from ngrpo_ops.metrics import replay_tolerance  # noqa: E402
from ngrpo_ops.random import gates  # noqa: E402
from ngrpo_ops.record import SparseRecord  # noqa: E402
from ngrpo_ops.wire import KEY  # noqa: E402

PARITY = 1e-5  # float32
WITHOUT = 1e-2  # what plain ids differ by, at the least
METRICS = ("gated_share", "anchor_differs", "anchor_weight", "cosine", "replay_error", "replay_outliers")
VOCABULARY = len(byte_tokenizer())
TEMPERATURE = 0.7

Difference = Callable[[str, float, float | None], None]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verl")
    make_inputs(folder, SHAPE)
    return folder


@pytest.fixture(scope="module")
def mild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose log-probabilities are no extremes, for gradients."""
    folder = tmp_path_factory.mktemp("mild")
    tiny_model(**SHAPE, vocab_size=VOCABULARY, scale=1.5).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


# Replay ------------------------------------------------------------------------------------------------------------


def rollouts(noise: bool = False) -> list[Rollout]:
    """Of prompts of 5, 3, 7 and 4 tokens, with 6, 9, 1 and 8 generated ones. About half of the steps are mixed."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for row, (first, length) in enumerate([(5, 6), (3, 9), (7, 1), (4, 8)]):
        prompt, tokens = (torch.randint(2, VOCABULARY, (n,), generator=generator) for n in (first, length))
        (steps,) = (torch.rand(length, generator=generator) < 0.5).nonzero(as_tuple=True)
        ids = torch.randint(2, VOCABULARY, (len(steps), 3), generator=generator)
        ids[:, 0] = tokens[steps]
        weights = torch.rand(len(steps), 3, generator=generator).softmax(-1)
        logprobs = -torch.rand(length, generator=generator)
        record = SparseRecord(first, steps, ids, weights, logprobs, (0.33, 7, 40 + row) if noise else None)
        made.append(Rollout(prompt.tolist(), tokens.tolist(), record))
    assert sum(len(rollout.record.steps) for rollout in made) > 8
    return made


def by_hand(model: Any, made: list[Rollout]) -> list[Tensor]:
    """Log-probabilities of the generated tokens: each sample alone, from embeddings formed here."""
    embedded, out = model.get_input_embeddings(), []
    for prompt, tokens, record in made:
        ids = torch.tensor(prompt + tokens)
        columns = list(embedded(ids).unbind(0))
        for j, step in enumerate(record.steps.tolist()):
            mixed = (record.weights[j][:, None] * embedded(record.ids[j])).sum(0)
            if record.noise is not None:
                scale, seed, row_id = (torch.tensor([value]) for value in record.noise)
                mixed = gaussian_noise(mixed[None], scale, seed=seed, row_ids=row_id, steps=torch.tensor([step]))[0]
            columns[record.first + step] = mixed
        logits = model(inputs_embeds=torch.stack(columns)[None]).logits[0] / TEMPERATURE
        logprobs = logits.log_softmax(-1)[record.first - 1 : -1]
        out.append(logprobs.gather(1, ids[record.first :, None])[:, 0])
    return out


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    """verl's process group, of this process alone."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    before = {name: os.environ.get(name) for name in rank}
    os.environ.update(rank)
    yield
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def make_worker(
    model: Path, strategy: str = "fsdp2", packed: bool = True, dynamic: bool = True, **changes: Any
) -> TrainingWorker:
    """verl's training worker. Of `changes`, those that a model's configuration has are its, the others the engine's."""
    of_model = {"enable_gradient_checkpointing": False, "lora_rank": 0}
    of_model |= {name: changes.pop(name) for name in list(changes) if name in of_model}
    float32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=str(model), use_remove_padding=packed, override_config={"attn_implementation": "sdpa"}, **of_model
            ),
            engine_config=FSDPEngineConfig(
                strategy=strategy, model_dtype="float32", mixed_precision=float32, use_torch_compile=False,
                use_dynamic_bsz=dynamic, max_token_len_per_gpu=24, infer_max_token_len_per_gpu=24,
                micro_batch_size_per_gpu=2, infer_micro_batch_size_per_gpu=2, **changes,
            ),
            optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10, clip_grad=1e9, weight_decay=0.0),
            checkpoint_config=CheckpointConfig(),
        )
    )  # fmt: skip
    worker.reset()
    assert isinstance(worker.engine, ReplayingFSDPEngine)
    return worker


def score(worker: TrainingWorker, batch: TensorDict) -> list[Tensor]:
    scored = worker.infer_batch(copy.deepcopy(batch))["log_probs"]
    return list(response_from_nested(scored, batch["response_mask"]).unbind())


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {},
    "fixed": {"dynamic": False},
    "checkpointing": {"enable_gradient_checkpointing": True},
    "padded_to_length": {"pad_to_length": True, "pad_to_length_bucket": 32},
    "lora": {"lora_rank": 4},
}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_are_those_of_a_forward_by_hand(mild: Path, packed: bool, variant: str) -> None:
    """By verl's own workers and loss, in micro-batches."""
    made = rollouts(noise=variant == "noise")
    torch.manual_seed(0)
    worker = make_worker(mild, packed=packed, **VARIANTS[variant])
    module, reference = worker.engine.module, AutoModelForCausalLM.from_pretrained(mild, dtype=torch.float32)
    lora = "lora" in variant
    if lora:  # as initialized one factor of each is zero, and the other has no gradient
        reference = _with_the_same_lora(reference, module)
    batch = training_batch(made, TEMPERATURE)
    expected = by_hand(reference, made)
    for values, wanted in zip(score(worker, batch), expected, strict=True):
        torch.testing.assert_close(values, wanted.detach(), atol=5e-6, rtol=1e-5)

    advantages = [torch.randn(len(x), generator=torch.Generator().manual_seed(i)) for i, x in enumerate(expected)]
    batch["old_log_probs"] = torch.nested.as_nested_tensor([x.detach() for x in expected], layout=torch.jagged)
    batch["advantages"] = torch.nested.as_nested_tensor(advantages, layout=torch.jagged)
    actor = FSDPActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=2, ppo_mini_batch_size=4)
    worker.set_loss_fn(functools.partial(ppo_loss, config=actor))
    tensordict_utils.assign_non_tensor(
        batch, compute_loss=True, mini_batch_size=4, global_batch_size=4, epochs=1, seed=1
    )
    grads: dict[str, Tensor] = {}
    step = worker.engine.optimizer_step

    def spied() -> Any:
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                grads[name] = parameter.grad.full_tensor().clone()
        return step()

    worker.engine.optimizer_step = spied
    worker.train_mini_batch(batch)
    tokens = sum(map(len, expected))
    ratios = [(x - x.detach()).exp() * a for x, a in zip(expected, advantages, strict=True)]
    (-sum(ratio.sum() for ratio in ratios) / tokens).backward()
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert set(grads) == set(wanted)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], atol=2e-6, rtol=1e-4)
    if not lora:  # every candidate is moved, but those after which no token follows
        moved = grads["model.embed_tokens.weight"].abs().sum(1) > 0
        assert moved[torch.cat([x.record.ids[x.record.steps < len(x.tokens) - 1].flatten() for x in made])].all()


def _with_the_same_lora(reference: nn.Module, module: nn.Module) -> nn.Module:
    """The reference with a sharded model's adapter, whose factors become noise in both."""
    from peft import get_peft_model

    (config,) = module.peft_config.values()
    wrapped = get_peft_model(reference, copy.deepcopy(config))
    sharded = dict(module.named_parameters())
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
            with torch.no_grad():
                sharded[name].to_local().copy_(parameter)
    return wrapped


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", ["fsdp", "fsdp2", "reference"])
def test_a_worker_replays_and_plain_ids_differ(mild: Path, packed: bool, kind: str, difference: Difference) -> None:
    made = rollouts()
    batch = training_batch(made, TEMPERATURE)
    without = training_batch([x._replace(record=unmixed(x.record)) for x in made], TEMPERATURE)
    expected = torch.cat(by_hand(AutoModelForCausalLM.from_pretrained(mild, dtype=torch.float32), made)).detach()
    worker = make_worker(mild, "fsdp" if kind == "fsdp" else "fsdp2", packed, forward_only=kind == "reference")
    replayed, plain = (float((torch.cat(score(worker, x)) - expected).abs().max()) for x in (batch, without))
    assert replayed <= PARITY and plain > WITHOUT
    difference(f"verl, worker alone, {kind}, {'packed' if packed else 'padded'}", replayed, plain)


def test_a_sample_that_fills_the_batch_up_needs_no_record(mild: Path) -> None:
    """By verl's own function, which copies the first sample's columns; a first sample of 1 token too."""
    made = rollouts()
    for first in (0, 2):
        ordered = [*made[first:], *made[:first]]
        batch = training_batch(ordered, TEMPERATURE)
        names = [name for name in batch.keys() if isinstance(batch[name], Tensor) and batch[name].is_nested]  # noqa: SIM118
        columns = {name: list(batch[name].unbind()) for name in names}
        extra, uids = batch["extra_fields"], batch["uid"]
        rows = [
            {name: columns[name][i] for name in names} | {"extra_fields": extra[i], "uid": uids[i]}
            for i in range(len(made))
        ]
        filler, _ = construct_minimal_padding_template(rows[0], {}, eos_token_id=EOS)
        rows.append({name: filler[name] for name in rows[0]} | {"uid": "pad0"})
        whole = tensordict_utils.list_of_dict_to_tensordict(rows)
        tensordict_utils.assign_non_tensor(
            whole, temperature=TEMPERATURE, calculate_entropy=False, compute_loss=False, pad_token_id=0,
            max_token_len_per_gpu=200,
        )  # fmt: skip
        found = score(make_worker(mild), whole)
        assert len(found) == 5
        expected = by_hand(AutoModelForCausalLM.from_pretrained(mild, dtype=torch.float32), ordered)
        for values, wanted in zip(found[:4], expected, strict=True):
            torch.testing.assert_close(values, wanted.detach(), atol=5e-6, rtol=1e-5)


def test_missing_and_foreign_records_stop_a_forward(mild: Path) -> None:
    made = rollouts()
    worker = make_worker(mild)
    packed = [pack_record(x.record, x.tokens) for x in made]

    def with_fields(fields: list[dict]) -> TensorDict:
        batch = training_batch(made, TEMPERATURE)
        batch["extra_fields"] = NonTensorStack(*fields)
        return batch

    score(worker, with_fields([{KEY: one} for one in packed]))
    with pytest.raises(RuntimeError, match="a training sample has no record"):
        score(worker, with_fields([{KEY: packed[0]}, {}, {KEY: packed[2]}, {KEY: packed[3]}]))
    swapped = [packed[1], packed[0], *packed[2:]]
    with pytest.raises(RuntimeError, match="is of other tokens"):
        score(worker, with_fields([{KEY: one} for one in swapped]))
    later = replace(made[0].record, first=made[0].record.first + 1)
    with pytest.raises(RuntimeError, match="is of other tokens"):
        score(worker, with_fields([{KEY: pack_record(later, made[0].tokens)}, *({KEY: one} for one in packed[1:])]))
    other = copy.deepcopy(made[0].record)
    other.ids[0] = other.ids[0].flip(0)
    with pytest.raises(RuntimeError, match="not its anchors"):
        score(worker, with_fields([{KEY: pack_record(other, made[0].tokens)}, *({KEY: one} for one in packed[1:])]))
    without = training_batch(made, TEMPERATURE)
    del without["extra_fields"]
    with pytest.raises(RuntimeError, match="a training sample has no record"):
        score(worker, without)


def test_a_forward_past_the_input_embeddings_stops(mild: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker(mild)
    forward_step = ReplayingFSDPEngine.__mro__[1].forward_step
    monkeypatch.setattr(ReplayingFSDPEngine.__mro__[1], "forward_step", lambda *args: (None, {}))
    with pytest.raises(RuntimeError, match="called 0 times"):
        score(worker, training_batch(rollouts(), TEMPERATURE))
    monkeypatch.setattr(
        ReplayingFSDPEngine.__mro__[1], "forward_step", lambda *args: (forward_step(*args), forward_step(*args))[1]
    )
    with pytest.raises(RuntimeError, match="called 2 times"):
        score(worker, training_batch(rollouts(), TEMPERATURE))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("static", [0, 60], ids=["", "padded_to_length"])
def test_with_ulysses_each_rank_replays_its_slice(size: int, static: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By verl's own slicing; the attention itself needs flash-attention and was not run."""
    made = rollouts(noise=True)
    batch = training_batch(made, TEMPERATURE)
    ids = nn.functional.pad(batch["input_ids"].values()[None], (0, static))
    records = BatchRecords.of(batch)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: size)
    seen = []
    for rank in range(size):
        monkeypatch.setattr(ulysses, "get_ulysses_sequence_parallel_rank", lambda group=None, rank=rank: rank)
        monkeypatch.setattr(sample_module, "get_ulysses_sequence_parallel_rank", lambda rank=rank: rank)
        sliced = ulysses.ulysses_pad_and_slice_inputs(ids, None, size)[0] if size > 1 else ids
        overlay = records.overlay(sliced)
        assert torch.equal(sliced.flatten()[overlay.positions], overlay.ids[:, 0])
        seen += zip(overlay.ids.tolist(), overlay.noise.row_ids.tolist(), overlay.noise.steps.tolist(), strict=True)
    assert seen == [
        (candidates, x.record.noise[2], step)
        for x in made
        for candidates, step in zip(x.record.ids.tolist(), x.record.steps.tolist(), strict=True)
    ]


def test_metrics_are_totals_over_micro_and_mini_batches(mild: Path) -> None:
    """verl's own reduction of micro-batches, mini-batches and ranks; a filling sample counts for nothing."""
    made = rollouts()
    worker = make_worker(mild, dynamic=False)
    batch = training_batch(made, TEMPERATURE)
    old = [x.record.logprobs.clone() for x in made]
    old[1][4] += 0.25
    batch["old_log_probs"] = torch.nested.as_nested_tensor(old, layout=torch.jagged)
    batch["advantages"] = torch.nested.as_nested_tensor([torch.ones(len(x)) for x in old], layout=torch.jagged)
    actor = FSDPActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, ppo_mini_batch_size=2)
    worker.set_loss_fn(functools.partial(ppo_loss, config=actor))
    tensordict_utils.assign_non_tensor(
        batch, compute_loss=True, mini_batch_size=2, global_batch_size=2, epochs=1, seed=1, micro_batch_size_per_gpu=1
    )
    found = reduce_metrics(dict(tensordict_utils.get(worker.train_mini_batch(batch), "metrics")))
    mixed = torch.cat([x.record.logprobs[x.record.steps] for x in made])
    tokens = sum(len(x.tokens) for x in made)
    assert found["mix/gated_share"] == pytest.approx(len(mixed) / tokens)
    assert found["mix/anchor_differs"] == pytest.approx(float((1 - mixed.double().exp()).mean()))
    anchors = torch.cat([x.record.weights[:, 0] for x in made])
    assert found["mix/anchor_weight"] == pytest.approx(float(anchors.double().mean()))
    assert found["mix/replay_error"] == pytest.approx(0.25, abs=1e-6)
    follow = sum(len(x.tokens) - int(x.record.steps[0]) - 1 for x in made if len(x.record.steps))
    assert found["mix/replay_outliers"] == pytest.approx(1 / follow)
    embedded = AutoModelForCausalLM.from_pretrained(mild, dtype=torch.float32).get_input_embeddings().weight
    cosines = [
        torch.cosine_similarity(
            (x.record.weights[j][:, None] * embedded[x.record.ids[j]]).sum(0), embedded[x.tokens[s]], 0
        )
        for x in made
        for j, s in enumerate(x.record.steps.tolist())
    ]
    assert found["mix/cosine"] == pytest.approx(
        float(torch.stack(cosines).mean()), abs=1e-2
    )  # the 2nd is of new weights


def test_metrics_of_a_micro_batch_that_only_fills_up() -> None:
    """It counts for nothing beside others, and alone it has no values."""
    import numpy as np

    made = rollouts()[0]
    nothing = torch.nested.as_nested_tensor([torch.zeros(1)], layout=torch.jagged)
    filler = BatchRecords([None], torch.zeros(1, dtype=torch.int64), True).metrics(nothing, [])
    scored = torch.nested.as_nested_tensor([made.record.logprobs], layout=torch.jagged)
    real = BatchRecords([made.record], torch.zeros(1, dtype=torch.int64), True).metrics(scored, [torch.ones(4)])
    for name, metric in real.items():
        assert np.isnan(np.mean([filler[name]])), name
        assert np.mean([filler[name], metric]) == np.mean([metric]) == pytest.approx(np.mean([metric, metric])), name
    assert np.mean([real["mix/cosine"], filler["mix/cosine"]]) == 1


# Samples -----------------------------------------------------------------------------------------------------------


def configuration(inputs: Path, *given: str) -> Any:
    """verl's whole configuration for a command line of our launcher."""
    named = {argument.lstrip("+").partition("=")[0] for argument in given}
    kept = [x for x in arguments(inputs, inputs) if x.lstrip("+").partition("=")[0] not in named]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", verl_arguments([*kept, *given])[0])
    complete(config)
    return config


@pytest.mark.parametrize("loss_on_mixed_steps", [True, False])
@pytest.mark.parametrize("kept", [6, 3])
def test_a_sample_has_all_of_its_record(inputs: Path, loss_on_mixed_steps: bool, kept: int) -> None:
    """Through the agent loop, pydantic and TransferQueue; verl cuts a sample to `response_length` tokens."""
    rollout = rollouts(noise=True)[0]
    config = configuration(
        inputs, f"ngrpo.loss_on_mixed_steps={loss_on_mixed_steps}", f"data.max_response_length={kept}"
    )
    asked: list[dict] = []

    class Servers:
        async def generate(self, sampling_params: dict, **kwargs: Any) -> TokenOutput:
            asked.append(sampling_params)
            extra = {KEY: (rollout.record, rollout.tokens)} if "extra_args" in sampling_params else {}
            return TokenOutput(token_ids=rollout.tokens, log_probs=[-1.0] * 6, extra_fields=extra)

    async def sample(**kwargs: Any) -> Any:
        loop = MixingAgentLoop(
            DictConfigWrap(config), Servers(), byte_tokenizer_with_template(), None, None, DictConfigWrap(config.data)
        )
        return await loop.run({"temperature": 1.0}, raw_prompt=[{"role": "user", "content": "abcde"}], **kwargs)

    output = asyncio.run(sample(**{FIRST_ROW: 40, "session_id": 2}))
    assert asked[0]["extra_args"] == {KEY: {"row_id": 42}}
    fields = output.as_dict()
    (travelled,) = serial_utils.decode(serial_utils.encode([fields["extra_fields"]]))
    record = unpack_record(travelled[KEY], first=5, tokens=fields["responses"].tolist())
    mixed = rollout.record.steps[rollout.record.steps < kept]
    assert record.steps.tolist() == mixed.tolist() and record.noise == rollout.record.noise
    assert torch.equal(record.ids, rollout.record.ids[: len(mixed)])
    assert torch.equal(record.weights, rollout.record.weights[: len(mixed)])
    assert torch.equal(record.logprobs, rollout.record.logprobs[:kept])
    expected = torch.ones(kept, dtype=torch.int64)
    if not loss_on_mixed_steps:
        expected[mixed] = 0
    assert torch.equal(fields["response_mask"], expected)
    plain = asyncio.run(sample())  # validation
    assert "extra_args" not in asked[1] and KEY not in plain.extra_fields and set(plain.response_mask) == {1}


def byte_tokenizer_with_template() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def test_the_server_fetches_the_record_of_a_mixed_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from ngrpo_ops.integrations.vllm import records

    gate = torch.tensor([[True, False, True]])
    whole = MixRecord(gate, torch.ones(1, 3, 2, dtype=torch.int64), torch.ones(1, 3, 2) / 2, 0, torch.zeros(1, 3))
    fetched: list[tuple] = []

    class Engine:
        async def collective_rpc(self, method: str, timeout: Any, args: tuple) -> list[bytes]:
            fetched.append(args)
            return [records.pack(whole)]

    async def generate(self: Any, prompt_ids: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> TokenOutput:
        return TokenOutput(token_ids=[1, 2, 1])

    server = MixingHttpServer.__new__(MixingHttpServer)
    server.engine = Engine()
    monkeypatch.setattr(MixingHttpServer.__mro__[1], "generate", generate)
    params = {"extra_args": {KEY: {"row_id": 9}}}
    output = asyncio.run(server.generate([5, 6], params, "request", priority=0))
    record, tokens = output.extra_fields[KEY]
    assert fetched == [([9], [3])] and tokens == [1, 2, 1]
    assert record.first == 2 and record.steps.tolist() == [0, 2]
    assert asyncio.run(server.generate([5, 6], {}, "request")).extra_fields == {} and len(fetched) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_server_asks_its_engine_whether_it_can_mix(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    class Engine:
        async def collective_rpc(self, method: str, timeout: Any, args: tuple) -> list[bytes]:
            raise NotImplementedError(f"no method {method}")

    async def launch(self: Any, *args: Any) -> None:
        self.engine, self.node_rank = Engine(), rank

    server = MixingHttpServer.__new__(MixingHttpServer)
    monkeypatch.setattr(MixingHttpServer.__mro__[1], "launch_server", launch)
    if rank:  # has no engine of its own
        asyncio.run(server.launch_server())
    else:
        with pytest.raises(RuntimeError, match="plugin 'ngrpo_ops' was not loaded in its process"):
            asyncio.run(server.launch_server())


def test_reward_models_and_teachers_have_verls_own_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: Any, *args: Any, is_reward_model: bool = False, is_teacher_model: bool = False) -> None:
        self.is_reward_model, self.is_teacher_model, self.server_class = is_reward_model, is_teacher_model, "verl's"

    monkeypatch.setattr(MixingReplica.__mro__[1], "__init__", init)
    assert MixingReplica(is_reward_model=True).server_class == "verl's"
    assert MixingReplica(is_teacher_model=True).server_class == "verl's"
    assert MixingReplica().server_class.__ray_metadata__.modified_class.__name__ == "MixingHttpServer"


@pytest.fixture
def manager(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A manager whose prompts go nowhere, but into `sent`."""
    made = MixingAgentLoopManager(configuration(inputs), None)
    made.sent = []
    monkeypatch.setattr(AgentLoopManagerTQ, "generate_sequences", lambda self, prompts: self.sent.append(prompts))
    return made


def prompts(count: int, step: int, **columns: Any) -> TensorDict:
    batch = tensordict_utils.get_tensordict({"uid": NonTensorStack(*map(str, range(count)))})
    for name, values in columns.items():
        batch[name] = NonTensorStack(*values)
    tensordict_utils.assign_non_tensor_data(batch, "global_steps", step)
    return batch


def test_row_ids_are_step_and_place(manager: Any) -> None:
    for batch in (prompts(2, 5), prompts(1, 5), prompts(2, 6)):  # verl asks for more prompts in place of failed ones
        manager.generate_sequences(batch)
    rows = [list(batch[FIRST_ROW]) for batch in manager.sent]
    base = 2**32
    assert rows == [[5 * base, 5 * base + 4], [5 * base + 8], [6 * base, 6 * base + 4]]
    assert all(set(batch["agent_name"]) == {AGENT} for batch in manager.sent)
    manager.generate_sequences(prompts(3, 7, __rollout_n__=[2, 9, 1]))
    assert list(manager.sent[-1][FIRST_ROW]) == [7 * base, 7 * base + 2, 7 * base + 11]


def test_validation_prompts_are_verls_own(manager: Any) -> None:
    batch = prompts(2, 5, agent_name=["mine", "mine"])
    tensordict_utils.assign_non_tensor_data(batch, "validate", True)
    manager.generate_sequences(batch)
    assert FIRST_ROW not in manager.sent[0].keys() and list(manager.sent[0]["agent_name"]) == ["mine"] * 2  # noqa: SIM118


def test_prompts_with_another_agent_loop_are_refused(manager: Any) -> None:
    manager.generate_sequences(prompts(1, 5, agent_name=["single_turn_agent"]))
    with pytest.raises(
        ValueError, match=r"agent_name must be single_turn_agent or ngrpo, or left out, got .'tool_agent'"
    ):
        manager.generate_sequences(prompts(2, 5, agent_name=["tool_agent", "single_turn_agent"]))


# What stops a start ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("trainer.use_v1=False", "the older trainer drops the records"),
        ("trainer.v1.trainer_mode=colocate_async", "an interrupted sample is sent again"),
        ("trainer.v1.trainer_mode=separate_async", "an interrupted sample is sent again"),
        ("actor_rollout_ref.model.external_lib=mine", "ngrpo_ops.integrations.verl must be among it"),
        ("actor_rollout_ref.actor.strategy=megatron", "the other engines do not replay"),
        ("actor_rollout_ref.ref.strategy=veomni", "the other engines do not replay"),
        ("actor_rollout_ref.rollout.name=sglang", "the plugin that mixes is vLLM's"),
        ("actor_rollout_ref.rollout.enable_prefix_caching=True", "cached blocks are found by token ids alone"),
        ("actor_rollout_ref.rollout.disaggregation.enabled=True", "a connector finds blocks"),
        ("actor_rollout_ref.rollout.data_parallel_size=2", "other engines would not be fetched"),
        ("actor_rollout_ref.rollout.pipeline_model_parallel_size=2", "sampled on the last stage"),
        ("actor_rollout_ref.model.mtp.enable_rollout=True", "a drafted token"),
        ("actor_rollout_ref.rollout.multi_turn.enable=True", "earlier turns would be encoded again"),
        ("actor_rollout_ref.rollout.enable_rollout_routing_replay=True", "was never tried"),
        ("actor_rollout_ref.rollout.agent.custom_async_server.path=x.py", "a server of your own"),
        ("actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent", "an agent loop of your own"),
        ("+actor_rollout_ref.rollout.agent.agent_loop_manager_class=a.B", "gives the samples their row ids"),
        ("actor_rollout_ref.rollout.quantization=fp8", "a quantized embedding"),
        ("actor_rollout_ref.actor.fsdp_config.qat.enable=True", "a quantized embedding"),
        ("actor_rollout_ref.model.tiled_mlp.enabled=True", "was never tried"),
        ("actor_rollout_ref.actor.use_prefix_grouper=True", "writes a group's prompt once"),
        ("algorithm.adv_estimator=gae", "its critic would value plain tokens"),
        ("critic.enable=True", "its critic would value plain tokens"),
        ("algorithm.adv_estimator=remax", "its greedy baselines would be mixed"),
        ("distillation.enabled=True", "a teacher reads plain tokens"),
    ],
)
def test_settings_without_mixing_are_refused(inputs: Path, given: str, message: str) -> None:
    assert settings.check_settings(configuration(inputs)).k == 3
    config = configuration(inputs, given)
    with pytest.raises(ValueError, match=message) as error:
        settings.check_settings(config)
    assert str(error.value).startswith(given.lstrip("+").partition("=")[0])


@pytest.mark.parametrize(
    "given",
    [
        "algorithm.adv_estimator=rloo", "actor_rollout_ref.actor.use_dynamic_bsz=True", "critic.enable=False",
        "actor_rollout_ref.actor.strategy=fsdp", "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
        "algorithm.use_kl_in_reward=True", "actor_rollout_ref.model.use_fused_kernels=True",
        "actor_rollout_ref.model.lora_rank=4",
    ],
)  # fmt: skip
def test_settings_with_mixing_are_not(inputs: Path, given: str) -> None:
    assert settings.check_settings(configuration(inputs, given)).mixing_rate == 0.1


def test_a_vision_language_model_is_refused(inputs: Path, tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLConfig

    Qwen2_5_VLConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a vision-language model is not supported"):
        settings.check_settings(configuration(inputs, f"actor_rollout_ref.model.path={tmp_path}"))


def test_the_mixing_is_read_from_verls_settings(inputs: Path) -> None:
    config = configuration(inputs, "+ngrpo.k=5", "ngrpo.stop_token_ids=[7,8]", "actor_rollout_ref.rollout.seed=6")
    mixing = settings.mixing_config(config)
    assert (mixing.k, mixing.stop_token_ids, mixing.seed) == (5, (7, 8), 6)
    assert mixing.excluded_token_ids == "special"  # as in the engine, see wire.SERVED_DEFAULTS
    for given, message in {
        "+ngrpo.mixing_rate=2": "mixing_rate must be within",
        "+ngrpo.k=1000": "k must be at most the vocabulary size",
        "+ngrpo.strategy=nowhere:f": "nowhere",
    }.items():
        with pytest.raises((ValueError, ImportError), match=message):
            settings.check_settings(configuration(inputs, given))
    config = configuration(inputs)
    OmegaConf.update(config, settings.MIXING, None)
    with pytest.raises(ValueError, match="must hold the fields of MixingConfig, got none"):
        settings.check_settings(config)
    OmegaConf.update(config, settings.MIXING, {"rate": 1}, force_add=True)
    with pytest.raises(ValueError, match=r"must hold fields of MixingConfig, got .*'rate': 1\}"):
        settings.check_settings(config)


def test_the_example_has_the_papers_settings_and_its_reward_grades(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "examples" / "verl_r1_distill_qwen_1.5b.sh").read_text()
    _, reward, _, data, command = re.split(r"<<'PYTHON'\n|^PYTHON\n", text, flags=re.MULTILINE)
    words = shlex.split(command.partition("python -m")[2].replace("\\\n", " "))
    assert words[0] == OURS and words[-1] == "$@"
    given = [word for word in words[1:-1] if not word.startswith("actor_rollout_ref.model.path=")]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", verl_arguments([*given, f"actor_rollout_ref.model.path={inputs}/model"])[0])
    complete(config)
    mixing = settings.check_settings(config)
    assert (mixing.k, mixing.mixing_rate, mixing.excluded_token_ids) == (3, 0.1, "special")
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (config.data.train_batch_size, rollout.n, rollout.temperature) == (64, 4, 0.7)
    assert (actor.optim.lr, actor.kl_loss_coef, actor.use_kl_loss) == (1e-6, 0.001, True)
    assert (config.data.max_prompt_length, config.data.max_response_length) == (4096, 8192)
    scope: dict[str, Any] = {"__name__": "reward"}
    exec(reward, scope)
    graded = [scope["compute_score"]("", text, "2") for text in ("so \\boxed{2}", "so \\boxed{3}", "I do not know")]
    assert graded == [1.0, 0.0, 0.0]
    exec(data, scope)
    row = scope["verl_row"]("1 + 1 = ?", 2, "toy", 7)
    assert row["reward_model"]["ground_truth"] == "2" and row["prompt"][0]["content"].startswith("1 + 1 = ? ")


@pytest.mark.parametrize("name", ["checks", "dry_run", "launcher", "samples", "settings"])
def test_the_examples_of_the_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"{OURS}.{name}"))
    assert found.attempted > 0 and not found.failed


def test_arguments_of_the_launcher() -> None:
    assert verl_arguments(["+ngrpo.dry_run=True"])[1] and not verl_arguments(["+ngrpo.dry_run=false"])[1]
    with pytest.raises(SystemExit, match=r"ngrpo\.rate is not known, known are k, "):
        verl_arguments(["+ngrpo.rate=1"])
    with pytest.raises(SystemExit, match=r"ngrpo\.dry_run must be True or False, got '2'"):
        verl_arguments(["+ngrpo.dry_run=2"])
    own = ["actor_rollout_ref.rollout.enable_prefix_caching=True", "+ngrpo.seed=5"]
    found, _ = verl_arguments(own)
    assert found == [own[0], f"++{settings.MIXING}.seed=5"]


def test_what_the_configuration_has_stays(inputs: Path) -> None:
    config = configuration(inputs, "actor_rollout_ref.rollout.seed=6")
    assert config.actor_rollout_ref.model.external_lib == settings.EXTERNAL_LIB == OURS
    assert resolve(":".join(settings.MANAGER.rsplit(".", 1)))[1] == "MixingAgentLoopManager"
    assert OmegaConf.select(config, settings.MIXING).seed == 6
    own = configuration(inputs, "+ngrpo.seed=5", "actor_rollout_ref.model.external_lib=mine")
    assert OmegaConf.select(own, settings.MIXING).seed == 5
    assert own.actor_rollout_ref.model.external_lib == "mine"


TARGETS = [(file, target) for file, targets in checks.EXPECTED_PARAMETERS.items() for target in targets]


@pytest.mark.parametrize(("file", "target"), TARGETS, ids=[target for _, target in TARGETS])
def test_a_function_with_another_name_or_parameters_stops(
    file: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks.check_parameters(file)
    owner, name = resolve(target)
    with monkeypatch.context() as patch:  # a base class may have one of the same name
        patch.delattr(owner, name)
        with pytest.raises(ImportError, match=f"verl has changed {target}: expected .*, found None"):
            checks.check_parameters(file)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda self, other: None)
        with pytest.raises(ImportError, match=f"verl has changed {target}: expected .*, found .'self', 'other'"):
            checks.check_parameters(file)


def test_a_renamed_hook_stops_the_launcher(inputs: Path, tmp_path: Path) -> None:
    """In a process of its own, before anything starts."""
    target = "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead.forward_step"
    (tmp_path / "dump").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", f"import {OURS}"], env=os.environ | {"PYTHONPATH": PATH, "VERL_RENAMED": target},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"ImportError: verl has changed {target}: expected parameters" in done.stderr


def test_the_registries_have_our_classes() -> None:
    register()
    register()  # a second call changes nothing
    for strategy in ("fsdp", "fsdp2"):
        assert EngineRegistry.get_engine_cls("language_model", strategy) is ReplayingFSDPEngine
        assert EngineRegistry.get_engine_cls("value_model", strategy) is not ReplayingFSDPEngine
    assert RolloutReplicaRegistry.get("vllm") is MixingReplica
    key = ("cuda", "cpu")  # see PLATFORM
    mine = {"fsdp": {key: dict}}
    original = EngineRegistry._engines
    EngineRegistry._engines = {"language_model": mine}
    try:
        with pytest.raises(ImportError, match=r"builtins\.dict is verl's engine for strategy 'fsdp' on cuda of cpu"):
            register()
    finally:
        EngineRegistry._engines = original


# Training ----------------------------------------------------------------------------------------------------------


MIXED = ("+ngrpo.k=3", "+ngrpo.mixing_rate=0.5", "+ngrpo.temperature=4.0")


@pytest.fixture
def train(inputs: Path, tmp_path: Path) -> Callable[..., Run]:
    def start(*given: str, module: str = OURS, name: str = "run", **settings: Any) -> Run:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return run(module, inputs, folder, *given, **settings)

    return start


def largest(forwards: list[dict[str, Any]], what: str) -> float:
    """The largest difference between an engine's and the policy's log-probabilities: "replayed", or by "plain" ids."""
    differences = [
        (scored - record.logprobs).abs().max()
        for forward in forwards
        for scored, record in zip(forward[what], forward["records"], strict=True)
        if record is not None
    ]
    return float(torch.stack(differences).max())


def assert_mixed(result: Run, difference: Difference | None = None, name: str = "", steps: int = 2) -> list[dict]:
    """A run's forwards of the policy, which replay what the engine has mixed; the metrics are those of its records."""
    assert result.status == 0, result.output[-6000:]
    policys = [forward for forward in result.noted("forward") if not forward["reference"] and not forward["trains"]]
    replayed, plain = largest(policys, "replayed"), largest(policys, "plain")
    assert replayed <= PARITY and plain > WITHOUT
    logged = {metric: result.logged(f"actor/mix/{metric}") for metric in METRICS}
    assert all(len(values) == steps for values in logged.values())
    assert max(logged["replay_error"]) == pytest.approx(replayed, rel=1e-3, abs=1e-9)
    assert set(logged["replay_outliers"]) == {0.0}
    records = [record for forward in policys for record in forward["records"] if record is not None]
    assert len(records) == steps * 4 * SAMPLES
    shares = [0.0] * 2
    for record in records:
        shares[0] += len(record.steps)
        shares[1] += len(record.logprobs)
    assert min(logged["gated_share"]) <= shares[0] / shares[1] <= max(logged["gated_share"])
    assert all(0.3 < share < 0.7 for share in logged["gated_share"]) and all(x < 1 for x in logged["cosine"])
    if difference is not None:
        difference(name, replayed, plain)
    return policys


def assert_gates_of_step(step: int, forwards: list[dict]) -> None:
    """The samples' mixed steps are those of the step's row ids, one sample each, whichever request came first."""
    seed = 42  # verl's default of rollout.seed
    rows = step * 2**32 + torch.arange(4 * SAMPLES)
    drawn = gates(torch.tensor(seed), rows[:, None], torch.arange(TOKENS), 0.5)
    schedules = [row.nonzero()[:, 0].tolist() for row in drawn]
    records = [record for forward in forwards for record in forward["records"] if record is not None]
    assert len(records) == len(schedules)
    for record in sorted(records, key=lambda record: -len(record.logprobs)):
        length = len(record.logprobs)
        schedules.remove(next(x for x in schedules if [s for s in x if s < length] == record.steps.tolist()))


@pytest.mark.slow
def test_two_steps_with_a_reference(train: Callable[..., Run], difference: Difference) -> None:
    result = train(*MIXED)
    policys = assert_mixed(result, difference, "verl, fsdp2, packed")
    for step in (1, 2):
        assert_gates_of_step(step, policys[len(policys) // 2 * (step - 1) :][: len(policys) // 2])
    # In the first step the reference is the policy: its replayed log-probabilities are the same.
    references = [forward for forward in result.noted("forward") if forward["reference"]]
    assert largest(references[: len(references) // 2], "replayed") <= PARITY
    first, second = result.logged("actor/kl_loss")
    assert abs(first) <= 1e-9 < second
    assert max(map(abs, result.logged("actor/ppo_kl"))) <= 1e-6
    # The forwards that train, too.
    assert largest([forward for forward in result.noted("forward") if forward["trains"]], "replayed") <= PARITY
    # In the engine: the table of the second step is that of the weights that the first update has made.
    *_, synced, trained = result.noted("table")
    updates = result.noted("update")
    assert synced["equal"] and trained["equal"] and synced["embedding"] != trained["embedding"]
    assert trained["embedding"] == pytest.approx(updates[0], rel=1e-12)
    assert len(result.rollouts("validations")) == 1


@pytest.mark.slow
def test_two_ranks_and_two_replicas(train: Callable[..., Run], difference: Difference) -> None:
    """Balanced over the ranks in dynamic batches, without the mixed steps in the loss, and an update on both."""
    sizes = [
        f"actor_rollout_ref.{name}=64"
        for name in (
            "actor.ppo_max_token_len_per_gpu", "rollout.log_prob_max_token_len_per_gpu",
            "ref.log_prob_max_token_len_per_gpu",
        )
    ]  # fmt: skip
    dynamic = [
        f"actor_rollout_ref.{name}=True"
        for name in ("actor.use_dynamic_bsz", "rollout.log_prob_use_dynamic_bsz", "ref.log_prob_use_dynamic_bsz")
    ]
    result = train(*MIXED, "ngrpo.loss_on_mixed_steps=False", *sizes, *dynamic, ranks=2)
    policys = assert_mixed(result, difference, "verl, two ranks and two replicas")
    assert len({len(forward["records"]) for forward in policys}) > 1  # dynamic
    for forward in result.noted("forward"):
        for mask, record in zip(forward["masks"], forward["records"], strict=True):
            if record is not None:
                assert [step for step, kept in enumerate(mask) if not kept] == record.steps.tolist()
    updates = result.noted("update")
    assert len(updates) == 4 and len(set(updates)) == 2  # both ranks have the weights of one policy
    tables = result.noted("table")
    assert all(table["equal"] for table in tables)
    assert sum(table["embedding"] == pytest.approx(updates[0], rel=1e-12) for table in tables) == 2  # each replica's
    first, second = result.logged("actor/kl_loss")
    assert abs(first) <= 1e-9 < second


@pytest.mark.slow
def test_rate_zero_and_validation_are_stock(train: Callable[..., Run]) -> None:
    """At rate 0 tokens, losses and validations, step by step; at rate 1 the validation before the first step."""
    validated = (
        "actor_rollout_ref.rollout.val_kwargs.temperature=1.0", "trainer.val_before_train=True",
        "actor_rollout_ref.rollout.enable_prefix_caching=False",
    )  # fmt: skip
    every_step = (*validated, "trainer.test_freq=1")
    stock = train(*every_step, module=STOCK, name="stock", VERL_SEEDS="1")
    zero = train("+ngrpo.mixing_rate=0", *every_step, name="zero", VERL_SEEDS="1")
    last = ("trainer.total_training_steps=1", "trainer.test_freq=-1")
    one = train("+ngrpo.mixing_rate=1.0", *validated, *last, name="one", VERL_SEEDS="1")
    for result in (stock, zero, one):
        assert result.status == 0, result.output[-6000:]
    assert zero.logged("actor/mix/gated_share") == [0.0] * 2 and one.logged("actor/mix/gated_share") == [1.0]

    def samples(result: Run, folder: str) -> list[list[tuple[str, str, float]]]:
        return [sorted((x["input"], x["output"], x["score"]) for x in step) for step in result.rollouts(folder)]

    assert len(samples(stock, "rollouts")) == 2 and len(samples(stock, "validations")) == 3
    for folder in ("rollouts", "validations"):
        assert samples(zero, folder) == samples(stock, folder)
    assert samples(one, "validations")[0] == samples(stock, "validations")[0]
    assert samples(one, "rollouts")[0] != samples(stock, "rollouts")[0]
    # The rows are in the order of their arrival, in which they are added up. At a ratio of 1 the policy's loss is a sum
    # of advantages, of size 1, that cancel: its rounding is not relative to it.
    for name in ("actor/pg_loss", "actor/kl_loss", "actor/grad_norm", "actor/entropy"):
        assert len(stock.logged(name)) == 2
        assert zero.logged(name) == pytest.approx(stock.logged(name), rel=1e-5, abs=1e-6), name


BY_HAND = (
    f"actor_rollout_ref.model.external_lib={settings.EXTERNAL_LIB}",
    "actor_rollout_ref.rollout.enable_prefix_caching=False",
    f"+{settings.MIXING}.k=3",
    f"+{settings.MIXING}.mixing_rate=0.5",
)


@pytest.mark.slow
def test_fsdp1_and_padded_rows_by_verls_own_launcher(train: Callable[..., Run], difference: Difference) -> None:
    """Without a reference, which FSDP1 offloads into pinned memory. With noise on the mixes."""
    given = (
        f"+{settings.ROLLOUT}.agent.agent_loop_manager_class={settings.MANAGER}",
        f"+{settings.MIXING}.strategy=gaussian",
        "actor_rollout_ref.actor.strategy=fsdp", "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.actor.use_kl_loss=False",
    )  # fmt: skip
    result = train(*BY_HAND, *given, module=STOCK)
    policys = assert_mixed(result, difference, "verl, fsdp, padded")
    assert not any(forward["packed"] for forward in policys)


OWN_STRATEGY = """
import torch


def half_and_half(policy):
    ids = policy.likeliest(2)
    return ids, torch.full(ids.shape, 0.5, device=ids.device)
"""


@pytest.mark.slow
def test_lora_with_checkpointing_and_a_strategy_of_the_users(
    train: Callable[..., Run], difference: Difference, inputs: Path, tmp_path: Path
) -> None:
    """The adapter is merged into what the engine gets; the reference is the policy without it.

    verl sends merged weights in bfloat16, whatever the model's dtype is. So the model's weights are such numbers here,
    and what the engine gets is rounded only after the first update.
    """
    (tmp_path / "own_strategies.py").write_text(OWN_STRATEGY)
    model = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    shutil.copytree(inputs / "model", tmp_path / "rounded")
    model.save_pretrained(tmp_path / "rounded")
    given = (
        f"actor_rollout_ref.model.path={tmp_path}/rounded", "actor_rollout_ref.model.lora_rank=4",
        "actor_rollout_ref.model.lora.merge=True", "actor_rollout_ref.model.enable_gradient_checkpointing=True",
    )  # fmt: skip
    own = ("+ngrpo.strategy=own_strategies:half_and_half", "+ngrpo.k=2", "+ngrpo.mixing_rate=0.5")
    result = train(*own, *given, PYTHONPATH=os.pathsep.join([str(tmp_path), PATH]))
    assert result.status == 0, result.output[-6000:]
    # Policy and reference are one engine, so the forwards are taken by what they are to reproduce.
    trains = [forward for forward in result.noted("forward") if forward["trains"]]
    first, second = trains[: len(trains) // 2], trains[len(trains) // 2 :]
    assert largest(first, "replayed") <= PARITY and largest(first, "plain") > WITHOUT
    assert result.logged("actor/mix/replay_error")[0] <= PARITY
    difference("verl, lora, checkpointing", largest(first, "replayed"), largest(first, "plain"))
    replayed = largest(second, "replayed")
    assert PARITY < replayed <= replay_tolerance(torch.bfloat16) and replayed < largest(second, "plain") / 4
    difference("verl, lora sent in bfloat16 after an update", replayed, largest(second, "plain"))
    kl = result.logged("actor/kl_loss")
    assert abs(kl[0]) <= 1e-9 < kl[1]
    records = [record for forward in result.noted("forward") for record in forward["records"]]
    assert all(record.ids.shape[1] == 2 and bool((record.weights == 0.5).all()) for record in records)


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_same_gates(train: Callable[..., Run], difference: Difference) -> None:
    saved = ("trainer.save_freq=1", "trainer.test_freq=-1")
    whole = train(*MIXED, *saved, name="whole")
    of_both_steps = assert_mixed(whole)
    assert_gates_of_step(2, of_both_steps[len(of_both_steps) // 2 :])
    checkpoint = whole.folder / "checkpoints" / "global_step_1"
    resumed = train(
        *MIXED, "trainer.test_freq=-1", "trainer.resume_mode=resume_path", f"trainer.resume_from_path={checkpoint}",
        name="resumed",
    )  # fmt: skip
    policys = assert_mixed(resumed, difference, "verl, resumed", steps=1)
    assert_gates_of_step(2, policys)
    assert resumed.logged("training/global_step") == [2]


@pytest.mark.slow
def test_a_plugin_that_is_not_loaded_stops_the_start(train: Callable[..., Run]) -> None:
    result = train(*MIXED, VLLM_PLUGINS="none")
    assert result.status not in (0, -9)
    assert "the plugin 'ngrpo_ops' was not loaded in its process" in result.output
    assert not result.rollouts()


@pytest.mark.slow
def test_settings_by_hand_without_the_manager_stop_the_first_forward(train: Callable[..., Run]) -> None:
    """No launcher: nothing asks the engine to mix, and the training workers say so."""
    result = train(*BY_HAND, module=STOCK)
    assert result.status not in (0, -9)
    assert "RuntimeError: a training sample has no record" in result.output
    assert not result.logged("actor/pg_loss")


@pytest.mark.slow
def test_a_dry_run_prints_the_parity(train: Callable[..., Run]) -> None:
    result = train("+ngrpo.dry_run=True", "+ngrpo.loss_on_mixed_steps=False")
    assert result.status == 0, result.output[-6000:]
    assert "parity: the policy agrees with the engine on mixed rollouts" in result.output
    broken = train("+ngrpo.dry_run=True", name="broken", VERL_WITHOUT_REPLAY="1")
    assert broken.status == 1 and "NO PARITY" in broken.output


@pytest.mark.slow
def test_a_refused_setting_ends_the_launcher(train: Callable[..., Run]) -> None:
    result = train(*MIXED, "trainer.v1.trainer_mode=separate_async")
    assert result.status == 1
    assert "error: trainer.v1.trainer_mode='separate_async' is not supported with N-GRPO" in result.output
    assert "Started a local Ray instance" not in result.output
