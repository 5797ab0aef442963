"""Rollouts in a vLLM server that mixes, as NGRPOTrainer asks for them, over TRL's own: `make bench-engines`.

Without a GPU the server is vLLM's for the CPU with its kernels interpreted (tests/engines/trl_server_cpu): what a step
costs there is mostly the interpreter's: the ratio says how much mixing, requests a prompt and records add to such a
rollout, and nothing of a GPU.
"""

from __future__ import annotations

import atexit
import tempfile
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.importorskip(
        "cpu_engine", reason="vLLM for the CPU is in .venv-engines: make bench-engines", exc_type=ImportError
    )
pytest.importorskip("vllm", reason="needs vLLM")

from harness import Case, compare
from models import VOCABULARY
from transformers import AutoConfig
from trl.generation.vllm_client import VLLMClient
from trl_server_cpu.runs import Server, make_model

from ngrpo_ops.integrations.trl import NGRPOConfig
from ngrpo_ops.integrations.trl.server import MixingServer

PROMPT, NEW, COMPLETIONS = 8, 8, 2
WHO = ("ours", "stock server", "mixing server, plain requests")


@lru_cache(maxsize=1)
def _model() -> str:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return make_model(Path(folder.name))


@lru_cache(maxsize=2)
def _server(mixes: bool) -> Server:
    mixing = {"mixing_rate": 0.1} if mixes else None
    made = Server(_model(), Path(_model(), f"{mixes}.log"), mixing, "--max-num-seqs", "64").start()
    atexit.register(made.kill)
    return made.wait()


@lru_cache(maxsize=1)
def _mixing() -> MixingServer:
    url = _server(True).url
    args = NGRPOConfig("out", use_cpu=True, bf16=False, report_to="none", vllm_server_base_url=url)
    mixing = MixingServer(args, args.mixing(), _model())
    model = SimpleNamespace(config=AutoConfig.from_pretrained(_model()))
    mixing.attach(SimpleNamespace(model=model, vllm_generation=SimpleNamespace(vllm_client=VLLMClient(url))))
    return mixing


def _case(prompts: int, device: str, who: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    asked = torch.randint(3, VOCABULARY, (prompts, PROMPT), generator=generator).tolist()
    settings = {"n": COMPLETIONS, "max_tokens": NEW, "generation_kwargs": {"ignore_eos": True}}
    if who == "ours":
        mixing = _mixing()

        def run() -> None:
            with mixing.rollouts(torch.arange(prompts * COMPLETIONS)) as records:
                mixing.client.generate(prompts=asked, **settings)
            assert len(records[0]) == prompts * COMPLETIONS
    else:
        client = VLLMClient(_server(who != "stock server").url)

        def run() -> None:
            client.generate(prompts=asked, **settings)

    dtype = "bfloat16" if device == "cuda" else "float32"
    moved = NEW * sum(path.stat().st_size for path in Path(_model()).glob("*.safetensors"))
    shape = f"B={prompts}x{COMPLETIONS} new={NEW} V={VOCABULARY} layers=2 d=128"
    return Case("vLLM server rollout", shape, dtype, moved, run, rounds=3)


CASES = {f"B={prompts}x{COMPLETIONS}": (partial(_case, prompts), WHO) for prompts in (4,)}


def bench_served_rollout(benchmark: Any, case_name: str, who: str, device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the server is on the GPU")
    make, _ = CASES[case_name]
    compare(benchmark, make, who, device)
