"""The vLLM plugin in a real engine: what it emits, what it records, and what it refuses."""

from __future__ import annotations

import doctest
import functools
import importlib
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import snippets
import torch
from cpu_engine import SETTINGS, SHAPE, mixer_of, on_two_ranks
from models import EOS, PAD, VOCABULARY, tiny_model, tokenizer
from vllm import LLM
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.worker_base import WorkerBase
from vllm_requests import (
    PARITY,
    Difference,
    check_parity,
    params,
    prompts,
    replayed,
    replayed_logits,
    sequences,
    taken,
)

from ngrpo_ops import MixingConfig, nearest_neighbors
from ngrpo_ops.integrations import vllm as adapter
from ngrpo_ops.integrations.transformers import NeighborMixing
from ngrpo_ops.integrations.vllm import engine_kwargs, plugin, request_kwargs, take_records

try:
    from vllm.v1.worker.gpu.sample import logits_processor
except ImportError:  # until vLLM 0.30 Model Runner V2 takes none of a user's own
    logits_processor = None


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(**SHAPE)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("engine_model")
    model.save_pretrained(path)
    return str(path)


# Replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_requests_of_mixed_lengths_under_preemption(
    engine: Any, model: Any, asynchronous: bool, difference: Difference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 requests, 8 at a time, in a cache too small for them: prefill in chunks, preempted, prefilled again."""
    preempted: list[str] = []
    preempt = Scheduler._preempt_request

    def count(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", count)
    llm = engine(
        MixingConfig(mixing_rate=0.5, seed=3), max_model_len=128, block_size=32, num_gpu_blocks_override=13,
        max_num_batched_tokens=24, async_scheduling=asynchronous,
    )  # fmt: skip
    rows = list(range(100, 164))
    asked = [params(row, max_tokens=4 + (13 * i) % 40) for i, row in enumerate(rows)]
    outputs = llm.generate(prompts(64, longest=40), asked, use_tqdm=False)
    assert len(set(preempted)) >= 3
    record = taken(llm, outputs, rows)
    assert record.gate.sum() > 400
    difference("vllm, preempted", *check_parity(model, outputs, record))
    everything_is_free(llm)


def everything_is_free(llm: LLM) -> None:
    mixer = mixer_of(llm)
    assert not mixer.requests.kept and not mixer.requests.slots
    assert len(set(mixer.pool._free)) == len(mixer.pool._free) == len(mixer.pool.gate)


STRATEGIES = [
    {},
    {"k": 1},
    {"k": 5, "temperature": 0.5, "metric": "l2", "variant": "released"},
    {"strategy": "topk"},
    {"strategy": "gumbel", "temperature": 0.7},
    {"strategy": "gaussian", "noise_scale": 1.0},
    {"strategy": "moi", "moi_beta": 0.5},
    {"strategy": "multiplex", "temperature": 0.5},
    {"strategy": "anchor", "entropy_threshold": 3.0},
    {"stop_token_ids": [20, 21, 22, 23, 24, 25, 26, 27, 28, 29]},
    {"allowed_token_ids": [5, 6, 7, 8, 9]},
    {"excluded_token_ids": [5, 6, 7, 8, 9]},
]


@pytest.mark.parametrize("settings", STRATEGIES, ids=str)
def test_every_strategy_emits_and_records_what_transformers_does(
    engine: Any, model: Any, settings: dict, difference: Difference
) -> None:
    difference("vllm, strategies", *check_strategy(engine, model, settings))


def check_strategy(engine: Any, model: Any, settings: dict) -> tuple[float, float | None]:
    """With the counter-based sampler the two paths must draw the same tokens, gates and candidates.

    Returns:
        The differences of `check_parity`.
    """
    config = MixingConfig(mixing_rate=0.5, seed=5, sampler="counter_based", **settings)
    llm = engine(config)
    cuts = {"temperature": 0.9, "top_k": 40, "top_p": 0.95}
    outputs = llm.generate(prompts(8), [params(row, **cuts) for row in range(8)], use_tqdm=False)
    record = taken(llm, outputs, list(range(8)))
    differences = check_parity(model, outputs, record, 0.9)
    asked, tokens, _ = sequences(outputs)
    width = max(map(len, asked))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in asked])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in asked])
    mixing = NeighborMixing(model, config)
    ours, theirs = mixing.generate(
        ids, attention_mask=mask, do_sample=True, min_new_tokens=0, max_new_tokens=20, eos_token_id=None, **cuts,
        row_ids=torch.arange(8),
    )  # fmt: skip
    mixing.remove()
    assert ours[:, width:].tolist() == tokens
    assert torch.equal(theirs.gate, record.gate)
    assert torch.equal(theirs.ids[theirs.gate], record.ids[record.gate])
    assert torch.allclose(theirs.weights[theirs.gate], record.weights[record.gate], atol=1e-5)
    return differences


OWN_STRATEGIES = """
import torch
from ngrpo_ops import register_strategy

