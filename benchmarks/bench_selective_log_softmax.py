"""Log-probabilities of one id a row, with temperature, over a Qwen2.5 vocabulary; and their gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from harness import Case, compare
from peers import compiled, log_softmax_gather, trl_selective_log_softmax
from shapes import LOGITS_ROWS, QWEN2_5_0_5B

from ngrpo_ops import selective_log_softmax

V = QWEN2_5_0_5B[0]
TEMPERATURE = 0.7
WHO = ("ours", "log_softmax + gather", "TRL's selective_log_softmax", "torch.compile of log_softmax + gather")
BACKWARD = ("ours", "ours, in place", "log_softmax + gather", "TRL's selective_log_softmax")


@lru_cache(maxsize=1)  # the same memory for every member
def _inputs(dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    n = LOGITS_ROWS[device]
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(n, V, generator=generator, device=device).mul_(3).to(dtype)
    return logits, torch.randint(V, (n,), generator=generator, device=device)


def _case(backward: bool, dtype: torch.dtype, device: str, who: str) -> Case:
    logits, ids = _inputs(dtype, device)
    functions: dict[str, Callable[..., Any]] = {
        "ours": lambda x: selective_log_softmax(x, ids, temperature=TEMPERATURE),
        "ours, in place": lambda x: selective_log_softmax(x, ids, temperature=TEMPERATURE, in_place_backward=True),
        "log_softmax + gather": lambda x: log_softmax_gather(x, ids, TEMPERATURE),
        "TRL's selective_log_softmax": lambda x: trl_selective_log_softmax(x, ids, TEMPERATURE),
    }
    if who.startswith("torch.compile"):
        run = compiled(log_softmax_gather, logits, ids, TEMPERATURE)
    elif not backward:
        run = partial(functions[who], logits)
    else:
        leaf = logits.detach().requires_grad_()

        def run() -> torch.Tensor:
            hidden = leaf * 1.0 if who == "ours, in place" else leaf  # a second run needs its logits again
            return torch.autograd.grad(functions[who](hidden).sum(), hidden)[0]

    op = "selective_log_softmax" + (" forward and backward" if backward else "")
    moved = logits.numel() * dtype.itemsize * (3 if backward else 1)
    return Case(op, f"N={len(ids)} V={V}", str(dtype).removeprefix("torch."), moved, run)


CASES = {
    f"{'backward' if backward else 'forward'} {dtype}": (partial(_case, backward, dtype), BACKWARD if backward else WHO)
    for backward in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
}


def bench_selective_log_softmax(benchmark: Any, case_name: str, who: str, device: str) -> None:
    make, _ = CASES[case_name]
    compare(benchmark, make, who, device)
