"""Rollouts in a vLLM engine with mixing, records fetched, over those of the engine without: `make bench-engines`.

Without a GPU the engine is vLLM's for the CPU with its kernels interpreted (tests/engines/cpu_engine.py): what a step
costs there is mostly the interpreter's: the ratio says how much mixing adds to such a step, and nothing of a GPU.
"""

from __future__ import annotations

import atexit
import tempfile
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    cpu_engine = pytest.importorskip(
        "cpu_engine", reason="vLLM for the CPU is in .venv-engines: make bench-engines", exc_type=ImportError
    )
vllm = pytest.importorskip("vllm", reason="needs vLLM")

from harness import Case, compare  # noqa: E402

from ngrpo_ops import MixingConfig  # noqa: E402
from ngrpo_ops.integrations.vllm import engine_kwargs, request_kwargs, take_records  # noqa: E402

PROMPT, NEW = 16, 16
VOCABULARY = 4_096
WHO = ("ours", "plain engine", "mixing engine, plain requests")


@lru_cache(maxsize=1)
def _model() -> str:
    import transformers

    shape = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    transformers.Qwen2ForCausalLM(shape).save_pretrained(folder.name)
    return folder.name


@lru_cache(maxsize=2)
def _engine(mixes: bool) -> Any:
    settings: dict[str, Any] = {"skip_tokenizer_init": True, "enable_prefix_caching": False}
    if torch.cuda.is_available():
        settings |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.3}
    else:
        settings |= cpu_engine.SETTINGS
    if mixes:
        settings |= engine_kwargs(MixingConfig(mixing_rate=0.1))
    return vllm.LLM(_model(), max_model_len=128, max_num_seqs=64, **settings)


def _case(batch: int, device: str, who: str) -> Case:
    llm = _engine(who != "plain engine")
    generator = torch.Generator().manual_seed(0)
    prompts = [
        {"prompt_token_ids": row} for row in torch.randint(1, VOCABULARY, (batch, PROMPT), generator=generator).tolist()
    ]
    asked = [
        vllm.SamplingParams(
            max_tokens=NEW, ignore_eos=True, detokenize=False, logprobs=0, seed=row,
            extra_args=request_kwargs(row) if who == "ours" else None,
        )
        for row in range(batch)
    ]  # fmt: skip

    def run() -> None:
        llm.generate(prompts, asked, use_tqdm=False)
        if who == "ours":
            take_records(llm, range(batch), [NEW] * batch)

    dtype = "bfloat16" if device == "cuda" else "float32"
    moved = NEW * sum(path.stat().st_size for path in Path(_model()).glob("*.safetensors"))
    return Case("vLLM rollout", f"B={batch} new={NEW} V={VOCABULARY} layers=4 d=512", dtype, moved, run, rounds=3)


CASES = {f"B={batch}": (partial(_case, batch), WHO) for batch in (8,)}


def bench_rollout(benchmark: Any, case_name: str, who: str, device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the engine is on the GPU")
    make, _ = CASES[case_name]
    compare(benchmark, make, who, device)
