"""Compiles every kernel, configuration and dtype for GPUs that need not be here, and tables what each takes.

    python benchmarks/resources.py            # the table, kept as benchmarks/results/resources.csv

The launchers are run on meta tensors at the shapes of real models with their launches recorded, so that what is
compiled is what a GPU would compile. A compiler assertion kills its process: one process a kernel and target.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ngrpo_ops.kernels import (
    configs,
    decode_step,
    gaussian_noise,
    group_advantages,
    mix_embeddings,
    nearest_neighbors,
    nearest_neighbors_rows,
    selective_log_softmax,
)
from ngrpo_ops.kernels.primitives import Launch, forced_int64, recording
from ngrpo_ops.ops.decode_step.settings import Settings
from ngrpo_ops.ops.group_advantages.reference import GroupSettings
from ngrpo_ops.strategies import get_strategy

RESULTS = Path(__file__).parent / "results" / "resources.csv"
COLUMNS = ("kernel", "target", "config", "dtype", "registers", "stack", "spills", "shared", "wgmma")
TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
    "cuda:89": GPUTarget("cuda", 89, 32),  # of workstations: must fit, and may spill a few bytes
}
SHARED_LIMIT = {
    "cuda:80": 166_912,
    "cuda:90": 232_448,
    "cuda:100": 232_448,
    "hip:gfx942": 65_536,
    "cuda:89": 101_376,
}
ALLOWED = {"cuda:89": 16}  # bytes of stack and spills
# Kernels with a matrix product, which must use the tensor cores' own instruction.
MULTIPLIES = {
    "append_pairs_kernel",
    "append_pairs_symmetric_kernel",
}

# Of those, the kernels whose tiles are small enough for tcgen05, which takes 8 warps at most.
MULTIPLIES_ON_BLACKWELL = {"append_pairs_kernel", "append_pairs_symmetric_kernel"}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_NAMES |= {torch.int64: "i64", torch.int32: "i32", torch.bool: "i1", torch.uint8: "u8"}


# The launches -----------------------------------------------------------------------------------------------------


def _meta(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _mix(dtype: torch.dtype, d: int, k: int) -> None:
    n, v = 16_384, 151_936
    table, ids, weights = _meta(v, d, dtype=dtype), _meta(n, k), _meta(n, k, dtype=torch.float32)
    grad = _meta(n, d, dtype=dtype)
    mix_embeddings.forward(table, ids, weights, None)
    mix_embeddings.grad_weights(grad, table, ids, weights, None)
    for deterministic in (True, False):
        mix_embeddings.grad_embedding(grad, table, ids, weights, None, deterministic)


def _selective_log_softmax(dtype: torch.dtype, v: int, k: int, entropy: bool) -> None:
    b, t = 8, 1024
    logits, ids = _meta(b, t, v, dtype=dtype), _meta(b * t, k)
    grad, *rest = selective_log_softmax.forward(logits, ids, 0.7, entropy)
    selective_log_softmax.backward(grad, rest[0], logits, ids, *rest, 0.7, False)


def _group_advantages(
    dtype: torch.dtype,
    group_size: int,
    ragged: bool,
    baseline: str,
    scale: str,
    singleton_groups: str,
    weights_dtype: torch.dtype,
) -> None:
    n = 64 * group_size
    rewards, weights = _meta(n, 1, dtype=dtype), _meta(n, dtype=weights_dtype) if ragged else None
    order, offsets = (_meta(n), _meta(65)) if ragged else (None, None)
    settings = GroupSettings(
        weights, order, offsets, group_size, baseline, scale, ddof=1, eps=1e-4, singleton_groups=singleton_groups,
        omit_nan=ragged,
    )  # fmt: skip
    out, scales = group_advantages.forward(rewards, settings)
    group_advantages.backward(out, scales, rewards, settings)


DECODE_STEPS: tuple[tuple[int, int, str, dict[str, Any]], ...] = (
    (151_936, 3, "neighbor", {"alone": True}),
    (8192, 3, "neighbor", {"cut": True, "entropy": 1.0}),
    (262_144, 32, "neighbor", {"cut": True, "variant": "released"}),
    (151_936, 1, "anchor", {}),
    (151_936, 3, "topk", {"tau": 0.5}),
    (151_936, 4, "gumbel", {"tau": 0.5, "cut": True, "alone": True}),
    (262_144, 32, "gumbel", {}),
    (151_936, 3, "gaussian", {}),
    (151_936, 3, "moi", {"cut": True, "alone": True}),
    (262_144, 8, "multiplex", {"alone": True}),
)


def _decode_step(dtype: torch.dtype, v: int, k: int, strategy: str, **other: Any) -> None:
    b, d = 64, 1536
    entry = get_strategy(strategy)
    rows = {name: _meta(b, dtype=torch.float32) for name in ("temperature", "top_p", "min_p")}
    filters: dict[str, Any] = dict.fromkeys(("top_k", "top_p", "min_p"))
    if other.get("cut"):
        filters |= {"top_k": _meta(b), "top_p": rows["top_p"], "min_p": rows["min_p"]}
    settings = Settings(
        neighbor_ids=_meta(v, k - 1) if entry.reads_neighbors else None, k=k, strategy=strategy,
        options=entry.option_values({}), variant=other.get("variant", "paper"), temperature=rows["temperature"],
        mixing_temperature=other.get("tau"), **filters, seed=_meta(), step=_meta(), row_ids=_meta(b), mixing_rate=0.1,
        entropy_threshold=other.get("entropy"), enabled=_meta(b, dtype=torch.bool),
    )  # fmt: skip
    logits = _meta(b, v, dtype=dtype)
    if other.get("alone"):
        unread = {} if entry.reads_filters else dict.fromkeys(filters)
        decode_step.mixing_candidates(logits, settings._replace(**unread), return_entropy=True)
    decode_step.decode_step(logits, _meta(v, d, dtype=dtype), settings)
    if strategy == "gaussian":
        n = _meta(4096)
        gaussian_noise.gaussian_noise(_meta(4096, d, dtype=dtype), n.float(), n, n, n)


def _append_pairs(dtype: torch.dtype, q: int) -> None:
    metric, width = ("l1", 896) if dtype == torch.float32 else ("cosine", 960)
    x, y = (_meta(n, width, dtype=dtype) for n in (q, 16_384))
    pairs = nearest_neighbors.no_pairs(151_936, 88, x.device)
    x_limits, y_limits, ids = _meta(q, dtype=torch.float32), _meta(16_384, dtype=torch.float32), _meta(16_384)
    excluded = _meta(q, dtype=torch.int32)
    nearest_neighbors.append_pairs(x, y, metric, x_limits, excluded, pairs, x_ids=_meta(q), y_ids=ids)
    if q > 64:
        allowed = _meta(q, dtype=torch.bool)
        for diagonal in (False, True) if metric != "l1" else (False,):
            nearest_neighbors.append_pairs_symmetric(
                x, y, metric, x_limits, y_limits, allowed, allowed, pairs, x_ids=ids, y_ids=ids, diagonal=diagonal
            )


def _keep_best(places: int, metric: str) -> None:
    pairs = nearest_neighbors.no_pairs(49_152, places, torch.device("meta"))
    values, is_far = _meta(49_152, dtype=torch.float32), _meta(49_152, dtype=torch.bool)
    kept = places // 3
    nearest_neighbors.keep_best(
        pairs, metric, values, values, is_far, *[values] * 4, k=kept // 5 + 1, kept=kept, rounding=1e-4, underflow=1e-36
    )


def _pair_scores(dtype: torch.dtype, d: int, metric: str) -> None:
    table, ids = _meta(151_936, d, dtype=dtype), _meta(300_000)
    scales = _meta(151_936, dtype=torch.float32) if metric == "cosine" else None
    nearest_neighbors.pair_scores(table, scales, ids, table, scales, ids, metric)


def _rows(dtype: torch.dtype, d: int, metric: str) -> None:
    table = _meta(151_936, d, dtype=dtype)
    norms, inverse_norms, roundoffs, _ = nearest_neighbors_rows.row_statistics(table, metric)
    scales = inverse_norms if metric == "cosine" else None
    nearest_neighbors_rows.row_movements(table.float(), scales, table, scales, metric)
    if metric == "l1":
        return
    rows = _meta(16_384) if d == 896 else slice(0, 16_384)
    for queries in (True, False):
        nearest_neighbors_rows.prepare_rows(
            table, rows, norms, inverse_norms, roundoffs, metric, queries=queries, rounding=1e-4, underflow=1e-36
        )


def _every_case() -> Iterator[tuple[torch.dtype, Callable[[], None]]]:
    for dtype in DTYPES:
        for d, k in ((128, 3), (896, 3), (1536, 3), (1536, 32)):
            yield dtype, lambda dtype=dtype, d=d, k=k: _mix(dtype, d, k)
        for v in (4096, 151_936):
            for k, entropy in ((1, False), (3, True)):
                yield dtype, lambda dtype=dtype, v=v, k=k, e=entropy: _selective_log_softmax(dtype, v, k, e)
        for case in (
            (8, False, "mean", "std", "zero", torch.bool),
            (8, True, "leave_one_out", "none", "nan", torch.bool),
            (8, True, "mean", "std", "keep", torch.int64),
            (64, False, "none", "mean", "zero", torch.bool),
            (4096, False, "mean", "std", "zero", torch.bool),
        ):
            yield dtype, lambda dtype=dtype, case=case: _group_advantages(dtype, *case)
        every = dtype == torch.bfloat16  # the logits' dtype changes a load and no more
        for v, k, strategy, other in DECODE_STEPS if every else DECODE_STEPS[:2]:
            yield dtype, lambda dtype=dtype, v=v, k=k, s=strategy, o=other: _decode_step(dtype, v, k, s, **o)
        for metric in ("cosine", "dot", "l2", "l1"):
            yield dtype, lambda dtype=dtype, m=metric: _pair_scores(dtype, 896, m)
        for d, metric in ((128, "cosine"), (896, "cosine"), (896, "dot"), (896, "l2"), (896, "l1")):
            if every or (d, metric) == (896, "cosine"):
                yield dtype, lambda dtype=dtype, d=d, m=metric: _rows(dtype, d, m)
    for q in (16, 16_384):
        for dtype in (torch.bfloat16, torch.float32):
            yield dtype, lambda dtype=dtype, q=q: _append_pairs(dtype, q)
    for places, metric in ((88, "cosine"), (88, "l1"), (341, "l2"), (1264, "cosine")):
        yield torch.float32, lambda places=places, metric=metric: _keep_best(places, metric)


class Case(NamedTuple):
    """A launch, and what its row of the table says of it."""

    launch: Launch
    config: str
    dtype: str

    @property
    def kernel(self) -> str:
        return self.launch.kernel.__name__


def _describe(launch: Launch) -> str:
    parts = [f"{name}={value}" for name, value in launch.config.kwargs.items()]
    parts += [f"warps={launch.config.num_warps}", f"stages={launch.config.num_stages}"]
    parts += [f"{name}={value}" for name, value in _constants(launch).items() if name not in launch.config.kwargs]
    return " ".join(parts)


@functools.cache  # and so never run in two threads: recording is global
def every_case() -> tuple[Case, ...]:
    """Each kernel once for each configuration, set of constants and dtype, in a fixed order."""
    cases: dict[tuple[str, str, str], Case] = {}
    for dtype, run in _every_case():
        for wide in (False, True):
            with recording() as launches:
                if wide:
                    with forced_int64():
                        run()
                else:
                    run()
            for launch in launches:
                case = Case(launch, _describe(launch), _NAMES[dtype])
                cases.setdefault((case.kernel, case.config, case.dtype), case)
    return tuple(cases.values())


def uncompiled_configs(cases: tuple[Case, ...]) -> set[str]:
    """Pinned configurations that no case launches: empty, or a kernel goes untested."""
    seen = {(case.kernel, str(case.launch.config)) for case in cases}
    return {
        f"{kernel}: {config}"
        for kernel, pinned in configs.PINNED.items()
        for _, config in pinned
        if (kernel, str(config)) not in seen
    }


# Compiling --------------------------------------------------------------------------------------------------------


def _constants(launch: Launch) -> dict[str, Any]:
    every = {**launch.arguments, **launch.config.kwargs}
    annotations = launch.kernel.fn.__annotations__
    return {name: every[name] for name in launch.kernel.arg_names if "constexpr" in str(annotations.get(name))}


def _source(launch: Launch) -> ASTSource:
    """What triton's own launch would specialise on: element types, 16-byte alignment, integers that are 1."""
    every = {**launch.arguments, **launch.config.kwargs}
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = every[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and specialise):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _NAMES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and specialise:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(launch.kernel, signature, constants, attributes)


