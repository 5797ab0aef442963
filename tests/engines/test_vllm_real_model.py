"""SmolLM2 in a vLLM engine: its rollouts replayed by transformers, and the neighbors that the engine found."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_engine import mixer_of
from vllm import LLM
from vllm_requests import Difference, check_parity, params, taken

from ngrpo_ops import MixingConfig

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from examples.real_model.load import RegistryUnreachableError, load_model, smollm2_folder

QUESTIONS = ("Hi!", "Tom has 3 apples and buys 5 more. How many apples does he have?", "What is seven times six?")
TOKENS = 12  # few: the interpreter takes a second for each token of a vocabulary like this


@pytest.fixture(scope="module")
def folder() -> str:
    try:
        return str(smollm2_folder())
    except RegistryUnreachableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def loaded(folder: str) -> tuple[Any, Any]:
    return load_model()


@pytest.fixture
def start(engine: Callable[..., LLM]) -> Callable[..., LLM]:
    """Engines for weights flat enough that no mix is nearly its anchor, so that a replay that is missing shows."""

    def start(**settings: Any) -> LLM:
        config = MixingConfig(mixing_rate=0.5, temperature=20.0, excluded_token_ids="special")
        return engine(config, skip_tokenizer_init=False, max_model_len=128, **settings)

    return start


def chats(tokenizer: Any) -> list[dict[str, list[int]]]:
    """The questions in the chat template."""
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return [{"prompt_token_ids": ids} for ids in asked]


def test_the_engine_and_transformers_agree(start: Any, loaded: tuple[Any, Any], difference: Difference) -> None:
    model, tokenizer = loaded
    llm = start()
    asked = chats(tokenizer)
    rows = list(range(len(asked)))
    outputs = llm.generate(asked, [params(row, max_tokens=TOKENS, temperature=0.7) for row in rows], use_tqdm=False)
    record = taken(llm, outputs, rows)
    assert 0.3 < float(record.gate.float().mean()) < 0.7
    difference("vllm, SmolLM2", *check_parity(model, outputs, record, 0.7))


def test_the_engine_found_the_neighbors_that_transformers_mixes_with(start: Any, loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    llm = start()
    llm.generate(chats(tokenizer)[:1], params(0, max_tokens=2), use_tqdm=False)
    neighbors = mixer_of(llm).table.ids
    (ids,) = zip(*(tokenizer(word)["input_ids"] for word in (" therefore", " Monday", "7")), strict=True)
    assert [tokenizer.decode([i]) for i in neighbors[list(ids), 0].tolist()] == [" thus", " Tuesday", "6"]
    assert not torch.isin(neighbors, torch.tensor(tokenizer.all_special_ids)).any()
