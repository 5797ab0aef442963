"""A decode step over a Qwen2.5 vocabulary: what mixing costs over plain sampling, and what other ways of it cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from harness import Case, compare
from peers import compiled, mix_after_sampling, plain_step, search_every_step, warped_step
from shapes import BATCHES, QWEN2_5_0_5B, QWEN2_5_1_5B

from ngrpo_ops import decode_step

K, RATE, TEMPERATURE, TOP_K, TOP_P = 3, 0.1, 0.7, 50, 0.95
WHO = ("ours", "softmax + multinomial, no mixing", "a search at every step", "torch.compile with a table")
CUT = ("ours", "transformers' warpers + multinomial, no mixing")


@lru_cache(maxsize=1)
def _tables(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embedding, the same normalized, and neighbors: any will do, a lookup costs the same."""
    v, d = QWEN2_5_1_5B if device == "cuda" else QWEN2_5_0_5B
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    embedding = torch.randn(v, d, generator=generator, device=device).to(dtype)
    neighbors = torch.randint(v, (v, K - 1), generator=generator, device=device)
    return embedding, torch.nn.functional.normalize(embedding, dim=1), neighbors


@lru_cache(maxsize=1)  # the same memory for every member
def _logits(batch: int, device: str) -> torch.Tensor:
    """float32 as transformers' generate has them on a CPU, bfloat16 as an engine has them on a GPU."""
    v, generator = QWEN2_5_0_5B[0], torch.Generator(device).manual_seed(1)
    logits = torch.randn(batch, v, generator=generator, device=device).mul_(3)
    return logits.bfloat16() if device == "cuda" else logits


def _case(batch: int, cut: bool, device: str, who: str) -> Case:
    (embedding, normalized, neighbors), logits = _tables(device), _logits(batch, device)
    cuts: dict[str, Any] = {"top_k": TOP_K, "top_p": TOP_P} if cut else {}
    zero = torch.zeros((), dtype=torch.int64, device=device)
    functions: dict[str, Callable[[], Any]] = {
        "ours": lambda: decode_step(
            logits, embedding, neighbors, mixing_rate=RATE, temperature=TEMPERATURE, seed=zero, step=zero, **cuts
        ),
        "softmax + multinomial, no mixing": lambda: plain_step(logits, embedding, TEMPERATURE),
        "a search at every step": lambda: search_every_step(logits, embedding, normalized, K, RATE, TEMPERATURE),
        "transformers' warpers + multinomial, no mixing": lambda: warped_step(
            logits, embedding, TEMPERATURE, TOP_K, TOP_P
        ),
    }
    if who.startswith("torch.compile"):
        run = compiled(mix_after_sampling, logits, embedding, neighbors, RATE, TEMPERATURE)
    else:
        run = functions[who]
    op = "decode_step" + (f" top-k {TOP_K}, top-p {TOP_P}" if cut else "")
    moved = logits.numel() * logits.dtype.itemsize
    rounds = 15 if device == "cuda" or batch == 1 else 7 if batch <= 64 else 3
    return Case(op, f"B={batch} V={logits.shape[1]}", str(logits.dtype).removeprefix("torch."), moved, run, rounds)


CASES = {f"B={batch}": (partial(_case, batch, False), WHO) for batch in BATCHES} | {
    "cut": (partial(_case, 64, True), CUT)
}


def bench_decode_step(benchmark: Any, case_name: str, who: str, device: str) -> None:
    make, _ = CASES[case_name]
    compare(benchmark, make, who, device)
