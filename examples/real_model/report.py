"""From the files of the studies to results.json, and from results.json alone to report.md and its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ngrpo_ops.files import read_json, write_json, write_text

from ..countdown.report import bare, color_of, draw_differences
from ..measure import Estimate, markdown_table
from .results import ASKED, QUANTILES, collect, training_figures

PAPER = {"mean": 0.9985, "min": 0.8813, "below_0.95": 0.012}  # cos(mix, anchor), of its 1.5B model
_RESULTS = "results.json"
_NEAREST = 1e-5  # of 1 - cos in the picture


def write_report(out: Path, folder: Path) -> Path:
    """Everything of a rollout study in `folder`; the path of report.md. A training study that is there stays.

    Raises:
        FileError: a file of the study is damaged or missing.
    """
    results = collect(out)
    path = folder / _RESULTS
    before = read_json(path) if path.exists() else {}
    if before.get("model") == results["model"]:
        results["training"] = before["training"]
    return _write(results, folder)


def add_training(out: Path, folder: Path) -> Path:
    """Everything of a training study beside the rollout study in `folder`; the path of report.md.

    Raises:
        FileError: a file is damaged or missing.
        ValueError: the studies are of different models.
    """
    results, training = read_json(folder / _RESULTS), training_figures(out)
    if training["settings"]["model"] != results["model"]:
        raise ValueError(
            f"{folder / _RESULTS} must be of {training['settings']['model']}, as {out} is, got {results['model']!r:.80}"
        )
    return _write(results | {"training": training}, folder)


def _write(results: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _RESULTS, results, indent=1)
    draw(results, folder)
    write_text(folder / "report.md", report(results))
    return folder / "report.md"


def _interval(value: float, interval: list[float]) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def report(results: Mapping[str, Any]) -> str:
    """report.md, of what results.json holds and nothing else."""
    parts = [
        _head(results),
        _question(results),
        _cells(results),
        _mixes(results),
        _replays(results),
        _training(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(results: Mapping[str, Any]) -> str:
    settings, samples = results["settings"], results["settings"]["samples"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"""# A real model: what mixing does to its solutions

Model: {results["model"]}

Written by `python -m examples.real_model.study`; what the words mean is in [README.md](README.md). Runs at commit
{results["commit"]}; {versions}; seed {results["seed"]}.

{results["problems"]} problems of {settings["task"]} x {samples} samples in each of {len(results["arms"])} cells,
temperature {settings["temperature"]}, at most {settings["tokens"]} tokens, weights in {settings["dtype"]}. Intervals
are of 95 %, over problems."""


def _question(results: Mapping[str, Any]) -> str:
    question = results["question"]
    if question is None:
        return ""
    arms = results["arms"]
    rows = []
    for name in ASKED:
        against = question["against"][name]
        rows.append(
            [arms[name]["label"], *(str(Estimate(*against[key])) for key in ("pass@1", "right_paths", "paths"))]
        )
    table = markdown_table(["N-GRPO - ...", "pass@1", "paths to the right answer", "paths of all samples"], rows)
    matched = results["matched"]
    entropy = "; ".join(f"{arms[name]['label']} {arms[name]['entropy']:.3f}" for name in ("ngrpo", *ASKED))
    return f"""## The question

Does mixing add solution paths at equal accuracy, compared with sampling at equal entropy? The question and its test
were committed in [README.md](README.md) before the runs.

**Answer: {question["answer"]}.**

{table}

N-GRPO's rollouts have {matched["ngrpo_entropy"]:.3f} nats a token where the temperature was matched, forced anchors
counted as 0; plain sampling has {matched["entropy"]:.3f} at temperature {matched["temperature"]:.3f}. In the study
itself: {entropy}."""


def _cells(results: Mapping[str, Any]) -> str:
    arms = results["arms"]
    samples = results["settings"]["samples"]
    header = ["cell", "pass@1", f"pass@{samples}", "paths to the right answer", "paths of all samples",
              "distinct answers", "usable groups"]  # fmt: skip
    rows = [
        [
            arm["label"],
            _interval(arm["pass@1"], arm["interval"]),
            *(
                _interval(arm[key], arm[f"{key}_interval"])
                for key in (f"pass@{samples}", "right_paths", "paths", "distinct_answers")
            ),
            f"{arm['usable_groups']:.2f}",
        ]
        for arm in arms.values()
    ]
    text_header = ["cell", "log-probability a token", "entropy", "distinct-1", "distinct-2", "distinct-3", "tokens",
                   "ended"]  # fmt: skip
    text_rows = [
        [
            arm["label"],
            *(f"{arm[key]:.3f}" for key in ("logprob", "entropy")),
            *("" if arm[f"distinct_{n}"] is None else f"{arm[f'distinct_{n}']:.3f}" for n in (1, 2, 3)),
            f"{arm['tokens']:.1f}",
            f"{arm['ended']:.0%}",
        ]
        for arm in arms.values()
    ]
    keys = ("pass@1", f"pass@{samples}", "right_paths", "paths", "distinct_answers")
    differences = [
        [arm["label"], *(str(Estimate(*arm["against_grpo"][key])) for key in keys)]
        for arm in arms.values()
        if "against_grpo" in arm
    ]
    difference_header = ["cell - GRPO", "pass@1", f"pass@{samples}", "paths to the right answer",
                         "paths of all samples", "distinct answers"]  # fmt: skip
    return f"""## The cells