def _compile(case: Case, target: str) -> dict[str, Any]:
    config = case.launch.config
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if target.startswith("hip"):
        options["num_stages"] = min(config.num_stages, configs.HIP_STAGES)
    elif config.maxnreg is not None:
        options["maxnreg"] = config.maxnreg
    compiled = triton.compile(_source(case.launch), target=TARGETS[target], options=options)
    row: dict[str, Any] = {"kernel": case.kernel, "target": target, "config": case.config, "dtype": case.dtype}
    if target.startswith("cuda"):
        used = _ptxas(compiled.asm["ptx"], target)
        row |= {
            **used,
            "shared": compiled.metadata.shared,
            "wgmma": any(name in compiled.asm["ptx"] for name in ("wgmma", "tcgen05")),
        }
    else:
        text = compiled.asm["amdgcn"]

        def count(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]

        row |= {
            "registers": count("vgpr_count"),
            "stack": count("private_segment_fixed_size"),
            "spills": count("vgpr_spill_count") + count("sgpr_spill_count"),
            "shared": compiled.metadata.shared,
            "wgmma": "mfma" in text,
        }
    return row


def _ptxas(ptx: str, target: str) -> dict[str, int]:
    knobs = triton.knobs.nvidia
    assembler = knobs.ptxas_blackwell if target == "cuda:100" else knobs.ptxas
    arch = re.search(r"\.target (sm_\w+)", ptx)[1]  # type: ignore[index]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [assembler.path, "-v", f"--gpu-name={arch}", str(source), "-o", str(source.with_suffix(".cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def count(pattern: str) -> int:
        return sum(int(x) for x in re.findall(pattern, report))

    return {
        "registers": count(r"Used (\d+) registers"),
        "stack": count(r"(\d+) bytes stack frame"),
        "spills": count(r"(\d+) bytes spill (?:stores|loads)"),
    }


