"""What the compiler makes of the kernels, for tests in whose process the kernels are interpreted. Prints JSON.

python tests/compiled_kernels.py contractions   # of each kernel, how many error-free forms were contracted
python tests/compiled_kernels.py variants       # of each kernel, how many variants calls with other settings need
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).parent.parent
H100 = GPUTarget("cuda", 90, 32)

# Contractions -----------------------------------------------------------------------------------------------------


@triton.jit
def contracted_kernel(x, out, factor):
    """A test for infinity that does not survive: scaled - scaled becomes the rounding error of the product."""
    scaled = tl.load(x) * factor
    tl.store(out, tl.where(scaled - scaled == 0.0, scaled, 0.0))


def contractions(ptx: str) -> list[str]:
    """The lines fma(a, b, -(a * b)), up to signs: what was written as a difference of equal values, and is not 0.

    An error-free product that is written with `tl.fma` has the same form. There the product is used too, as the high
    part; here nothing else reads it but tests for a sign or size, so a kernel that has both must be looked at.
    """
    made: dict[str, tuple[str, list[str]]] = {}
    found = []
    for line in ptx.splitlines():
        match = re.match(r"\s*(?:@!?%p\d+\s+)?(\w[\w.]*)\s+(%\w+),\s*([^;]*);", line)
        if match is None:
            continue
        operation, register, operands = match[1], match[2], [x.strip() for x in match[3].split(",")]
        made[register] = operation, operands
        if operation.startswith("fma.rn.f") and len(operands) == 3:
            signs_and_names = [_unsigned(x, made) for x in operands]
            (a_sign, a), (b_sign, b), (c_sign, c) = signs_and_names
            product, factors = made.get(c, ("", []))
            if product.startswith("mul") and len(factors) == 2:
                (p_sign, p), (q_sign, q) = (_unsigned(x, made) for x in factors)
                if {p, q} == {a, b} and a_sign * b_sign != c_sign * p_sign * q_sign:
                    found.append(line.strip())
    return found


def _unsigned(name: str, made: dict[str, tuple[str, list[str]]]) -> tuple[int, str]:
    """-1 and x of a register that is -x."""
    operation, operands = made.get(name, ("", []))
    return (-1, operands[0]) if operation.startswith("neg") else (1, name)


def _ptx(source: ASTSource, **options: Any) -> str:
    return triton.compile(source, target=H100, options=options).asm["ptx"]


def contractions_of_kernels() -> dict[str, int]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import compiled
    import kernel_cases

    signature = {"x": "*fp32", "out": "*fp32", "factor": "fp32"}
    counts = {"contracted_kernel": len(contractions(_ptx(ASTSource(contracted_kernel, signature, {}))))}
    for case in kernel_cases.every_case("cuda:90"):
        # The element type changes a load; a wide offset no arithmetic of floating-point numbers.
        if case.dtype == "bf16" and "INT64=True" not in case.config:
            ptx = _ptx(compiled.source(case.launch), num_warps=case.launch.config.num_warps)
            counts[case.kernel] = counts.get(case.kernel, 0) + len(contractions(ptx))
    return counts


# Variants ---------------------------------------------------------------------------------------------------------


class _Driver:
    """Enough of a driver for triton to say what it would compile."""

    def get_current_target(self) -> GPUTarget:
        return H100

    def get_current_device(self) -> int:
        return 0


def _calls() -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """Calls of a public function whose settings change from call to call, and nothing that is part of a kernel."""
    import ngrpo_ops as ops

    v, d = 5120, 64
    logits, table = torch.zeros(16, v, dtype=torch.bfloat16), torch.zeros(v, d, dtype=torch.bfloat16)
    neighbors = torch.zeros(v, 2, dtype=torch.int64)

    def step(b: int = 4, **settings: Any) -> Callable[[], object]:
        usual = {"neighbor_ids": neighbors} if "strategy" not in settings else {}
        usual |= {"seed": 1, "step": 0, "backend": "triton"}
        return lambda: ops.decode_step(logits[:b], table, **usual | settings)

    # Of numbers that filter something. Whether there is a filter is compiled in.
    numbers = {"top_k": (1, 16, 50, 4095), "top_p": (0.5, 0.9), "min_p": (0.05, 0.1)}
    yield "filters", [step(top_k=k, top_p=0.9, min_p=0.1) for k in numbers["top_k"]]
    yield "filters", [step(top_k=5, top_p=p, min_p=m) for p in numbers["top_p"] for m in numbers["min_p"]]
    yield "batches", [step(b, top_p=0.9, temperature=torch.ones(b)) for b in (1, 2, 3, 16)]
    yield "rates", [step(mixing_rate=rate) for rate in (0, 0.1, 0.5, 0.75, 1.0)]
    yield "counters", [step(seed=seed, step=at) for seed in (0, 1, 16, 31) for at in (0, 1, 16, 31)]
    yield "temperatures", [step(temperature=t, mixing_temperature=m) for t in (0, 1, 0.7) for m in (1, 16, 0.5)]
    yield "entropies", [step(entropy_threshold=h) for h in (0, 1, 16, 0.5)]
    yield "noise", [step(strategy="gaussian", k=3, noise_scale=s) for s in (0, 1, 16, 0.5)]
    yield "beta", [step(strategy="moi", k=3, moi_beta=s) for s in (0, 1, 16, 0.5)]

    def mix(n: int, rows: int, padding: int | None) -> Callable[[], object]:
        def call() -> None:
            weights = torch.ones(n, 3, requires_grad=True)
            embedding = torch.zeros(rows, d, dtype=torch.bfloat16, requires_grad=True)
            ids = torch.zeros(n, 3, dtype=torch.int64)
            ops.mix_embeddings(embedding, ids, weights, padding_id=padding, backend="triton").sum().backward()

        return call

    sizes = [(n, rows) for n in (11, 16, 17, 64) for rows in (1, 16, 17)]
    yield "mix", [mix(n, rows, None) for n, rows in sizes]
    yield "padded mix", [mix(n, rows, padding) for n, rows in sizes for padding in (-1, 1, 16)]

    def log_softmax(batch: int, length: int) -> Callable[[], object]:
        def call() -> None:
            x = torch.zeros(batch, length, v, requires_grad=True)
            ops.selective_log_softmax(x, torch.zeros(batch, length).long(), backend="triton").sum().backward()

        return call

    yield "log-softmax", [log_softmax(n, t) for n in (1, 2, 16) for t in (1, 7, 16)]

    def advantages(groups: int, size: int) -> Callable[[], object]:
        def call() -> None:
            rewards = torch.zeros(groups * size, requires_grad=True)
            ops.group_advantages(rewards, group_size=size, backend="triton").sum().backward()

        return call

    yield "advantages", [advantages(n, size) for n in (1, 2, 16) for size in (1, 7, 16)]


def variants_of_kernels() -> dict[str, dict[str, int]]:
    """Of each group of calls and kernel, how often triton would compile."""
    from ngrpo_ops.ops import _library

    seen: dict[str, set[str]] = defaultdict(set)

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        *_, binder = kernel.device_caches[0]
        _, specialization, _ = binder(*args, **kwargs)
        seen[kernel.fn.__name__].add(str(specialization))

    driver.set_active(_Driver())
    JITFunction.run = run
    _library._unavailable = lambda tensor: None
    counts: dict[str, dict[str, int]] = {}
    for name, calls in _calls():
        seen.clear()
        for call in calls:
            call()
        found = {kernel: len(keys) for kernel, keys in sorted(seen.items())}
        counts[name] = {k: max(counts.get(name, {}).get(k, 0), n) for k, n in found.items()}
    return counts


if __name__ == "__main__":
    task = {"contractions": contractions_of_kernels, "variants": variants_of_kernels}[sys.argv[1]]
    print(json.dumps(task()))
