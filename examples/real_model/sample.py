"""Completions of prompts in one cell, and what is measured on them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ngrpo_ops import MixRecord, gaussian_noise, mix_embeddings, selective_log_softmax
from ngrpo_ops.integrations.transformers import NeighborMixing
from ngrpo_ops.integrations.transformers.view import require_context, token_text

_AT_ONCE = 16  # rows of a forward over whole sequences, whose logits are large
_WORD = re.compile(r"\w+|[^\w\s]")


class Rollouts(NamedTuple):
    """B completions.

    sequences: int64 [B, P + T]; mask: of what is no left padding, [B, P + T]; live: bool [B, T], the completion up to
    its end token, which is one of it; ended: bool [B], whether it has one; entropy: float32 [B, T], of the policy at
    the temperature, in nats.
    """

    sequences: Tensor
    mask: Tensor
    record: MixRecord
    live: Tensor
    ended: Tensor
    entropy: Tensor

    @property
    def completions(self) -> Tensor:
        return self.sequences[:, self.record.prompt_length :]

    def emitted_entropy(self, forces: bool) -> Tensor:
        """float32 [B]: the sum over a completion of the entropy that each token was drawn with.

        Args:
            forces: whether a mixed step emits the argmax, which is a draw of no entropy.
        """
        entropy = self.entropy.masked_fill(self.record.gate, 0.0) if forces else self.entropy
        return (entropy * self.live).sum(1)


class _Entropies(LogitsProcessor):
    """Keeps the entropy of each step of a generate."""

    def __init__(self, temperature: float) -> None:
        self.temperature, self.steps = temperature, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        some = input_ids[:, -1]  # the entropy is of all tokens
        _, entropy = selective_log_softmax(scores, some, temperature=self.temperature, return_entropy=True)
        self.steps.append(entropy.float())
        return scores


def encode(tokenizer: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts as the model's chat template has them, padded on the left. Without a template they stay as they are."""
    texts, options = list(prompts), {}
    if getattr(tokenizer, "chat_template", None):
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            for prompt in prompts
        ]
        options = {"add_special_tokens": False}  # which are in the template
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt", **options)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def sample(
    mixing: NeighborMixing, batch: dict[str, Tensor], samples: int, temperature: float, tokens: int, row_ids: Tensor
) -> Rollouts:
    """`samples` completions of each prompt, of at most `tokens` tokens, without any filter or penalty.

    Raises:
        ValueError: a prompt that with the new tokens is longer than the model's context.
    """
    model = mixing.model
    require_context(model, batch["input_ids"].shape[1], tokens)
    pad, ends = _pad_and_ends(model)
    entropies = _Entropies(temperature)
    with torch.no_grad():
        sequences, record = mixing.generate(
            **batch, row_ids=row_ids, num_return_sequences=samples, do_sample=True, temperature=temperature, top_k=0,
            top_p=1.0, repetition_penalty=1.0, max_new_tokens=tokens, pad_token_id=pad, logits_processor=[entropies],
        )  # fmt: skip
    completion = sequences[:, record.prompt_length :]
    end = torch.isin(completion, torch.tensor(ends, dtype=torch.int64, device=completion.device))
    live = end.long().cumsum(1) - end.long() == 0
    prompts = batch["attention_mask"].repeat_interleave(samples, 0)
    mask = torch.cat([prompts, torch.ones_like(completion)], 1)
    entropy = torch.stack(entropies.steps, 1)[:, : completion.shape[1]]
    return Rollouts(sequences, mask, record, live, end.any(1), entropy)


def _pad_and_ends(model: Any) -> tuple[int, list[int]]:
    generation = model.generation_config
    ends = generation.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    pad = generation.pad_token_id
    return (pad if pad is not None else ends[0] if ends else 0), ends