def _in_process(kernel: str, target: str, only: str | None = None) -> list[dict[str, Any]]:
    """Compiles a kernel's cases for a target in a process of its own; a crash is pinned on one case by trying each."""
    command = [sys.executable, __file__, "--kernel", kernel, "--target", target]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    cases = [i for i, case in enumerate(every_case()) if case.kernel == kernel]
    if only is not None:
        command += ["--case", only]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return [json.loads(line) for line in done.stdout.splitlines()]
    if only is None and len(cases) > 1:
        return [row for i in cases for row in _in_process(kernel, target, str(i))]
    case = every_case()[int(only) if only is not None else cases[0]]
    lines = [line for line in done.stderr.splitlines() if re.search(r"\w", line)]
    error = next((line for line in reversed(lines) if "rror" in line), f"exit {done.returncode}")
    return [{"kernel": kernel, "target": target, "config": case.config, "dtype": case.dtype, "error": error}]


def compile_all(
    targets: tuple[str, ...] = tuple(TARGETS), jobs: int | None = None, only: Container[str] = tuple(configs.PINNED)
) -> list[dict[str, Any]]:
    """A row a case and target, in a fixed order; a row that did not compile has `error` in the place of figures.

    Args:
        only: the kernels that are wanted.
    """
    kernels = [kernel for kernel in dict.fromkeys(case.kernel for case in every_case()) if kernel in only]
    pairs = [(kernel, target) for kernel in kernels for target in targets]
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        for (kernel, target), found in zip(pairs, pool.map(lambda pair: _in_process(*pair), pairs), strict=True):
            print(f"{kernel} for {target}: {len(found)} compiled", file=sys.stderr, flush=True)
            rows += found
    return rows


