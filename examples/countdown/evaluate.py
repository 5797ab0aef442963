"""Evaluation on held-out problems: unbiased pass@k, usable groups, distinct solutions, first divergence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..measure import bootstrap_interval, pass_at_k, usable_groups
from .rl import GROUP
from .task import Problem, Task, normal_form

_BATCH = 2048


class Samples(NamedTuple):
    """What a model answered.

    right: bool [problems, samples].
    unique: int [problems], distinct solutions up to the order and grouping of sums and products.
    divergence: float [problems], the token, from 0, at which two samples of a problem first differ; mean over pairs.
    """

    right: np.ndarray
    unique: np.ndarray
    divergence: np.ndarray


def sample_solutions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    problems: Sequence[Problem],
    samples: int,
    seed: int,
    name: str | None,
) -> Samples:
    """Sample at temperature 1, without mixing, and score. `name` is the progress bar's; None: no bar."""
    right = np.zeros((len(problems), samples), dtype=bool)
    unique = np.zeros(len(problems), dtype=int)
    divergence = np.full(len(problems), np.nan)
    at_once = max(1, _BATCH // samples)
    batches = range(0, len(problems), at_once)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for start in tqdm(batches, desc=f"evaluate {name}", unit="batch", leave=False, disable=name is None):
            part = problems[start : start + at_once]
            batch = tokenizer([p.prompt for p in part], return_tensors="pt", return_token_type_ids=False)
            output = model.generate(
                **batch,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=task.max_tokens,
                num_return_sequences=samples,
            )
            tokens = output[:, batch["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for i, problem in enumerate(part):
                rows = slice(i * samples, (i + 1) * samples)
                answers = texts[rows]
                right[start + i] = [task.is_solution(text, problem) for text in answers]
                solved = {text for text, ok in zip(answers, right[start + i], strict=True) if ok}
                unique[start + i] = len({normal_form(task.read(text)) for text in solved})
                divergence[start + i] = first_divergence(tokens[rows])
    return Samples(right, unique, divergence)


def first_divergence(tokens: torch.Tensor) -> float:
    """Of neighboring pairs of [samples, length]: the mean place of the first token that differs; those that are the
    same throughout count as the length."""
    a, b = tokens[:-1:2], tokens[1::2]
    differ = a != b
    first = torch.where(differ.any(1), differ.int().argmax(1), tokens.shape[1])
    return first.double().mean().item()


def summarize(runs: Sequence[Samples], ks: Sequence[int]) -> dict[str, object]:
    """The metrics of an arm over its seeds: means, and intervals over problems of the mean over seeds."""
    samples = runs[0].right.shape[1]
    out: dict[str, object] = {}
    for k in ks:
        by_seed = np.stack([pass_at_k(samples, run.right.sum(1), k) for run in runs])
        out[f"pass@{k}"] = float(by_seed.mean())
        out[f"pass@{k}_interval"] = bootstrap_interval(by_seed.mean(0))
        out[f"pass@{k}_seeds"] = by_seed.mean(1).tolist()
    out["usable_groups"] = float(np.mean([usable_groups(run.right, GROUP) for run in runs]))
    out["unique_equations"] = float(np.mean([run.unique for run in runs]))
    out["first_divergence"] = float(np.mean([run.divergence for run in runs]))
    return out