def two_likeliest(policy):
    ids = policy.likeliest(2)
    return ids, torch.full(ids.shape, 0.5, device=ids.device)

@register_strategy(emits_sample=True)
def drawn(policy):
    ids = policy.draws(policy.k)
    return ids, policy.softmax(ids)
"""


@pytest.fixture
def own_strategies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module on the path of the engine's process."""
    name = "strategies_of_a_user"
    (tmp_path / f"{name}.py").write_text(OWN_STRATEGIES)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize("function", ["two_likeliest", "drawn"])
def test_a_strategy_of_the_users_own(
    engine: Any, model: Any, own_strategies: str, function: str, difference: Difference
) -> None:
    error, without = check_strategy(engine, model, {"strategy": f"{own_strategies}:{function}", "k": 2})
    difference("vllm, own strategy", error, without)
    assert error <= 1e-5


@pytest.mark.parametrize(
    "settings", [{"strategy": "moi"}, {"strategy": "multiplex"}, {"sampler": "counter_based"}], ids=str
)
def test_a_draw_that_the_engines_own_cuts_would_not_leave_has_a_log_probability(engine: Any, settings: dict) -> None:
    """vLLM cuts by min-p first, which leaves less of the others; ours are in the order of transformers."""
    llm = engine(MixingConfig(mixing_rate=1.0, seed=3, **settings), logprobs_mode="processed_logprobs")
    cuts = {"temperature": 1.0, "top_p": 0.8, "min_p": 0.1, "logprobs": 0}
    outputs = llm.generate(prompts(8), [params(row, **cuts) for row in range(8)], use_tqdm=False)
    found = [next(iter(token.values())).logprob for output in outputs for token in output.outputs[0].logprobs]
    assert len(found) == 8 * 20 and min(found) > -torch.inf


def test_a_bfloat16_engine(engine: Any, tmp_path: Path, difference: Difference) -> None:
    """Rounding is large here, and engine and transformers round differently; plain ids are further off all the same."""
    rounded = tiny_model(**SHAPE, scale=1.0).bfloat16()
    rounded.save_pretrained(tmp_path)
    llm = engine(MixingConfig(k=8, mixing_rate=0.5, temperature=4.0), model=str(tmp_path), dtype="bfloat16")
    outputs = llm.generate(prompts(16), [params(row) for row in range(16)], use_tqdm=False)
    record = taken(llm, outputs, list(range(16)))
    again, live = replayed(rounded.float(), outputs, record)
    plain, _ = replayed(rounded.float(), outputs, None)
    errors, without = ((x - record.logprobs)[live].abs() for x in (again, plain))
    assert errors.mean() < without.mean() / 5
    difference("vllm, bfloat16", float(errors.max()), float(without.max()))


def test_native_gates_are_those_of_transformers(engine: Any, model: Any) -> None:
    config = MixingConfig(mixing_rate=0.3, seed=11)
    llm = engine(config)
    rows = [7, 2**40, 0, 12]
    outputs = llm.generate(prompts(4), [params(row, seed=1) for row in rows], use_tqdm=False)
    record = taken(llm, outputs, rows)
    mixing = NeighborMixing(model, config)
    ids = torch.full((4, 1), 5)
    _, theirs = mixing.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=20, eos_token_id=None,
        row_ids=torch.tensor(rows),
    )  # fmt: skip
    mixing.remove()
    assert torch.equal(theirs.gate, record.gate) and 10 < int(record.gate.sum()) < 40