{markdown_table(header, rows)}

Of the {samples} samples of a problem. Usable groups, of 8, have some right and some wrong samples.

![paths against accuracy](trade.png)

{markdown_table(text_header, text_rows)}

The log-probability is that of the text under the plain model at temperature 1, a mean over tokens: it falls where a
text means less to the model. The entropy, in nats, is of what a token was drawn from, 0 where it was a forced anchor;
Gumbel's and the two that emit a sample are counted as plain sampling. Distinct-n is of words, within a problem.

{markdown_table(difference_header, differences)}

Paired over problems, each interval for itself, not corrected for their number.

![differences from GRPO](differences.png)"""


def _mixes(results: Mapping[str, Any]) -> str:
    arms = {name: arm for name, arm in results["arms"].items() if arm["mixes"]}
    if not arms:
        return ""
    rows = [
        ["the paper, 1.5B", "", f"{PAPER['mean']:.4f}", f"{PAPER['min']:.4f}", f"{PAPER['below_0.95']:.1%}", "", ""]
    ]
    for arm in arms.values():
        mixes = arm["mixes"]
        cosine = mixes["cosine"]
        rows.append(
            [
                arm["label"], f"{mixes['count']:,}", f"{cosine['mean']:.4f}", f"{cosine['min']:.4f}",
                f"{cosine['below_0.95']:.1%}", f"{mixes['anchor_weight']:.3f}",
                f"{mixes['anchor_weight_below_0.95']:.1%}",
            ]
        )  # fmt: skip
    header = ["cell", "mixed steps", "cos(mix, anchor), mean", "min", "below 0.95", "anchor weight, mean",
              "below 0.95"]  # fmt: skip
    text = f"""## The mixes

{markdown_table(header, rows)}

![how far mixes are from their anchors](mixes.png)"""
    if "ngrpo" not in arms:
        return text
    kinds = results["arms"]["ngrpo"]["mixes"]["kinds"]
    kind_rows = [
        [
            name, f"{kind['share']:.1%}", f"{kind['others_weight']:.4f}",
            "" if kind["within_kind"] is None else f"{kind['within_kind']:.0%}",
            ", ".join(
                f"{_token(anchor)} with {_token(other)} {weight:.2f} (x {count})"
                for anchor, other, count, weight in kind["pairs"]
            ),
        ]
        for name, kind in kinds.items()
    ]  # fmt: skip
    kind_header = ["anchor", "of mixed steps", "weight of the others", "of it within the kind",
                   "heaviest in all: anchor with other, mean weight"]  # fmt: skip
    return f"""{text}

What N-GRPO mixes with what, at the paper's setting:

{markdown_table(kind_header, kind_rows)}"""


def _token(text: str) -> str:
    """A token in a table of Markdown."""
    shown = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
    return "`" + shown.replace("|", "\\|").replace("`", "'") + "`"


def _replays(results: Mapping[str, Any]) -> str:
    replays = results["replay_errors"]
    if replays is None:
        return ""
    rows = [[results["arms"][name]["label"], f"{error:.1e}"] for name, error in replays["errors"].items()]
    return f"""## Replays

The largest |replayed - sampled| log-probability in float32, {replays["problems"]} x {replays["samples"]} rollouts of
each cell that mixes; {results["replay_error"]:.1e} in all.

{markdown_table(["cell", "replay error"], rows)}"""


def _training(results: Mapping[str, Any]) -> str:
    training = results["training"]
    if not training:
        return ""
    settings, before = training["settings"], training["before"]
    top = f"pass@{before['samples']}"
    passes = _interval(before["pass@1"], before["interval"]), _interval(before[top], before[f"{top}_interval"])
    rows = [["before", "", *passes, "", "", ""]]
    for arm in training["arms"].values():
        against = arm.get("against_grpo")
        rows.append(
            [
                arm["label"],
                "; ".join(f"{seed['pass@1']:.3f}, {seed[top]:.3f}" for seed in arm["seeds"].values()),
                _interval(arm["pass@1"], arm["interval"]),
                _interval(arm[top], arm[f"{top}_interval"]),
                *(str(Estimate(*against[key])) if against else "" for key in ("pass@1", top)),
                "" if arm["replay_error"] is None else f"{arm['replay_error']:.1e}",
            ]
        )
    header = ["arm", f"seeds: pass@1, {top}", "pass@1", top, "pass@1, arm - GRPO", f"{top}, arm - GRPO",
              "largest replay error"]  # fmt: skip
    return f"""## Training

