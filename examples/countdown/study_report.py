"""From the runs of the study to report.md, its pictures, seeds.csv (the means of every run) and correct.csv (how many
samples of a run solve each held-out problem, so that anyone can ask something else of them)."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ..measure import estimate, markdown_table, pass_at_k
from .arms import ARMS
from .mixes import STRATEGIES, draw_mixes
from .report import bare, color_of, draw_differences
from .runs import read_matched, read_run
from .task import TASKS

if TYPE_CHECKING:
    from .study import Preset

DRAWS = 10_000
LOST = 0.01  # of the draws may have no gain, for a cost to have a meaning
KS = (1, 2, 4, 8, 16, 32, 64)
_CHUNK = 500


class Arm(NamedTuple):
    """An arm's runs on a task. pass_at: by k, float [seeds, problems]; runs: the files, in the order of `seeds`."""

    pass_at: dict[int, np.ndarray]
    runs: list[dict[str, Any]]
    seeds: list[int]

    def of(self, seeds: Sequence[int]) -> Arm:
        """Some of the runs."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return Arm({k: v[rows] for k, v in self.pass_at.items()}, [self.runs[row] for row in rows], list(seeds))

    def spread(self, values: np.ndarray) -> float:
        """Standard error over seeds."""
        return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def load(folder: Path, arms: Mapping[str, Sequence[int]], top: int) -> dict[str, Arm]:
    """pass@k for k up to `top`, and the runs of a task by arm, "supervised" first; arms without runs are left out.

    Args:
        arms: the seeds of each; runs of other seeds are not read.
    """
    found: dict[str, Arm] = {}
    places = {name: {seed: folder / name / f"{seed}.json" for seed in seeds} for name, seeds in arms.items()}
    for name, where in ({"supervised": {0: folder / "supervised.json"}} | places).items():
        where = {seed: path for seed, path in where.items() if path.exists()}
        runs = [read_run(path) for path in where.values()]
        if runs:
            samples = runs[0]["samples"]
            correct = [np.array(run["correct"]) for run in runs]
            passes = {k: np.stack([pass_at_k(samples, c, k) for c in correct]) for k in KS if k <= top}
            found[name] = Arm(passes, runs, list(where))
    return found


# Intervals --------------------------------------------------------------------------------------------------------


class Draws(NamedTuple):
    """A paired bootstrap: how often each problem and seed was drawn, as shares; [DRAWS, problems], [DRAWS, seeds]."""

    problems: np.ndarray
    seeds: np.ndarray

    @classmethod
    def of(cls, problems: int, seeds: int) -> Draws:
        rng = np.random.default_rng(0)

        def shares(count: int) -> np.ndarray:
            return rng.multinomial(count, np.full(count, 1 / count), size=DRAWS) / count

        return cls(shares(problems), shares(seeds))

    def means(self, values: np.ndarray) -> np.ndarray:
        """[DRAWS]: the mean of [seeds, problems], or of [1, problems], which all seeds share."""
        if len(values) == 1:
            return self.problems @ values[0]
        return np.einsum("ds,sp,dp->d", self.seeds, values, self.problems, optimize=True)


class Costs(NamedTuple):
    """pass@K lost per pass@1 gained. value: of the means; draws: of the bootstrap; lost: share of them without gain."""

    value: float
    draws: np.ndarray
    lost: float


def costs(before: Arm, after: Arm, draws: Draws) -> Costs:
    top = max(after.pass_at)

    def cost(mean: Callable[[np.ndarray], Any]) -> Any:
        gained = mean(after.pass_at[1]) - mean(before.pass_at[1])
        lost = mean(before.pass_at[top]) - mean(after.pass_at[top])
        return lost / np.where(gained > 0, gained, np.nan), gained

    drawn, gained = cost(draws.means)
    return Costs(float(cost(np.mean)[0]), drawn, float((gained <= 0).mean()))


def compare(arms: dict[str, Arm], name: str, other: str, level: float = 0.95) -> dict[str, Any]:
    """Paired differences name - other of pass@1, pass@K and cost, on the seeds that both have; the cost None where one
    of the two often gains nothing."""
    common = sorted(set(arms[name].seeds) & set(arms[other].seeds))
    one, two = arms[name].of(common), arms[other].of(common)
    draws = Draws.of(one.pass_at[1].shape[1], len(common))
    out: dict[str, Any] = {"seeds": len(common)}
    for k in (1, max(one.pass_at)):
        difference = one.pass_at[k] - two.pass_at[k]
        out[f"pass@{k}"] = estimate(float(difference.mean()), draws.means(difference), level)
    first, second = (costs(arms["supervised"], arm, draws) for arm in (one, two))
    meaningful = max(first.lost, second.lost) <= LOST
    out["cost"] = estimate(first.value - second.value, first.draws - second.draws, level) if meaningful else None
    return out


def answer(against: list[dict[str, Any]], planned: int) -> str:
    """Of the primary question on a task, by its pre-written rule, once the planned seeds are there."""
    seeds = min(comparison["seeds"] for comparison in against)
    if seeds < planned:
        return f"incomplete: {seeds} of {planned} seeds"
    if any(comparison["cost"] is None for comparison in against):
        return "no answer: an arm gains no pass@1 in more than 1 % of the draws, so that its cost has no meaning"
    if all(comparison["cost"].high < 0 for comparison in against):
        return "yes: it loses less than both"
    if all(comparison["cost"].low > 0 for comparison in against):
        return "no: it loses more than both"
    return "not told apart"


# Pictures ---------------------------------------------------------------------------------------------------------


def draw_trade(tasks: dict[str, dict[str, Arm]], path: Path) -> None:
    """pass@K against pass@1: every seed, the means, and where all began."""
    figure, all_axes = plt.subplots(1, len(tasks), figsize=(4.9 * len(tasks), 5), layout="constrained", squeeze=False)
    for axes, (task, arms) in zip(all_axes[0], tasks.items(), strict=True):
        top = max(arms["supervised"].pass_at)
        asked = ("supervised", "grpo", "anchor", "ngrpo")
        for name, arm in arms.items():
            x, y = arm.pass_at[1].mean(1), arm.pass_at[top].mean(1)
            color, above = color_of(name, ARMS), name in asked
            label = "before (supervised)" if name == "supervised" else ARMS[name].label
            axes.plot(x, y, ".", color=color, alpha=0.25, markersize=5)
            axes.plot(
                x.mean(), y.mean(), "*" if name == "supervised" else "o", color=color, markersize=11 if above else 7,
                label=label, markeredgecolor="white", zorder=4 if above else 3,
            )  # fmt: skip
        axes.set(xlabel="pass@1", ylabel=f"pass@{top}", title=f"{task}: small points are runs, large ones means")
        axes.legend(frameon=False, fontsize=8)
        bare(axes)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_training(tasks: dict[str, dict[str, Arm]], path: Path) -> None:
    """Reward, usable groups and entropy over the steps, of the primary arms and of GRPO at matched entropy."""
    shown = ("grpo", "grpo_matched", "anchor", "ngrpo")
    measures = {
        "reward": "mean reward",
        "usable_groups": "groups with reward std > 0",
        "entropy": "policy's entropy, nats",
    }
    figure, all_axes = plt.subplots(len(tasks), 3, figsize=(13, 3.6 * len(tasks)), layout="constrained", squeeze=False)
    for row, (task, arms) in zip(all_axes, tasks.items(), strict=True):
        for axes, (measure, label) in zip(row, measures.items(), strict=True):
            for name in (name for name in shown if name in arms):
                curve = np.array([run["history"][measure] for run in arms[name].runs]).mean(0)
                window = min(5, len(curve))
                smooth = np.convolve(curve, np.ones(window) / window, "valid")
                axes.plot(np.arange(window, len(curve) + 1), smooth, color=color_of(name, ARMS), label=ARMS[name].label)
            axes.set(xlabel="step", title=f"{task}: {label}")
            bare(axes)
    all_axes[0][0].legend(frameon=False, fontsize=8, title="mean over seeds, of 5 steps", title_fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# Tables -----------------------------------------------------------------------------------------------------------


def _cost(comparison: dict[str, Any]) -> str:
    return "no gain" if comparison["cost"] is None else str(comparison["cost"])


def _last(run: dict[str, Any], metric: str) -> float:
    return float(np.mean(run["history"][metric][-10:]))


def _arm_row(name: str, arms: dict[str, Arm]) -> list[str]:
    arm = arms[name]
    cells = ["before" if name == "supervised" else ARMS[name].label, str(len(arm.runs))]
    for k in arm.pass_at:
        by_seed = arm.pass_at[k].mean(1)
        error = arm.spread(by_seed)
        cells.append(f"{by_seed.mean():.3f}" + ("" if np.isnan(error) else f" ± {error:.3f}"))
    for measure in ("usable_groups", "unique", "divergence"):
        cells.append(f"{np.mean([np.mean(run[measure]) for run in arm.runs]):.2f}")
    if name == "supervised":
        return [*cells, "", "", ""]
    cells.append(f"{np.mean([_last(run, 'usable_groups') for run in arm.runs]):.2f}")
    cells.append(f"{np.mean([_last(run, 'entropy') for run in arm.runs]):.2f}")
    cells.append(f"{np.mean([run['history']['num_tokens'][-1] for run in arm.runs]) / 1e3:.0f}k")
    return cells


def _seed_rows(task: str, arms: dict[str, Arm]) -> list[list[str]]:
    rows = []
    for name, arm in arms.items():
        for i, run in enumerate(arm.runs):
            passes = [f"{values[i].mean():.4f}" for values in arm.pass_at.values()]
            rest = [f"{np.mean(run[m]):.4f}" for m in ("usable_groups", "unique", "divergence")]
            rows.append([task, name, str(run.get("seed", "")), *passes, *rest])
    return rows


def write_report(out: Path, name: str, preset: Preset, checkpoints: dict[str, Path], folder: Path) -> Path:
    """All files of the report on the preset of this name, in `folder`; the path of report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    top = preset.samples
    tasks = {
        task: load(out / task, {name: preset.seeds_of(name) for name in names}, top)
        for task, names in preset.arms.items()
    }
    lines = [
        "# The Countdown study",
        "",
        f"Written by `python examples/countdown/study.py --preset {name}`; the question and its test are in that "
        "file's docstring, which was committed before the runs; it says what was changed since.",
        "",
        f"{preset.steps} steps of 32 prompts x 8 rollouts from the same checkpoint, the same prompts for all arms of a "
        f"seed; {preset.problems} held-out problems, {preset.samples} samples of each without mixing at temperature 1. "
        "A Qwen2 of 0.2 million parameters, trained here. What it says about larger models is unknown.",
        "",
    ]
    comparisons: dict[str, dict[str, dict[str, Any]]] = {}
    answers = []
    for task, arms in tasks.items():
        if not all(name in arms for name in ("grpo", "anchor", "ngrpo")):
            continue
        against = [compare(arms, "ngrpo", other, level=0.975) for other in ("grpo", "anchor")]
        answers.append([
            task,
            *(f"{costs_of(arms, name)}" for name in ("grpo", "anchor", "ngrpo")),
            *(_cost(comparison) for comparison in against),
            f"**{answer(against, preset.primary_seeds)}**",
        ])  # fmt: skip
        comparisons[task] = {name: compare(arms, name, "grpo") for name in arms if name not in ("supervised", "grpo")}
    lines += [
        "## The primary question",
        "",
        f"Does N-GRPO lose less pass@{top} per point of pass@1 gained than GRPO, and than the anchor-only control? The "
        f"cost is pass@{top} lost per pass@1 gained; intervals of 97.5 %, paired over problems and seeds.",
        "",
        markdown_table(
            ["task", "cost, GRPO", "anchor only", "N-GRPO", "N-GRPO - GRPO", "N-GRPO - anchor only", "answer"], answers
        ),
        "",
        f"![pass@{top} against pass@1](trade.png)",
        "",
    ]
    draw_trade(tasks, folder / "trade.png")
    if comparisons:
        measures = {name: name for name in ("pass@1", f"pass@{top}", "cost")}
        labels = {name: arm.label for name, arm in ARMS.items()}
        draw_differences(comparisons, measures, labels, folder / "differences.png")
    draw_training(tasks, folder / "training.png")
    for task, arms in tasks.items():
        matched = out / task / "matched.json"
        lines += [f"## {task}", "", TASKS_SAY[task], ""]
        if matched.exists():
            found = read_matched(matched)
            lines += [
                f"On the checkpoint N-GRPO's rollouts have {found['ngrpo_entropy']:.3f} nats a token, forced anchors "
                f"counted as 0; GRPO's have {found['entropy']:.3f} at temperature {found['temperature']:.3f}, which is "
                "that of the arm at matched entropy. Its policy is trained at that temperature and, like all, "
                "evaluated at 1, hotter than it was trained, which by itself favors pass@k at large k.",
                "",
            ]
        header = ["arm", "seeds", *(f"pass@{k}" for k in arms["supervised"].pass_at), "usable groups",
                  "unique equations", "first divergence", "usable groups in training", "policy's entropy",
                  "tokens"]  # fmt: skip
        lines += [
            markdown_table(header, [_arm_row(name, arms) for name in arms]),
            "",
            "Means and standard errors over seeds. Usable groups (of 8, some right and some not), distinct solutions "
            "of a problem up to order and grouping, and the token at which two samples first differ: of the "
            "evaluation. The last columns: of training, its last 10 steps (the entropy is the whole policy's at the "
            "temperature of its rollouts, forced anchors not counted as 0), and the tokens of prompts and rollouts in "
            "all.",
            "",
        ]
        if task in comparisons:
            rows = [
                [ARMS[name].label, str(c["seeds"]), str(c["pass@1"]), str(c[f"pass@{top}"]), _cost(c)]
                for name, c in comparisons[task].items()
            ]
            lines += [
                markdown_table(["arm - GRPO", "seeds", "pass@1", f"pass@{top}", "cost"], rows),
                "",
                "Intervals of 95 %, paired, not corrected for their number.",
                "",
            ]
    lines += [
        "At a rate of 1 every step emits the argmax: the rollouts of a group are all the same, no group is usable, and "
        "nothing is learned.",
        "",
    ] * any("rate_1" in arms for arms in tasks.values())
    lines += ["![differences from GRPO](differences.png)", "", "![training](training.png)", ""]
    landed = draw_mixes(checkpoints, folder / "mixes.png", preset.rollouts)
    lines += [
        "## Where mixes land",
        "",
        f"On the checkpoints, every step of {preset.rollouts:,} rollouts mixed (k = 3). Above, a line leads from each "
        "mix to its anchor; below, how far they go.",
        "",
        "![mixed and noised embeddings among the tokens](mixes.png)",
        "",
        markdown_table(
            [
                "task",
                "strategy",
                "nearest token is the anchor",
                "median distance from it over that of its nearest token",
            ],
            [
                [task, STRATEGIES[strategy], f"{found['nearest_is_anchor']:.1%}", f"{found['median_distance']:.2f}"]
                for task, strategies in landed.items()
                for strategy, found in strategies.items()
            ],
        ),
        "",
    ]
    every = [row for task, arms in tasks.items() for row in _seed_rows(task, arms)]
    header = ["task", "arm", "seed", *(f"pass@{k}" for k in KS if k <= top), "usable_groups", "unique", "divergence"]
    with (folder / "seeds.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *every])
    with (folder / "correct.csv").open("w", newline="") as file:
        counts = [
            [task, name, run.get("seed", ""), run["samples"], *run["correct"]]
            for task, arms in tasks.items()
            for name, arm in arms.items()
            for run in arm.runs
        ]
        csv.writer(file).writerows([["task", "arm", "seed", "samples", *range(preset.problems)], *counts])
    seconds = sum(run.get("seconds", 0) for arms in tasks.values() for arm in arms.values() for run in arm.runs)
    lines += [
        "<details><summary>Every seed</summary>", "", markdown_table(header, every), "", "</details>", "",
        f"{len(every) - len(tasks)} runs; their times, of a thread each, add up to {seconds / 3600:.1f} hours.", "",
    ]  # fmt: skip
    path = folder / "report.md"
    path.write_text("\n".join(lines))
    return path


TASKS_SAY = {
    "equation": "The solution is an equation, `4 * ( 2 + 1 )`: the nearest neighbors of a number are numbers.",
    "steps": "The solution is a chain of steps in words that have synonyms, `first 2 plus 1 makes 3 then 4 times 3 "
    "gives 12`: neighbors carry meaning.",
}
assert TASKS_SAY.keys() == TASKS.keys()


def costs_of(arms: dict[str, Arm], name: str) -> str:
    arm = arms[name]
    draws = Draws.of(arm.pass_at[1].shape[1], len(arm.runs))
    found = costs(arms["supervised"], arm, draws)
    if found.lost > LOST:
        return "no gain"
    spread = estimate(found.value, found.draws)
    return f"{spread.value:.2f} [{spread.low:.2f}, {spread.high:.2f}]"
