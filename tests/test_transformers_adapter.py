"""The transformers adapter: what a rollout emits and records, and that a replay sees what the rollout saw."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EOS, PAD, VOCABULARY, left_padded, tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scipy.stats import binomtest
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

from ngrpo_ops import MixingConfig, MixRecord, candidate_weights, nearest_neighbors, strategies
from ngrpo_ops.integrations.transformers import NeighborMixing
from ngrpo_ops.strategies import get_strategy
from ngrpo_ops.testing import STRATEGIES

PARITY = 1e-5


def full_mask(attention_mask: Tensor, sequences: Tensor) -> Tensor:
    """The prompt's mask for each returned sequence, and ones for the completion."""
    mask = attention_mask.repeat_interleave(sequences.shape[0] // attention_mask.shape[0], 0)
    return torch.cat([mask, mask.new_ones(mask.shape[0], sequences.shape[1] - mask.shape[1])], dim=1)


def completion_logprobs(model: nn.Module, sequences: Tensor, mask: Tensor, prompt: int, temperature: float) -> Tensor:
    logits = model(input_ids=sequences, attention_mask=mask).logits[:, prompt - 1 : -1]
    log_p = (logits.float() / temperature).log_softmax(-1)
    return log_p.gather(-1, sequences[:, prompt:, None]).squeeze(-1)


def replay_errors(mixing: NeighborMixing, model: nn.Module, batch: dict, **settings: object) -> tuple[float, float]:
    """Largest |rollout - replayed| log-probability with the record, and with the plain ids instead of it."""
    sequences, record = mixing.generate(**batch, max_new_tokens=12, **settings)
    temperature = float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 1.0  # type: ignore[arg-type]
    mask = full_mask(batch["attention_mask"], sequences)
    live = record.logprobs != 0
    errors = []
    for context in (mixing.replay(record), nullcontext()):
        with context, torch.no_grad():
            replayed = completion_logprobs(model, sequences, mask, record.prompt_length, temperature)
        errors.append(float((replayed - record.logprobs)[live].abs().max()))
    return errors[0], errors[1]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gemma"])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": False},
        {"do_sample": True, "cache_implementation": "static", "top_k": 5, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3, "repetition_penalty": 1.4},
    ],
    ids=["sampled", "greedy", "static-filtered", "returned3-penalty"],
)
def test_replay_equals_rollout_on_left_padded_prompts(family: str, tied: bool, settings: dict) -> None:
    model = tiny_model(family, tied)
    error, plain = replay_errors(NeighborMixing(model, MixingConfig(mixing_rate=0.5)), model, left_padded(), **settings)
    assert error <= PARITY
    assert plain > 1e-2


