"""The rollout study: what mixing does to a real model's solutions, without training.

    python -m examples.real_model.study --preset full

Every cell samples the same problems with the same random numbers. A batch of problems in a cell leaves a file, so that
an interrupted study goes on where it was; all cells have a batch before the next one begins, so that one cut short has
the same problems in every cell. The report is written from those files alone (`--report-only`).

The question and its test, written down before the runs, are in examples/real_model/README.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tqdm import tqdm
from transformers.utils import logging

from ngrpo_ops import nearest_neighbors
from ngrpo_ops.files import FileError, read_json, write_json
from ngrpo_ops.integrations.transformers import NeighborMixing
from ngrpo_ops.rollout import reads_table

from ..measure import commit, temperature_of_entropy
from .cells import CELLS, SEED, Cell, excluded_tokens
from .load import NAME, NOTE, ModelUnavailableError, load_model
from .paths import path_of
from .sample import encode, mixes_of, plain_logprobs, replay_error, sample
from .tasks import WORD_PROBLEMS, Problem, Task, task_named

TEMPERATURE = 0.7  # of the paper's rollouts
_MATCHING_ROW = 1_000_000  # the first row of the rollouts that the temperature is matched on: no cell's
_MATCHING_TOLERANCE = 0.01  # of the entropies, relative
_PACKAGES = ("torch", "transformers", "trl", "numpy")


@dataclass(frozen=True)
class Preset:
    """How large a study is.

    Args:
        cells: their names.
        problems, samples: of each cell.
        tokens: of a completion, at most.
        at_once: problems in a batch.
        matching: rollouts of each problem that the temperature is matched on.
        dtype: of the weights.
        replays: problems whose rollouts are made and replayed once more in float32.
    """

    cells: tuple[str, ...]
    problems: int
    samples: int
    tokens: int
    at_once: int
    matching: int
    dtype: str = "bfloat16"
    replays: int = 1


PRESETS = {
    "full": Preset(tuple(CELLS), problems=100, samples=16, tokens=40, at_once=10, matching=1),
    "mixes": Preset(("grpo", "anchor", "ngrpo"), problems=20, samples=16, tokens=40, at_once=10, matching=1),
    "quick": Preset(("grpo", "grpo_matched", "anchor", "ngrpo"), 4, 4, tokens=16, at_once=2, matching=2),
}


class Setting(NamedTuple):
    """What all cells share. mixing: by the cell's name."""

    task: Task
    problems: list[Problem]
    tokenizer: Any
    mixing: dict[str, NeighborMixing]
    preset: Preset


