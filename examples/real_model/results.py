"""From the batches of a rollout study to its figures: what results.json holds, and the answer to the question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ngrpo_ops.files import FileError, read_json

from ..measure import bootstrap_interval, estimate, pass_at_k, usable_groups
from .cells import CELLS, KINDS, kind_of
from .sample import distinct_n

DRAWS = 10_000
GROUP = 8  # of the usable groups
EQUAL = 0.05  # pass@1 is equal where the interval of its difference lies within this
AS_MANY = 0.25  # paths are as many where the interval of their difference lies within this
ASKED = ("grpo_matched", "anchor")  # what N-GRPO is compared with in the question
QUANTILES = np.linspace(0, 1, 201)  # of the cosines, for the picture
_SHOWN = 6  # pairs of tokens of a kind


class Sampled(NamedTuple):
    """A cell's samples, [problems][samples], and its mixed steps.

    right: bool array. samples: as study.py writes them. mixes: by batch.
    """

    right: np.ndarray
    samples: list[list[dict[str, Any]]]
    mixes: list[dict[str, Any]]

    def per_problem(self, count: Callable[[list[dict[str, Any]]], float]) -> np.ndarray:
        """[problems]: what `count` says of the samples of each."""
        return np.array([count(samples) for samples in self.samples], dtype=float)

    def per_token(self, name: str) -> float:
        """The mean over tokens of what is summed over them."""
        rows = [row for samples in self.samples for row in samples]
        return sum(row[name] for row in rows) / sum(row["tokens"] for row in rows)


def distinct_paths(samples: list[dict[str, Any]]) -> int:
    """The number of different solution paths."""
    return len({tuple(row["path"]) for row in samples})


def right_paths(samples: list[dict[str, Any]]) -> int:
    """The number of different solution paths that end with the right answer: the study's primary measure."""
    return distinct_paths([row for row in samples if row["right"]])


def distinct_answers(samples: list[dict[str, Any]]) -> int:
    """The number of different answers; completions without one count for nothing."""
    return len({row["answer"] for row in samples} - {None})


def load(out: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Sampled], list[str]]:
    """The samples by cell, of the problems that every cell has; and the prompts.

    Raises:
        FileError: a damaged file, or no batch that every cell has.
    """
    folder = out / "cells"
    names = list(settings["cells"])
    files = [sorted(path.name for path in (folder / name).glob("[0-9]*.json")) for name in names]
    common = sorted(set.intersection(*map(set, files))) if files else []
    if not common:
        raise FileError(f"{folder}: must hold a batch of every cell, got none")
    cells, prompts = {}, []
    for name in names:
        parts = [_batch(folder / name / file) for file in common]
        samples = [one for part in parts for one in part["samples"]]
        right = np.array([[row["right"] for row in one] for one in samples])
        cells[name] = Sampled(right, samples, [part["mixes"] for part in parts])
        prompts = [prompt for part in parts for prompt in part["prompts"]]
    return cells, prompts


def _batch(path: Path) -> dict[str, Any]:
    content = read_json(path)
    for name, kind in {"prompts": list, "samples": list, "mixes": dict}.items():
        if not isinstance(content.get(name), kind):
            raise FileError(f"{path}: {name} must be there, got {content.get(name)!r:.80}")
    return content


# An arm -----------------------------------------------------------------------------------------------------------


def ks_of(samples: int) -> list[int]:
    """1, 2, 4 and so on, up to the samples of a problem."""
    return [2**i for i in range(samples.bit_length()) if 2**i <= samples]


def figures(cell: Sampled) -> dict[str, Any]:
    """All figures of a cell. Intervals are of 95 %, over problems; "interval" is that of pass@1."""
    problems, samples = cell.right.shape
    correct = cell.right.sum(1)
    out: dict[str, Any] = {"problems": problems, "samples": samples}
    for k in ks_of(samples):
        values = pass_at_k(samples, correct, k)
        out[f"pass@{k}"] = float(values.mean())
        out["interval" if k == 1 else f"pass@{k}_interval"] = list(bootstrap_interval(values))
    counts = {"right_paths": right_paths, "paths": distinct_paths, "distinct_answers": distinct_answers}
    for name, count in counts.items():
        values = cell.per_problem(count)
        out[name] = float(values.mean())
        out[f"{name}_interval"] = list(bootstrap_interval(values))
    for n in (1, 2, 3):
        shares = [distinct_n([row["text"] for row in rows], n) for rows in cell.samples]
        there = [share for share in shares if share is not None]
        out[f"distinct_{n}"] = float(np.mean(there)) if there else None
    out["logprob"] = cell.per_token("logprob")
    out["entropy"] = cell.per_token("entropy")
    rows = [row for one in cell.samples for row in one]
    out["tokens"] = float(np.mean([row["tokens"] for row in rows]))
    out["ended"] = float(np.mean([row["ended"] for row in rows]))
    out["usable_groups"] = usable_groups(cell.right, min(GROUP, samples))
    out["mixes"] = mix_figures(cell.mixes)
    return out