@given(
    k=st.integers(1, 6),
    rate=st.sampled_from([0.2, 0.5, 1.0]),
    temperature=st.sampled_from([None, 0.4, 2.0]),
    metric=st.sampled_from(["cosine", "dot", "l2", "l1"]),
    strategy=st.sampled_from(STRATEGIES),
    variant=st.sampled_from(["paper", "released"]),
    sampler=st.sampled_from(["native", "counter_based"]),
    entropy_threshold=st.sampled_from([None, 4.1]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
@settings(max_examples=30)
def test_replay_equals_rollout_for_every_configuration(**fields: object) -> None:
    model = tiny_model()
    fields["mixing_rate"] = fields.pop("rate")
    if fields["strategy"] == "anchor":
        fields["k"] = None
    if not get_strategy(fields["strategy"]).softmax_of_logits:
        fields["variant"] = "paper"
    config = MixingConfig(**fields)  # type: ignore[arg-type]
    error, _ = replay_errors(NeighborMixing(model, config), model, left_padded(), do_sample=True)
    assert error <= PARITY


class _Seen(LogitsProcessor):
    """Keeps the processed scores of every step, as they stand before the adapter's own processor."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores.clone())
        return scores


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize(("temperature", "mixing_temperature"), [(0.7, None), (1.0, 0.3)])
def test_a_gated_step_emits_the_argmax_and_records_its_neighbors_and_their_weights(
    variant: str, temperature: float, mixing_temperature: float | None
) -> None:
    model = tiny_model()
    config = MixingConfig(k=4, mixing_rate=0.5, temperature=mixing_temperature, variant=variant)  # type: ignore[arg-type]
    seen = _Seen()
    sequences, record = NeighborMixing(model, config).generate(
        **left_padded(8),
        max_new_tokens=10,
        do_sample=True,
        temperature=temperature,
        repetition_penalty=1.5,
        logits_processor=LogitsProcessorList([seen]),
    )
    scores = torch.stack(seen.scores, dim=1)[:, : record.length]
    gate, ids = record.gate, record.ids
    assert gate.any() and not gate.all()
    anchors = scores.argmax(-1)
    assert torch.equal(sequences[:, record.prompt_length :][gate], anchors[gate])
    assert torch.equal(ids[..., 0][gate], anchors[gate])
    neighbors = nearest_neighbors(model.get_input_embeddings().weight, 3).ids
    assert torch.equal(ids[..., 1:][gate], neighbors[anchors[gate]])
    tau = temperature if mixing_temperature is None else mixing_temperature
    z = (scores.double() / tau).softmax(-1) if variant == "released" else scores.double() / tau
    expected = z.gather(-1, ids).softmax(-1)
    assert (record.weights - expected)[gate].abs().max() < 1e-6
    ours = candidate_weights(scores[gate], ids[gate], temperature=tau, variant=variant)  # type: ignore[arg-type]
    assert (ours - expected[gate]).abs().max() < 1e-6


def test_gates_follow_the_rate_and_depend_on_seed_row_and_step_alone() -> None:
    model = tiny_model()
    batch = left_padded(64)

    def gates(rows: Tensor, seed: int = 5, order: Tensor | None = None, **settings: object) -> Tensor:
        part = batch if order is None else {name: value[order] for name, value in batch.items()}
        mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.3, seed=seed))
        _, record = mixing.generate(
            **part, row_ids=rows, max_new_tokens=20, min_new_tokens=20, do_sample=True, **settings
        )
        mixing.remove()
        return record.gate

    rows = torch.arange(64) + 1000
    reference = gates(rows)
    assert binomtest(int(reference.sum()), reference.numel(), 0.3).pvalue > 1e-3
    order = torch.randperm(64)[:10]
    assert torch.equal(gates(rows[order], order=order, temperature=3.0), reference[order])
    assert not torch.equal(gates(rows, seed=6), reference)
    assert not torch.equal(gates(rows + 64), reference)


def test_no_two_rollouts_share_their_rows() -> None:
    mixing = NeighborMixing(tiny_model(), MixingConfig(mixing_rate=0.5))
    first = mixing.generate(**left_padded(), max_new_tokens=12, min_new_tokens=12)[1]
    state = mixing.state_dict()
    second = mixing.generate(**left_padded(2), num_return_sequences=3, do_sample=True, max_new_tokens=5)[1]
    assert mixing.next_row == 4 + 6
    assert not torch.equal(first.gate[:, :5], second.gate[:4, :5])
    mixing.load_state_dict(state)
    again = mixing.generate(**left_padded(2), num_return_sequences=3, do_sample=True, max_new_tokens=5)[1]
    length = min(second.length, again.length)
    live = (second.logprobs[:, :length] != 0) & (again.logprobs[:, :length] != 0)
    assert torch.equal(second.gate[:, :length][live], again.gate[:, :length][live])


@pytest.mark.parametrize("do_sample", [False, True])
def test_rate_zero_is_plain_generate(do_sample: bool) -> None:
    model, batch = tiny_model(), left_padded()
    torch.manual_seed(7)
    expected = model.generate(**batch, do_sample=do_sample, max_new_tokens=12)
    after = torch.get_rng_state()
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.0))
    torch.manual_seed(7)
    sequences, record = mixing.generate(**batch, do_sample=do_sample, max_new_tokens=12)
    assert torch.equal(sequences, expected)
    assert torch.equal(torch.get_rng_state(), after)
    assert not record.gate.any()


def test_the_global_generator_is_not_touched() -> None:
    mixing = NeighborMixing(tiny_model(), MixingConfig(mixing_rate=0.5))
    before = torch.get_rng_state()
    mixing.generate(**left_padded(), max_new_tokens=8)
    assert torch.equal(torch.get_rng_state(), before)


def test_plain_generate_is_untouched_before_during_and_after() -> None:
    model, batch = tiny_model(), left_padded()
    expected = model.generate(**batch, max_new_tokens=8)
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=1.0))
    mixed = mixing.generate(**batch, max_new_tokens=8)[0]
    assert torch.equal(model.generate(**batch, max_new_tokens=8), expected)
    assert not torch.equal(mixed[:, 6:], expected[:, 6 : mixed.shape[1]])
    mixing.remove()
    module = model.get_input_embeddings()
    assert not module._forward_hooks and not module._forward_pre_hooks and not model._forward_hooks


def test_rollouts_mixes_generate_and_restores_it_after_an_error() -> None:
    model, batch = tiny_model(), left_padded()
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=1.0))
    with mixing.rollouts(torch.arange(4)) as records:
        model.generate(**batch, max_new_tokens=4)
    assert len(records) == 1 and records[0].gate.any()
    with pytest.raises(ValueError, match="use_cache"), mixing.rollouts():
        model.generate(**batch, use_cache=False)
    assert "generate" not in vars(model)
    model.generate = model.generate  # a user's own patch is put back
    with mixing.rollouts():
        pass
    assert "generate" in vars(model)


# Ends of rows -----------------------------------------------------------------------------------------------------


def test_gates_end_with_the_row() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[EOS] = model.lm_head.weight.mean(0) + 0.05  # ends often, not always
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.6))
    sequences, record = mixing.generate(**left_padded(32), do_sample=True, max_new_tokens=30)
    completion = sequences[:, record.prompt_length :]
    ended = (completion == EOS).cumsum(1) - (completion == EOS).long() > 0
    assert ended.any()
    assert not record.gate[ended].any()
    assert (record.logprobs[ended] == 0).all()
    assert (completion[ended] == PAD).all()


def test_mixing_stops_after_a_stop_token() -> None:
    model = tiny_model()
    plain = MixingConfig(mixing_rate=1.0)
    sequences, _ = NeighborMixing(model, plain).generate(**left_padded(), max_new_tokens=12, min_new_tokens=12)
    stop = int(sequences[0, 6 + 3])
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=1.0, stop_token_ids=[stop]))
    sequences, record = mixing.generate(**left_padded(), max_new_tokens=12, min_new_tokens=12)
    completion = sequences[:, record.prompt_length :]
    after = (completion == stop).cumsum(1) - (completion == stop).long() > 0
    assert after[0].any()
    assert torch.equal(record.gate, ~after)


class _EndsWith(StoppingCriteria):
    """Ends a row at a token, as a stop string would: nothing the adapter's processor could know of."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_a_criterion_that_ends_no_row_changes_nothing(pad: int) -> None:
    """Padding may look like the end token, and then an end token that was emitted looks like padding."""
    records = []
    for criteria in (None, StoppingCriteriaList([_EndsWith(VOCABULARY)])):
        model = tiny_model()
        with torch.no_grad():
            model.lm_head.weight[EOS] = model.lm_head.weight.mean(0) + 0.05
        torch.manual_seed(0)
        mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.5))
        sequences, record = mixing.generate(
            **left_padded(16), do_sample=True, max_new_tokens=24, pad_token_id=pad, stopping_criteria=criteria
        )
        records.append(record)
    completion = sequences[:, record.prompt_length :]
    last = completion.eq(EOS).float().argmax(1, keepdim=True)  # the end tokens that were emitted
    emitted = completion.eq(EOS).any(1)
    assert emitted.any() and record.gate.gather(1, last)[emitted].any()
    assert (record.logprobs.gather(1, last)[emitted] != 0).all()
    for name, tensor in records[0].tensors().items():
        assert torch.equal(tensor, records[1].tensors()[name]), name


