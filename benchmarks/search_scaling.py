"""How the time of a search grows with the vocabulary and with the width of its rows: ours, its peers and the floor.

Over V and d the rows are random. Beside them stands the table of a real model, SmolLM2-135M-Instruct or what
`NGRPO_OPS_TABLE` names, and random rows of its shape.

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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import COMMIT, DEVICES, environment, keep_freed_memory
from matplotlib.figure import Figure
from peers import faiss_index, tiled_matmul_topk
from shapes import QUERIES
from tables import ModelUnavailableError, real_tables, scored_pairs
from torch import Tensor

from ngrpo_ops import nearest_neighbors

K = 2
VOCABULARIES, WIDTH = (8_192, 16_384, 32_768, 65_536, 151_936), 896
WIDTHS, VOCABULARY = (128, 256, 512, 896, 1536, 3072), 65_536
ROUNDS, ENOUGH = 5, 6.0  # runs, and the seconds after which fewer will do
RANDOM = "random"  # rows
FLOOR = "floor: the matrix product alone"
STYLES = {
    "ours": ("C0", "o-"),
    "tiled matmul + topk": ("C1", "s--"),
    "faiss IndexFlatIP": ("C2", "^--"),
    FLOOR: ("k", ":"),
}


def best_time(run: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest of some runs after a first one: of two at least, where they take long."""
    times: list[float] = []
    while len(times) < 3 or (len(times) <= ROUNDS and sum(times) < ENOUGH):
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


def random_rows(v: int, d: int) -> Tensor:
    return torch.randn(v, d, generator=torch.Generator().manual_seed(0))


def measure(embedding: Tensor, device: str) -> tuple[dict[str, float], float]:
    """Seconds of each, and the pairs that ours scores one by one, a query."""
    v, d = embedding.shape
    embedding = embedding.to(device)
    queries = torch.randperm(v, generator=torch.Generator().manual_seed(0))[:QUERIES].to(device)
    search = partial(nearest_neighbors, embedding, K, queries=queries)
    times = {
        "ours": best_time(search, device),
        "tiled matmul + topk": best_time(lambda: tiled_matmul_topk(embedding, queries, K), device),
    }
    if device == "cpu" and importlib.util.find_spec("faiss"):
        times["faiss IndexFlatIP"] = best_time(faiss_index(embedding, queries, K), device)
    return {**times, FLOOR: floor(v, d, device)}, scored_pairs(search) / QUERIES


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    random = [r for r in rows if (r.get("rows") or RANDOM) == RANDOM]
    panels = (("V", [r for r in random if r["d"] == WIDTH], "rows of the vocabulary V", f"d = {WIDTH}"),)
    panels += (("d", [r for r in random if r["V"] == VOCABULARY], "width of the rows d", f"V = {VOCABULARY:,}"),)
    *curves, bars = figure.subplots(1, 3)
    for axes, (name, part, label, fixed) in zip(curves, panels, strict=True):
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
    _draw_real(bars, rows)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _draw_real(axes: Any, rows: list[dict[str, Any]]) -> None:
    """The real table beside random rows of its shape."""
    real = [r for r in rows if (r.get("rows") or RANDOM) != RANDOM]
    if not real:
        axes.set_axis_off()
        return
    v, d, name = real[0]["V"], real[0]["d"], real[0]["rows"]
    of = {RANDOM: [r for r in rows if (r["V"], r["d"], r.get("rows") or RANDOM) == (v, d, RANDOM)], name: real}
    for i, (who, (color, _)) in enumerate(STYLES.items()):
        seconds = [next((r["seconds"] for r in part if r["who"] == who), 0.0) for part in of.values()]
        axes.bar([x + 0.2 * (i - 1.5) for x in range(len(of))], seconds, 0.2, color=color, label=who)
    scored = [next((r.get("scored_pairs") for r in part if r["who"] == "ours"), None) for part in of.values()]
    labels = [f"{x}\n{float(n):.1f} pairs scored a query" if n else x for x, n in zip(of, scored, strict=True)]
    axes.set_xticks(range(len(of)), labels, fontsize=8)
    axes.set_ylabel("seconds")
    axes.set_title(f"{QUERIES:,} queries, k = {K}, V = {v:,}, d = {d}, float32", fontsize=9)
    axes.grid(alpha=0.3, axis="y")


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=DEVICES[-1], choices=DEVICES)
    device = parser.parse_args().device
    folder = Path(os.environ.get("NGRPO_OPS_RESULTS") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    shapes = sorted({*((v, WIDTH) for v in VOCABULARIES), *((VOCABULARY, d) for d in WIDTHS)})
    tables: list[tuple[str, Callable[[], Tensor]]] = [(RANDOM, partial(random_rows, *shape)) for shape in shapes]
    try:
        name, real, _ = real_tables()
    except ModelUnavailableError as error:
        print(f"without a real table: {error}", flush=True)
    else:
        tables += [(RANDOM, partial(random_rows, *real.shape)), (name, lambda: real)]
    rows: list[dict[str, Any]] = []
    for i, (of, make) in enumerate(tables, start=1):
        embedding = make()
        (v, d), (times, scored) = embedding.shape, measure(embedding, device)
        for who, seconds in times.items():
            row = {"device": device, "rows": of, "V": v, "d": d, "who": who, "seconds": seconds}
            rows.append({**row, "scored_pairs": scored if who == "ours" else "", "commit": COMMIT})
        shown = ", ".join(f"{who} {t:.3f} s" for who, t in times.items())
        print(f"{i}/{len(tables)}  {of} rows, V = {v}, d = {d}: {shown}; {scored:.1f} pairs scored a query", flush=True)
    with (folder / f"search_scaling_{device}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    draw(rows, folder / f"search_scaling_{device}.png", environment(device))


if __name__ == "__main__":
    main()
