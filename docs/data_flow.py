"""The picture of docs/how_it_works.md. `python docs/figures.py` draws it with all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

# Okabe and Ito's colors: what GRPO has too, what is ours, what travels between the two halves.
PLAIN, OURS, RECORD = "#E8EEF4", "#FBE3D0", "#D8F0E6"
EDGES = {PLAIN: "#0072B2", OURS: "#D55E00", RECORD: "#009E73"}

# name: (left, bottom, width, height, color, text)
BOXES = {
    "weights": (0.1, 6.15, 2.6, 0.9, PLAIN, "policy weights"),
    "table": (3.5, 6.15, 4.4, 0.9, OURS, "neighbor table: of every token the k - 1\n"
              "nearest, searched once a weight update"),
    "logits": (0.1, 3.9, 2.6, 1.1, PLAIN, "logits of the next token"),
    "gate": (3.5, 3.9, 2.0, 1.1, OURS, "gate: mix this\nstep? (rate)"),
    "sample": (6.6, 3.45, 3.9, 0.75, PLAIN, "no: sample y, feed its embedding E[y]"),
    "mix": (6.6, 4.5, 3.9, 1.25, OURS, "yes: emit the anchor, feed\n"
            "$\\Sigma\\;\\alpha_c\\,E[c]$ of it and its neighbors\n($\\alpha$: softmax of their logits)"),
    "record": (11.5, 4.6, 3.3, 1.1, RECORD, "record: which steps,\nk ids, k weights"),
    "text": (12.3, 3.45, 2.5, 0.75, PLAIN, "text, reward, advantage"),
    "inputs": (0.1, 0.35, 4.3, 1.25, OURS, "input embeddings, mixed\npositions rebuilt from the record\n"
               "with the model's own table"),
    "forward": (5.3, 0.35, 4.2, 1.25, PLAIN, "forward: old, current and\nreference log-probabilities"),
    "loss": (10.6, 0.35, 4.2, 1.25, PLAIN, "the trainer's own loss:\nratio, clip, KL"),
}  # fmt: skip


def _box(axes: Any, name: str) -> None:
    x, y, width, height, color, text = BOXES[name]
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0.04,rounding_size=0.12", facecolor=color,
            edgecolor=EDGES[color], linewidth=1.6,
        )
    )  # fmt: skip
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=11)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], color: str = "#444444", bend: float = 0):
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.5, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", end, start, arrowprops=style)


def draw_data_flow(path: Path) -> None:
    figure, axes = plt.subplots(figsize=(12.4, 6.6), layout="constrained")
    axes.set(xlim=(-0.1, 15.1), ylim=(0, 7.5))
    axes.axis("off")
    lanes = ((2.95, 2.95, 1.6, "rollout, step by step"), (0.05, 2.05, 6.2, "training, all steps at once"))
    for bottom, height, left, title in lanes:
        axes.add_patch(
            FancyBboxPatch((-0.05, bottom), 15.1, height, boxstyle="round,pad=0", facecolor="none", edgecolor="#BBBBBB")
        )
        axes.text(left, bottom + height - 0.1, title, fontsize=11, color="#666666", va="top", style="italic")
    for name in BOXES:
        _box(axes, name)
    _arrow(axes, (2.75, 6.6), (3.45, 6.6))
    _arrow(axes, (1.4, 6.1), (1.4, 5.05))
    _arrow(axes, (2.75, 4.45), (3.45, 4.45))
    _arrow(axes, (5.55, 4.6), (6.55, 5.1))
    _arrow(axes, (5.55, 4.25), (6.55, 3.85))
    _arrow(axes, (7.0, 6.1), (7.4, 5.8), EDGES[OURS])
    _arrow(axes, (10.55, 3.82), (12.25, 3.82))
    _arrow(axes, (10.55, 4.8), (12.25, 4.05))
    _arrow(axes, (10.55, 5.15), (11.45, 5.15), EDGES[RECORD])
    _arrow(axes, (7.6, 3.4), (1.4, 3.85), bend=-0.14)
    _arrow(axes, (6.55, 5.35), (2.2, 5.05), EDGES[OURS], bend=0.12)
    for height in (3.45, 5.57):
        axes.text(3.7, height, "the next input", fontsize=10, color="#444444")
    axes.plot((11.75, 11.75), (4.55, 2.62), color=EDGES[RECORD], linewidth=1.5)
    _arrow(axes, (11.75, 2.62), (2.3, 1.65), EDGES[RECORD], bend=0.06)
    _arrow(axes, (13.6, 3.4), (13.6, 1.65))
    _arrow(axes, (4.45, 0.97), (5.25, 0.97))
    _arrow(axes, (9.55, 0.97), (10.55, 0.97))
    for x, color, text in (
        (8.6, PLAIN, "GRPO's own"),
        (10.9, OURS, "N-GRPO's"),
        (12.8, RECORD, "what travels with the text"),
    ):
        axes.add_patch(
            FancyBboxPatch((x, 6.95), 0.3, 0.22, boxstyle="round,pad=0.03", facecolor=color, edgecolor=EDGES[color])
        )
        axes.text(x + 0.45, 7.06, text, va="center", fontsize=10)
    figure.savefig(path, dpi=100, metadata={"Software": None})  # the same bytes from every version
    plt.close(figure)
