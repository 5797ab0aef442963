"""What a model's forwards really do: a rollout and its replay see the same, or the rollout is refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from models import EOS, PAD, VOCABULARY, left_padded, tiny_model
from torch import nn
from transformers import Gemma4ForCausalLM as Gemma4
from transformers import Gemma4TextConfig, GenerationConfig, LogitsProcessorList, MambaConfig, MambaForCausalLM
from transformers.cache_utils import DynamicCache

from ngrpo_ops import MixingConfig, MixRecord, nearest_neighbors
from ngrpo_ops.integrations.transformers import NeighborMixing, checks

PARITY = 1e-5
HALF = MixingConfig(mixing_rate=0.5)


def replay_error(mixing: NeighborMixing, batch: dict, sequences: torch.Tensor, record: MixRecord) -> float:
    """The largest difference of log-probabilities, of sequences without an end token."""
    mask = torch.cat([batch["attention_mask"], torch.ones_like(record.ids[..., 0])], dim=1)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), mixing.replay(record):
        logits = mixing.model(input_ids=sequences, attention_mask=mask, position_ids=position_ids).logits
    start = record.prompt_length
    logprobs = logits[:, start - 1 : -1].float().log_softmax(-1).gather(-1, sequences[:, start:, None]).squeeze(-1)
    return float((logprobs - record.logprobs).abs().max())


def endless(model: Any) -> Any:
    model.generation_config.eos_token_id = None
    return model


def rollout(mixing: NeighborMixing, **settings: Any) -> float:
    """The replay error of a mixed rollout."""
    batch = left_padded()
    sequences, record = mixing.generate(**batch, do_sample=True, max_new_tokens=6, **settings)
    assert record.gate.any()
    return replay_error(mixing, batch, sequences, record)


# The cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["model", "one-layer"])
def test_gradient_checkpointing_in_training_mode_keeps_the_cache(whole: bool) -> None:
    model = endless(tiny_model()).train()
    if whole:
        model.gradient_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()
        model.model.layers[0].gradient_checkpointing = False
    before = [getattr(module, "gradient_checkpointing", None) for module in model.modules()]
    assert rollout(NeighborMixing(model, HALF)) < PARITY
    assert [getattr(module, "gradient_checkpointing", None) for module in model.modules()] == before
    assert "gradient_checkpointing" not in vars(model.model.embed_tokens)


def test_a_forward_that_drops_the_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = endless(tiny_model())
    forward = type(model.model).forward

    def without_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        dropped = dict.fromkeys(
            set(checks.CACHE_NAMES) & kwargs.keys()
        )  # "past_key_values", and from transformers 5.24 on "cache"
        return forward(self, *args, **kwargs | dropped | {"use_cache": False})

    mixing = NeighborMixing(model, HALF)
    monkeypatch.setattr(type(model.model), "forward", without_cache)
    with pytest.raises(RuntimeError, match="did not keep its key-value cache"):
        mixing.generate(**left_padded(), max_new_tokens=4)


def test_a_step_that_reads_more_than_one_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at steps that mix nothing: an earlier mix would be read as plain ids."""
    model = endless(tiny_model())
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=1e-6))
    prepare = model.prepare_inputs_for_generation

    def whole(input_ids: torch.Tensor, **kwargs: Any) -> dict:
        return prepare(input_ids, **kwargs) | {"input_ids": input_ids, "past_key_values": DynamicCache()}

    monkeypatch.setattr(model, "prepare_inputs_for_generation", whole)
    with pytest.raises(RuntimeError, match="one token a step"):
        mixing.generate(torch.ones(1, 3, dtype=torch.int64), max_new_tokens=4)


@pytest.mark.parametrize("name", ["past_key_values", "cache", "cache_params"])
def test_a_used_cache_is_refused_by_every_name(name: str) -> None:
    model = endless(tiny_model())
    cache = DynamicCache()
    model(input_ids=left_padded()["input_ids"], past_key_values=cache)
    with pytest.raises(ValueError, match=f"{name} must be empty, got a cache of 6 tokens"):
        NeighborMixing(model, HALF).generate(**left_padded(), max_new_tokens=3, **{name: cache})