def test_a_request_that_does_not_ask_is_as_if_alone(engine: Any) -> None:
    llm = engine(MixingConfig(mixing_rate=0.5))
    quiet = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 30, "seed": 77}
    alone = llm.generate(prompts(3)[2], params(None, **quiet), use_tqdm=False)
    mixed = llm.generate(
        [*prompts(6), prompts(3)[2]], [*(params(row) for row in range(6)), params(None, **quiet)], use_tqdm=False
    )
    assert mixed[-1].outputs[0].token_ids == alone[0].outputs[0].token_ids
    stock = engine()
    plain = stock.generate(prompts(3)[2], params(None, **quiet), use_tqdm=False)
    assert plain[0].outputs[0].token_ids == alone[0].outputs[0].token_ids
    assert type(stock.llm_engine.model_executor.driver_worker.worker.model_runner.model_state).__name__ == (
        "DefaultModelState"
    )


def test_several_sequences_of_a_request(engine: Any, model: Any) -> None:
    llm = engine(MixingConfig(mixing_rate=0.5))
    outputs = llm.generate(prompts(3), [params(10 * i, n=4, seed=None) for i in range(3)], use_tqdm=False)
    rows = [10 * i + j for i in range(3) for j in range(4)]
    record = taken(llm, outputs, rows)
    check_parity(model, outputs, record)
    assert len({tuple(gate) for gate in record.gate.tolist()}) == 12


def sampler_of(llm: LLM) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.sampler