@pytest.mark.parametrize("sampler", ["native", "counter_based"])
@pytest.mark.parametrize("pad", [PAD, EOS])
def test_nothing_is_recorded_of_padding(pad: int, sampler: str) -> None:
    """Whatever it looks like, and whatever ended the row."""
    mixing = NeighborMixing(tiny_model(), MixingConfig(mixing_rate=0.3, sampler=sampler))
    criteria = StoppingCriteriaList([_EndsWith(3), _EndsWith(11), _EndsWith(20)])
    sequences, record = mixing.generate(
        **left_padded(64), do_sample=True, max_new_tokens=24, pad_token_id=pad, stopping_criteria=criteria
    )
    completion = sequences[:, record.prompt_length :]
    ends = sum((completion == token).long() for token in (3, 11, 20, EOS))
    padding = ends.cumsum(1) - ends > 0
    assert (completion[padding] == pad).all() and (ends.sum(1) > 0).sum() > 10
    assert torch.equal(record.logprobs == 0, padding)
    assert not record.gate[padding].any() and record.gate.any()


def test_a_row_ended_by_a_criterion_of_the_user_is_no_longer_gated() -> None:
    model = tiny_model()
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=1.0))
    sequences, _ = mixing.generate(**left_padded(), max_new_tokens=12, min_new_tokens=12)
    criterion = StoppingCriteriaList([_EndsWith(int(sequences[0, 6 + 2]))])
    output, record = mixing.generate(
        **left_padded(), max_new_tokens=12, stopping_criteria=criterion, return_dict_in_generate=True
    )
    completion = output.sequences[:, record.prompt_length :]
    assert (completion[0] == PAD).any()
    assert not record.gate[completion == PAD].any()
    assert record.gate[completion != PAD].all()
    assert torch.equal(record.logprobs == 0, completion == PAD)


# Replay -----------------------------------------------------------------------------------------------------------


def _reference_embeddings(model: nn.Module, sequences: Tensor, record: MixRecord) -> Tensor:
    """The rebuilt history by hand: equation 10 at the gated columns."""
    table = model.get_input_embeddings().weight
    embedded = table[sequences]
    mixed = (record.weights[..., None] * table[record.ids]).sum(-2)
    start = record.prompt_length
    completion = torch.where(record.gate[..., None], mixed, embedded[:, start:])
    return torch.cat([embedded[:, :start], completion], dim=1)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_reach_every_candidate_row(tied: bool) -> None:
    model, batch = tiny_model(tied=tied), left_padded()
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.5))
    sequences, record = mixing.generate(**batch, do_sample=True, max_new_tokens=10)
    mask = full_mask(batch["attention_mask"], sequences)
    coefficients = torch.randn(sequences.shape[0], record.length)

    def gradient(make: Callable[[], Tensor]) -> Tensor:
        model.zero_grad()
        log_p = make()[:, record.prompt_length - 1 : -1].log_softmax(-1)
        (log_p.gather(-1, sequences[:, record.prompt_length :, None]).squeeze(-1) * coefficients).sum().backward()
        return model.get_input_embeddings().weight.grad.clone()

    by_hand = gradient(
        lambda: model(inputs_embeds=_reference_embeddings(model, sequences, record), attention_mask=mask).logits
    )
    with mixing.replay(record):
        replayed = gradient(lambda: model(input_ids=sequences, attention_mask=mask).logits)
    plain = gradient(lambda: model(input_ids=sequences, attention_mask=mask).logits)
    scale = by_hand.abs().max()
    assert (replayed - by_hand).abs().max() <= 1e-5 * scale
    assert (plain - by_hand).abs().max() > 1e-2 * scale


def test_a_record_is_replayed_over_several_forwards_and_after_a_shuffle() -> None:
    model, batch = tiny_model(), left_padded(6)
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.5))
    sequences, record = mixing.generate(**batch, do_sample=True, max_new_tokens=10)
    mask = full_mask(batch["attention_mask"], sequences)
    order = torch.randperm(6)
    sequences, mask, record = sequences[order], mask[order], record[order].fit(record.length + 3)
    sequences = torch.cat([sequences, sequences.new_full((6, 3), PAD)], dim=1)
    mask = torch.cat([mask, mask.new_zeros(6, 3)], dim=1)
    with mixing.replay(record), torch.no_grad():
        chunks = zip(sequences.split(2), mask.split(2), strict=True)
        parts = [completion_logprobs(model, s, m, 6, 1.0) for s, m in chunks]
    live = record.logprobs != 0
    assert (torch.cat(parts) - record.logprobs)[live].abs().max() <= PARITY