def plain_logprobs(model: Any, rollouts: Rollouts, samples: int) -> Tensor:
    """float32 [B]: the log-probability of each completion as a text, under the plain model at temperature 1.

    A prompt is read once for its samples. Within no replay: the model reads the plain ids.
    """
    found = []
    start = rollouts.record.prompt_length
    with torch.no_grad():
        for first in range(0, len(rollouts.sequences), samples):
            rows = slice(first, first + samples)
            live = rollouts.live[rows]
            length = int(live.sum(1).max())
            prompt = rollouts.sequences[first, :start][rollouts.mask[first, :start].bool()]
            completion = rollouts.sequences[rows, start : start + length]
            read = model(input_ids=prompt[None], use_cache=True, logits_to_keep=1)
            cache = read.past_key_values
            cache.batch_repeat_interleave(samples)
            logits = read.logits.expand(samples, -1, -1)
            if length > 1:
                rest = model(input_ids=completion[:, :-1], past_key_values=cache, use_cache=True).logits
                logits = torch.cat([logits, rest], 1)
            logprobs = selective_log_softmax(logits, completion).float()
            found.append((logprobs * live[:, :length]).sum(1))
    return torch.cat(found)


def replay_error(mixing: NeighborMixing, rollouts: Rollouts, temperature: float) -> float:
    """The largest |replayed - sampled| log-probability, of a forward over the whole sequences."""
    record, start = rollouts.record, rollouts.record.prompt_length
    assert record.logprobs is not None
    largest = 0.0
    with torch.no_grad(), mixing.replay(record):
        for first in range(0, len(rollouts.sequences), _AT_ONCE):
            rows = slice(first, first + _AT_ONCE)
            completion = rollouts.sequences[rows, start:]
            positions = (rollouts.mask[rows].long().cumsum(1) - 1).clamp(min=0)
            logits = mixing.model(
                input_ids=rollouts.sequences[rows], attention_mask=rollouts.mask[rows], position_ids=positions,
                logits_to_keep=completion.shape[1] + 1, use_cache=False,
            ).logits[:, :-1]  # fmt: skip
            replayed = selective_log_softmax(logits, completion, temperature=temperature).float()
            errors = (replayed - record.logprobs[rows]).abs().masked_fill(~rollouts.live[rows], 0.0)
            largest = max(largest, float(errors.max()))
    return largest


def cosines(table: Tensor, record: MixRecord) -> Tensor:
    """float32 [M]: cos(mix, anchor) of every mixed step, in the order of `record.gate.nonzero()`."""
    rows, steps = record.gate.nonzero(as_tuple=True)
    ids = record.ids[rows, steps]
    mixed = mix_embeddings(table, ids, record.weights[rows, steps])
    if record.noise_scale is not None:
        assert record.noise_seed is not None and record.row_ids is not None
        mixed = gaussian_noise(
            mixed, record.noise_scale[rows], seed=record.noise_seed[rows], row_ids=record.row_ids[rows], steps=steps
        )
    return torch.cosine_similarity(mixed.float(), table[ids[:, 0]].float(), dim=-1)


def mixes_of(tokenizer: Any, table: Tensor, record: MixRecord) -> dict[str, Any]:
    """Every mixed step: candidates (the anchor first), their weights, the cosine; and the texts of the tokens."""
    ids, weights = record.ids[record.gate], record.weights[record.gate]
    return {
        "ids": ids.tolist(),
        "weights": [[round(weight, 6) for weight in row] for row in weights.tolist()],
        "cosine": [round(cosine, 6) for cosine in cosines(table, record).tolist()],
        "texts": {str(i): token_text(tokenizer, i) for i in ids.unique().tolist()},
    }


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams of words over all n-grams of some texts; None where there are none.

    Examples:
        >>> distinct_n(["a b", "a c"], 1)
        0.75
    """
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = _WORD.findall(text)
        grams.update(zip(*(words[i:] for i in range(n)), strict=False))
    return len(grams) / grams.total() if grams else None
