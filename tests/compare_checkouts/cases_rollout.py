"""Cases of MixRecord, of rollouts with `generate` and their replay, and of training with TRL."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from inputs import STRATEGIES, Case, Cases, Inputs, counter_based_sampler, refusal
from models import EOS, PAD, VOCABULARY, left_padded, tiny_model, tokenizer
from torch import Tensor

from ngrpo_ops import MixingConfig, MixRecord
from ngrpo_ops.integrations.transformers import NeighborMixing


def cases() -> Cases:
    for noise in (False, True):
        yield Case("MixRecord", "with noise" if noise else "without noise", partial(records, noise=noise))
    yield from generate_cases()
    for name, settings in TRAININGS.items():
        yield Case("NGRPOTrainer", name, partial(trained, settings=settings))


# MixRecord --------------------------------------------------------------------------------------------------------


def record(inputs: Inputs, b: int, t: int, noise: bool) -> MixRecord:
    gate = inputs.mask(0.4, b, t)
    gate[:, 3:] = False  # so that it can be cut
    of_noise = {"noise_scale": inputs.uniform(b), "noise_seed": inputs.integers(9, b), "row_ids": inputs.integers(9, b)}
    return MixRecord(
        gate, inputs.integers(50, b, t, 3), inputs.uniform(b, t, 3), 4, -inputs.uniform(b, t),
        **of_noise if noise else {},
    )  # fmt: skip


def records(inputs: Inputs, noise: bool) -> Any:
    one, other = record(inputs, 5, 6, noise), record(inputs, 2, 4, noise)
    found = {
        "fit, longer": one.fit(9), "fit, shorter": one.fit(3), "fit, prompt": one.fit(6, 11), "to": one.to("cpu"),
        "slice": one[1:4], "order": one[torch.tensor([4, 0, 0])], "mask": one[torch.arange(5) % 2 == 0],
        "cat": MixRecord.cat([one, other, one[:0]]),
        "bare": MixRecord(one.gate, one.ids, one.weights, 0).fit(7),
    }  # fmt: skip
    return found, len(one), one.length, sorted(one.tensors())


# generate ---------------------------------------------------------------------------------------------------------

SAMPLED = {"do_sample": True, "temperature": 0.8}
GENERATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rate 0": ({"mixing_rate": 0.0}, SAMPLED),
    "rate 1": ({"mixing_rate": 1.0}, SAMPLED),
    "k = 1": ({"k": 1}, SAMPLED),
    "k = 6, mixing temperature": ({"k": 6, "temperature": 0.4}, SAMPLED),
    "released": ({"variant": "released"}, SAMPLED),
    "dot": ({"metric": "dot"}, SAMPLED),
    "l2": ({"metric": "l2"}, SAMPLED),
    "l1": ({"metric": "l1"}, SAMPLED),
    "entropy threshold": ({"entropy_threshold": 4.1, "mixing_rate": 1.0}, SAMPLED),
    "stop tokens": ({"stop_token_ids": range(3, 30)}, SAMPLED),
    "allowed tokens": ({"allowed_token_ids": [5, 9, 20, 33]}, SAMPLED),
    "another seed": ({"seed": -(2**63)}, SAMPLED),
    "several sequences": ({}, SAMPLED | {"num_return_sequences": 3}),
    "filters": ({}, SAMPLED | {"top_k": 9, "top_p": 0.9, "min_p": 0.01}),
    "repetition penalty": ({}, SAMPLED | {"repetition_penalty": 1.4}),
    "static cache": ({}, SAMPLED | {"cache_implementation": "static"}),
    "topk, released": ({"strategy": "topk", "variant": "released"}, SAMPLED),
    "gumbel, mixing temperature": ({"strategy": "gumbel", "temperature": 0.3}, SAMPLED),
    "gaussian, noise 1": ({"strategy": "gaussian", "noise_scale": 1.0}, SAMPLED),
    "moi, filters": ({"strategy": "moi", "moi_beta": 0.5}, SAMPLED | {"top_k": 9, "top_p": 0.9}),
    "multiplex, several sequences": ({"strategy": "multiplex"}, SAMPLED | {"num_return_sequences": 2}),
}


def generate_cases() -> Cases:
    def case(name: str, config: dict[str, Any], generation: dict[str, Any], family: str = "qwen2") -> Case:
        call = partial(generated, config=config, generation=generation, family=family)
        return Case("NeighborMixing.generate", name, call)

    for sampler, value in (("native", "native"), ("counter based", counter_based_sampler())):
        for strategy in STRATEGIES:
            for mode, generation in (("sampled", SAMPLED), ("greedy", {})):
                yield case(f"{strategy}, {sampler}, {mode}", {"strategy": strategy, "sampler": value}, generation)
        for name, (config, generation) in GENERATIONS.items():
            yield case(f"{name}, {sampler}", config | {"sampler": value}, generation)
        for strategy in ("neighbor", "gaussian", "moi"):
            yield case(f"llama, {strategy}, {sampler}", {"strategy": strategy, "sampler": value}, SAMPLED, "llama")
    yield Case("NeighborMixing.generate", "LoRA", generated_with_lora)
    yield Case("NeighborMixing.generate", "trainers that call generate", generated_by_others)
    yield Case("NeighborMixing.generate", "a reference model", replayed_on_another)
    yield Case("NeighborMixing.generate", "errors", refused_generations)


def mask_of(attention_mask: Tensor, sequences: Tensor) -> Tensor:
    mask = attention_mask.repeat_interleave(sequences.shape[0] // attention_mask.shape[0], 0)
    return torch.cat([mask, mask.new_ones(mask.shape[0], sequences.shape[1] - mask.shape[1])], dim=1)


def log_probabilities(model: Any, sequences: Tensor, mask: Tensor, prompt: int) -> Tensor:
    logits = model(input_ids=sequences, attention_mask=mask).logits[:, prompt - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, sequences[:, prompt:, None]).squeeze(-1)


def replayed(mixing: NeighborMixing, model: Any, sequences: Tensor, found: MixRecord, attention_mask: Tensor) -> Any:
    """Log-probabilities of the replay, and the gradients of their sum."""
    mask = mask_of(attention_mask, sequences)
    model.zero_grad()
    with mixing.replay(found):
        values = log_probabilities(model, sequences, mask, found.prompt_length)
    values.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"replayed": values, "gradients": gradients, "sequences": sequences, "record": found}


def generated(inputs: Inputs, config: dict[str, Any], generation: dict[str, Any], family: str) -> Any:
    model, batch = tiny_model(family), left_padded(5)
    mixing = NeighborMixing(model, MixingConfig(**{"mixing_rate": 0.5} | config))
    torch.manual_seed(3)
    turns = []
    for row_ids in (None, torch.arange(5 * generation.get("num_return_sequences", 1)) + 2**40):
        sequences, found = mixing.generate(**batch, max_new_tokens=8, row_ids=row_ids, **generation)
        turns.append(replayed(mixing, model, sequences, found, batch["attention_mask"]))
    table = mixing.table
    return turns, mixing.state_dict(), None if table is None else (table.ids, table.scores)


def generated_with_lora(inputs: Inputs) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    model, batch = get_peft_model(tiny_model(), lora), left_padded(4)
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.5))
    sequences, found = mixing.generate(**batch, max_new_tokens=6, do_sample=True)
    assert mixing.table is not None
    return replayed(mixing, model, sequences, found, batch["attention_mask"]), mixing.table.ids


def generated_by_others(inputs: Inputs) -> Any:
    """As trainers do: `rollouts` around the model's own generate, rows shuffled, the replay in two forwards."""
    model, batch = tiny_model(), left_padded(6)
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.5, strategy="gaussian"))
    with mixing.rollouts() as kept:
        sequences = model.generate(**batch, max_new_tokens=6, do_sample=True)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    found, rows = kept[0][order].fit(kept[0].length), sequences[order]
    mask = mask_of(batch["attention_mask"], sequences)[order]
    with mixing.replay(found), torch.no_grad():
        parts = [log_probabilities(model, rows[i], mask[i], found.prompt_length) for i in (slice(0, 2), slice(2, 6))]
    mixing.remove()
    return parts, kept[0], mixing.mixer.cosines, model.generate(**batch, max_new_tokens=3)