def test_a_replay_that_does_not_fit_or_is_not_used_exactly_once_raises() -> None:
    model, batch = tiny_model(), left_padded()
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.5))
    sequences, record = mixing.generate(**batch, max_new_tokens=5, min_new_tokens=5)
    with pytest.raises(RuntimeError, match="0 of the record's 4 rows"), mixing.replay(record):
        pass
    with pytest.raises(RuntimeError, match="5 completion columns"), mixing.replay(record):
        model(input_ids=sequences[:, :-1])
    with pytest.raises(RuntimeError, match="already replayed"), mixing.replay(record):
        model(input_ids=sequences)
        model(input_ids=sequences)
    with pytest.raises(RuntimeError, match="only 2 of"), mixing.replay(record):
        model(input_ids=sequences[:2])
    model(input_ids=sequences[:2])  # and nothing stays armed


def test_another_model_replays_with_its_own_table() -> None:
    policy, other, batch = tiny_model(), tiny_model(scale=2.0), left_padded()
    mixing = NeighborMixing(policy, MixingConfig(mixing_rate=0.5))
    sequences, record = mixing.generate(**batch, max_new_tokens=8)
    mask = full_mask(batch["attention_mask"], sequences)
    with mixing.replay(record, other), torch.no_grad():
        replayed = other(input_ids=sequences, attention_mask=mask).logits
        by_hand = other(inputs_embeds=_reference_embeddings(other, sequences, record), attention_mask=mask).logits
    assert (replayed - by_hand).abs().max() <= 1e-4


def test_the_table_follows_the_weights() -> None:
    model = tiny_model()
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=1.0))
    mixing.generate(**left_padded(), max_new_tokens=2)
    with torch.no_grad():  # in place, through .data, as a weight sync does: no version counter moves
        model.get_input_embeddings().weight.data.copy_(torch.randn(VOCABULARY, 32))
    _, record = mixing.generate(**left_padded(), max_new_tokens=4, min_new_tokens=4)
    expected = nearest_neighbors(model.get_input_embeddings().weight, 2).ids
    assert torch.equal(record.ids[..., 1:], expected[record.ids[..., 0]])


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_lora_on_the_embedding_and_gradient_checkpointing(checkpointing: bool | None) -> None:
    model = get_peft_model(
        tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    )
    batch = left_padded()
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.5))
    error, plain = replay_errors(mixing, model, batch, do_sample=True)
    assert error <= PARITY and plain > 1e-2
    merged = model.get_input_embeddings()(torch.arange(VOCABULARY)).detach()
    assert torch.equal(mixing.table.ids, nearest_neighbors(merged, 2).ids)
    sequences, record = mixing.generate(**batch, max_new_tokens=6, min_new_tokens=6)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.train()
    with mixing.replay(record):
        logits = model(input_ids=sequences, attention_mask=full_mask(batch["attention_mask"], sequences)).logits
        logits.logsumexp(-1).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)


# Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "num_beams=1"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prompt_lookup_num_tokens": 2}, "assisted"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"cache_implementation": "paged"}, "paged"),
        ({"generation_config": GenerationConfig(num_beams=3)}, "num_beams=1"),
        ({"custom_generate": lambda *a, **k: None}, "custom_generate"),
    ],
    ids=["beams", "no-cache", "prompt-lookup", "guidance", "paged", "in-config", "custom"],
)
def test_generation_that_would_not_mix_is_refused(settings: dict, message: str) -> None:
    mixing = NeighborMixing(tiny_model(), MixingConfig())
    with pytest.raises(ValueError, match=message):
        mixing.generate(**left_padded(), max_new_tokens=3, **settings)


def test_assisted_decoding_and_embedded_prompts_are_refused() -> None:
    model = tiny_model()
    mixing = NeighborMixing(model, MixingConfig())
    with pytest.raises(ValueError, match="assisted"):
        mixing.generate(**left_padded(1), assistant_model=tiny_model())
    with pytest.raises(ValueError, match="inputs_embeds"):
        mixing.generate(**left_padded(), inputs_embeds=torch.zeros(4, 6, 32))
    with pytest.raises(ValueError, match="input_ids must be"):
        mixing.generate(torch.zeros(0, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"row_ids must be \[4\]"):
        mixing.generate(**left_padded(), row_ids=torch.arange(3))


def test_a_cache_may_come_empty_and_not_from_an_earlier_turn() -> None:
    model, batch = tiny_model(), left_padded()
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.5))
    cache = DynamicCache(config=model.config)
    sequences, record = mixing.generate(**batch, max_new_tokens=4, min_new_tokens=4, past_key_values=cache)
    assert record.gate.any()
    mask = full_mask(batch["attention_mask"], sequences)
    with pytest.raises(ValueError, match="past_key_values must be empty, got a cache of 9 tokens"):
        mixing.generate(sequences, attention_mask=mask, past_key_values=cache, max_new_tokens=4)