def mix_figures(mixes: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How far mixes are from their anchors, and which tokens are mixed with which; None where nothing is mixed."""
    cosine = np.array([value for part in mixes for value in part["cosine"]])
    if not len(cosine):
        return None
    anchor = np.array([weights[0] for part in mixes for weights in part["weights"]])
    return {
        "count": len(cosine),
        "cosine": {
            "mean": float(cosine.mean()),
            "min": float(cosine.min()),
            "below_0.95": float((cosine < 0.95).mean()),
        },
        "cosine_quantiles": np.quantile(cosine, QUANTILES).round(6).tolist(),
        "anchor_weight": float(anchor.mean()),
        "anchor_weight_below_0.95": float((anchor < 0.95).mean()),
        "kinds": _kinds(mixes),
    }


def _kinds(mixes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By the anchor's kind: the share of mixed steps, the mean weight of the others, the share of it that stays within
    the kind, and the pairs with the most weight: anchor, other, times, mean weight."""
    steps: dict[str, int] = defaultdict(int)
    moved: dict[str, float] = defaultdict(float)
    within: dict[str, float] = defaultdict(float)
    pairs: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for part in mixes:
        texts = part["texts"]
        for ids, weights in zip(part["ids"], part["weights"], strict=True):
            anchor = texts[str(ids[0])]
            kind = kind_of(anchor)
            steps[kind] += 1
            for one, weight in zip(ids[1:], weights[1:], strict=True):
                other = texts[str(one)]
                moved[kind] += weight
                within[kind] += weight * (kind_of(other) == kind)
                if weight > 0 and one != ids[0]:
                    pairs[kind][anchor, other].append(weight)
    total = sum(steps.values())
    out = {}
    for kind in KINDS:
        if steps[kind]:
            heaviest = sorted(pairs[kind].items(), key=lambda pair: -sum(pair[1]))[:_SHOWN]
            out[kind] = {
                "share": steps[kind] / total,
                "others_weight": moved[kind] / steps[kind],
                "within_kind": within[kind] / moved[kind] if moved[kind] else None,
                "pairs": [[*pair, len(weights), float(np.mean(weights))] for pair, weights in heaviest],
            }
    return out


# The question -----------------------------------------------------------------------------------------------------


def question(cells: Mapping[str, Sampled]) -> dict[str, Any] | None:
    """Does mixing add solution paths at equal accuracy? By the rule of README.md; None without the cells it is of."""
    if not all(name in cells for name in ("ngrpo", *ASKED)):
        return None
    against = {other: compare(cells["ngrpo"], cells[other]) for other in ASKED}
    return {"against": against, "answer": answer(list(against.values()))}


def compare(one: Sampled, other: Sampled) -> dict[str, Any]:
    """Differences one - other, with their intervals, see `paired`."""
    samples = one.right.shape[1]
    measures: dict[str, Callable[[Sampled], np.ndarray]] = {
        "pass@1": lambda cell: cell.right.mean(1),
        f"pass@{samples}": lambda cell: cell.right.any(1).astype(float),
        "right_paths": lambda cell: cell.per_problem(right_paths),
        "paths": lambda cell: cell.per_problem(distinct_paths),
        "distinct_answers": lambda cell: cell.per_problem(distinct_answers),
    }
    return {name: paired(measure(one) - measure(other)) for name, measure in measures.items()}


def paired(differences: np.ndarray) -> list[float]:
    """The mean of differences [problems], and its interval of 95 % by a bootstrap over problems."""
    problems = len(differences)
    shares = np.random.default_rng(0).multinomial(problems, np.full(problems, 1 / problems), size=DRAWS) / problems
    return list(estimate(float(differences.mean()), shares @ differences))


def answer(against: Sequence[Mapping[str, Any]]) -> str:
    """Of the question, by the rule that was written down before the runs."""
    accuracy = [comparison["pass@1"][1:] for comparison in against]
    added = [comparison["right_paths"][1:] for comparison in against]
    if any(low < -EQUAL or high > EQUAL for low, high in accuracy):
        return "no answer: accuracy is not shown to be equal"
    if all(low > 0 for low, _ in added):
        return "yes: it adds paths to both"
    if all(high < 0 for _, high in added):
        return "no: it has fewer paths than both"
    if all(low >= -AS_MANY and high <= AS_MANY for low, high in added):
        return "no: as many paths, to within a quarter of a path"
    return "not told apart"


# Training ---------------------------------------------------------------------------------------------------------


def training_figures(folder: Path) -> dict[str, Any]:
    """What results.json holds of a training study: settings, "before", and its arms, each with its seeds.

    An arm's pass@1 and pass@k are means over seeds of the held-out problems; "interval" is of 95 %, over problems, of
    pass@1, and "against_before" and "against_grpo" are differences, paired over problems, on the seeds that both have.

    Raises:
        FileError: a damaged file, or no study.
    """
    settings = read_json(folder / "settings.json")
    before = _run(folder / "before.json")
    samples = before["samples"]
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for arm in settings["arms"]:
        paths = {seed: folder / "runs" / f"{arm}-{seed}.json" for seed in range(settings["seeds"])}
        found = {seed: _run(path) for seed, path in paths.items() if path.exists()}
        if found:
            runs[arm] = found

    def passes(several: Sequence[Mapping[str, Any]], k: int) -> np.ndarray:
        """[problems]: means over the runs."""
        return np.mean([pass_at_k(samples, np.array(one["correct"]), k) for one in several], axis=0)

    def held_out(several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {"problems": len(before["correct"]), "samples": samples}
        for k in ks_of(samples):
            values = passes(several, k)
            out[f"pass@{k}"] = float(values.mean())
            out["interval" if k == 1 else f"pass@{k}_interval"] = list(bootstrap_interval(values))
        return out

    def against(several: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {f"pass@{k}": paired(passes(several, k) - passes(others, k)) for k in (1, samples)}

    arms = {}
    for arm, by_seed in runs.items():
        several = list(by_seed.values())
        histories = [run["history"] for run in several]
        errors = [error for history in histories for error in history.get("mix/replay_error", [])]
        common = [seed for seed in by_seed if seed in runs.get("grpo", {})]
        arms[arm] = {
            "label": CELLS[arm].label,
            **held_out(several),
            "seeds": {
                seed: {f"pass@{k}": float(passes([run], k).mean()) for k in (1, samples)}
                for seed, run in by_seed.items()
            },
            "against_before": against(several, [before]),
            "replay_error": max(errors) if errors else None,
            "history": {name: np.mean([history[name] for history in histories], 0).tolist() for name in histories[0]},
            "seconds": float(np.mean([run["seconds"] for run in several])),
        }
        if arm != "grpo" and common:
            others = [runs["grpo"][seed] for seed in common]
            arms[arm]["against_grpo"] = against([by_seed[seed] for seed in common], others)
    return {"settings": settings, "before": held_out([before]), "arms": arms}


def _run(path: Path) -> dict[str, Any]:
    content = read_json(path)
    for name, kind in {"samples": int, "correct": list}.items():
        if not isinstance(content.get(name), kind):
            raise FileError(f"{path}: {name} must be there, got {content.get(name)!r:.80}")
    return content


# The file ---------------------------------------------------------------------------------------------------------


def collect(out: Path) -> dict[str, Any]:
    """What results.json holds of a rollout study; its "training" is empty.

    Args:
        out: folder of the study.

    Raises:
        FileError: a file of the study is damaged or missing.
    """
    settings = read_json(out / "settings.json")
    for name in ("model", "commit", "versions", "seed", "cells"):
        if name not in settings:
            raise FileError(f"{out / 'settings.json'}: must hold {name} of a study")
    cells, prompts = load(out, settings)
    arms = {name: {"label": CELLS[name].label} | figures(cell) for name, cell in cells.items()}
    reference = cells["grpo"]
    for name, cell in cells.items():
        if name != "grpo":
            arms[name]["against_grpo"] = compare(cell, reference)
    replay = read_json(out / "replay.json") if (out / "replay.json").exists() else None
    matched = read_json(out / "matched.json") if (out / "matched.json").exists() else None
    mixes = arms["ngrpo"]["mixes"]
    return {
        **{name: settings[name] for name in ("model", "commit", "versions", "seed")},
        "settings": {name: value for name, value in settings.items() if name not in ("cells",)},
        "problems": len(prompts),
        "arms": arms,
        "question": question(cells),
        "matched": matched,
        "training": {},
        "mixes": {name: mixes[name] for name in ("cosine", "anchor_weight")} if mixes else None,
        "replay_error": max(replay["errors"].values()) if replay else None,
        "replay_errors": replay,
    }