{settings["steps"]} steps of {settings["prompts"]} prompts x {settings["group"]} rollouts, learning rate
{settings["learning_rate"]:g}, full fine-tuning in float32, {settings["seeds"]} seeds an arm;
{before["problems"]} held-out problems x {before["samples"]} samples without mixing, temperature
{settings["temperature"]}. Runs at commit {settings["commit"]}. Intervals are over problems alone: two seeds say little
of what another seed would do.

{markdown_table(header, rows)}

![training](training.png)"""


# Pictures ---------------------------------------------------------------------------------------------------------


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """The pictures that report.md shows."""
    arms, samples = results["arms"], results["settings"]["samples"]
    draw_trade(arms, folder / "trade.png")
    comparisons = {name: arm["against_grpo"] for name, arm in arms.items() if "against_grpo" in arm}
    measures = {
        "pass@1": "pass@1", f"pass@{samples}": f"pass@{samples}", "right_paths": "right paths", "paths": "all paths",
    }  # fmt: skip
    labels = {name: arm["label"] for name, arm in arms.items()}
    draw_differences({results["settings"]["task"]: comparisons}, measures, labels, folder / "differences.png")
    moved = {name: arm for name, arm in arms.items() if arm["mixes"] and arm["mixes"]["cosine"]["min"] < 1}
    draw_mixes(moved, labels, folder / "mixes.png")
    if results["training"]:
        draw_training(results["training"]["arms"], folder / "training.png")


def draw_trade(arms: Mapping[str, Any], path: Path) -> None:
    """Paths to the right answer, and all paths, against pass@1, with intervals."""
    figure, both = plt.subplots(1, 2, figsize=(13, 5.4), layout="constrained")
    titles = {"right_paths": "different paths to the right answer", "paths": "different paths of all samples"}
    for axes, (key, title) in zip(both, titles.items(), strict=True):
        for name, arm in arms.items():
            asked = name in ("grpo", "ngrpo", *ASKED)
            x, y = arm["pass@1"], arm[key]
            low, high = arm[f"{key}_interval"]
            color = color_of(name, arms)
            spread = {"xerr": [[x - arm["interval"][0]], [arm["interval"][1] - x]], "yerr": [[y - low], [high - y]]}
            axes.errorbar(x, y, **spread, color=color, alpha=0.6 if asked else 0.15, linewidth=1)
            axes.plot(
                x, y, "o", color=color, markersize=9 if asked else 6, label=arm["label"], markeredgecolor="white",
                zorder=4,
            )  # fmt: skip
        axes.set(xlabel="pass@1", ylabel=f"{title}, a problem", title=title[0].upper() + title[1:])
        bare(axes)
    figure.legend(*both[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_mixes(arms: Mapping[str, Any], labels: Mapping[str, str], path: Path) -> None:
    """The share of mixed steps whose mix is farther from its anchor than a distance."""
    figure, axes = plt.subplots(figsize=(9.5, 5), layout="constrained")
    for name, arm in arms.items():
        away = np.maximum(1 - np.array(arm["mixes"]["cosine_quantiles"]), _NEAREST)
        axes.plot(
            away, QUANTILES, color=color_of(name, labels), label=arm["label"], linewidth=2.5 if name == "ngrpo" else 1.3
        )
    axes.axvline(0.05, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set(
        xlabel="1 - cos(mix, anchor); dotted: a cosine of 0.95", ylabel="share of mixed steps at least so far",
        ylim=(0, 1.02), title="How far mixes are from their anchors",
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    bare(axes)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_training(arms: Mapping[str, Any], path: Path) -> None:
    """Reward, usable groups and replay error over the steps, means over seeds."""
    measures = {
        "reward": "mean reward", "usable_groups": "groups with reward std > 0", "mix/replay_error": "replay error",
    }  # fmt: skip
    figure, row = plt.subplots(1, len(measures), figsize=(13, 3.8), layout="constrained")
    for axes, (measure, title) in zip(row, measures.items(), strict=True):
        for name, arm in arms.items():
            if measure in arm["history"]:
                curve = arm["history"][measure]
                steps = range(1, len(curve) + 1)
                axes.plot(steps, curve, "o-", markersize=3, color=color_of(name, arms), label=arm["label"])
        axes.set(xlabel="step", title=title)
        bare(axes)
    row[-1].set_yscale("log")
    row[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