def test_a_step_that_generate_takes_and_undoes_is_not_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.23 does where it looks for the end a step late."""
    model = tiny_model()
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.5))
    generate = model.generate
    expected, whole = mixing.generate(**left_padded(), max_new_tokens=5, min_new_tokens=5, row_ids=torch.arange(4))
    monkeypatch.setattr(model, "generate", lambda **kwargs: generate(**kwargs)[:, :-1])
    sequences, record = mixing.generate(**left_padded(), max_new_tokens=5, min_new_tokens=5, row_ids=torch.arange(4))
    assert torch.equal(sequences, expected[:, :-1])
    for name, tensor in record.tensors().items():
        assert torch.equal(tensor, whole.tensors()[name][:, :4]), name


@contextmanager
def _wider_head(model: nn.Module) -> Iterator[None]:
    old = model.lm_head
    model.lm_head = nn.Linear(32, VOCABULARY + 5, bias=False)
    yield
    model.lm_head = old


def test_models_that_cannot_be_mixed_are_refused() -> None:
    with pytest.raises(TypeError, match="model must be a transformers model"):
        NeighborMixing(nn.Linear(2, 2), MixingConfig())
    with pytest.raises(TypeError, match="config must be a MixingConfig"):
        NeighborMixing(tiny_model(), {"k": 3})  # type: ignore[arg-type]
    small = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        NeighborMixing(T5ForConditionalGeneration(small), MixingConfig())
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="prompt-learning"):
        NeighborMixing(get_peft_model(tiny_model(), prompt), MixingConfig())
    with pytest.raises(ValueError, match="stop_token_ids must be below"):
        NeighborMixing(tiny_model(), MixingConfig(stop_token_ids=[VOCABULARY]))
    with pytest.raises(ValueError, match="k must be at most the vocabulary"):
        NeighborMixing(tiny_model(), MixingConfig(k=VOCABULARY + 1, strategy="topk"))
    larger = tiny_model()
    larger.resize_token_embeddings(VOCABULARY + 1)
    with pytest.raises(ValueError, match="same vocabulary"):
        NeighborMixing(tiny_model(), MixingConfig()).attach(larger)
    model = tiny_model()
    with _wider_head(model), pytest.raises(ValueError, match="two vocabularies"):
        NeighborMixing(model, MixingConfig()).generate(**left_padded(), max_new_tokens=2)


def test_allowed_token_ids_are_the_only_neighbors() -> None:
    allowed = [5, 9, 20, 33]
    mixing = NeighborMixing(tiny_model(), MixingConfig(mixing_rate=1.0, allowed_token_ids=allowed))
    _, record = mixing.generate(**left_padded(), max_new_tokens=6, min_new_tokens=6)
    assert torch.isin(record.ids[..., 1:], torch.tensor(allowed)).all()


def test_a_mix_that_is_not_embedded_stops_the_rollout() -> None:
    model = tiny_model()
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.5))
    mixing.remove()
    with pytest.raises(RuntimeError, match="not embedded"):
        mixing.generate(**left_padded(), max_new_tokens=4)


def test_disabled_progress_bars() -> None:
    logging.disable_progress_bar()
    try:
        assert NeighborMixing(tiny_model()).refresh().recomputed == VOCABULARY
    finally:
        logging.enable_progress_bar()


def test_k_of_one_emits_the_anchor_and_embeds_it_alone() -> None:
    model, batch = tiny_model(), left_padded()
    mixing = NeighborMixing(model, MixingConfig(k=1, mixing_rate=1.0))
    sequences, record = mixing.generate(**batch, do_sample=True, max_new_tokens=8)
    assert mixing.table is None and record.ids.shape[2] == 1
    assert torch.equal(sequences, model.generate(**batch, do_sample=False, max_new_tokens=8))


# Strategies and samplers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["topk", "gumbel", "gaussian", "moi", "multiplex", "anchor"])
@pytest.mark.parametrize("sampler", ["native", "counter_based"])
def test_strategies_replay(strategy: str, sampler: str) -> None:
    model = tiny_model()
    config = MixingConfig(mixing_rate=0.5, strategy=strategy, sampler=sampler)  # type: ignore[arg-type]
    mixing = NeighborMixing(model, config)
    error, plain = replay_errors(mixing, model, left_padded(8), do_sample=True, temperature=0.8)
    assert error <= PARITY
    assert plain > 1e-2 or strategy == "anchor"  # whose input is its token's own
    assert mixing.table is None


def test_gaussian_noise_is_replayed_after_a_shuffle_and_is_what_the_mix_is_fed() -> None:
    model, batch = tiny_model(), left_padded(6)
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.5, strategy="gaussian", noise_scale=1.0))
    sequences, record = mixing.generate(**batch, do_sample=True, max_new_tokens=10)
    mask = full_mask(batch["attention_mask"], sequences)
    order = torch.randperm(6)
    shuffled = record[order].fit(record.length + 2)
    assert torch.equal(shuffled.row_ids, record.row_ids[order])
    ids = torch.cat([sequences[order], sequences.new_full((6, 2), PAD)], dim=1)
    padded = torch.cat([mask[order], mask.new_zeros(6, 2)], dim=1)
    live = shuffled.logprobs != 0
    with mixing.replay(shuffled), torch.no_grad():
        replayed = completion_logprobs(model, ids, padded, 6, 1.0)
    assert (replayed - shuffled.logprobs)[live].abs().max() <= PARITY
    without = MixRecord(record.gate, record.ids, record.weights, record.prompt_length, record.logprobs)
    with mixing.replay(without), torch.no_grad():
        silent = completion_logprobs(model, sequences, mask, 6, 1.0)
    assert (silent - record.logprobs)[record.logprobs != 0].abs().max() > 1e-2


@pytest.mark.parametrize("strategy", ["moi", "multiplex"])
def test_a_strategy_that_draws_draws_from_what_generate_would(strategy: str) -> None:
    """Its tokens are within the cuts, the argmax in a greedy rollout; cuts that it does not have are refused."""
    model, batch = tiny_model(), left_padded(16)
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=1.0, strategy=strategy))  # type: ignore[arg-type]
    length = {"max_new_tokens": 10, "eos_token_id": None}
    sequences, record = mixing.generate(**batch, do_sample=True, top_k=2, **length)
    mask = full_mask(batch["attention_mask"], sequences)
    with mixing.replay(record), torch.no_grad():
        logits = model(input_ids=sequences, attention_mask=mask).logits[:, -11:-1]
    place = (logits > logits.gather(2, sequences[:, -10:, None])).sum(2)  # of the emitted token among the likeliest
    assert place.max() == 1 and 0.1 < (place == 1).double().mean() < 0.9
    sequences, record = mixing.generate(**batch, do_sample=False, **length)
    with mixing.replay(record), torch.no_grad():
        logits = model(input_ids=sequences, attention_mask=mask).logits[:, -11:-1]
    assert torch.equal(logits.argmax(2), sequences[:, -10:])
    with pytest.raises(ValueError, match="typical_p"):
        mixing.generate(**batch, do_sample=True, typical_p=0.5, **length)


def test_our_sampler_knows_no_batch_and_no_global_generator() -> None:
    model, batch = tiny_model(), left_padded(16)
    config = MixingConfig(mixing_rate=0.3, sampler="counter_based", seed=4)
    settings = {"do_sample": True, "temperature": 1.3, "top_k": 30, "top_p": 0.95, "max_new_tokens": 10}
    rows = torch.arange(16) + 7
    before = torch.get_rng_state()
    sequences, record = NeighborMixing(model, config).generate(**batch, row_ids=rows, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    for row in (0, 5, 15):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        alone, part = NeighborMixing(model, config).generate(**one, row_ids=rows[row : row + 1], **settings)
        length = alone.shape[1]
        assert torch.equal(alone[0], sequences[row, :length]) and (sequences[row, length:] == PAD).all()
        assert torch.equal(part.gate[0], record.gate[row, : part.length])
    another = NeighborMixing(model, config).generate(**batch, row_ids=rows + 16, **settings)[0]
    assert another.shape != sequences.shape or not torch.equal(another, sequences)


def test_our_sampler_returns_several_sequences() -> None:
    model, batch = tiny_model(), left_padded(2)
    config = MixingConfig(mixing_rate=0.5, sampler="counter_based")
    sequences, record = NeighborMixing(model, config).generate(
        **batch, do_sample=True, num_return_sequences=3, max_new_tokens=8, pad_token_id=torch.tensor(PAD)
    )
    repeated = {name: tensor.repeat_interleave(3, 0) for name, tensor in batch.items()}
    expected, again = NeighborMixing(model, config).generate(
        **repeated, do_sample=True, max_new_tokens=8, pad_token_id=torch.tensor(PAD)
    )
    assert torch.equal(sequences, expected) and torch.equal(record.gate, again.gate)
    assert len({tuple(row) for row in sequences[:3].tolist()}) > 1


def test_our_sampler_draws_from_the_policy() -> None:
    model = tiny_model(scale=1.5)
    batch = {name: value[1:2].expand(20_000, -1) for name, value in left_padded(2).items()}
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.0, sampler="counter_based"))
    sequences, _ = mixing.generate(**batch, do_sample=True, temperature=0.9, top_k=0, max_new_tokens=1)
    with torch.no_grad():
        one = {name: value[:1] for name, value in batch.items()}
        p = (model(**one).logits[0, -1].double() / 0.9).softmax(0)
    counts = sequences[:, -1].bincount(minlength=VOCABULARY).double()
    likely = 20_000 * p > 5
    statistic = ((counts - 20_000 * p) ** 2 / (20_000 * p))[likely].sum()
    assert statistic < 2 * int(likely.sum()) + 40


def test_our_sampler_is_greedy_where_generate_would_be() -> None:
    model, batch = tiny_model(), left_padded()
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.0, sampler="counter_based"))
    assert torch.equal(mixing.generate(**batch, max_new_tokens=8)[0], model.generate(**batch, max_new_tokens=8))


@pytest.mark.parametrize("setting", [{"typical_p": 0.9}, {"epsilon_cutoff": 1e-3}, {"renormalize_logits": True}])
def test_cuts_that_our_sampler_does_not_have_are_refused(setting: dict) -> None:
    mixing = NeighborMixing(tiny_model(), MixingConfig(sampler="counter_based"))
    with pytest.raises(ValueError, match=next(iter(setting))):
        mixing.generate(**left_padded(), do_sample=True, **setting)
    NeighborMixing(tiny_model(), MixingConfig()).generate(**left_padded(), do_sample=True, max_new_tokens=2, **setting)


def test_only_uncertain_steps_are_mixed() -> None:
    model = tiny_model()
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=1.0, entropy_threshold=4.13))
    seen = _Seen()
    _, record = mixing.generate(
        **left_padded(8), max_new_tokens=10, min_new_tokens=10, do_sample=True,
        logits_processor=LogitsProcessorList([seen]),
    )  # fmt: skip
    p = torch.stack(seen.scores, dim=1)[:, : record.length].double().softmax(-1)
    entropy = -torch.where(p > 0, p * p.log(), 0).sum(-1)
    assert torch.equal(record.gate, entropy >= 4.13) and record.gate.any() and not record.gate.all()


class _Breaks(LogitsProcessor):
    """Leaves the row 2 without a token, or with NaN, at the third step."""

    def __init__(self, value: float) -> None:
        self.value, self.calls = value, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            scores = scores.clone()
            scores[2] = self.value
        return scores


@pytest.mark.parametrize("sampler", ["native", "counter_based"])
@pytest.mark.parametrize(("value", "reason"), [(torch.nan, "NaN"), (-torch.inf, "-inf")])
def test_logits_that_nothing_can_be_sampled_from_stop_the_rollout_at_its_end(sampler, value, reason) -> None:
    mixing = NeighborMixing(tiny_model(), MixingConfig(mixing_rate=1.0, sampler=sampler))
    with pytest.raises(RuntimeError, match=f"row 102, step 2: .*{reason}"):
        mixing.generate(
            **left_padded(), row_ids=torch.arange(100, 104), max_new_tokens=6, min_new_tokens=6,
            logits_processor=LogitsProcessorList([_Breaks(value)]),
        )  # fmt: skip


def test_a_model_of_nan_stops_the_rollout_at_its_end() -> None:
    model = tiny_model()
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.0))
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(RuntimeError, match="row 0, step 0 hold NaN"):
        mixing.generate(**left_padded(), max_new_tokens=3)


def test_returned_logits_and_scores_are_those_of_generate() -> None:
    """The anchors are forced in place, but not in what the user asked to have returned."""
    model, batch = tiny_model(), left_padded()
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=1.0, k=1))
    output, _ = mixing.generate(
        **batch,
        max_new_tokens=4,
        min_new_tokens=4,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    plain = model.generate(
        **batch, max_new_tokens=4, min_new_tokens=4, output_logits=True, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, plain.sequences)
    assert all(torch.equal(x, y) for x, y in zip(output.logits, plain.logits, strict=True))
    assert all(bool((x.isfinite().sum(1) == 1).all()) for x in output.scores)


# A user's own strategy --------------------------------------------------------------------------------------------


_STRATEGIES = """
import torch