def test_penalties_run_once_a_step(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixed row is chosen from the logits that vLLM has penalized, not from logits that are penalized again."""
    llm = engine(MixingConfig(mixing_rate=0.5))
    sampler, calls = sampler_of(llm), Counter()

    def count(owner: Any, name: str, called: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[called] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(sampler, "sample", "steps")
    penalties = sampler.penalties_state
    count(penalties, "apply" if hasattr(penalties, "apply") else "apply_penalties", "penalties")  # until vLLM 0.30
    outputs = llm.generate(prompts(4), [params(row, repetition_penalty=2.0) for row in range(4)], use_tqdm=False)
    assert taken(llm, outputs, list(range(4))).gate.sum() > 20
    assert calls["penalties"] == calls["steps"] >= 20


if logits_processor is not None:

    class Alternating(logits_processor.LogitsProcessor):
        """Forbids a quarter of the tokens, at each call another: those whose id is the call's number modulo 4."""

        def __init__(self, vllm_config: Any, req_states: Any) -> None:
            self.calls = 0

        def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
            logits[:, self.calls % 4 :: 4] = -torch.inf
            self.calls += 1
            return logits

    @pytest.mark.parametrize("sampler", ["native", "counter_based"])
    def test_a_logits_processor_with_a_state_runs_once_a_step(engine: Any, model: Any, sampler: str) -> None:
        llm = engine(MixingConfig(mixing_rate=0.5, sampler=sampler), logits_processors=[Alternating])
        (processor,) = (p for p in sampler_of(llm).logits_processors if isinstance(p, Alternating))
        processor.calls = 0
        outputs = llm.generate(prompts(4), [params(row) for row in range(4)], use_tqdm=False)
        record = taken(llm, outputs, list(range(4)))
        check_parity(model, outputs, record)
        logits, emitted, live = replayed_logits(model, outputs, record)
        assert live.all() and record.gate.sum() > 20
        step = torch.arange(20)
        assert (emitted % 4 != step % 4).all()
        forbidden = torch.arange(VOCABULARY) % 4 == step[:, None] % 4
        anchors = logits.masked_fill(forbidden, -torch.inf).argmax(-1)
        assert torch.equal(anchors[record.gate], record.ids[..., 0][record.gate])
        assert (logits.argmax(-1) != anchors)[record.gate].any()


def test_penalties_biases_and_cuts(engine: Any, model: Any) -> None:
    """The anchor is what vLLM's own processors leave, and its log-probability is the policy's, cut or not."""
    llm = engine(MixingConfig(mixing_rate=0.5), logprobs_mode="processed_logprobs")
    settings = {"top_p": 0.3, "temperature": 0.7, "logit_bias": {8: -100.0}}
    outputs = llm.generate(prompts(6), [params(row, **settings) for row in range(6)], use_tqdm=False)
    record = taken(llm, outputs, list(range(6)))
    _, tokens, logprobs = sequences(outputs)
    assert 8 not in {token for row in tokens for token in row}
    again, live = replayed(model, outputs, record, 0.7)
    assert (again - record.logprobs)[live].abs().max() <= PARITY
    # The anchor is the argmax of what the penalty leaves: recomputed here from the policy's own logits.
    repeated = llm.generate(prompts(6), [params(row, repetition_penalty=5.0) for row in range(6)], use_tqdm=False)
    other = taken(llm, repeated, list(range(6)))
    assert (replayed(model, repeated, other)[0] - other.logprobs).abs().max() <= PARITY
    logits, emitted, _ = replayed_logits(model, repeated, other)
    changed = 0
    for row, step in other.gate.nonzero().tolist():
        scores = logits[row, step].clone()
        before = list(repeated[row].prompt_token_ids) + emitted[row, :step].tolist()
        scores[before] = torch.where(scores[before] > 0, scores[before] / 5.0, scores[before] * 5.0)
        assert scores.argmax() == other.ids[row, step, 0]
        changed += int(scores.argmax() != logits[row, step].argmax())
    assert changed > 10
    unbiased = llm.generate(prompts(6), [params(row, top_p=0.3, top_k=3) for row in range(6)], use_tqdm=False)
    record = taken(llm, unbiased, list(range(6)))
    _, _, logprobs = sequences(unbiased)
    assert (logprobs - record.logprobs)[record.gate].abs().max() <= PARITY
    assert (logprobs - record.logprobs)[~record.gate].min() > -1e-6  # of what the cuts leave


def test_weights_that_come_in_are_searched(engine: Any, model: Any, folder: str) -> None:
    llm = engine(MixingConfig(mixing_rate=0.5))
    mixer = mixer_of(llm)
    mixer._refresh()  # from vLLM 0.30 on the engine of a CPU does not warm up
    first = mixer.table.ids.clone()
    torch.manual_seed(9)
    changed = tiny_model(**SHAPE)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    for name, parameter in changed.named_parameters():
        mixer.model.load_weights([(name, parameter.data)])
    outputs = llm.generate(prompts(4), [params(row) for row in range(4)], use_tqdm=False)
    check_parity(changed, outputs, taken(llm, outputs, list(range(4))))
    expected = nearest_neighbors(changed.get_input_embeddings().weight.detach(), 2).ids
    assert torch.equal(mixer.table.ids, expected) and not torch.equal(first, expected)


def test_rows_that_no_token_stands_for_are_told_by_the_engines_tokenizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Five rows beyond the tokenizer, three special tokens, three rows of one value. The word alone is sent."""
    changed = tiny_model(**SHAPE, vocab_size=VOCABULARY + 5)
    with torch.no_grad():
        weight = changed.get_input_embeddings().weight
        weight[[20, 33, 34]] = weight[20].clone()
    changed.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    ours = engine_kwargs(MixingConfig(mixing_rate=0.5, excluded_token_ids="special"))
    assert ours["additional_config"]["ngrpo_ops"]["excluded_token_ids"] == "special"
    given = {**SETTINGS, "skip_tokenizer_init": False, "max_model_len": 64, "max_num_seqs": 8, **ours}
    caplog.set_level(logging.INFO, "vllm.ngrpo_ops.integrations.vllm.engine")
    llm = LLM(str(tmp_path), **given)
    try:
        words = torch.ones(VOCABULARY + 5, dtype=torch.bool)
        words[[0, 1, 2, 20, 33, 34, *range(VOCABULARY, VOCABULARY + 5)]] = False
        outputs = llm.generate(prompts(4), [params(row) for row in range(4)], use_tqdm=False)
        assert torch.equal(mixer_of(llm).table.ids, nearest_neighbors(weight.detach(), 2, allowed=words).ids)
        record = taken(llm, outputs, list(range(4)))
        assert words[record.ids[record.gate][:, 1:]].all()
    finally:
        llm.llm_engine.engine_core.shutdown()
    said = [entry.getMessage() for entry in caplog.records if "no neighbors" in entry.getMessage()]
    assert said == [
        f"11 of {VOCABULARY + 5} token embeddings are no neighbors (excluded_token_ids='special'): 5 beyond the "
        "tokenizer, 3 of special or reserved tokens, 3 equal to another"
    ]


@pytest.mark.parametrize("way", ["load_weights", "reload_weights"])
def test_weights_that_come_in_between_the_steps_of_a_request_are_searched(engine: Any, way: str) -> None:
    """Also where no request is new, and where they do not go through the model's `load_weights`."""
    llm = engine(MixingConfig(mixing_rate=0.5))
    mixer = mixer_of(llm)
    for row, prompt in enumerate(prompts(4)):
        llm.llm_engine.add_request(str(row), prompt, params(row))
    for _ in range(8):
        llm.llm_engine.step()
    before = mixer.table.ids.clone()
    name = "model.embed_tokens.weight"
    weight = mixer.model.get_parameter(name)
    weight = weight + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(9))
    if way == "load_weights":
        mixer.model.load_weights([(name, weight[:VOCABULARY])])
    else:
        llm.collective_rpc(way, kwargs={"weights_iterator": [(name, weight)], "is_checkpoint_format": False})
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    record = take_records(llm, range(4), [20] * 4)
    expected = nearest_neighbors(weight[:VOCABULARY], 2).ids
    assert not torch.equal(before, expected)
    for table, steps in ((before, slice(0, 6)), (expected, slice(10, 20))):
        ids = record.ids[:, steps][record.gate[:, steps]]
        assert len(ids) and torch.equal(ids[:, 1:], table[ids[:, 0]])