def replayed_on_another(inputs: Inputs) -> Any:
    model, reference, batch = tiny_model(), tiny_model(scale=2.0), left_padded(4)
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.5))
    sequences, found = mixing.generate(**batch, max_new_tokens=6, do_sample=True)
    mixing.attach(reference)
    mask = mask_of(batch["attention_mask"], sequences)
    with mixing.replay(found, reference), torch.no_grad():
        return log_probabilities(reference, sequences, mask, found.prompt_length)


def refused_generations(inputs: Inputs) -> Any:
    batch = left_padded()
    mixing = NeighborMixing(tiny_model(), MixingConfig(mixing_rate=0.5, sampler=counter_based_sampler()))
    settings: list[dict[str, Any]] = [
        {"num_beams": 2}, {"use_cache": False}, {"guidance_scale": 2.0}, {"prompt_lookup_num_tokens": 2},
        {"row_ids": torch.arange(3)}, {"inputs_embeds": torch.zeros(4, 6, 32)},
        *({"do_sample": True, name: value} for name, value in (("typical_p", 0.5), ("epsilon_cutoff", 0.1))),
    ]  # fmt: skip
    found = [refusal(partial(mixing.generate, **batch, max_new_tokens=2, **change)) for change in settings]
    makers: list[Callable[[], Any]] = [
        lambda: NeighborMixing(torch.nn.Linear(2, 2), MixingConfig()),
        lambda: NeighborMixing(tiny_model(), {"k": 3}),  # type: ignore[arg-type]
        lambda: NeighborMixing(tiny_model(), MixingConfig(stop_token_ids=[VOCABULARY])),
        lambda: mixing.generate(torch.zeros(0, 3, dtype=torch.int64)),
    ]
    sequences, record = mixing.generate(**batch, max_new_tokens=3)

    def replay(columns: int, rows: int) -> None:
        with mixing.replay(record):
            mixing.model(input_ids=sequences[:rows, :columns])

    makers += [partial(replay, 5, 4), partial(replay, sequences.shape[1], 2)]
    return found + [refusal(call) for call in makers]


