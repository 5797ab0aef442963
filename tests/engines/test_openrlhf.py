"""The OpenRLHF adapter: replayed forwards and gradients, what stops a start, and runs of the real training loop."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import inspect
import json
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cpu_engine import SHAPE
from models import byte_tokenizer
from openrlhf_cpu.runs import OURS, PROMPTS, SAMPLES, STOCK, Run, make_inputs, run
from ray._common.utils import load_class
from torch import Tensor, nn

from ngrpo_ops import MixingConfig, MixRecord, gaussian_noise
from ngrpo_ops._patching import resolve
from ngrpo_ops.integrations import openrlhf as adapter
from ngrpo_ops.integrations.openrlhf import checks, launcher
from ngrpo_ops.integrations.openrlhf.samples import action_ranges, experience_metrics, make_overlay
from ngrpo_ops.integrations.openrlhf.settings import VARIABLE, read_settings
from ngrpo_ops.integrations.openrlhf.workers import PATCHES, replaying
from ngrpo_ops.integrations.vllm import records
from ngrpo_ops.random import bernoulli, philox
from ngrpo_ops.record import SparseRecord
from ngrpo_ops.strategies import _registry as registry
from ngrpo_ops.strategies import get_strategy
from ngrpo_ops.versions import VERSIONS, Versions

# What the runs' processes load at their start: here for openrlhf's own imports.
_spec = importlib.util.spec_from_file_location(
    "openrlhf_stand_ins", Path(__file__).with_name("openrlhf_cpu") / "sitecustomize.py"
)
assert _spec is not None and _spec.loader is not None
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))

from openrlhf.models import Actor, ring_attn_utils  # noqa: E402
from openrlhf.models import actor as actor_module  # noqa: E402
from openrlhf.trainer.ppo_utils import experience as experiences  # noqa: E402
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator  # noqa: E402

PARITY = 1e-4  # float32
WITHOUT = 1e-2  # what plain ids differ by, at the least
METRICS = ("gated_share", "anchor_differs", "anchor_weight", "cosine", "replay_error")

Difference = Callable[[str, float, float | None], None]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openrlhf")
    make_inputs(folder, SHAPE)
    return folder


@pytest.fixture
def installed() -> Iterator[None]:
    adapter.install()
    yield
    adapter.uninstall()


# Replay ------------------------------------------------------------------------------------------------------------


def samples(noise: bool = False) -> list[SparseRecord]:
    """Of rows with prompts of 3, 1 and 5 tokens and 6, 9 and 2 generated ones."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for row, (first, length, steps) in enumerate([(3, 6, [0, 2, 3, 5]), (1, 9, [1, 8]), (5, 2, [])]):
        ids = torch.randint(3, 200, (len(steps), 3), generator=generator)
        weights = torch.rand(len(steps), 3, generator=generator, dtype=torch.float64).softmax(-1).float()
        at = torch.tensor(steps, dtype=torch.int64)
        made.append(
            SparseRecord(first, at, ids, weights, torch.zeros(length), (0.33, 7, 40 + row) if noise else None)
        )  # fmt: skip
    return made


def batch(rows: list[SparseRecord]) -> experiences.Experience:
    """Padded on the right, as OpenRLHF does; each mixed position holds its anchor."""
    length = max(row.first + len(row.logprobs) for row in rows)
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(3, 200, (len(rows), length), generator=generator)
    attention_mask, action_mask = torch.zeros_like(sequences), torch.zeros_like(sequences)
    for i, row in enumerate(rows):
        end = row.first + len(row.logprobs)
        sequences[i, row.first + row.steps] = row.ids[:, 0]
        sequences[i, end:] = 0
        attention_mask[i, :end] = 1
        action_mask[i, row.first : end] = 1
    return experiences.Experience(
        sequences=sequences, attention_mask=attention_mask, action_mask=action_mask[:, 1:], mm_train_inputs=rows,
        info={}, prompts=[""] * len(rows), labels=[""] * len(rows), images=[None] * len(rows),
        total_length=attention_mask.sum(1),
    )  # fmt: skip