def test_a_state_space_model_mixes() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**shape, eos_token_id=None, pad_token_id=PAD, initializer_range=1.0)).eval()
    mixing = NeighborMixing(model, HALF)
    batch = {"input_ids": torch.arange(8).view(2, 4) + 2}
    sequences, record = mixing.generate(**batch, do_sample=True, max_new_tokens=6)
    assert record.gate.any()
    with torch.no_grad(), mixing.replay(record):
        logits = model(input_ids=sequences).logits
    logprobs = logits[:, 3:-1].log_softmax(-1).gather(-1, sequences[:, 4:, None]).squeeze(-1)
    assert (logprobs - record.logprobs).abs().max() < 1e-4


# What is drawn anew -----------------------------------------------------------------------------------------------


def test_dropout_in_training_mode_is_refused() -> None:
    mixing = NeighborMixing(endless(tiny_model(attention_dropout=0.3)).train(), HALF)
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=r"two of its forwards differ .*model\.eval\(\)"):
        mixing.generate(**left_padded(), max_new_tokens=3)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is not touched"
    mixing.model.eval()
    assert rollout(mixing) < PARITY
    plain = NeighborMixing(endless(tiny_model(attention_dropout=0.3)).train(), MixingConfig(mixing_rate=0))
    assert not plain.generate(**left_padded(), max_new_tokens=3)[1].gate.any()
    without = NeighborMixing(endless(tiny_model()).train(), HALF)
    assert rollout(without) < PARITY and without.model.training


# The table and the device -----------------------------------------------------------------------------------------


def test_weights_that_accelerate_has_offloaded_mix() -> None:
    plain, offloaded = endless(tiny_model()), endless(tiny_model())
    offloaded.load_state_dict(plain.state_dict())
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert offloaded.get_input_embeddings().weight.is_meta
    batch, results = left_padded(), []
    for model in (plain, offloaded):
        torch.manual_seed(3)
        mixing = NeighborMixing(model, HALF)
        sequences, record = mixing.generate(**batch, do_sample=True, max_new_tokens=6)
        results.append((sequences, record.ids, record.weights, mixing.table.ids))
        assert replay_error(mixing, batch, sequences, record) < PARITY
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


class _Scaled(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * torch.linspace(0.1, 3, self.embedding_dim)


def _with_hook(model: Any) -> None:
    scales = torch.linspace(0.1, 3, model.config.hidden_size)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output * scales)


def _with_forward(model: Any) -> None:
    embeddings = model.get_input_embeddings()
    forward, scales = embeddings.forward, torch.linspace(0.1, 3, model.config.hidden_size)
    embeddings.forward = lambda ids: forward(ids) * scales


def _with_class(model: Any) -> None:
    model.get_input_embeddings().__class__ = _Scaled


def _with_norm(model: Any) -> None:
    model.get_input_embeddings().max_norm = 1.0


@pytest.mark.parametrize("change", [_with_hook, _with_forward, _with_class, _with_norm])
def test_the_table_is_of_what_the_module_returns(change: Callable[[Any], None]) -> None:
    model = endless(tiny_model())
    change(model)
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.5, metric="dot"))
    assert rollout(mixing) < PARITY
    with torch.no_grad():
        rows = model.get_input_embeddings()(torch.arange(VOCABULARY))
    assert torch.equal(mixing.table.ids, nearest_neighbors(rows, 2, metric="dot").ids)


# A second table of token ids ----------------------------------------------------------------------------------------


def test_a_model_with_per_layer_inputs_is_refused() -> None:
    config = Gemma4TextConfig(
        vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        global_head_dim=8, layer_types=["full_attention"] * 2, num_kv_shared_layers=0, pad_token_id=PAD,
        eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"reads token ids elsewhere .*embed_tokens_per_layer"):
        NeighborMixing(Gemma4(config), HALF)
    NeighborMixing(Gemma4(config), MixingConfig(mixing_rate=0))  # nothing is mixed
    refused = Gemma4(config)
    with pytest.raises(ValueError, match="elsewhere"):
        NeighborMixing(refused, HALF)
    assert not refused.get_input_embeddings()._forward_hooks


