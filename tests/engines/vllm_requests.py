"""Requests to a vLLM engine, its records, and their replay by transformers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from models import PAD
from vllm import LLM, SamplingParams

from ngrpo_ops import MixingConfig, MixRecord
from ngrpo_ops.integrations.transformers import NeighborMixing
from ngrpo_ops.integrations.vllm import request_kwargs, take_records

PARITY = 1e-4
WITHOUT = 1e-2  # what plain ids differ by, at the least

Difference = Callable[[str, float, float | None], None]


def prompts(count: int, longest: int = 9) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": [3 + (7 * i + j) % 60 for j in range(1 + i % longest)]} for i in range(count)]


def params(row: int | None, **settings: Any) -> SamplingParams:
    extra = {} if row is None else {"extra_args": request_kwargs(row)}
    given = {"max_tokens": 20, "temperature": 1.0, "logprobs": 0, "detokenize": False, "ignore_eos": True}
    return SamplingParams(**given | {"seed": row} | settings | extra)


def sequences(outputs: list[Any]) -> tuple[list[list[int]], list[list[int]], torch.Tensor]:
    """Prompts, completions and the engine's own log-probabilities [B, T], of all sequences of all requests."""
    flat = [(list(o.prompt_token_ids), c) for o in outputs for c in o.outputs]
    tokens = [list(c.token_ids) for _, c in flat]
    logprobs = torch.zeros(len(flat), max(map(len, tokens)))
    for row, (_, completion) in enumerate(flat):
        for step, (token, entry) in enumerate(zip(tokens[row], completion.logprobs, strict=True)):
            logprobs[row, step] = entry[token].logprob
    return [prompt for prompt, _ in flat], tokens, logprobs


def replayed(
    model: Any, outputs: list[Any], record: MixRecord | None, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of a transformers forward, and where there are tokens: [B, T]."""
    logits, emitted, live = replayed_logits(model, outputs, record)
    return (logits / temperature).log_softmax(-1).gather(-1, emitted[..., None]).squeeze(-1), live


def replayed_logits(
    model: Any, outputs: list[Any], record: MixRecord | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits [B, T, V] that each completion token was chosen from, the tokens [B, T], and where there are some."""
    asked, tokens, _ = sequences(outputs)
    width, length = max(map(len, asked)), max(map(len, tokens))
    ids = torch.full((len(asked), width + length), PAD)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(asked, tokens, strict=True)):
        start, stop = width - len(prompt), width + len(completion)
        ids[row, start:stop] = torch.tensor(prompt + completion)
        mask[row, start:stop] = 1
    mixing = NeighborMixing(model, MixingConfig(k=1))
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), nullcontext() if record is None else mixing.replay(record.fit(length, width)):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=position_ids).logits
    mixing.remove()
    return logits[:, width - 1 : -1], ids[:, width:], mask[:, width:].bool()


def taken(llm: LLM, outputs: list[Any], row_ids: list[int]) -> MixRecord:
    return take_records(llm, row_ids, [len(c.token_ids) for o in outputs for c in o.outputs])


def check_parity(
    model: Any, outputs: list[Any], record: MixRecord, temperature: float = 1.0
) -> tuple[float, float | None]:
    """The largest difference from a replay of the record's log-probabilities and, at temperature 1, of the engine's.

    Returns:
        The difference, and the same from plain ids; None: the mixes are anchors alone, which are embedded as they are.
    """
    _, tokens, logprobs = sequences(outputs)
    again, live = replayed(model, outputs, record, temperature)
    plain, _ = replayed(model, outputs, None, temperature)
    emitted = torch.tensor([row + [0] * (live.shape[1] - len(row)) for row in tokens])
    assert record.gate.any() and (record.ids[..., 0] == emitted)[record.gate].all()
    assert not record.gate[~live].any()
    compared = (logprobs, record.logprobs) if temperature == 1.0 else (record.logprobs,)
    error = max(float((again - x)[live].abs().max()) for x in compared)
    assert error <= PARITY
    without = float((plain - record.logprobs)[live].abs().max()) if record.ids.shape[2] > 1 else None
    assert without is None or without > WITHOUT
    return error, without
