"""The table on the screen and the picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

# Okabe and Ito's colors, told apart by color-blind readers too.
COLORS = {"supervised": "#7f7f7f", "grpo": "#0072B2", "ngrpo": "#D55E00", "anchor": "#009E73"}
LABELS = {"supervised": "supervised", "grpo": "GRPO", "ngrpo": "N-GRPO", "anchor": "anchor only (k = 1)"}
_WINDOW = 10


def print_table(arms: dict[str, Any], ks: Sequence[int]) -> None:
    table = Table(title="Countdown, held-out problems: mean, and 95 % interval over problems", padding=(0, 0))
    table.add_column("arm")
    for k in ks:
        table.add_column(f"pass@{k}", justify="right")
    table.add_column("usable\ngroups", justify="right")
    table.add_column("unique\nequations", justify="right")
    for name, arm in arms.items():
        cells = []
        for k in ks:
            low, high = arm[f"pass@{k}_interval"]
            cells.append(f"{arm[f'pass@{k}']:.3f}\n{low:.2f}-{high:.2f}")
        table.add_row(LABELS[name], *cells, f"{arm['usable_groups']:.3f}", f"{arm['unique_equations']:.2f}")
    Console().print(table)


def draw(arms: dict[str, Any], ks: Sequence[int], path: Path) -> None:
    """pass@k of every arm; reward and usable groups over the steps of training."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for name, arm in arms.items():
        low, high = zip(*(arm[f"pass@{k}_interval"] for k in ks), strict=True)
        left.fill_between(ks, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
        left.plot(ks, [arm[f"pass@{k}"] for k in ks], "o-", color=COLORS[name], label=LABELS[name])
        for axes, metric in ((middle, "reward"), (right, "usable_groups")):
            if "history" in arm:
                curves = np.array([seed[metric] for seed in arm["history"]])
                curve = curves.mean(0)
                window = min(_WINDOW, len(curve))
                axes.plot(curve, color=COLORS[name], alpha=0.2, linewidth=1)
                smooth = np.convolve(curve, np.ones(window) / window, "valid")
                axes.plot(
                    np.arange(window - 1, len(curve)), smooth, color=COLORS[name], linewidth=2, label=LABELS[name]
                )
    left.set_xscale("log", base=2)
    left.set_xticks(ks, [str(k) for k in ks])
    left.set(xlabel="k", ylabel="pass@k", ylim=(0, 1), title="Held-out pass@k (band: 95 % over problems)")
    for axes, label in ((middle, "mean reward"), (right, "groups with reward std > 0")):
        axes.set(
            xlabel="training step", ylabel=label, ylim=(0, None), title=f"{label[0].upper()}{label[1:]} in training"
        )
    for axes in (left, middle, right):
        bare(axes)
    left.legend(frameon=False, loc="upper left")
    middle.legend(frameon=False, loc="lower right", title=f"thick: mean of {_WINDOW} steps")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def color_of(name: str, names: Iterable[str]) -> Any:
    """The color of an arm: its own, or one by its place among `names`."""
    return COLORS.get(name) or plt.get_cmap("tab20")(list(names).index(name) % 20)


def bare(axes: Any) -> None:
    """Axes with a light grid and without a frame."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_differences(
    comparisons: Mapping[str, Mapping[str, Mapping[str, Any]]],
    measures: Mapping[str, str],
    labels: Mapping[str, str],
    path: Path,
) -> None:
    """Each arm's differences from GRPO, with their intervals.

    Args:
        comparisons: by task and arm; of each measure (value, low, high), or None.
        measures: what is shown, with its title.
        labels: of all arms.
    """
    figure, all_axes = plt.subplots(
        len(comparisons), len(measures), layout="constrained", squeeze=False,
        figsize=(1 + 4 * len(measures), 1.2 + 0.34 * sum(map(len, comparisons.values())) + 1.1 * len(comparisons)),
        height_ratios=[len(c) + 2 for c in comparisons.values()],
    )  # fmt: skip
    for row, (task, arms) in zip(all_axes, comparisons.items(), strict=True):
        for column, (axes, (measure, title)) in enumerate(zip(row, measures.items(), strict=True)):
            for i, (name, comparison) in enumerate(arms.items()):
                if comparison[measure] is None:
                    continue
                value, low, high = comparison[measure]
                axes.plot([low, high], [-i, -i], color=color_of(name, labels), linewidth=2)
                axes.plot(value, -i, "o", color=color_of(name, labels))
            axes.set_yticks([-i for i in range(len(arms))], [labels[name] if column == 0 else "" for name in arms])
            axes.axvline(0, color="black", linewidth=1)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.set_title(f"{task}: {title}, arm - GRPO", fontsize=10)
            bare(axes)
    figure.savefig(path, dpi=130)
    plt.close(figure)
