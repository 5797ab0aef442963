"""A picture after the paper's first figure: where mixed and noised embeddings land among the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.spatial.distance import cdist
from transformers import AutoModelForCausalLM

from ngrpo_ops import MixingConfig, gaussian_noise, mix_embeddings
from ngrpo_ops.integrations.transformers import NeighborMixing

from .model import build_tokenizer
from .report import COLORS
from .task import TASKS, Task

STRATEGIES = {"neighbor": "N-GRPO", "topk": "Soft Thinking (top-k)", "gaussian": "STHT (top-k and noise)"}
_COLORS = {"neighbor": COLORS["ngrpo"], "topk": COLORS["anchor"], "gaussian": COLORS["grpo"]}
_SHOWN = 120  # mixes of each strategy in the map
_LABEL = np.array([0.07, 0.025])  # the room of a token's name, of the map's width and height


class Mixes(NamedTuple):
    """Every mixed step of some rollouts. anchors [M]: token ids; embeddings [M, d]: what was fed."""

    anchors: np.ndarray
    embeddings: np.ndarray


def collect(checkpoint: Path, task: Task, strategy: str, rollouts: int) -> Mixes:
    """Rollouts of the checkpoint in which every step is mixed, k = 3."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = build_tokenizer(task)
    stream = task.training([], "mixes")
    batch = tokenizer([next(stream)[0].prompt for _ in range(rollouts)], return_tensors="pt")
    batch.pop("token_type_ids", None)
    config = MixingConfig(k=3, mixing_rate=1.0, strategy=strategy, excluded_token_ids="special")
    mixing = NeighborMixing(model, config, tokenizer=tokenizer)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        _, record = mixing.generate(**batch, do_sample=True, top_k=0, max_new_tokens=task.max_tokens)
    table = model.get_input_embeddings().weight.detach()
    rows, steps = record.gate.nonzero(as_tuple=True)
    ids, weights = record.ids[rows, steps], record.weights[rows, steps]
    mixed = mix_embeddings(table, ids, weights)
    if record.noise_scale is not None:
        assert record.noise_seed is not None and record.row_ids is not None
        mixed = gaussian_noise(
            mixed, record.noise_scale[rows], seed=record.noise_seed[rows], row_ids=record.row_ids[rows], steps=steps
        )
    return Mixes(ids[:, 0].numpy(), mixed.numpy())


def draw_mixes(checkpoints: dict[str, Path], path: Path, rollouts: int) -> dict[str, dict[str, dict[str, float]]]:
    """Draw the picture.

    Returns:
        By task and strategy: the share of mixes whose nearest token is the anchor, and the median distance to the
        anchor over the anchor's to its own nearest token.
    """
    figure, axes = plt.subplots(
        2, len(checkpoints), figsize=(5.4 * len(checkpoints), 8.5), layout="constrained", squeeze=False,
        height_ratios=[2.2, 1],
    )  # fmt: skip
    out: dict[str, dict[str, dict[str, float]]] = {}
    for column, (name, checkpoint) in enumerate(checkpoints.items()):
        task = TASKS[name]
        tokenizer = build_tokenizer(task)
        table = AutoModelForCausalLM.from_pretrained(checkpoint).get_input_embeddings().weight.detach().numpy()
        between = cdist(table, table)
        np.fill_diagonal(between, np.inf)
        spacing = between.min(1)
        used = [token for token in range(len(table)) if tokenizer.convert_ids_to_tokens(token) not in ("<pad>", "->")]
        center = table[used].mean(0)
        axis = np.linalg.svd(table[used] - center, full_matrices=False)[2][:2].T
        top, bottom = axes[0][column], axes[1][column]
        out[name] = {}
        for strategy, label in STRATEGIES.items():
            mixes = collect(checkpoint, task, strategy, rollouts)
            distances = cdist(mixes.embeddings, table)
            to_anchor = distances[np.arange(len(mixes.anchors)), mixes.anchors] / spacing[mixes.anchors]
            stays = float((distances.argmin(1) == mixes.anchors).mean())
            out[name][strategy] = {"nearest_is_anchor": stays, "median_distance": float(np.median(to_anchor))}
            color = _COLORS[strategy]
            moved = np.flatnonzero(to_anchor > 0.05)
            chosen = np.random.default_rng(0).permutation(moved)[:_SHOWN]
            points = (mixes.embeddings[chosen] - center) @ axis
            origins = (table[mixes.anchors[chosen]] - center) @ axis
            for point, origin in zip(points, origins, strict=True):
                top.plot(*zip(origin, point, strict=True), color=color, alpha=0.25, linewidth=0.8)
            top.plot(*points.T, ".", color=color, markersize=4, label=label)
            ordered = np.sort(to_anchor)
            bottom.plot(
                ordered, np.linspace(0, 1, len(ordered)), color=color, label=f"{label}: {stays:.0%} nearest to it"
            )
        _label_tokens(top, tokenizer, used, (table[used] - center) @ axis)
        top.set_title(
            f"{name}: tokens (two main axes) and where {_SHOWN} mixes of each kind land,\n"
            "of those that moved more than 5 % of the way to the nearest token",
            fontsize=10,
        )
        top.legend(frameon=False, fontsize=9, loc="best")
        bottom.axvline(1, color="black", linewidth=0.8, linestyle=":")
        bottom.set(
            xlabel="distance from the anchor / distance of its nearest token", ylabel="share of mixed steps",
            xlim=(0, 1.6),
        )  # fmt: skip
        bottom.set_title("how far mixes are from their anchor", fontsize=10)
        bottom.legend(frameon=False, fontsize=9, loc="lower right")
        for each in (top, bottom):
            each.grid(alpha=0.25)
            each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return out


def _label_tokens(axes: Any, tokenizer: Any, tokens: list[int], points: np.ndarray) -> None:
    """A dot for each token; words by name, of the numbers every tenth and those up to twelve, where there is room."""
    axes.plot(*points.T, "o", color="#555555", markersize=3, zorder=3)
    extent = np.ptp(points, axis=0)
    labeled: list[np.ndarray] = []
    for token, point in zip(tokens, points, strict=True):
        text = tokenizer.convert_ids_to_tokens(token)
        named = not text.isdecimal() or int(text) <= 12 or int(text) % 10 == 0
        if named and all((np.abs(point - other) > _LABEL * extent).any() for other in labeled):
            labeled.append(point)
            axes.annotate(text, point, fontsize=8, xytext=(2, 2), textcoords="offset points", zorder=4)