from ngrpo_ops import register_strategy
from ngrpo_ops.strategies import Option


def _equal(ids):
    return ids, torch.full(ids.shape, 1 / ids.shape[1])


def two_likeliest(policy):
    return _equal(policy.likeliest(2))


def two_draws(policy):
    ids = policy.draws(policy.k)
    return ids, policy.softmax(ids)


@register_strategy(reads_neighbors=True, reads_filters=False)
def equal_neighbors(policy):
    return _equal(policy.neighbors())


@register_strategy(options={"noise_scale": Option(0.5, "size of the noise")}, reads_filters=False)
def noisy(policy):
    return _equal(policy.likeliest(policy.k))


def anchor_thrice(policy):
    ids = policy.likeliest(1).expand(-1, 3)
    return ids, torch.ones(ids.shape)


def negative(policy):
    ids = policy.likeliest(2)
    return ids, torch.tensor([1.5, -0.5]).expand(ids.shape)


def beyond(policy):
    return _equal(policy.likeliest(2) + policy.vocabulary)


def one_column(policy):
    return _equal(policy.likeliest(1))


def ids_of_int32(policy):
    ids, weights = two_likeliest(policy)
    return ids.int(), weights


def weights_of_int64(policy):
    ids, weights = two_likeliest(policy)
    return ids, weights.long()