def test_a_second_table_that_no_module_shows_is_refused() -> None:
    """Looked up by a function, from a parameter: only what a mix of one token changes tells of it."""
    model = tiny_model()
    model.second = nn.Parameter(torch.randn(VOCABULARY, 32))
    forward = model.model.forward

    def with_second(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        embedded = model.get_input_embeddings()(input_ids) + nn.functional.embedding(input_ids, model.second)
        return forward(**kwargs | {"inputs_embeds": embedded})

    model.model.forward = with_second
    with pytest.raises(ValueError, match="a mix that is wholly one token is not read as that token"):
        NeighborMixing(model, HALF).generate(**left_padded(), max_new_tokens=2)


# Wrappers -----------------------------------------------------------------------------------------------------------


def test_positional_arguments_of_generate_are_kept() -> None:
    model = endless(tiny_model())
    config, ids = GenerationConfig(max_new_tokens=4, do_sample=False), left_padded()["input_ids"]
    mixing = NeighborMixing(model, HALF)
    with mixing.rollouts(torch.arange(4)) as records:
        by_place = model.generate(ids, config, LogitsProcessorList())
        by_name = model.generate(input_ids=ids, generation_config=config)
        with pytest.raises(TypeError, match="multiple values for argument 'generation_config'"):
            model.generate(ids, config, generation_config=config)
    assert torch.equal(by_place, by_name) and torch.equal(records[0].gate, records[1].gate)


def test_what_a_user_has_put_on_the_model_is_restored() -> None:
    model = endless(tiny_model())
    calls: list[str] = []
    make, generate = model._get_stopping_criteria, model.generate

    def own_criteria(*args: Any, **kwargs: Any) -> Any:
        calls.append("criteria")
        return make(*args, **kwargs)

    def own_generate(*args: Any, **kwargs: Any) -> Any:
        calls.append("generate")
        return generate(*args, **kwargs)

    model._get_stopping_criteria, model.generate = own_criteria, own_generate
    mixing = NeighborMixing(model, HALF)
    with mixing.rollouts():
        model.generate(**left_padded(), max_new_tokens=2)
    assert calls == ["generate", "criteria"]
    assert vars(model)["_get_stopping_criteria"] is own_criteria and vars(model)["generate"] is own_generate


# One user at a time -------------------------------------------------------------------------------------------------


def in_threads(*tasks: Callable[[], Any]) -> list[Any]:
    """What each task returns or raises, all run at a time."""
    results: list[Any] = [None] * len(tasks)

    def run(place: int, task: Callable[[], Any]) -> None:
        try:
            results[place] = task()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place, task)) for place, task in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("shared", ["mixing", "model", "nothing"])
def test_two_threads_take_turns(shared: str) -> None:
    """Greedy rollouts, by row ids of their own: what each returns does not depend on the other."""
    model = endless(tiny_model())
    mixing = NeighborMixing(model, HALF)
    other_model = copy.deepcopy(model) if shared == "nothing" else model
    other = mixing if shared == "mixing" else NeighborMixing(other_model, HALF)

    def task(mixing: NeighborMixing, row: int) -> Callable[[], Any]:
        return lambda: mixing.generate(**left_padded(), max_new_tokens=8, row_ids=torch.arange(row, row + 4))

    tasks = [task(mixing if i % 2 else other, 4 * i) for i in range(8)]
    expected = [t() for t in tasks]
    for (sequences, record), (right, right_record) in zip(in_threads(*tasks), expected, strict=True):
        assert torch.equal(sequences, right) and torch.equal(record.gate, right_record.gate)
        assert torch.equal(record.ids, right_record.ids) and torch.equal(record.logprobs, right_record.logprobs)
    assert not mixing.mixer.armed