def test_tensor_parallel(model: Any, tmp_path: Path, difference: Difference) -> None:
    """Two ranks with half of the vocabulary each know the same table and leave the same records, also after a sync."""
    torch.manual_seed(9)
    changed = tiny_model(**SHAPE)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    models = {"model": model, "changed": changed}
    for name, saved in models.items():
        saved.save_pretrained(tmp_path / name)
    on_two_ranks("tensor_parallel_worker.py", tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    for (name, of_name), first, second in zip(models.items(), *ranks, strict=True):
        assert first["rows_here"] + second["rows_here"] == VOCABULARY and second["rows_here"] > 0
        assert torch.equal(first["table"], nearest_neighbors(of_name.get_input_embeddings().weight.detach(), 2).ids)
        assert torch.equal(first["table"], second["table"])
        for field, tensor in first["record"].tensors().items():
            assert torch.equal(tensor, second["record"].tensors()[field]), (name, field)
        difference("vllm, tensor parallel", *check_parity(of_name, first["outputs"], first["record"]))


def test_sequences_that_end(engine: Any, model: Any) -> None:
    llm = engine(MixingConfig(mixing_rate=0.5))
    asked = [params(row, ignore_eos=False, stop_token_ids=list(range(EOS, 12)), max_tokens=40) for row in range(16)]
    outputs = llm.generate(prompts(16), asked, use_tqdm=False)
    lengths = [len(o.outputs[0].token_ids) for o in outputs]
    assert len(set(lengths)) > 3
    check_parity(model, outputs, taken(llm, outputs, list(range(16))))


# Records ----------------------------------------------------------------------------------------------------------


def test_records_are_taken_once_and_only_of_what_was_asked(engine: Any) -> None:
    llm = engine(MixingConfig(mixing_rate=0.5))
    outputs = llm.generate(prompts(2), [params(4), params(None)], use_tqdm=False)
    with pytest.raises(ValueError, match="row 5"):
        take_records(llm, [5], [20])
    with pytest.raises(ValueError, match="asked for 21"):
        take_records(llm, [4], [21])
    assert taken(llm, outputs[:1], [4]).gate.shape == (1, 20)
    with pytest.raises(ValueError, match="taken before"):
        take_records(llm, [4], [20])
    with pytest.raises(ValueError, match="lengths"):
        take_records(llm, [4], [20, 3])
    with pytest.raises(ValueError, match="different from each other"):
        take_records(llm, [4, 4], [20, 20])
    core = llm.llm_engine
    core.add_request("aborted", prompts(1)[0], params(4))
    for _ in range(5):
        core.step()
    core.abort_request(["aborted"])
    llm.generate(prompts(1), [params(None)], use_tqdm=False)
    assert mixer_of(llm).requests.kept[4].entries.size >= 3
    assert take_records(llm, [4], [0]).gate.shape == (1, 0)
    everything_is_free(llm)
    llm.generate(prompts(1), [params(4)], use_tqdm=False)
    again = llm.generate(prompts(1), [params(4)], use_tqdm=False)  # never taken: the later one counts
    assert taken(llm, again, [4]).ids[0, :, 0].gt(0).any()
    assert take_records(llm, [], []).gate.shape == (0, 0)
    llm.generate(prompts(2), [params(4), params(4)], use_tqdm=False)  # who may say which is whose?
    with pytest.raises(ValueError, match="several requests"):
        take_records(llm, [4], [20])


# Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"return_sampling_mask": True, "logprobs_mode": "processed_logprobs"}, "return_sampling_mask"),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill|KV sharing fast prefill"),  # vLLM 0.29 refuses it
        ({"additional_config": {"ngrpo_ops": {"rate": 0.1}}}, "fields of MixingConfig"),
        ({"additional_config": {"ngrpo_ops": {"k": 0}}}, "k must be"),
        ({"additional_config": {"ngrpo_ops": {"k": VOCABULARY + 1}}}, "vocabulary size"),
        ({"additional_config": {"ngrpo_ops": {"stop_token_ids": [VOCABULARY]}}}, "stop_token_ids"),
        ({"additional_config": {"ngrpo_ops": {"excluded_token_ids": "special"}}}, "skip_tokenizer_init"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_engines_that_would_not_mix_are_refused(engine: Any, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine(MixingConfig(), **settings)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        (None, "speculative_config", object()),
        ("parallel_config", "enable_batch_sharded_sampling", True),
        ("parallel_config", "decode_context_parallel_size", 2),
        ("parallel_config", "data_parallel_size", 2),
        (None, "kv_transfer_config", object()),
        (None, "watermark_config", object()),
        ("model_config", "return_sampling_mask", True),
        ("parallel_config", "use_ubatching", True),
        ("cache_config", "kv_sharing_fast_prefill", True),
        ("model_config", "is_multimodal_model", True),
        ("model_config", "enable_trace_replay", True),
    ],
)
def test_what_a_cpu_engine_cannot_be_is_refused_too(engine: Any, part: str | None, name: str, value: Any) -> None:
    real = engine(MixingConfig()).llm_engine.vllm_config

    class Changed:
        def __init__(self, of: Any, **changes: Any) -> None:
            self.of, self.changes = of, changes

        def __getattr__(self, attribute: str) -> Any:
            return self.changes[attribute] if attribute in self.changes else getattr(self.of, attribute)

    adapter.refuse_engine(real, MixingConfig())
    changed = Changed(real, **{name: value} if part is None else {part: Changed(getattr(real, part), **{name: value})})
    with pytest.raises(ValueError, match="cannot be mixed"):
        adapter.refuse_engine(changed, MixingConfig())


def test_another_runner_or_version_is_refused(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        with pytest.raises(ValueError, match="Model Runner V1"):
            engine(MixingConfig())
    for version in ("0.28.0", "0.34.0", "0.290.0"):
        monkeypatch.setattr(adapter.vllm, "__version__", version)
        with pytest.raises(ValueError, match=rf"{version} is not tested .* mixes in vLLM 0\.29 to 0\.33"):
            engine(MixingConfig())


def test_an_untested_version_is_warned_of(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(plugin.logger, "warning_once", said.append)
    engine(MixingConfig())
    assert not said
    monkeypatch.setattr(adapter.vllm, "__version__", "0.33.0")
    engine()
    assert not said
    engine(MixingConfig())
    assert len(said) == 1 and "vLLM 0.33.0 is not among the versions (0.29, 0.31, 0.32)" in said[0]


def test_lora_on_the_engines_embedding_is_refused(tmp_path: Path) -> None:
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    settings = SETTINGS | {"max_model_len": 64, "enable_lora": True, "max_lora_rank": 8}
    with pytest.raises(ValueError, match="enable_lora"):
        LLM(str(tmp_path), **settings, **engine_kwargs(MixingConfig()))


def test_an_engine_without_the_plugin_is_noticed(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter.require_mixing(engine(MixingConfig()))
    with pytest.raises(ValueError, match="cannot mix"):
        adapter.require_mixing(engine())
    monkeypatch.delattr(WorkerBase, "take_mix_records")
    with pytest.raises(ValueError, match=r"VLLM_PLUGINS.*`python -m ngrpo_ops env`"):
        adapter.require_mixing(engine(MixingConfig()))


def test_requests_that_cannot_be_mixed_are_refused(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="engine_kwargs"):
        engine().generate(prompts(1), params(1), use_tqdm=False)
    llm = engine(MixingConfig(mixing_rate=0.5), enable_prefix_caching=True)
    for settings, prompt in (({}, {}), ({"n": 2}, {"cache_salt": "1"})):
        with pytest.raises(ValueError, match="cache_salt"):
            llm.generate(prompts(1)[0] | prompt, params(1, **settings), use_tqdm=False)
    asked = params(1)
    (tmp_path / "named_by_a_request.py").write_text(OWN_STRATEGIES)
    monkeypatch.syspath_prepend(tmp_path)
    named = {"row_id": 1, "strategy": "named_by_a_request:drawn"}
    for wrong in ({"row_id": "1"}, {}, {"row_id": 1, "rate": 0.5}, named, "3", 3.0, True):
        asked.extra_args = {"ngrpo_ops": wrong}
        with pytest.raises(ValueError, match="request_kwargs"):
            llm.generate(prompts(1), asked, use_tqdm=False)
    assert "named_by_a_request" not in sys.modules
    outputs = llm.generate(prompts(1)[0] | {"cache_salt": "1"}, params(1), use_tqdm=False)
    assert taken(llm, outputs, [1]).gate.any()


def test_logits_that_are_no_distribution_are_reported(engine: Any, model: Any) -> None:
    llm = engine(MixingConfig(mixing_rate=0.5))
    head = mixer_of(llm).model.lm_head.weight
    with torch.inference_mode():
        head[:, 0] = torch.nan
    outputs = llm.generate(prompts(1), params(1), use_tqdm=False)
    with pytest.raises(RuntimeError, match="row 1"):
        taken(llm, outputs, [1])


def test_the_plugin_is_an_entry_point() -> None:
    from importlib.metadata import entry_points

    (found,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "ngrpo_ops")
    assert found.load() is adapter.register
    from vllm.engine.arg_utils import EngineArgs

    adapter.register()
    before = EngineArgs.create_engine_config
    adapter.register()  # a second call changes nothing
    assert EngineArgs.create_engine_config is before
    assert Path(adapter.__file__).parent.name == "vllm"


# The package ------------------------------------------------------------------------------------------------------


def test_the_plugin_loads_the_mixing_of_a_worker_only_where_it_is_used() -> None:
    code = "import json, sys, ngrpo_ops.integrations.vllm; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert f"{adapter.__name__}.plugin" in loaded
    assert not {f"{adapter.__name__}.engine", "vllm.engine.arg_utils", "vllm.v1.engine"} & set(loaded)


def test_the_old_names_warn() -> None:
    with pytest.warns(DeprecationWarning, match="request_kwargs"):
        assert adapter.request_arguments is request_kwargs
    with pytest.warns(DeprecationWarning, match="engine_kwargs"):
        assert adapter.engine_arguments is engine_kwargs
    with pytest.raises(AttributeError, match="no_such_name"):
        adapter.no_such_name  # noqa: B018


def test_an_engine_in_a_process_of_its_own_imports_the_strategy(own_strategies: str, tmp_path: Path) -> None:
    """What vLLM does there: it loads the plugin and reads the engine's configuration."""
    settings = engine_kwargs(MixingConfig(strategy=f"{own_strategies}:drawn", k=2))["additional_config"]["ngrpo_ops"]
    code = f"""
import json
import os
from ngrpo_ops.integrations.vllm.plugin import config_of
from ngrpo_ops.strategies import get_strategy
strategy = get_strategy(config_of(json.loads({json.dumps(settings)!r})).strategy)
print(strategy.function.__module__, strategy.emits_sample)
"""
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.stdout.splitlines()[-1] == f"{own_strategies} True"


@pytest.mark.parametrize("name", ["client", "plugin", "pool", "records"])
def test_the_examples_of_the_docstrings(name: str) -> None:
    module = importlib.import_module(f"{adapter.__name__}.{name}")
    found = doctest.testmod(module)
    assert found.attempted > 0 and not found.failed


# The page ---------------------------------------------------------------------------------------------------------


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS | {"skip_tokenizer_init": False, "max_model_len": 64, "max_num_seqs": 8}
    monkeypatch.setattr("vllm.LLM", functools.partial(LLM, **settings))
    model = snippets.save_model(tmp_path / "model", **SHAPE)
    names: dict[str, Any] = snippets.run(snippets.ROOT / "docs" / "vllm.md", model)
    names["llm"].llm_engine.engine_core.shutdown()
    record = names["record"]
    assert len(record) == 2 and record.length <= 32 and record.gate.any()
    width = names["width"]
    logprobs = names["logits"][:, width - 1 : -1].log_softmax(-1).gather(-1, names["ids"][:, width:, None])[..., 0]
    live = names["mask"][:, width:].bool()
    assert float((logprobs.detach() - record.logprobs)[live].abs().max()) < 1e-4  # the page's replay
