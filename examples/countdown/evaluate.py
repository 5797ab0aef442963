"""Evaluation on held-out problems: unbiased pass@k, usable groups, distinct solutions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .rl import GROUP, MAX_COMPLETION
from .task import Problem, is_solution, normal_form, parse

_BATCH = 2048


def pass_at_k(samples: int, correct: np.ndarray, k: int) -> np.ndarray:
    """The unbiased estimator 1 - C(n - c, k) / C(n, k) of each problem, as a product that cannot overflow.

    Args:
        samples: n, at least k.
        correct: int [problems], c of the n samples that are right.
        k: attempts.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be within [1, {samples}], the samples of a problem, got {k}")
    miss = np.ones(len(correct))
    for i in range(k):
        miss *= np.clip(samples - correct - i, 0, None) / (samples - i)
    return 1.0 - miss


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over problems."""
    draws = np.random.default_rng(seed).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def sample_solutions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    samples: int,
    seed: int,
    name: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Sample at temperature 1 and score.

    Returns:
        right: bool [problems, samples].
        unique: int [problems], distinct solutions up to the order and grouping of sums and products.
    """
    right = np.zeros((len(problems), samples), dtype=bool)
    unique = np.zeros(len(problems), dtype=int)
    at_once = max(1, _BATCH // samples)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(problems), at_once), desc=f"evaluate {name}", unit="batch", leave=False):
            part = problems[start : start + at_once]
            batch = tokenizer([p.prompt for p in part], return_tensors="pt", return_token_type_ids=False)
            output = model.generate(
                **batch,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=MAX_COMPLETION,
                num_return_sequences=samples,
            )
            texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, problem in enumerate(part):
                answers = texts[i * samples : (i + 1) * samples]
                right[start + i] = [is_solution(text, problem) for text in answers]
                solved = {text for text, ok in zip(answers, right[start + i], strict=True) if ok}
                unique[start + i] = len({normal_form(parse(text)) for text in solved})
    return right, unique


def summarize(right: Sequence[np.ndarray], unique: Sequence[np.ndarray], ks: Sequence[int]) -> dict[str, object]:
    """The metrics of an arm over its seeds: means, and intervals over problems of the mean over seeds."""
    samples = right[0].shape[1]
    out: dict[str, object] = {}
    for k in ks:
        by_seed = np.stack([pass_at_k(samples, r.sum(1), k) for r in right])
        out[f"pass@{k}"] = float(by_seed.mean())
        out[f"pass@{k}_interval"] = bootstrap_interval(by_seed.mean(0))
        out[f"pass@{k}_seeds"] = by_seed.mean(1).tolist()
    groups = np.stack([r[:, : samples - samples % GROUP].reshape(-1, GROUP) for r in right])
    out["usable_groups"] = float((groups.any(-1) & ~groups.all(-1)).mean())
    out["unique_equations"] = float(np.mean(unique))
    return out