def shared_settings(model: str | None, task: str) -> dict[str, Any]:
    """What a run of either study depends on, beside its preset."""
    return {
        "model": NOTE if model is None else model,
        "task": task,
        "temperature": TEMPERATURE,
        "seed": SEED,
        "commit": commit(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def settings_of(preset: Preset, model: str | None, task: str) -> dict[str, Any]:
    """Everything that a run depends on."""
    return (
        asdict(preset) | {"cells": {name: asdict(CELLS[name]) for name in preset.cells}} | shared_settings(model, task)
    )


def check_settings(now: dict[str, Any], out: Path) -> None:
    """Batches that are in the folder count only if they were made as they would be now. How many there are may differ.

    Raises:
        SystemExit: they were not; the message names the settings.
    """
    path = out / "settings.json"
    now = json.loads(json.dumps(now))
    before = read_json(path) if path.exists() else now
    changed = [name for name in now if name != "problems" and now[name] != before.get(name)]
    if changed:
        raise SystemExit(f"--out {out} holds batches with other settings ({', '.join(changed)}): choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, now, indent=1)


class KnownNeighbors:
    """A neighbor table that was searched before, in the place of NeighborMixing's own. The weights do not change here.

    Args:
        ids: int64 [V, k - 1].
    """

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def refresh(self, embedding: torch.Tensor, progress: Any = None) -> None:
        """Nothing."""


def find_neighbors(preset: Preset, model: Any, tokenizer: Any, path: Path) -> dict[str, Any]:
    """The neighbors that the cells need, searched once in float32, from their file if it is there.

    Returns:
        "excluded": token ids by name, see `excluded_tokens`; "ids": the neighbors [V, n] without these, nearest first.
    """
    if not path.exists():
        table = model.get_input_embeddings().weight.detach().float()
        excluded = excluded_tokens(tokenizer, table)
        configs = [(CELLS[name].excludes, CELLS[name].config(excluded)) for name in preset.cells]
        ids = {}
        for excludes in sorted({excludes for excludes, config in configs if reads_table(config)}):
            most = max(config.k for name, config in configs if name == excludes and reads_table(config))
            allowed = torch.ones(len(table), dtype=torch.bool, device="cpu")
            allowed[excluded[excludes]] = False
            print(f"neighbors of {len(table):,} tokens, {excludes} excluded", flush=True)
            ids[excludes] = nearest_neighbors(table, most - 1, allowed=allowed).ids.tolist()
        write_json(path, {"excluded": excluded, "ids": ids})
    found = read_json(path)
    if not all(isinstance(found.get(name), dict) for name in ("excluded", "ids")):
        raise FileError(f"{path}: must hold neighbors, excluded and ids")
    return found


def prepare(preset: Preset, task: Task, model: Any, tokenizer: Any, out: Path) -> Setting:
    """The problems, and the mixing of every cell."""
    neighbors = find_neighbors(preset, model, tokenizer, out / "neighbors.json")
    mixing = {}
    for name in preset.cells:
        cell = CELLS[name]
        made = NeighborMixing(model, cell.config(neighbors["excluded"]), tokenizer=tokenizer)
        if made.table is not None:
            ids = torch.tensor(neighbors["ids"][cell.excludes], dtype=torch.int64, device="cpu")
            made.table = KnownNeighbors(ids[:, : made.config.k - 1].contiguous())
        mixing[name] = made
    return Setting(task, task.problems(preset.problems, SEED), tokenizer, mixing, preset)


def entropy_at(setting: Setting, name: str, temperature: float) -> float:
    """Mean entropy in nats, over tokens, of the distribution each was drawn from: 0 where it was a forced anchor."""
    total = tokens = 0.0
    count, mixing = setting.preset.matching, setting.mixing[name]
    at_once = setting.preset.at_once * setting.preset.samples // count  # as many rows as a batch of the cells has
    for first in range(0, len(setting.problems), at_once):
        prompts = [problem.prompt for problem in setting.problems[first : first + at_once]]
        rows = _MATCHING_ROW + torch.arange(first * count, (first + len(prompts)) * count, device="cpu")
        batch = encode(setting.tokenizer, prompts)
        rollouts = sample(mixing, batch, count, temperature, setting.preset.tokens, rows)
        total += float(rollouts.emitted_entropy(CELLS[name].forces).sum())
        tokens += int(rollouts.live.sum())
    return total / tokens


def matched(setting: Setting, path: Path) -> float:
    """The temperature at which plain sampling has N-GRPO's entropy, from its file if it is there.

    Raises:
        FileError: the file is damaged.
    """
    if not path.exists():
        wanted = entropy_at(setting, "ngrpo", TEMPERATURE)
        tried: dict[str, float] = {}

        def at(temperature: float) -> float:
            tried[f"{temperature:.4f}"] = entropy_at(setting, "grpo", temperature)
            print(f"matching: {tried[f'{temperature:.4f}']:.4f} of {wanted:.4f} nats at {temperature:.4f}", flush=True)
            return tried[f"{temperature:.4f}"]

        found, entropy = temperature_of_entropy(at, wanted, (0.1 * TEMPERATURE, 1.1 * TEMPERATURE), _MATCHING_TOLERANCE)
        write_json(path, {"temperature": found, "entropy": entropy, "ngrpo_entropy": wanted, "tried": tried})
    temperature = read_json(path).get("temperature")
    if not isinstance(temperature, float):
        raise FileError(f"{path}: temperature must be there, got {temperature!r:.80}")
    return temperature


def batches(preset: Preset, problems: list[Problem]) -> Iterator[tuple[int, list[Problem]]]:
    """Problems that are sampled at once, with the place of the first."""
    for first in range(0, len(problems), preset.at_once):
        yield first, problems[first : first + preset.at_once]


def run_batch(setting: Setting, cell: Cell, name: str, first: int, problems: list[Problem], heat: float) -> dict:
    """The completions of some problems in a cell, scored and measured."""
    begun = time.perf_counter()
    count, mixing, task = setting.preset.samples, setting.mixing[name], setting.task
    rows = torch.arange(first * count, (first + len(problems)) * count, device="cpu")
    batch = encode(setting.tokenizer, [problem.prompt for problem in problems])
    rollouts = sample(mixing, batch, count, heat, setting.preset.tokens, rows)
    logprobs = plain_logprobs(mixing.model, rollouts, count).tolist()
    entropies = rollouts.emitted_entropy(cell.forces).tolist()
    made: list[list[dict[str, Any]]] = []
    for i, problem in enumerate(problems):
        made.append([])
        for row in range(i * count, (i + 1) * count):
            length = int(rollouts.live[row].sum())
            text = setting.tokenizer.decode(rollouts.completions[row, :length], skip_special_tokens=True)
            answer = task.answer(text)
            made[i].append(
                {
                    "text": text,
                    "answer": answer,
                    "right": task.is_right(answer, problem),
                    "path": list(path_of(text)),
                    "tokens": length,
                    "ended": bool(rollouts.ended[row]),
                    "logprob": round(logprobs[row], 4),
                    "entropy": round(entropies[row], 4),
                }
            )
    return {
        "first": first,
        "prompts": [problem.prompt for problem in problems],
        "answers": [problem.answer for problem in problems],
        "samples": made,
        "mixes": mixes_of(setting.tokenizer, mixing.model.get_input_embeddings().weight.detach(), rollouts.record),
        "seconds": time.perf_counter() - begun,
    }


def batch_path(out: Path, name: str, first: int) -> Path:
    return out / "cells" / name / f"{first:04d}.json"


def jobs_of(preset: Preset) -> list[tuple[int, str]]:
    """First problem and cell of every batch, in their order."""
    return [(first, name) for first in range(0, preset.problems, preset.at_once) for name in preset.cells]


def work(setting: Setting, jobs: list[tuple[int, str]], temperature: float, out: Path) -> None:
    """The batches of these jobs, one after the other, each to its file."""
    parts = dict(batches(setting.preset, setting.problems))
    for first, name in jobs:
        cell = CELLS[name]
        made = run_batch(setting, cell, name, first, parts[first], temperature if cell.matched else TEMPERATURE)
        write_json(batch_path(out, name, first), made)


def _worker(preset: Preset, task: str, model: str | None, jobs: list[tuple[int, str]], heat: float, out: Path) -> None:
    """`work` in a process of its own, with one thread: threads that wait for each other lose on a busy machine."""
    quiet()
    loaded = load_model(model, getattr(torch, preset.dtype))
    work(prepare(preset, task_named(task), *loaded, out), jobs, heat, out)


def run(preset: Preset, task: str, model: str | None, out: Path, workers: int) -> None:
    """All that is not there yet: the matched temperature, the batches, the replays.

    Raises:
        RuntimeError: a worker failed.
    """
    loaded = task_named(task), *load_model(model, getattr(torch, preset.dtype))  # before anything is written
    check_settings(settings_of(preset, model, task), out)
    setting = prepare(preset, *loaded, out)
    jobs = jobs_of(preset)
    for name in preset.cells:
        batch_path(out, name, 0).parent.mkdir(parents=True, exist_ok=True)
    for first, name in jobs:
        if batch_path(out, name, first).exists():
            read_json(batch_path(out, name, first))  # damaged: now, and not after the hours of the others
    temperature = matched(setting, out / "matched.json") if "grpo_matched" in preset.cells else TEMPERATURE

    def is_open(job: tuple[int, str]) -> bool:
        return not batch_path(out, job[1], job[0]).exists()

    open_jobs = [job for job in jobs if is_open(job)]
    with tqdm(total=len(jobs), initial=len(jobs) - len(open_jobs), desc="study", unit="batch", smoothing=0.05) as bar:
        if workers == 1:
            for job in open_jobs:
                work(setting, [job], temperature, out)
                bar.update()
        else:
            _in_processes((preset, task, model), open_jobs, temperature, out, workers, bar)
    setting.mixing.clear()
    replay_errors(prepare(preset, task_named(task), *load_model(model), out), out / "replay.json")


def _in_processes(
    setting: tuple[Preset, str, str | None],
    jobs: list[tuple[int, str]],
    temperature: float,
    out: Path,
    workers: int,
    bar: tqdm,
) -> None:
    # A fresh interpreter for each worker: forked ones would share the threads of torch.
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_worker, args=(*setting, jobs[i::workers], temperature, out), daemon=True)
        for i in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes):
            if any(process.exitcode for process in processes):
                break
            time.sleep(2)
            done = sum(batch_path(out, name, first).exists() for first, name in jobs)
            bar.update(bar.initial + done - bar.n)
    finally:
        failed = [process.exitcode for process in processes if process.exitcode]
        for process in processes:  # else they would go on with what they have
            process.terminate()
            process.join()
    if failed:
        raise RuntimeError(f"a worker ended with code {failed[0]}: its message is above")


def replay_errors(setting: Setting, path: Path) -> None:
    """Rollouts of every cell that mixes, replayed; the largest error of each goes to the file, if it is not there."""
    if path.exists():
        return
    prompts = [problem.prompt for problem in setting.problems[: setting.preset.replays]]
    rows = torch.arange(len(prompts) * setting.preset.samples, device="cpu")
    found = {}
    for name, mixing in setting.mixing.items():
        if mixing.config.mixing_rate > 0:
            batch = encode(setting.tokenizer, prompts)
            rollouts = sample(mixing, batch, setting.preset.samples, TEMPERATURE, setting.preset.tokens, rows)
            found[name] = replay_error(mixing, rollouts, TEMPERATURE)
            print(f"replay error in float32, {name}: {found[name]:.1e}", flush=True)
    write_json(path, {"problems": len(prompts), "samples": setting.preset.samples, "errors": found})


def quiet() -> None:
    """One thread, and no talk of the libraries."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


@contextmanager
def as_command(alone: bool, threads: int = 1) -> Iterator[None]:
    """What a study does as a command: it can be stopped, and says in a line what is wrong with what it was given.

    Args:
        alone: in a process of its own, and not where a test calls it.
        threads: of such a process.
    """
    if alone:
        quiet()
        torch.set_num_threads(threads)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on where this was"))
    try:
        yield
    except FileError as error:
        sys.exit(f"{error}\nDelete it, and the same command makes it again.")
    except (ModelUnavailableError, ValueError) as error:
        sys.exit(str(error))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.real_model.study", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--preset", choices=list(PRESETS), default="quick")
    parser.add_argument("--model", help=f"a folder or a hub name; default: {NAME}, dequantized from 4 bits")
    parser.add_argument("--task", default=WORD_PROBLEMS, help="or a task of reasoning-gym, by its name there")
    parser.add_argument("--problems", type=int, help="of each cell, in the place of the preset's")
    parser.add_argument("--out", type=Path, help="folder of the batches; default: runs/real_model/study-<preset>")
    parser.add_argument("--report", type=Path, help="folder of the report; default: <out>/report")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="batches at a time, a thread each")
    parser.add_argument("--report-only", action="store_true", help="run nothing; report what is there")
    given = parser.parse_args(arguments)
    if given.workers < 1:
        parser.error(f"--workers must be at least 1, got {given.workers}")
    at_once = PRESETS[given.preset].at_once
    if given.problems is not None and (given.problems < 1 or given.problems % at_once):
        parser.error(f"--problems must be a multiple of {at_once}, those of a batch, got {given.problems}")
    out = given.out or Path("runs/real_model") / f"study-{given.preset}"
    with as_command(arguments is None):
        if not given.report_only:
            preset = PRESETS[given.preset]
            if given.problems is not None:
                preset = replace(preset, problems=given.problems)
            run(preset, given.task, given.model, out, given.workers)
        elif not (out / "settings.json").exists():
            sys.exit(f"--report-only: there is no study in {out}")
        from .report import write_report

        print(write_report(out, given.report or out / "report"))


if __name__ == "__main__":
    main()
