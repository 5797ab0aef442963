"""How the time of a search grows with the vocabulary and with the width of its rows: ours, its peers and the floor.

`make scaling` writes search_scaling_DEVICE.csv and .png to benchmarks/results, or to NGRPO_OPS_RESULTS. The floor is
the matrix product of the scores alone, in the fastest precision that is exact after re-scoring here: bfloat16 where the
processor multiplies it, else float32.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import DEVICES, environment, keep_freed_memory
from matplotlib.figure import Figure
from peers import faiss_index, tiled_matmul_topk
from shapes import QUERIES

from ngrpo_ops import nearest_neighbors

K = 2
VOCABULARIES, WIDTH = (8_192, 16_384, 32_768, 65_536, 151_936), 896
WIDTHS, VOCABULARY = (128, 256, 512, 896, 1536, 3072), 65_536
ROUNDS = 5
FLOOR = "floor: the matrix product alone"
STYLES = {
    "ours": ("C0", "o-"),
    "tiled matmul + topk": ("C1", "s--"),
    "faiss IndexFlatIP": ("C2", "^--"),
    FLOOR: ("k", ":"),
}


def best_time(run: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest of some runs after a first one."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def floor(v: int, d: int, device: str) -> float:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        queries, rows = (torch.randn(n, d, device=device).to(dtype) for n in (QUERIES, 8192))
        out = torch.empty(QUERIES, 8192, dtype=dtype, device=device)
        found.append(best_time(lambda q=queries, r=rows, o=out: torch.mm(q, r.T, out=o), device))
    return min(found) * v / 8192


def measure(v: int, d: int, device: str) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(v, d, generator=generator).to(device)
    queries = torch.randperm(v, generator=generator)[:QUERIES].to(device)
    times = {
        "ours": best_time(lambda: nearest_neighbors(embedding, K, queries=queries), device),
        "tiled matmul + topk": best_time(lambda: tiled_matmul_topk(embedding, queries, K), device),
    }
    if device == "cpu" and importlib.util.find_spec("faiss"):
        times["faiss IndexFlatIP"] = best_time(faiss_index(embedding, queries, K), device)
    return {**times, FLOOR: floor(v, d, device)}


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = (("V", [r for r in rows if r["d"] == WIDTH], "rows of the vocabulary V", f"d = {WIDTH}"),)
    panels += (("d", [r for r in rows if r["V"] == VOCABULARY], "width of the rows d", f"V = {VOCABULARY:,}"),)
    for axes, (name, part, label, fixed) in zip(figure.subplots(1, 2), panels, strict=True):
        for who, (color, style) in STYLES.items():
            points = sorted((r[name], r["seconds"]) for r in part if r["who"] == who)
            if points:
                axes.loglog(*zip(*points, strict=True), style, color=color, label=who, markersize=4)
        at = sorted({r[name] for r in part})
        axes.set_xticks(at, [f"{x:,}" for x in at], rotation=30, fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.set_ylabel("seconds")
        axes.set_title(f"{QUERIES:,} queries, k = {K}, {fixed}, float32", fontsize=9)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=DEVICES[-1], choices=DEVICES)
    device = parser.parse_args().device
    folder = Path(os.environ.get("NGRPO_OPS_RESULTS") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    shapes = sorted({*((v, WIDTH) for v in VOCABULARIES), *((VOCABULARY, d) for d in WIDTHS)})
    rows = []
    for i, (v, d) in enumerate(shapes, start=1):
        times = measure(v, d, device)
        rows += [{"device": device, "V": v, "d": d, "who": who, "seconds": t} for who, t in times.items()]
        shown = ", ".join(f"{who} {t:.3f} s" for who, t in times.items())
        print(f"{i}/{len(shapes)}  V = {v}, d = {d}: {shown}", flush=True)
    with (folder / f"search_scaling_{device}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    draw(rows, folder / f"search_scaling_{device}.png", environment(device))


if __name__ == "__main__":
    main()