def by_hand(actor: Any, rows: list[SparseRecord], experience: experiences.Experience) -> Tensor:
    """[B, L - 1] log-probabilities of the actions: each row alone, without padding, from embeddings formed here."""
    out = torch.zeros(experience.action_mask.shape)
    embedded = actor.model.get_input_embeddings()
    for i, row in enumerate(rows):
        ids = experience.sequences[i, : row.first + len(row.logprobs)]
        columns = list(embedded(ids).unbind(0))
        for j, step in enumerate(row.steps.tolist()):
            mixed = (row.weights[j][:, None] * embedded(row.ids[j])).sum(0)
            if row.noise is not None:
                scale, seed, row_id = (torch.tensor([value]) for value in row.noise)
                mixed = gaussian_noise(mixed[None], scale, seed=seed, row_ids=row_id, steps=torch.tensor([step]))[0]
            columns[row.first + step] = mixed
        logits = actor.model(inputs_embeds=torch.stack(columns)[None]).logits[0, :-1].float()
        logprobs = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        out[i, row.first - 1 : len(logprobs)] = logprobs[row.first - 1 :]
    return out


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("variant", ["plain", "noise", "checkpointing", "reentrant", "lora"])
def test_values_and_gradients_are_those_of_a_forward_by_hand(
    installed: None, inputs: Path, packed: bool, variant: str
) -> None:
    rows = samples(noise=variant == "noise")
    experience = batch(rows)
    lora = {"lora_rank": 4, "target_modules": ["q_proj", "v_proj", "embed_tokens"]} if variant == "lora" else {}
    torch.manual_seed(0)
    actor = Actor(str(inputs / "model"), packing_samples=packed, **lora).double()
    if variant == "lora":  # as initialized one factor of each is zero, and the other has no gradient
        for name, parameter in actor.named_parameters():
            if "lora" in name:
                nn.init.normal_(parameter, std=0.1)
    actor.train()
    coefficients = torch.randn(experience.action_mask.shape, generator=torch.Generator().manual_seed(2))

    def scored(score: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        actor.zero_grad()
        values = score()
        (values * coefficients * experience.action_mask).sum().backward()
        grads = {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}
        return values.detach() * experience.action_mask, grads

    def replayed() -> Tensor:
        with replaying(actor, [rows]):
            return actor(experience.sequences, experience.action_mask, experience.attention_mask)

    expected, wanted = scored(lambda: by_hand(actor, rows, experience))
    if variant in ("checkpointing", "reentrant"):
        if variant == "reentrant":  # asks for an input of the first block that requires a gradient
            actor.model.enable_input_require_grads()
        actor.gradient_checkpointing_enable({"use_reentrant": variant == "reentrant"})
    values, grads = scored(replayed)
    torch.testing.assert_close(values, expected, atol=2e-6, rtol=1e-6)
    assert set(grads) == set(wanted)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], atol=2e-6 * float(wanted[name].abs().max()), rtol=1e-5)
    if variant != "lora":  # every candidate is moved, but those after which no token follows
        moved = grads["model.model.embed_tokens.weight"].abs().sum(1) > 0
        assert moved[torch.cat([row.ids[row.steps < len(row.logprobs) - 1].flatten() for row in rows])].all()


def test_records_of_other_sequences_are_noticed(installed: None, inputs: Path) -> None:
    rows = samples()
    experience = batch(rows)
    actor = Actor(str(inputs / "model"))

    def score(batches: list, times: int = 1) -> None:
        with torch.no_grad(), replaying(actor, batches):
            for _ in range(times):
                actor(experience.sequences, experience.action_mask, experience.attention_mask)

    score([rows])
    wrong = {
        "swapped": [rows[1], rows[0], rows[2]],
        "one later": [replace(row, first=row.first + 1) for row in rows],
        "other anchors": [replace(row, ids=row.ids.flip(1)) for row in rows],
    }
    for changed in wrong.values():
        with pytest.raises(RuntimeError, match="not its anchors"):
            score([changed])
    with pytest.raises(RuntimeError, match="1 of 2 batches"):
        score([rows, rows])
    with pytest.raises(RuntimeError, match="more often"):
        score([rows], times=2)
    with pytest.raises(RuntimeError, match="called 0 times"), replaying(actor, [rows]):
        actor.model.config.use_cache = False
        actor.model.forward = lambda *args, **kwargs: {"logits": torch.zeros(*experience.sequences.shape, 259)}
        actor(experience.sequences, experience.action_mask, experience.attention_mask)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ring_attention_each_rank_replays_its_slice(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By OpenRLHF's own slicing; the attention itself needs flash-attention and was not run."""
    rows = samples(noise=True)
    experience = batch(rows)
    monkeypatch.setattr(ring_attn_utils, "update_ring_attn_params", lambda lengths: None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: size)
    seen = []
    for rank in range(size):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None, rank=rank: rank)
        sliced, *_ = ring_attn_utils.unpad_and_slice_tensor(experience.sequences, experience.attention_mask, "group")
        overlay = make_overlay(rows, experience.attention_mask, packed=True, group="group")
        assert torch.equal(sliced.flatten()[overlay.positions], overlay.ids[:, 0])
        seen += [
            (*ids, step, row)
            for ids, step, row in zip(
                overlay.ids.tolist(), overlay.noise.steps.tolist(), overlay.noise.row_ids.tolist(), strict=True
            )
        ]
    assert seen == [
        (*ids, step, row.noise[2])
        for row in rows
        for ids, step in zip(row.ids.tolist(), row.steps.tolist(), strict=True)
    ]


def test_records_survive_the_replay_buffer(installed: None, inputs: Path) -> None:
    """Split, stripped of their padding, shuffled and padded anew, as between rollout and training."""
    rows = samples()
    items = experiences.remove_padding_in_sequences(experiences.split_experience_batch(batch(rows)))
    shuffled = experiences.make_experience_batch([items[2], items[0]])
    assert [row.first for row in shuffled.mm_train_inputs] == [5, 3]
    actor = Actor(str(inputs / "model")).float()
    with torch.no_grad(), replaying(actor, [shuffled.mm_train_inputs]):
        found = actor(shuffled.sequences, shuffled.action_mask, shuffled.attention_mask)
    whole = batch(rows)
    expected = by_hand(actor, rows, whole)[[2, 0], : found.shape[1]]
    torch.testing.assert_close(found * shuffled.action_mask, expected, atol=2e-5, rtol=1e-5)