def ids_alone(policy):
    return policy.likeliest(2)


def two_arguments(policy, temperature):
    return two_likeliest(policy)


number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MixingConfig]:
    """Makes configurations whose strategy is a function of a user's module."""
    (tmp_path / "own_strategies.py").write_text(_STRATEGIES)
    (tmp_path / "broken_strategies.py").write_text("import a_module_that_is_nowhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(strategies, "_registry", dict(strategies._registry))
    for module in ("own_strategies", "broken_strategies"):
        monkeypatch.delitem(sys.modules, module, raising=False)

    def config(function: str, **fields: object) -> MixingConfig:
        return MixingConfig(strategy=f"own_strategies:{function}", **{"k": 2, "mixing_rate": 0.5, **fields})  # type: ignore[arg-type]

    return config


@pytest.mark.parametrize("sampler", ["native", "counter_based"])
@pytest.mark.parametrize("function", ["two_likeliest", "two_draws", "equal_neighbors", "noisy"])
def test_a_strategy_of_the_user_replays(own: Callable[..., MixingConfig], function: str, sampler: str) -> None:
    model = tiny_model()
    mixing = NeighborMixing(model, own(function, sampler=sampler))
    assert (mixing.table is not None) == (function == "equal_neighbors")
    error, plain = replay_errors(mixing, model, left_padded(8), do_sample=True, temperature=0.7, num_return_sequences=2)
    assert error <= PARITY and plain > 1e-2
    error, plain = replay_errors(mixing, model, left_padded(8), do_sample=False)
    assert error <= PARITY
    # A greedy row draws its argmax every time, and the mix of one token is its own embedding.
    assert plain > 1e-2 or function == "two_draws"


@pytest.mark.parametrize("sampler", ["native", "counter_based"])
def test_a_strategy_of_the_user_decides_what_is_emitted_and_mixed(
    own: Callable[..., MixingConfig], sampler: str
) -> None:
    model, batch = tiny_model(), left_padded(8)
    mixing = NeighborMixing(model, own("two_likeliest", sampler=sampler))
    seen = _Seen()
    sequences, record = mixing.generate(
        **batch, do_sample=True, max_new_tokens=10, logits_processor=LogitsProcessorList([seen])
    )
    gate, scores = record.gate, torch.stack(seen.scores, dim=1)[:, : record.length]
    assert gate.any() and not gate.all()
    assert torch.equal(record.ids[gate], scores.topk(2).indices[gate])
    assert (record.weights[gate] == 0.5).all()
    assert torch.equal(sequences[:, record.prompt_length :][gate], scores.argmax(-1)[gate])
    mask = full_mask(batch["attention_mask"], sequences)
    with mixing.replay(record), torch.no_grad():
        replayed = model(input_ids=sequences, attention_mask=mask).logits
        by_hand = model(inputs_embeds=_reference_embeddings(model, sequences, record), attention_mask=mask).logits
    assert (replayed - by_hand).abs().max() <= 1e-4


@pytest.mark.parametrize("sampler", ["native", "counter_based"])
def test_the_draws_of_a_strategy_of_the_user_are_within_the_filters(
    own: Callable[..., MixingConfig], sampler: str
) -> None:
    model, batch = tiny_model(), left_padded(16)
    mixing = NeighborMixing(model, own("two_draws", mixing_rate=1.0, sampler=sampler))
    seen = _Seen()
    sequences, record = mixing.generate(
        **batch, do_sample=True, top_k=2, max_new_tokens=10, min_new_tokens=10,
        logits_processor=LogitsProcessorList([seen]),
    )  # fmt: skip
    likeliest = torch.stack(seen.scores, dim=1).topk(2).indices
    emitted = sequences[:, record.prompt_length :]
    assert record.gate.all() and torch.equal(record.ids[..., 0], emitted)
    assert (record.ids[..., None] == likeliest[:, :, None]).any(-1).all()
    assert 0.1 < (emitted == likeliest[..., 1]).double().mean() < 0.9
    with pytest.raises(ValueError, match="typical_p"):
        mixing.generate(**batch, do_sample=True, typical_p=0.5)


def test_an_option_that_a_strategy_of_the_user_declares_is_read(own: Callable[..., MixingConfig]) -> None:
    for noise_scale, expected in ((None, 0.5), (0.25, 0.25)):
        mixing = NeighborMixing(tiny_model(), own("noisy", noise_scale=noise_scale))
        _, record = mixing.generate(**left_padded(), max_new_tokens=4)
        assert record.noise_scale.tolist() == [expected] * 4
    with pytest.raises(ValueError, match="noise_scale"):
        own("two_likeliest", noise_scale=0.5)


@pytest.mark.parametrize("sampler", ["native", "counter_based"])
@pytest.mark.parametrize(
    ("function", "k", "reason"),
    [("anchor_thrice", 3, "do not sum to 1"), ("negative", 2, "negative"), ("beyond", 2, "ids outside the vocabulary")],
)
def test_bad_values_of_a_strategy_stop_the_rollout_at_its_end(
    own: Callable[..., MixingConfig], function: str, k: int, reason: str, sampler: str
) -> None:
    mixing = NeighborMixing(tiny_model(), own(function, k=k, mixing_rate=1.0, sampler=sampler))
    steps = _Seen()
    with pytest.raises(RuntimeError, match=f"row 100, step 0 .*its strategy returned .*{reason}"):
        mixing.generate(
            **left_padded(), row_ids=torch.arange(100, 104), max_new_tokens=6, min_new_tokens=6,
            logits_processor=LogitsProcessorList([steps]),
        )  # fmt: skip
    assert len(steps.scores) == 6
    assert not mixing.mixer.armed


@pytest.mark.parametrize("sampler", ["native", "counter_based"])
@pytest.mark.parametrize(
    ("function", "error", "got"),
    [
        ("one_column", ValueError, r"\(4, 1\)"),
        ("ids_of_int32", TypeError, "torch.int32"),
        ("weights_of_int64", TypeError, "torch.int64"),
        ("ids_alone", TypeError, "Tensor"),
    ],
)
def test_a_strategy_that_returns_something_else_is_named(
    own: Callable[..., MixingConfig], function: str, error: type[Exception], got: str, sampler: str
) -> None:
    model, batch = tiny_model(), left_padded()
    expected = model.generate(**batch, max_new_tokens=4)
    mixing = NeighborMixing(model, own(function, mixing_rate=1.0, sampler=sampler))
    with pytest.raises(error, match=f"'own_strategies:{function}' must return ids int64 .*got .*{got}"):
        mixing.generate(**batch, max_new_tokens=4)
    assert torch.equal(model.generate(**batch, max_new_tokens=4), expected)  # and nothing stays armed


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ("own_strategies:two_arguments", "function of one argument"),
        ("own_strategies:number", "function of one argument"),
        ("own_strategies:missing", "cannot be imported: AttributeError"),
        ("missing_strategies:two_likeliest", "cannot be imported: ModuleNotFoundError"),
        ("broken_strategies:two_likeliest", "cannot be imported: .*a_module_that_is_nowhere"),
        ("two_likeliest", "must be one of"),
        ("own_strategies:", "must be one of"),
    ],
)
def test_a_strategy_that_is_none_is_refused_before_any_model(
    own: Callable[..., MixingConfig], strategy: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=f"strategy .*{reason}"):
        MixingConfig(strategy=strategy, k=2)
