"""How long the operations should take on an H100 that nobody has measured them on: predictions, never measurements.

    python benchmarks/predictions.py            # writes benchmarks/results/predictions_h100.csv
    python benchmarks/predictions.py --check    # whether that file is what the table of resources gives

Of each operation at the shapes of `make bench` on a GPU:

    floor         the bytes that any implementation must move, at the bandwidth that a good kernel reaches
    instructions  the instructions that its kernels issue (resources.csv) and their matrix products, on the busiest
                  multiprocessor; one instruction a cycle and scheduler, with nothing else in the way
    prediction    the larger of the two, and the launches

A kernel whose loops depend on its data has no such figure. The same arithmetic is done for a plain matrix product and a
plain softmax, kernels of our own whose like others have published figures of. Where it is off by more than a factor of
`TRUSTED` for one of them, no times are written at all.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import compiled
import kernel_cases
import resources
import shapes
import torch
import triton
import triton.language as tl
from triton import cdiv

from ngrpo_ops.kernels import configs, nearest_neighbors, nearest_neighbors_few
from ngrpo_ops.kernels.primitives import Launch, recording

RESULTS = Path(__file__).parent / "results" / "predictions_h100.csv"
COLUMNS = ("op", "shape", "dtype", "launches", "floor_s", "instructions_s", "predicted_s", "published_s", "source")
TRUSTED = 2.0
TARGET = "cuda:90"

# Of an H100 SXM. NVIDIA's 989 TFLOP/s of dense bfloat16 are 132 multiprocessors of 4,096 a cycle at 1.83 GHz. 3.01 of
# 3.35 TB/s is what the softmax that `SOFTMAX` cites reaches. A launch in a CUDA graph takes some 2 us: an assumption.
MULTIPROCESSORS, CLOCK, FLOPS_A_CYCLE, SCHEDULERS = 132, 1.83e9, 4096, 4
BANDWIDTH = 3.01e12
LAUNCH = 2e-6


# The arithmetic ---------------------------------------------------------------------------------------------------


def busiest(launch: Launch, row: dict[str, Any], trips: float, flops: float = 0.0) -> float:
    """Seconds of the multiprocessor with the most programs.

    Args:
        launch: with its grid and configuration.
        row: instructions, and those in loops, of a warp's program.
        trips: how often the loops are gone through.
        flops: of the matrix products of a program.
    """
    programs = 1
    for size in launch.grid:
        programs *= size
    each = (row["instructions"] - row["loop"] + row["loop"] * trips) * launch.config.num_warps / SCHEDULERS
    return cdiv(programs, MULTIPROCESSORS) * (each + flops / FLOPS_A_CYCLE) / CLOCK


# How often the loops of a kernel are gone through, by its arguments. The main loop of a matrix product is its flops.
TRIPS: dict[str, Callable[[dict[str, Any]], float]] = {
    "mix_grad_weights_kernel": lambda a: cdiv(a["K"], a["BLOCK_C"]) * cdiv(a["d"], a["BLOCK_D"]),
    "selective_log_softmax_backward_kernel": lambda a: 1,  # of the few tiles that hold a chosen id
    "group_advantages_kernel": lambda a: cdiv(a["group_size"], a["BLOCK_R"]),
    "group_advantages_backward_kernel": lambda a: cdiv(a["group_size"], a["BLOCK_R"]),
    "decode_choice_kernel": lambda a: cdiv(a["d"], a["BLOCK_D"]),
    "append_pairs_symmetric_kernel": lambda a: 1,
    "score_few_kernel": lambda a: cdiv(a["d"], a["BLOCK_K"]),
}
FLOPS: dict[str, Callable[[dict[str, Any]], float]] = {
    "append_pairs_symmetric_kernel": lambda a: 2.0 * a["BLOCK_M"] * a["BLOCK_N"] * a["d"],
    "score_few_kernel": lambda a: 2.0 * a["BLOCK_N"] * a["BLOCK_Q"] * a["d"],
}


def of_table(launch: Launch, table: list[dict[str, Any]], dtype: str) -> dict[str, Any] | None:
    """The row of a launch; of one whose other constants are in no row, the longest of its tile and dtype."""
    name, config = launch.kernel.__name__, kernel_cases.describe(launch)
    own = [row for row in table if row["kernel"] == name and row["dtype"] == dtype and row["target"] == TARGET]
    exact = [row for row in own if row["config"] == config]
    tile = " ".join(config.split()[: len(launch.config.kwargs) + 2])
    alike = exact or [row for row in own if row["config"].startswith(tile + " ") and "INT64=False" in row["config"]]
    return max(alike, key=lambda row: row["instructions"], default=None)


def seconds_of(launch: Launch, table: list[dict[str, Any]], dtype: str) -> float | None:
    """None where the loops depend on the data, or the table has no such kernel."""
    row, name = of_table(launch, table, dtype), launch.kernel.__name__
    if row is None or (row["loop"] and name not in TRIPS):
        return None
    arguments = {**launch.arguments, **launch.config.kwargs}
    trips = TRIPS[name](arguments) if name in TRIPS else 0
    return busiest(launch, row, trips, FLOPS[name](arguments) if name in FLOPS else 0.0)


# The operations ---------------------------------------------------------------------------------------------------


class Operation(NamedTuple):
    """As a benchmark names it, what it must move, and what launches it on meta tensors."""

    op: str
    shape: str
    dtype: torch.dtype
    moved: int
    run: Callable[[], Any]


def operations() -> Iterator[Operation]:
    v, d = shapes.QWEN2_5_1_5B
    bf16, fp32, k = torch.bfloat16, torch.float32, 3
    step = partial(kernel_cases.step, bf16, v, k, "neighbor", numbers=True)
    for b in shapes.BATCHES:
        yield Operation("decode_step", f"B={b} V={v}", bf16, 2 * b * v, partial(step, b=b))
    yield Operation("decode_step top-k 50, top-p 0.95", f"B=64 V={v}", bf16, 2 * 64 * v, partial(step, cut=True))
    n = shapes.POSITIONS["cuda"][0]
    for dtype in (fp32, bf16):
        moved, shape = shapes.mix_bytes(n, k, d, dtype.itemsize), f"N={n} k={k} V={v} d={d}"
        yield Operation("mix_embeddings", shape, dtype, moved, partial(kernel_cases.mix, dtype, d, k, n))
        moved, run = shapes.mix_backward_bytes(n, k, v, d, dtype.itemsize), partial(kernel_cases.mix_backward, dtype, d)
        yield Operation("mix_embeddings backward", shape, dtype, moved, partial(run, k, n))
    rows = shapes.LOGITS_ROWS["cuda"]
    for backward in (False, True):
        op = "selective_log_softmax" + (" forward and backward" if backward else "")
        for dtype in (fp32, bf16):
            run = partial(kernel_cases.log_softmax, dtype, v, 1, False, backward=backward)
            moved = rows * v * dtype.itemsize * (3 if backward else 1)
            yield Operation(op, f"N={rows} V={v}", dtype, moved, run)
    n, usual = shapes.REWARDS, (8, False, "mean", "std", "zero", torch.bool)
    run = partial(kernel_cases.advantages, fp32, *usual, groups=n // 8, backward=False)
    yield Operation("group_advantages", f"N={n} groups of 8", fp32, 8 * n, run)
    yield Operation(_ALL_PAIRS, f"V={v} d={d}", bf16, 2 * v * d, partial(_pass, v, d))
    for dtype in (fp32, bf16):
        moved, run = v * d * dtype.itemsize + 4 * 64 * v, partial(_few, dtype, v, d)
        yield Operation("nearest_neighbors, bounds of 64 queries", f"V={v} d={d}", dtype, moved, run)


_ALL_PAIRS = "nearest_neighbors, one pass over the pairs"


def _few(dtype: torch.dtype, v: int, d: int) -> None:
    w = cdiv(d + 2, nearest_neighbors.STEP) * nearest_neighbors.STEP
    x = torch.empty(64, w, dtype=torch.bfloat16, device="meta")
    values = torch.empty(64, dtype=torch.float32, device="meta")
    table = torch.empty(v, d, dtype=dtype, device="meta")
    nearest_neighbors_few.score_few(x, values, values, table, "cosine", rounding=1e-4, underflow=1e-36)


def _pass(v: int, d: int) -> None:
    """Every pair once, against thresholds that next to none reaches."""
    w = cdiv(d + 8, nearest_neighbors.STEP) * nearest_neighbors.STEP
    table = torch.empty(v, w, dtype=torch.bfloat16, device="meta")
    limits = torch.empty(v, dtype=torch.float32, device="meta")
    pairs = nearest_neighbors.no_pairs(v, 88, table.device)
    nearest_neighbors.append_pairs_symmetric(
        table, table, "cosine", limits, limits, None, None, pairs, diagonal=True
    )  # fmt: skip


def predict(operation: Operation, table: list[dict[str, Any]]) -> dict[str, Any]:
    with configs.for_architecture(TARGET), recording() as launches:
        operation.run()
    dtype = compiled.NAMES[operation.dtype]
    seconds = [seconds_of(launch, table, dtype) for launch in launches]
    floor = operation.moved / BANDWIDTH
    row: dict[str, Any] = {
        "op": operation.op, "shape": operation.shape, "dtype": str(operation.dtype).removeprefix("torch."),
        "launches": len(launches), "floor_s": floor,
    }  # fmt: skip
    if None not in seconds:
        issued = sum(seconds)  # type: ignore[arg-type]
        if operation.op == _ALL_PAIRS:
            issued /= 2  # programs below the diagonal return at once
        row |= {"instructions_s": issued, "predicted_s": max(floor, issued) + LAUNCH * len(launches)}
    return row


# Calibration ------------------------------------------------------------------------------------------------------


@triton.jit
def plain_matmul_kernel(
    a, b, c, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    tile = tl.program_id(0)
    rows = (tile % 8 + tile // (8 * (n // BLOCK_N)) * 8) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile % (8 * (n // BLOCK_N)) // 8 * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    a_at, b_at = a + rows[:, None] * k + inner[None, :], b + inner[:, None] * n + columns[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, k, BLOCK_K):
        total = tl.dot(tl.load(a_at), tl.load(b_at), total)
        a_at += BLOCK_K
        b_at += BLOCK_K * n
    tl.store(c + rows[:, None] * n + columns[None, :], total.to(tl.float16))


@triton.jit
def plain_softmax_kernel(x, out, n, BLOCK: tl.constexpr):
    """Two passes: a running maximum and sum, then the result."""
    row = tl.program_id(0).to(tl.int64) * n
    i = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, n, BLOCK):
        value = tl.load(x + row + start + i)
        higher = tl.maximum(top, value)
        total = total * tl.exp(top - higher) + tl.exp(value - higher)
        top = higher
    whole = tl.max(top, axis=0)
    sum_of_all = tl.sum(total * tl.exp(top - whole), axis=0)
    for start in range(0, n, BLOCK):
        value = tl.load(x + row + start + i)
        tl.store(out + row + start + i, tl.exp(value - whole) / sum_of_all)


MATMUL = "fp16 on an H100, triton's tutorial 03: 524.7 TFLOP/s, github.com/triton-lang/triton/issues/3672"
SOFTMAX = (
    "fp32 on an H100, torch.compile's two loads and a store: 2.0 TB/s of one load and a store, "
    "github.com/Dao-AILab/quack media/2025-07-10-membound-sol.md"
)


def _matmul(n: int) -> tuple[Launch, float, float]:
    x = torch.empty(n, n, dtype=torch.float16, device="meta")
    config = triton.Config({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}, num_warps=8, num_stages=3)
    arguments = {"a": x, "b": x, "c": x, "n": n, "k": n}
    launch = Launch(plain_matmul_kernel, arguments, config, (cdiv(n, 128) * cdiv(n, 256),))
    return launch, 1.0, 2.0 * 128 * 256 * n


def _softmax(rows: int, n: int) -> tuple[Launch, float, float]:
    x = torch.empty(rows, n, dtype=torch.float32, device="meta")
    config = triton.Config({"BLOCK": 4096}, num_warps=16, num_stages=2)
    return Launch(plain_softmax_kernel, {"x": x, "out": x, "n": n}, config, (rows,)), n / 4096, 0.0


def calibrate() -> list[dict[str, Any]]:
    """The arithmetic for kernels whose like have been measured and published."""
    found = []
    for op, shape, (launch, trips, flops), moved, published, source in (
        ("plain matrix product", "3072 x 3072 x 3072", _matmul(3072), 3 * 2 * 3072**2, 2 * 3072**3 / 524.7e12, MATMUL),
        ("plain softmax", "16384 x 131072", _softmax(16_384, 131_072), 3 * 4 * 2**31, 2 * 4 * 2**31 / 2.0e12, SOFTMAX),
    ):
        row, code = compiled.compile_launch(launch, TARGET)
        row |= next(compiled.instructions([code], TARGET))
        issued, floor = busiest(launch, row, trips, flops), moved / BANDWIDTH
        found.append({
            "op": op, "shape": shape, "dtype": source.split()[0], "launches": 1, "floor_s": floor,
            "instructions_s": issued, "predicted_s": max(floor, issued) + LAUNCH, "published_s": published,
            "source": source,
        })  # fmt: skip
    return found


def trusted(calibration: list[dict[str, Any]]) -> bool:
    ratios = [row["predicted_s"] / row["published_s"] for row in calibration]
    return all(1 / TRUSTED <= ratio <= TRUSTED for ratio in ratios)


def rows() -> list[dict[str, Any]]:
    calibration, table = calibrate(), resources.read_table()
    found = [predict(operation, table) for operation in operations()]
    if not trusted(calibration):
        for row in found:
            row.pop("predicted_s", None)
    return [*calibration, *found]


def _text(found: list[dict[str, Any]]) -> str:
    file = io.StringIO()
    table = csv.DictWriter(file, COLUMNS)
    table.writeheader()
    for row in found:
        table.writerow({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()})
    return file.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file, and write nothing")
    text = _text(rows()).encode()
    if parser.parse_args().check:
        same = RESULTS.exists() and RESULTS.read_bytes() == text
        print(end="" if same else "the predictions are not of this table: python benchmarks/predictions.py\n")
        return not same
    RESULTS.write_bytes(text)
    print(text.decode().replace("\r", ""), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