def test_metrics_are_totals_over_the_rollout() -> None:
    rows = [replace(row, logprobs=-torch.rand(len(row.logprobs)).double().float()) for row in samples()]
    experience = batch(rows)
    experience.action_log_probs = torch.zeros(experience.action_mask.shape)
    for i, row in enumerate(rows):
        experience.action_log_probs[i, row.first - 1 : row.first - 1 + len(row.logprobs)] = row.logprobs
    experience.action_log_probs[1, 4] += 0.25
    found = experience_metrics([experience])
    mixed = torch.cat([row.logprobs[row.steps] for row in rows])
    assert found["mix/gated_share"] == pytest.approx(6 / 17)
    assert found["mix/anchor_differs"] == pytest.approx(float((1 - mixed.exp()).mean()))
    assert found["mix/anchor_weight"] == pytest.approx(float(torch.cat([row.weights[:, 0] for row in rows]).mean()))
    assert found["mix/replay_error"] == pytest.approx(0.25, abs=1e-6)
    experience.action_mask[1, 4] = 0  # a token that does not enter the loss is not scored
    assert experience_metrics([experience])["mix/replay_error"] < 1e-6


def test_a_sample_has_all_of_its_record() -> None:
    gate = torch.tensor([[True, False, True, True]])
    ids, weights = torch.arange(12).view(1, 4, 3), torch.rand(1, 4, 3)
    noise = {"noise_scale": torch.tensor([0.5]), "noise_seed": torch.tensor([7]), "row_ids": torch.tensor([9])}
    sample = MixRecord(gate, ids, weights, 0, torch.randn(1, 4), **noise).sparse(0, first=5)
    assert sample.steps.tolist() == [0, 2, 3] and sample.first == 5 and sample.noise == (0.5, 7, 9)
    assert torch.equal(sample.ids, ids[0, [0, 2, 3]]) and torch.equal(sample.weights, weights[0, [0, 2, 3]])
    assert len(sample.logprobs) == 4


def test_tokens_left_out_of_the_loss() -> None:
    first, second, third = samples()
    assert action_ranges(first) == [(4, 5), (7, 8)]
    assert action_ranges(second) == [(1, 2), (3, 9)]
    assert action_ranges(third) == [(5, 7)]


@pytest.mark.parametrize("loss_on_mixed_steps", [True, False])
@pytest.mark.parametrize(("max_length", "kept"), [(9, 6), (6, 3), (2, 0)])
def test_the_record_is_cut_with_its_sample(
    executor: Callable[..., Any], inputs: Path, max_length: int, kept: int, loss_on_mixed_steps: bool
) -> None:
    """OpenRLHF cuts a sample to `max_length` tokens, here of a prompt of 3 and 6 generated ones."""
    whole = samples()[0]
    gate = torch.zeros(1, 6, dtype=torch.bool)
    ids, weights = torch.zeros(1, 6, 3, dtype=torch.int64), torch.zeros(1, 6, 3)
    gate[0, whole.steps], ids[0, whole.steps], weights[0, whole.steps] = True, whole.ids, whole.weights
    engine = EngineOfOne(MixRecord(gate, ids, weights, 0, torch.rand(1, 6)))
    made = executor(str(inputs / "reward.py"), loss_on_mixed_steps=loss_on_mixed_steps)
    params = SimpleNamespace(extra_args=None, max_tokens=max_length, logprobs=None)
    call = made.execute("abc", "", params, max_length, byte_tokenizer(), engine, images=iter([41, 42]))
    response = asyncio.run(call)
    assert engine.asked == [{"ngrpo_ops": {"row_id": 41}}] and engine.fetched == [([41], [6])]
    record = response["mm_train_inputs"]
    mixed = [step for step in whole.steps.tolist() if step < kept]
    assert record.first == 3 and record.steps.tolist() == mixed
    assert torch.equal(record.logprobs, engine.record.logprobs[0, :kept])
    assert torch.equal(record.ids, whole.ids[: len(mixed)]) and torch.equal(record.weights, whole.weights[: len(mixed)])
    assert response["action_ranges"] == ([(3, 9)] if loss_on_mixed_steps else action_ranges(record))
    experience = SamplesGenerator._process_response_into_experience(None, response, max_len=max_length)
    patched = PATCHES["openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator._process_response_into_experience"]
    measured = patched(lambda self, response, **kwargs: experience)(None, response, max_len=max_length)
    assert measured.response_length.tolist() == [kept]


class EngineOfOne:
    """An engine with the record of its only request, to the executor."""

    def __init__(self, record: MixRecord) -> None:
        self.record, self.llm = record, self
        self.asked: list[dict] = []
        self.fetched: list[tuple] = []

    async def generate(self, prompt_token_ids: list[int], sampling_params: Any, multi_modal_data: Any = None) -> Any:
        self.asked.append(sampling_params.extra_args)
        output = SimpleNamespace(token_ids=[7] * self.record.length, finish_reason="length", logprobs=None)
        return SimpleNamespace(outputs=[output])

    async def collective_rpc(self, method: str, timeout: Any, args: tuple) -> list[bytes]:
        self.fetched.append(args)
        return [records.pack(self.record)]


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes an executor as OpenRLHF does: of a file, by its path."""
    from openrlhf.trainer.ray.vllm_engine import _load_agent_executor

    def make(reward_url: str, **mixing: Any) -> Any:
        monkeypatch.setenv(VARIABLE, json.dumps({"mixing": mixing, "reward_url": reward_url}))
        return _load_agent_executor(str(launcher.EXECUTOR))

    yield make
    adapter.uninstall()


# Who is mixed ------------------------------------------------------------------------------------------------------


class Engine:
    """A handle of an engine, to the generator of samples."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.get_num_unfinished_requests = SimpleNamespace(remote=lambda: 0)
        self.generate_responses = SimpleNamespace(remote=lambda **kwargs: self.asked.append(kwargs))