# Training ---------------------------------------------------------------------------------------------------------

MULTI_STEP = {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "beta": 0.04}
TRAININGS: dict[str, dict[str, Any]] = {
    "rate 0": {"mixing_rate": 0.0},
    "rate 0.5": {},
    "rate 0.5, several steps": MULTI_STEP,
    "gaussian, several steps": {**MULTI_STEP, "mixing_strategy": "gaussian", "mixing_noise_scale": 1.0},
    "moi": {"mixing_strategy": "moi", "mixing_moi_beta": 0.5, "top_p": 0.9},
    "multiplex, counter based": {"mixing_strategy": "multiplex", "mixing_sampler": counter_based_sampler()},
    "mixed steps out of the loss": {"loss_on_mixed_steps": False, "mixing_variant": "released", "mixing_k": 4},
}
OF_TIME = re.compile(r"time|per_second|runtime")


def trained(inputs: Inputs, settings: dict[str, Any]) -> Any:
    """The logs but for times, and the weights, after three steps."""
    from datasets import Dataset

    from ngrpo_ops.integrations.trl import NGRPOConfig, NGRPOTrainer

    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[EOS] = model.lm_head.weight.mean(0) + 0.05  # completions of many lengths
    folder = Path.cwd() / "trainer"
    model.save_pretrained(folder / "model")
    texts = [" ".join(f"w{3 + (7 * i + j) % 60}" for j in range(2 + i % 4)) for i in range(16)]
    trainer = NGRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=lambda completions, **kwargs: [len(set(text.split())) / 10 for text in completions],
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer(),
        args=NGRPOConfig(
            output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", num_generations=4,
            per_device_train_batch_size=8, max_completion_length=10, learning_rate=1e-3, logging_steps=1, max_steps=3,
            save_strategy="no", disable_tqdm=True, **{"mixing_rate": 0.5} | settings,
        ),
    )  # fmt: skip
    trainer.train()
    logs = [
        {name: value for name, value in entry.items() if not OF_TIME.search(name)}
        for entry in trainer.state.log_history
    ]
    assert PAD == 0 and any("mix/gated_share" in entry for entry in logs)
    return logs, trainer.model.state_dict(), trainer.mixing.state_dict()