def test_a_plain_generate_beside_a_mixed_one_stays_plain() -> None:
    model = endless(tiny_model())
    plain = model.generate(**left_padded(), max_new_tokens=8, do_sample=False)
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=1.0))
    mixed, _ = mixing.generate(**left_padded(), max_new_tokens=8, row_ids=torch.arange(4))
    with mixing.rollouts(torch.arange(4)) as records:  # in every thread
        (beside,) = in_threads(lambda: model.generate(**left_padded(), max_new_tokens=8, do_sample=False))
    assert torch.equal(beside, mixed) and len(records) == 1
    tasks = [
        lambda: mixing.generate(**left_padded(), max_new_tokens=8, row_ids=torch.arange(4)),
        *[lambda: model.generate(**left_padded(), max_new_tokens=8, do_sample=False)] * 3,
    ]
    (again, _), *others = in_threads(*tasks)
    assert torch.equal(again, mixed) and all(torch.equal(other, plain) for other in others)


def test_what_cannot_be_shared_is_refused() -> None:
    model = endless(tiny_model())
    mixing, batch = NeighborMixing(model, HALF), left_padded()
    sequences, record = mixing.generate(**batch, max_new_tokens=4)
    with mixing.rollouts(), pytest.raises(RuntimeError, match="generate cannot begin within generate"):
        mixing.generate(**batch, max_new_tokens=4)
    with mixing.rollouts():
        with pytest.raises(RuntimeError, match=r"rollouts\(\) cannot begin within rollouts\(\)"), mixing.rollouts():
            pass
        with mixing.replay(record):
            model(input_ids=sequences)
    assert "generate" not in vars(model)

    def replay() -> None:
        with mixing.replay(record):
            model(input_ids=sequences)

    def within() -> Any:
        with mixing.replay(record):
            (found,) = in_threads(replay)
            model(input_ids=sequences)
            return found

    assert "another thread is in a replay of this model" in str(within())
    with pytest.raises(RuntimeError, match="a replay cannot begin within a replay"), mixing.replay(record):
        replay()
    assert rollout(mixing) < PARITY, "nothing stays armed"


def test_a_forward_that_autograd_repeats_in_its_own_thread_is_told() -> None:
    """On a GPU a checkpoint of the whole model is recomputed in another thread, where it would embed plain ids."""
    model = endless(tiny_model())
    mixing = NeighborMixing(model, HALF)
    sequences, record = mixing.generate(**left_padded(), max_new_tokens=4)
    with pytest.raises(RuntimeError, match="another thread ran a forward of the model"), mixing.replay(record):
        model(input_ids=sequences)
        in_threads(lambda: model(input_ids=sequences))
    with mixing.replay(record):
        model(input_ids=sequences)
        in_threads(lambda: model.generate(**left_padded(), max_new_tokens=2))  # without gradients: no matter


# The record of other sequences --------------------------------------------------------------------------------------


def test_the_record_of_other_sequences_is_refused() -> None:
    mixing = NeighborMixing(endless(tiny_model()), HALF)
    batch = left_padded()
    sequences, record = mixing.generate(**batch, do_sample=True, max_new_tokens=6)
    others, _ = mixing.generate(**batch, do_sample=True, max_new_tokens=6)
    with (
        pytest.raises(RuntimeError, match="are not its anchors: the record is of other sequences"),
        mixing.replay(record),
    ):
        mixing.model(input_ids=others)
    with (
        pytest.raises(RuntimeError, match="are not its anchors: the record is of other sequences"),
        mixing.replay(record[torch.tensor([1, 0, 2, 3])]),
    ):
        mixing.model(input_ids=sequences)
    with mixing.replay(record):
        mixing.model(input_ids=sequences)


def test_modules_keep_their_own_modes() -> None:
    model = endless(tiny_model()).train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    rollout(NeighborMixing(model, HALF))
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2


def test_a_cache_that_a_model_keeps_in_its_modules_passes() -> None:
    """RecurrentGemma returns no cache, and is given none."""
    checks.require_cache({"past_key_values": None}, object())
    with pytest.raises(RuntimeError, match="did not keep its key-value cache"):
        checks.require_cache({"past_key_values": DynamicCache()}, object())