@pytest.fixture
def generator(installed: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    import ray
    from torchdata.stateful_dataloader import StatefulDataLoader

    monkeypatch.setattr(ray, "get", lambda refs: refs)

    def make() -> Any:
        args = SimpleNamespace(
            rollout=SimpleNamespace(n_samples_per_prompt=4, batch_size=2),
            algo=SimpleNamespace(advantage=SimpleNamespace(is_correction_level="off")),
            vllm=SimpleNamespace(enable_sleep=False),
        )
        loader = StatefulDataLoader(
            [("", [text], [""], [None]) for text in PROMPTS], batch_size=1, collate_fn=lambda rows: rows[0]
        )
        return SamplesGenerator(SimpleNamespace(args=args), loader, [("", ["p"], [""], [None])], None, [Engine()])

    return make


def test_row_ids_count_samples_and_go_on_after_a_checkpoint(generator: Callable[[], Any]) -> None:
    first = generator()
    first._dispatch_prompts_to_vllm(["a", "b"], ["", ""], images=[None, None], max_new_tokens=3)
    first._dispatch_prompts_to_vllm(["c"], [""], n_samples_per_prompt=2, max_new_tokens=3)
    asked = [list(request["images"]) for request in first.vllm_engines[0].asked]
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    iterator = iter(first.prompts_dataloader)
    next(iterator)
    state = first.prompts_dataloader.state_dict()
    again = generator()
    again.prompts_dataloader.load_state_dict(state)
    again._dispatch_prompts_to_vllm(["d"], [""], max_new_tokens=3)
    assert list(again.vllm_engines[0].asked[0]["images"]) == [10, 11, 12, 13]
    assert len(list(again.prompts_dataloader)) == len(PROMPTS) - 1
    del state["ngrpo_next_row"]  # as GRPO's checkpoint
    plain = generator()
    plain.prompts_dataloader.load_state_dict(state)
    assert plain.next_row == 0


def test_evaluation_asks_for_no_mixes(generator: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = generator()
    monkeypatch.setattr("openrlhf.trainer.ppo_utils.samples_generator.ray.wait", lambda refs, **kwargs: ([], []))
    made.generate_eval_samples(max_new_tokens=3)
    (request,) = made.vllm_engines[0].asked
    assert request["images"] is None and made.next_row == 0 and not made.evaluating


def test_a_training_sample_without_a_record_stops_the_run(installed: None) -> None:
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    experience = batch(samples())
    experience.mm_train_inputs = [None] * 3
    with pytest.raises(RuntimeError, match="no record"):
        RemoteExperienceMaker.make_experience(SimpleNamespace(), [experience])


def test_rewards_are_openrlhfs_own_and_the_engine_is_one_that_mixes(executor: Callable[..., Any], inputs: Path) -> None:
    import vllm

    original = vllm.AsyncEngineArgs
    served = executor("http://one/score,http://two/score", k=2)
    assert served.reward_endpoints == ["http://one/score", "http://two/score"] and served.reward_func is None
    assert served.config == MixingConfig(k=2)
    arguments = vllm.AsyncEngineArgs(str(inputs / "model"), enable_prefix_caching=False)
    assert isinstance(arguments, original) and arguments.additional_config["ngrpo_ops"]["k"] == 2
    own = executor(str(inputs / "reward.py"), k=2)
    assert float(own.reward_func(["abcc"], ["a"], [""])["rewards"]) == pytest.approx(0.2)
    adapter.uninstall()
    assert vllm.AsyncEngineArgs is original


# What stops a start ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", checks.EXPECTED_PARAMETERS)
def test_a_change_upstream_stops_the_start(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter.check_openrlhf()
    owner, name = resolve(target)
    before = inspect.getattr_static(owner, name)
    with monkeypatch.context() as change:
        kinds = owner.__mro__[:-1] if isinstance(owner, type) else [owner]
        for kind in kinds:  # Ray's class of an actor and OpenRLHF's both have it
            if name in vars(kind):
                change.delattr(kind, name)
        if name == "__init__":
            change.setattr(owner, name, lambda self, renamed: None)
        with pytest.raises(ImportError, match=f"has changed {target}".replace(".", r"\.")):
            adapter.check_openrlhf()
        change.setattr(owner, name, lambda self, renamed: None, raising=False)
        with pytest.raises(ImportError, match=r"found \['self', 'renamed'\]"):
            adapter.check_openrlhf()
        if target in PATCHES:  # in a worker, whose node may have another version
            try:
                with pytest.raises(ImportError, match="OpenRLHF has changed"):
                    adapter.install()
            finally:
                adapter.uninstall()
    assert inspect.getattr_static(owner, name) is before


def test_another_version_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERSIONS, "openrlhf", Versions("0.11.1", "0.11.1", ("0.11.1",)))
    with pytest.raises(ImportError, match=r"OpenRLHF 0.11.2 is not tested"):
        adapter.check_openrlhf()
    monkeypatch.undo()
    monkeypatch.setitem(VERSIONS, "vllm", Versions("0.27", "0.28", ("0.28",)))
    with pytest.raises(ImportError, match=r"vLLM 0.29.0 is not tested"):
        adapter.check_openrlhf()


def test_install_is_idempotent_and_reversible() -> None:
    before = {target: inspect.getattr_static(*resolve(target)) for target in PATCHES}
    finders = list(sys.meta_path)
    for _ in range(2):
        adapter.install()
        once = {target: inspect.getattr_static(*resolve(target)) for target in PATCHES}
        adapter.install()
        again = {target: inspect.getattr_static(*resolve(target)) for target in PATCHES}
        assert once == again and not set(map(id, once.values())) & set(map(id, before.values()))
        adapter.uninstall()
        adapter.uninstall()
        after = {target: inspect.getattr_static(*resolve(target)) for target in PATCHES}
        assert after == before and sys.meta_path == finders


def test_a_module_is_patched_when_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's hook runs before anything of OpenRLHF is there."""
    monkeypatch.delitem(sys.modules, "openrlhf.models.actor")
    adapter.install()
    try:
        assert "openrlhf.models.actor" not in sys.modules
        module = importlib.import_module("openrlhf.models.actor")
        assert module is not actor_module and "batches" in module.Actor.forward.__code__.co_varnames
        assert module.Actor.forward.__wrapped__.__code__ == inspect.unwrap(Actor.forward).__code__
    finally:
        adapter.uninstall()
        importlib.import_module("openrlhf.models").actor = actor_module


@pytest.mark.parametrize("name", ["openrlhf.models.actor", "openrlhf.trainer.ray.launcher"])
def test_a_look_for_a_module_or_a_failed_import_does_not_lose_the_patch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = next(target for target in PATCHES if target.startswith(name))
    parent, _, short = name.rpartition(".")
    kept = sys.modules[name]
    monkeypatch.delitem(sys.modules, name)
    adapter.install()
    try:
        assert importlib.util.find_spec(name) is not None
        with monkeypatch.context() as changed:
            changed.setitem(checks.EXPECTED_PARAMETERS, target, ["self"])
            with pytest.raises(ImportError, match="OpenRLHF has changed"):
                importlib.import_module(name)
        assert name not in sys.modules
        importlib.import_module(name)
        owner, method = resolve(target)
        assert hasattr(getattr(owner, method), "__wrapped__")
    finally:
        adapter.uninstall()
        setattr(importlib.import_module(parent), short, kept)


def launch(monkeypatch: pytest.MonkeyPatch, inputs: Path, *arguments: str) -> Any:
    """Our launcher up to where OpenRLHF connects to Ray; returns what it would connect with."""
    import ray

    class Connected(Exception):
        pass

    def init(**keywords: Any) -> None:
        raise Connected(keywords)

    given = {
        "--actor.model_name_or_path": f"{inputs}/model", "--reward.remote_url": "http://localhost/score",
        "--data.prompt_dataset": f"{inputs}/prompts.jsonl", "--vllm.num_engines": "8",
        "--algo.advantage.estimator": "group_norm", "--rollout.n_samples_per_prompt": "4",
    }  # fmt: skip
    flat = [word for pair in given.items() for word in pair]
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(sys, "argv", ["openrlhf", *flat, *arguments])
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(Connected) as connected:
        adapter.main()
    return connected.value.args[0]


def test_the_arguments_are_the_fields_of_mixing_config(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    launcher.add_arguments(parser)
    names = {option.removeprefix("--ngrpo.") for option in parser._option_string_actions} - {"-h", "--help"}
    assert names == {field.name for field in fields(MixingConfig)} | {"dry_run"}
    assert all(len(action.help or "") > 20 for action in parser._actions if action.dest != "help")
    text = " ".join(parser.format_help().split())
    for part in ("the anchor counted", "Must be within [0, 1].", "--ngrpo.metric {cosine,dot,l2,l1}"):
        assert part in text

    runtime = launch(monkeypatch, inputs, "--train.seed", "5")["runtime_env"]
    assert runtime["worker_process_setup_hook"] == "ngrpo_ops.integrations.openrlhf.install"
    assert load_class(runtime["worker_process_setup_hook"]) is adapter.install  # as Ray's workers look for it
    assert "TOKENIZERS_PARALLELISM" in runtime["env_vars"]
    monkeypatch.setenv(VARIABLE, runtime["env_vars"][VARIABLE])
    assert read_settings() == (MixingConfig(seed=5, excluded_token_ids="special"), "http://localhost/score")

    words = (
        "--ngrpo.k 2 --ngrpo.mixing_rate 0.25 --ngrpo.temperature 0.7 --ngrpo.metric l2 --ngrpo.variant released "
        "--ngrpo.entropy_threshold 0.5 --ngrpo.sampler counter_based --ngrpo.stop_token_ids 7 8 --ngrpo.seed 3 "
        "--ngrpo.allowed_token_ids 4 5 6 --ngrpo.excluded_token_ids 4 9 --ngrpo.loss_on_mixed_steps false "
        "--reward.remote_url a.py"
    )
    runtime = launch(monkeypatch, inputs, *words.split())["runtime_env"]
    monkeypatch.setenv(VARIABLE, runtime["env_vars"][VARIABLE])
    expected = MixingConfig(
        k=2, mixing_rate=0.25, temperature=0.7, metric="l2", variant="released", entropy_threshold=0.5,
        sampler="counter_based", stop_token_ids=(7, 8), seed=3, allowed_token_ids=(4, 5, 6), excluded_token_ids=(4, 9),
        loss_on_mixed_steps=False,
    )  # fmt: skip
    assert read_settings() == (expected, "a.py")


def test_excluded_tokens_travel_as_the_word(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, expected in (("special", "special"), ("none", None), ("4 9", [4, 9])):
        runtime = launch(monkeypatch, inputs, "--ngrpo.excluded_token_ids", *words.split())["runtime_env"]
        assert json.loads(runtime["env_vars"][VARIABLE])["mixing"]["excluded_token_ids"] == expected


def test_the_old_name_of_a_sampler_is_taken_with_a_warning(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(DeprecationWarning, match="'counter_based' now"):
        runtime = launch(monkeypatch, inputs, "--ngrpo.sampler", "ngrpo")["runtime_env"]
    assert json.loads(runtime["env_vars"][VARIABLE])["mixing"]["sampler"] == "counter_based"


STRATEGY = """
def pair(policy):
    ids = policy.likeliest(policy.k)
    return ids, policy.softmax(ids)

def nothing():
    pass
"""


@pytest.fixture
def strategies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with a user's strategies, known to this process by the import path alone."""
    (tmp_path / "user_strategies.py").write_text(STRATEGY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "user_strategies", raising=False)
    monkeypatch.setattr("ngrpo_ops.strategies._registry", dict(registry))


def test_a_strategy_of_the_users_reaches_engine_and_workers(
    strategies: None, executor: Callable[..., Any], inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    name = "user_strategies:pair"
    runtime = launch(monkeypatch, inputs, "--ngrpo.strategy", name, "--ngrpo.k", "2")["runtime_env"]
    settings = json.loads(runtime["env_vars"][VARIABLE])
    assert settings["mixing"]["strategy"] == name
    # In a worker nothing is imported yet.
    del sys.modules["user_strategies"]
    monkeypatch.setattr("ngrpo_ops.strategies._registry", dict(registry))
    made = executor(settings["reward_url"], **settings["mixing"])
    assert made.config == MixingConfig(strategy=name, k=2, excluded_token_ids="special", seed=42)  # OpenRLHF's own seed
    assert get_strategy(name).function is sys.modules["user_strategies"].pair
    arguments = vllm.AsyncEngineArgs(str(inputs / "model"))
    assert arguments.additional_config["ngrpo_ops"]["strategy"] == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:pair", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("user_strategies:other", "cannot be imported: AttributeError"),
        ("user_strategies:nothing", "must be a function of one argument"),
    ],
)
def test_a_strategy_that_cannot_be_used_is_an_error_of_the_command_line(
    strategies: None, name: str, message: str, inputs: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        launch(monkeypatch, inputs, "--ngrpo.strategy", name)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert f"error: --ngrpo.strategy '{name}'" in said and message in said


def test_the_example_starts_and_its_reward_grades(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "examples" / "openrlhf_r1_distill_qwen_1.5b.sh").read_text()
    _, reward, command = re.split(r"<<'PYTHON'\n|^PYTHON\n", text, flags=re.MULTILINE)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", OURS] and words[-1] == "$@"
    runtime = launch(monkeypatch, inputs, *words[3:-1])["runtime_env"]
    monkeypatch.setenv(VARIABLE, runtime["env_vars"][VARIABLE])
    assert read_settings()[0] == MixingConfig(k=3, mixing_rate=0.1, excluded_token_ids="special", seed=42)
    scope: dict[str, Any] = {}
    exec(reward, scope)
    queries = ["ask: so \\boxed{1/2}", "ask: so \\boxed{2}", "ask: I do not know"]
    found = scope["reward_func"](queries, ["ask: "] * 3, ["\\frac{1}{2}"] * 3)
    assert found["rewards"].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ngrpo.k 0", "--ngrpo.k must be an integer of at least 1"),
        ("--ngrpo.mixing_rate 2", "--ngrpo.mixing_rate must be within"),
        ("--ngrpo.loss_on_mixed_steps maybe", "expected true or false"),
        ("--ngrpo.strategy none", "--ngrpo.strategy must be one of"),
        ("--ngrpo.metric none", "--ngrpo.metric must be one of ('cosine', 'dot', 'l2', 'l1'), got 'none'"),
        ("--ngrpo.nothing 1", "unrecognized arguments: --ngrpo.nothing"),
        ("--ngrpo.mixing_rate 1 --ngrpo.loss_on_mixed_steps false", "--ngrpo.mixing_rate must be below 1"),
        ("--ngrpo.k 100000", "--ngrpo.k must be at most the vocabulary size"),
        ("--ngrpo.stop_token_ids 999999", "--ngrpo.stop_token_ids must be below the vocabulary size"),
        (
            "--ngrpo.allowed_token_ids " + "10 11 12 " * 10_000,
            "--ngrpo.allowed_token_ids: 30000 token ids are too many",
        ),
        (
            "--ngrpo.excluded_token_ids " + "10 11 12 " * 10_000,
            "--ngrpo.excluded_token_ids: 30000 token ids are too many",
        ),
        ("--ngrpo.excluded_token_ids all", "--ngrpo.excluded_token_ids must be 'special' or a list of token ids"),
        (
            "--algo.advantage.estimator gae",
            "--algo.advantage.estimator gae is not supported with N-GRPO: its critic would value plain tokens",
        ),
        (
            "--train.agent_func_path mine.py",
            "--train.agent_func_path is not supported with N-GRPO: an executor of your own",
        ),
        (
            "--reward.remote_url=",
            "--reward.remote_url is not supported with N-GRPO: OpenRLHF leaves its reward model out",
        ),
        ("--vllm.num_engines 0", "--vllm.num_engines 0 is not supported with N-GRPO: the engines are what mixes"),
        ("--vllm.enable_prefix_caching", "--vllm.enable_prefix_caching is not supported with N-GRPO: cached blocks"),
        (
            "--data.max_images_per_prompt 1",
            "--data.max_images_per_prompt is not supported with N-GRPO: vision-language",
        ),
        ("--ds.deepcompile", "--ds.deepcompile is not supported with N-GRPO: the hooks"),
    ],
)
def test_settings_under_which_nothing_would_mix_are_refused(
    arguments: str, message: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        launch(monkeypatch, inputs, *arguments.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_vision_language_model_is_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "vision_config": {}}))
    with pytest.raises(SystemExit):
        launch(monkeypatch, inputs, "--actor.model_name_or_path", str(tmp_path))
    assert "vision-language models are not supported" in capsys.readouterr().err


def test_ray_that_runs_already_is_refused(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="Ray runs in this process already"):
        adapter.main()


# The training loop -------------------------------------------------------------------------------------------------


@pytest.fixture
def train(inputs: Path, tmp_path: Path) -> Callable[..., Run]:
    def start(*arguments: str, module: str = OURS, name: str = "run", **settings: Any) -> Run:
        (tmp_path / name).mkdir()
        found = run(module, inputs, tmp_path / name, *arguments, **settings)
        print(found.output[-6000:])  # shown where a test fails
        return found

    return start


# Means over more of bfloat16's rounding, and mixes that matter: of many tokens, weighted nearly alike.
IN_BFLOAT16 = "--ngrpo.mixing_rate 0.5 --ngrpo.k 8 --ngrpo.temperature 4 --rollout.max_new_tokens 24"


def drawn(row_id: int, length: int, rate: float = 0.5, seed: int = 42) -> list[int]:
    gates = bernoulli(philox(torch.tensor(seed), torch.tensor(row_id), torch.arange(length))[0], rate)
    return gates.nonzero()[:, 0].tolist()


def assert_mixed(result: Run, steps: int, rate: float = 0.5) -> None:
    """`steps` rollouts, logged and recorded; every sample's gates are those of one row id, and no two share one."""
    assert result.status == 0
    for name in METRICS:
        assert len(result.logged(f"mix/{name}")) == steps, name
    if rate == 0.5:
        assert all(0.25 < share < 0.75 for share in result.logged("mix/gated_share"))
        for name in ("anchor_differs", "anchor_weight", "cosine"):
            assert all(0 < value < 1 for value in result.logged(f"mix/{name}")), name
    rollouts = result.rollouts()
    assert len(rollouts) == steps
    left = set(range(0, steps * len(rollouts[0]), SAMPLES))
    for rollout in rollouts:
        for place in range(0, len(rollout), SAMPLES):  # the samples of a prompt are together, and in order
            rows = [experience["mm_train_inputs"][0] for experience in rollout[place : place + SAMPLES]]
            gates = [row.steps.tolist() for row in rows]
            lengths = [len(row.logprobs) for row in rows]
            fits = [f for f in left if gates == [drawn(f + i, n, rate) for i, n in enumerate(lengths)]]
            left.discard(fits[0])
            for experience, row in zip(rollout[place : place + SAMPLES], rows, strict=True):
                assert experience["sequences"][0, row.first + row.steps].tolist() == row.ids[:, 0].tolist()
    assert not left


def plain_difference(result: Run, inputs: Path) -> float:
    """The largest difference of log-probabilities that plain ids make, in the rollout of the weights at the start."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    largest = 0.0
    for experience in result.rollouts()[0]:
        (row,) = experience["mm_train_inputs"]
        steps = slice(row.first, row.first + len(row.logprobs))
        with torch.no_grad():
            logprobs = model(input_ids=experience["sequences"]).logits[0].log_softmax(-1)
        emitted = experience["sequences"][0, steps, None]
        plain = logprobs.roll(1, dims=0)[steps].gather(1, emitted)[:, 0]
        largest = max(largest, float((plain - row.logprobs).abs().max()))
    assert largest > WITHOUT
    return largest


@pytest.mark.slow
def test_the_loop_in_bfloat16_with_evaluation(train: Any, inputs: Path, difference: Difference) -> None:
    """OpenRLHF's own judgement: `vllm_kl`, its mean difference between engine and policy."""
    evaluation = (
        f"--eval.dataset {inputs}/prompts.jsonl --eval.steps 1 --eval.temperature 0 --eval.n_samples_per_prompt 1"
    )
    result = train(*IN_BFLOAT16.split(), *evaluation.split(), float32=False)
    assert_mixed(result, steps=2)
    assert max(map(abs, result.logged("vllm_kl"))) <= 5e-4
    assert result.logged("kl")[0] == 0  # the reference has the policy's weights, and replays the same record
    assert all(value > 0 for value in result.logged("kl")[1:])
    difference("openrlhf, bfloat16", max(result.logged("mix/replay_error")), plain_difference(result, inputs))

    evaluated = result.rollouts("generate_eval_samples")
    assert len(evaluated) == 2 and all(len(samples) == len(PROMPTS) for samples in evaluated)
    assert all(sample["mm_train_inputs"] == [None] for samples in evaluated for sample in samples)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(result.folder / "out", dtype=torch.float32)
    for sample in evaluated[-1]:  # of the weights that were saved
        with torch.no_grad():
            logits = model(input_ids=sample["sequences"]).logits[0, :-1]
        below = logits.max(-1).values - logits.gather(1, sample["sequences"][0, 1:, None])[:, 0]
        assert float((below * sample["action_mask"][0]).max()) < 0.3  # greedy but for rounding, on plain ids


@pytest.mark.slow
def test_without_the_replay_it_is_large(train: Any) -> None:
    result = train(*IN_BFLOAT16.split(), float32=False, OPENRLHF_WITHOUT_REPLAY="1")
    assert result.status == 0
    differences = result.logged(
        "vllm_kl"
    )  # means of signed differences, of either sign; 5e-4 is what the loop may have
    assert len(differences) == 2 and max(map(abs, differences)) > 1e-3
    assert min(result.logged("mix/replay_error")) > 0.1


@pytest.mark.slow
def test_two_actors_and_two_engines(train: Any, inputs: Path, difference: Difference) -> None:
    """And tokens of mixed steps left out of the loss."""
    two = "--actor.num_gpus_per_node 2 --ref.num_gpus_per_node 2 --vllm.num_engines 2 --rollout.micro_batch_size 2"
    result = train(
        "--ngrpo.mixing_rate", "0.5", "--ngrpo.loss_on_mixed_steps", "false", "--train.micro_batch_size", "2",
        *two.split(),
    )  # fmt: skip
    assert_mixed(result, steps=2)
    assert max(result.logged("mix/replay_error")) <= PARITY
    assert result.logged("kl")[0] == pytest.approx(0, abs=1e-9)
    for experience in [experience for rollout in result.rollouts() for experience in rollout]:
        row = experience["mm_train_inputs"][0]
        expected = torch.zeros_like(experience["action_mask"][0])
        expected[row.first - 1 :] = 1
        expected[row.first - 1 + row.steps] = 0
        assert torch.equal(experience["action_mask"][0], expected)
    difference(
        "openrlhf, two actors and two engines", max(result.logged("mix/replay_error")), plain_difference(result, inputs)
    )


@pytest.mark.slow
def test_zero_3_and_packing(train: Any, inputs: Path, difference: Difference) -> None:
    """With checkpointing, dynamic batches, and noise on the mixes."""
    words = (
        "--ngrpo.mixing_rate 0.5 --ngrpo.strategy gaussian --ds.zero_stage 3 --ds.packing_samples "
        "--train.dynamic_batch_enable --train.max_tokens_per_gpu 64 --rollout.max_tokens_per_gpu 64 "
        "--actor.gradient_checkpointing_enable"
    )
    result = train(*words.split())
    assert_mixed(result, steps=2)
    assert max(result.logged("mix/replay_error")) <= PARITY
    assert result.logged("kl")[0] == pytest.approx(0, abs=1e-9)
    difference("openrlhf, ZeRO-3, packed", max(result.logged("mix/replay_error")), plain_difference(result, inputs))


class _Scores(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        rewards = [len(set(query)) / 10 for query in asked["query"]]
        body = json.dumps({"rewards": rewards[0], "scores": rewards[0], "extra_logs": {"asked": 1.0}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.slow
def test_asynchronous_rollouts_with_a_reward_server(train: Any, inputs: Path, difference: Difference) -> None:
    """The policy stands still: a rollout that overlaps a training step is one step behind, mixed or not."""
    server = HTTPServer(("127.0.0.1", 0), _Scores)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        words = (
            "--ngrpo.mixing_rate 0.5 --train.async_enable --train.partial_rollout_enable --actor.adam.lr 0 "
            f"--reward.remote_url http://127.0.0.1:{server.server_port}/score --algo.advantage.estimator rloo"
        )
        result = train(*words.split())
    finally:
        server.shutdown()
    assert_mixed(result, steps=2)
    assert result.logged("asked") == [1.0] * 2 and min(result.logged("reward")) > 0
    assert max(result.logged("mix/replay_error")) <= PARITY
    assert max(map(abs, result.logged("vllm_kl"))) <= PARITY
    difference("openrlhf, asynchronous", max(result.logged("mix/replay_error")), plain_difference(result, inputs))


@pytest.mark.slow
def test_lora_fails_in_openrlhfs_own_sync(train: Any) -> None:
    """It sends the engine the names of PEFT's modules. Where this test fails, OpenRLHF has learned it: run ours."""
    stock = train("--ds.lora.rank", "4", module=STOCK)
    assert stock.status != 0 and "no module or parameter named 'base_model'" in stock.output


@pytest.mark.slow
def test_rate_zero_generates_what_stock_does(train: Any) -> None:
    # All prompts in every step, as their order is not seeded.
    words = f"--rollout.batch_size {len(PROMPTS)} --train.batch_size {SAMPLES * len(PROMPTS)} --train.num_episodes 2"
    ours = train("--ngrpo.mixing_rate", "0", *words.split(), name="ours", OPENRLHF_SEEDS="1")
    stock = train(*words.split(), module=STOCK, name="stock", OPENRLHF_SEEDS="1")
    assert_mixed(ours, steps=2, rate=0)
    assert ours.logged("mix/gated_share") == [0.0] * 2
    for step, (one, other) in enumerate(zip(ours.rollouts(), stock.rollouts(), strict=True)):
        tokens = [[(e["prompts"][0], e["sequences"][0].tolist()) for e in rollout] for rollout in (one, other)]
        assert sorted(tokens[0]) == sorted(tokens[1]), step


@pytest.mark.slow
def test_a_plugin_that_is_not_loaded_stops_the_first_rollout(train: Any) -> None:
    result = train("--ngrpo.mixing_rate", "0.5", VLLM_PLUGINS="none")
    assert result.status not in (0, -9)
    assert "the plugin 'ngrpo_ops' was not loaded in its process" in result.output
    assert not result.rollouts()


@pytest.mark.slow
def test_a_dry_run_prints_the_parity(train: Any) -> None:
    result = train("--ngrpo.dry_run", "--ngrpo.loss_on_mixed_steps", "false")
    assert result.status == 0, result.output
    assert "parity: the policy agrees with the engine on mixed rollouts" in result.output
    broken = train("--ngrpo.mixing_rate", "0.5", "--ngrpo.dry_run", name="broken", OPENRLHF_WITHOUT_REPLAY="1")
    assert broken.status == 1 and "NO PARITY" in broken.output