def faults(row: dict[str, Any]) -> list[str]:
    """Why a row would not pass: it did not compile, spills, overflows shared memory, multiplies on slower units."""
    if "error" in row:
        return [row["error"]]
    found = [f"{name} {row[name]}" for name in ("stack", "spills") if row[name] > ALLOWED.get(row["target"], 0)]
    if row["shared"] > SHARED_LIMIT[row["target"]]:
        found.append(f"shared {row['shared']} above {SHARED_LIMIT[row['target']]}")
    # wgmma multiplies 64 rows at least: tiles of fewer queries, which wait for memory, cannot use it; l1 has none.
    without = any(constant in row.get("config", "") for constant in ("BLOCK_M=16", "L1=True"))
    needed = {"cuda:90": MULTIPLIES, "cuda:100": MULTIPLIES_ON_BLACKWELL}.get(row["target"], ())
    if row["kernel"] in needed and not row["wgmma"] and not without:
        found.append("no wgmma" if row["target"] == "cuda:90" else "no tcgen05")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", help=argparse.SUPPRESS)
    parser.add_argument("--target", choices=TARGETS, help="compile for one target only, and keep no table")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kernel:
        for index, case in enumerate(every_case()):
            if case.kernel == arguments.kernel and arguments.case in (None, index):
                print(json.dumps(_compile(case, arguments.target)), flush=True)
        return 0
    rows = compile_all((arguments.target,) if arguments.target else tuple(TARGETS))
    widths = {name: max(len(name), *(len(str(row.get(name, ""))) for row in rows)) for name in COLUMNS}
    for row in [{name: name for name in COLUMNS}, *rows]:
        line = "  ".join(str(row.get(name, "-")).ljust(widths[name]) for name in COLUMNS)
        wrong = faults(row) if row["kernel"] != "kernel" else []
        print(line.rstrip() + (f"  <- {', '.join(wrong)}" if wrong else ""))
    if not arguments.target:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            table.writeheader()
            table.writerows(rows)
    wrong = [row for row in rows if faults(row)] or uncompiled_configs(every_case())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
