"""A whole `generate` with mixing over a plain one, on a model small enough that what mixing adds would show."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
from harness import Case, compare

from ngrpo_ops import MixingConfig

PROMPT, NEW = 32, 32
WHO = ("ours", "plain generate")


@lru_cache(maxsize=1)
def _mixing(device: str) -> Any:
    transformers = pytest.importorskip("transformers")
    from ngrpo_ops.integrations.transformers import NeighborMixing

    shape = transformers.Qwen2Config(
        vocab_size=32_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    mixing = NeighborMixing(transformers.Qwen2ForCausalLM(shape).eval().to(device), MixingConfig(mixing_rate=0.1))
    mixing.refresh()
    return mixing


def _case(batch: int, device: str, who: str) -> Case:
    mixing = _mixing(device)
    prompts = torch.randint(1, 32_000, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    settings = {
        "input_ids": prompts, "attention_mask": torch.ones_like(prompts), "do_sample": True, "temperature": 0.7,
        "top_k": 0, "max_new_tokens": NEW, "min_new_tokens": NEW,
    }  # fmt: skip

    def mixed() -> Any:
        # A rollout refreshes the table first; it is what the weights' change costs, and has its own benchmark.
        with mock.patch.object(mixing, "refresh"):
            return mixing.generate(**settings)

    run = mixed if who == "ours" else partial(mixing.model.generate, **settings)
    moved = NEW * sum(p.numel() * p.itemsize for p in mixing.model.parameters())
    return Case("generate", f"B={batch} new={NEW} V=32000 layers=4 d=512", "float32", moved, run, rounds=10)


CASES = {f"B={batch}": (partial(_case, batch), WHO) for batch in (1, 16, 64)}


def bench_generate(benchmark: Any, case_name: str, who: str, device: str) -> None:
    make, _ = CASES[case_name]
    compare(benchmark, make, who, device)
