"""The study: does mixing soften what reinforcement learning does to pass@k? Arms, controls, seeds, report.

    python examples/countdown/study.py --preset full

Every run, an arm on a task with a seed, leaves a file, so that an interrupted study goes on where it was. The report
is written from those files alone (`--report-only`). A run repeats bit for bit on the same kind of processor; on another
one rounding differs, and so do single runs.

The primary question and its test, written down before the runs:

    Reinforcement learning gains pass@1 and loses pass@64. Does N-GRPO lose less pass@64 per point of pass@1 gained than
    GRPO, and than the anchor-only control (k = 1)?

    cost(arm) = (pass@64 before - pass@64 after) / (pass@1 after - pass@1 before), means over held-out problems and
    seeds. On each task: "yes" if the intervals of both cost(N-GRPO) - cost(GRPO) and cost(N-GRPO) - cost(anchor only)
    lie below 0, "no" if both lie above, else "not told apart". The intervals are of 97.5 % each (95 % over the two
    tasks), percentiles of a paired bootstrap: held-out problems and seeds are drawn with replacement, the same for all
    arms. Where an arm gains no pass@1 in more than 1 % of the draws, its cost has no meaning, and that is the answer.
    The primary arms have 12 seeds, the others 10. The question, this rule and 20 seeds were committed before the first
    run; seeds, and the arms of the second task, were cut for time after six of the runs, none of whose results had been
    looked at.

    The answer was "not told apart" on both tasks. `--preset replication` asks the same again by the same rule, of
    checkpoints, held-out problems (400, 5 of them of the first 200 too) and seeds (12) of its own, primary arms only.
    That was committed before its first run, with 16 seeds; these were cut for time after four runs, none of whose
    results had been looked at. Both answers stand, whatever they are.

All else in the report is secondary: intervals of 95 % of differences from GRPO, not corrected for their number.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
from tqdm import tqdm

from examples.countdown.arms import ARMS
from examples.countdown.runs import read_matched, read_run
from examples.countdown.task import TASKS, Problem, Task
from examples.measure import temperature_of_entropy, usable_groups
from ngrpo_ops import MixingConfig, selective_log_softmax
from ngrpo_ops.files import FileError, read_json, write_json

PRIMARY = ("grpo", "anchor", "ngrpo")


@dataclass(frozen=True)
class Preset:
    """How large a study is.

    Args:
        arms: by task.
        primary_seeds, seeds: how many, of the arms of the primary question and of the others.
        supervised_steps: by task.
        steps: of reinforcement learning.
        rollouts: of the checkpoint, for the matched temperature and the picture of the mixes.
        problems, samples: of the evaluation. The checkpoint is sampled four times as often, as all arms share it.
        first_seed: of each arm, and the seed of the checkpoint and of the held-out problems.
    """

    arms: dict[str, tuple[str, ...]]
    primary_seeds: int
    seeds: int
    supervised_steps: dict[str, int]
    steps: int = 100
    rollouts: int = 2048
    problems: int = 200
    samples: int = 64
    first_seed: int = 0

    def seeds_of(self, arm: str) -> range:
        count = self.primary_seeds if arm in PRIMARY else self.seeds
        return range(self.first_seed, self.first_seed + count)

    def held_out(self, task: str) -> list[Problem]:
        return TASKS[task].held_out(self.problems, seed=self.first_seed)


_STEPS_ARMS = (*PRIMARY, "grpo_matched", "words_only")
PRESETS = {
    "full": Preset({"equation": tuple(ARMS), "steps": _STEPS_ARMS}, 12, 10, {"equation": 900, "steps": 900}),
    "replication": Preset(
        {"equation": PRIMARY, "steps": PRIMARY}, 12, 0, {"equation": 900, "steps": 900}, problems=400, first_seed=12,
    ),
    "quick": Preset(
        {"equation": (*PRIMARY, "grpo_matched"), "steps": (*PRIMARY, "words_only")},
        2, 1, {"equation": 20, "steps": 20}, steps=2, rollouts=64, problems=8, samples=16,
    ),
}  # fmt: skip


class Job(NamedTuple):
    task: str
    arm: str
    seed: int


def jobs_of(preset: Preset) -> list[Job]:
    """The primary arms first, and of these and the others seed by seed, so that a study cut short is balanced."""
    every = [
        Job(task, arm, seed) for task, arms in preset.arms.items() for arm in arms for seed in preset.seeds_of(arm)
    ]
    return sorted(every, key=lambda job: (job.arm not in PRIMARY, job.seed))


def _quiet(threads: int) -> None:
    import warnings

    import transformers

    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _write(path: Path, value: Any) -> None:
    """All of it or nothing, should the study be stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)


def _evaluated(model: Any, task: Any, held_out: list[Problem], samples: int, seed: int) -> dict[str, Any]:
    from examples.countdown.evaluate import sample_solutions
    from examples.countdown.model import build_tokenizer
    from examples.countdown.rl import GROUP

    result = sample_solutions(model, build_tokenizer(task), task, held_out, samples, seed=seed, name=None)
    return {
        "samples": samples,
        "correct": result.right.sum(1).tolist(),
        "usable_groups": usable_groups(result.right, GROUP),
        "unique": result.unique.tolist(),
        "divergence": [round(value, 3) for value in result.divergence],
    }


def run_job(job: Job, checkpoint: Path, preset: Preset, temperature: float, path: Path) -> float:
    """One arm, one seed, from the checkpoint to its file. The seconds it took."""
    from examples.countdown.rl import train_arm

    _quiet(threads=1)
    begun = time.perf_counter()
    task = TASKS[job.task]
    held_out = preset.held_out(job.task)
    with tempfile.TemporaryDirectory() as scratch:
        model, history = train_arm(
            task,
            checkpoint,
            held_out,
            Path(scratch),
            mixing=ARMS[job.arm].fields(task),
            steps=preset.steps,
            seed=job.seed,
            temperature=temperature,
        )
    # Evaluation draws another stream for every seed, and the same for all arms of one.
    result = _evaluated(model, task, held_out, preset.samples, seed=1000 + job.seed)
    seconds = time.perf_counter() - begun
    _write(path, job._asdict() | result | {"history": history, "temperature": temperature, "seconds": seconds})
    return seconds


def emitted_entropy(checkpoint: Path, task: Task, config: MixingConfig, temperature: float, rollouts: int) -> float:
    """Mean entropy in nats, over tokens of rollouts of the checkpoint, of the distribution each was drawn from: 0 where
    it was a forced anchor."""
    from transformers import AutoModelForCausalLM

    from examples.countdown.model import build_tokenizer
    from ngrpo_ops.integrations.transformers import NeighborMixing

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = build_tokenizer(task)
    stream = task.training([], "entropy")
    prompts = [next(stream)[0].prompt for _ in range(rollouts)]
    batch = tokenizer(prompts, return_tensors="pt", return_token_type_ids=False)
    mixing = NeighborMixing(model, config, tokenizer=tokenizer)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        sequences, record = mixing.generate(
            **batch, do_sample=True, temperature=temperature, top_k=0, max_new_tokens=task.max_tokens
        )
        with mixing.replay(record):
            logits = model(input_ids=sequences).logits
    first = batch["input_ids"].shape[1]
    _, entropy = selective_log_softmax(
        logits[:, first - 1 : -1], sequences[:, first:], temperature=temperature, return_entropy=True
    )
    ended = (sequences[:, first:] == tokenizer.eos_token_id).int()
    answer = ended.cumsum(1) - ended == 0  # the end itself is a token of it
    return float(entropy.masked_fill(record.gate, 0.0)[answer].mean())


def matched_temperature(checkpoint: Path, task: Task, rollouts: int) -> dict[str, float]:
    """The temperature at which GRPO's rollouts of the checkpoint have the entropy of N-GRPO's at 1, by bisection."""
    from ngrpo_ops.integrations.trl import NGRPOConfig

    config = NGRPOConfig("unused", use_cpu=True, bf16=False, **ARMS["ngrpo"].fields(task)).mixing()
    wanted = emitted_entropy(checkpoint, task, config, 1.0, rollouts)
    plain = replace(config, mixing_rate=0.0)
    temperature, found = temperature_of_entropy(
        lambda tried: emitted_entropy(checkpoint, task, plain, tried, rollouts), wanted
    )
    return {"temperature": temperature, "entropy": found, "ngrpo_entropy": wanted}


def prepare(task_name: str, preset: Preset, out: Path) -> Path:
    """The task's checkpoint, its evaluation and the matched temperature, from their files where they are there."""
    from transformers import AutoModelForCausalLM

    from examples.countdown.supervised import cached_checkpoint

    task = TASKS[task_name]
    held_out = preset.held_out(task_name)
    checkpoint, _ = cached_checkpoint(
        out / "supervised",
        task,
        held_out,
        steps=preset.supervised_steps[task_name],
        tied=False,
        fresh=False,
        seed=preset.first_seed,
    )
    path = out / task_name / "supervised.json"
    if not path.exists():
        model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        parts = [_evaluated(model, task, held_out, preset.samples, seed) for seed in range(996, 1000)]
        # Distinct solutions are of as many samples as the arms': their number grows with that of samples.
        merged = {name: np.mean([part[name] for part in parts], axis=0).tolist() for name in parts[0]}
        _write(
            path, merged | {name: np.sum([part[name] for part in parts], 0).tolist() for name in ("samples", "correct")}
        )
    path = out / task_name / "matched.json"
    if not path.exists() and any(ARMS[arm].matched for arm in preset.arms[task_name]):
        _write(path, matched_temperature(checkpoint, task, preset.rollouts))
    return checkpoint


def check_settings(preset: Preset, out: Path) -> None:
    """Runs that are in the folder count only if they were made as they would be now; which there are, may differ.

    Raises:
        SystemExit: they were not; the message names the settings.
    """
    from examples.countdown import rl, supervised

    now: dict[str, Any] = asdict(preset) | {
        "group": rl.GROUP,
        "prompts": rl.PROMPTS,
        "learning_rate": rl.LEARNING_RATE,
        "supervised": {"batch": supervised.BATCH, "learning_rate": supervised.LEARNING_RATE},
        "arms": {f"{task}/{arm}": ARMS[arm].fields(TASKS[task]) for task, arms in preset.arms.items() for arm in arms},
    }
    del now["seeds"], now["primary_seeds"]
    now = json.loads(json.dumps(now))
    path = out / "settings.json"
    before = read_json(path) if path.exists() else now
    if not isinstance(before.get("arms"), dict):
        raise FileError(f"{path}: must hold the settings of a study with its arms")
    changed = [name for name in now if name != "arms" and now[name] != before.get(name)]
    both = now["arms"].keys() & before["arms"].keys()
    changed += sorted(f"arm {name}" for name in both if now["arms"][name] != before["arms"][name])
    if changed:
        raise SystemExit(f"--out {out} holds runs with other settings ({', '.join(changed)}): choose another folder")
    _write(path, now | {"arms": before["arms"] | now["arms"]})


def run(preset: Preset, out: Path, workers: int) -> None:
    """All runs that are not there yet."""
    check_settings(preset, out)
    checkpoints = {task: prepare(task, preset, out) for task in preset.arms}
    jobs = jobs_of(preset)
    paths = {job: out / job.task / job.arm / f"{job.seed}.json" for job in jobs}
    open_jobs = [job for job in jobs if not paths[job].exists()]
    for path in (path for path in paths.values() if path.exists()):
        read_run(path)  # now, and not after the hours of the others
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on where this was"))
    # A fresh interpreter for each worker: forked ones would share the threads of torch.
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, mp_context=context) as pool,
        tqdm(total=len(jobs), initial=len(jobs) - len(open_jobs), desc="study", unit="run", smoothing=0.05) as bar,
    ):
        futures = {}
        for job in open_jobs:
            temperature = 1.0
            if ARMS[job.arm].matched:
                temperature = read_matched(out / job.task / "matched.json")["temperature"]
            futures[pool.submit(run_job, job, checkpoints[job.task], preset, temperature, paths[job])] = job
        try:
            for future in as_completed(futures):
                future.result()
                bar.set_postfix_str(" ".join(map(str, futures[future])), refresh=False)
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():  # else they would go on with what they have
                worker.terminate()
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="quick")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: runs/study-<preset>")
    parser.add_argument("--report", type=Path, help="folder of report.md and its pictures; default: <out>/report")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    parser.add_argument("--report-only", action="store_true", help="run nothing; report what is there")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers must be at least 1, got {arguments.workers}")
    out = arguments.out or Path("runs") / f"study-{arguments.preset}"
    preset = PRESETS[arguments.preset]
    _quiet(threads=arguments.workers)
    try:
        _study(arguments, preset, out)
    except FileError as error:
        sys.exit(f"{error}\nDelete it, and the same command makes it again.")


def _study(arguments: argparse.Namespace, preset: Preset, out: Path) -> None:
    if arguments.report_only:
        if not (out / "settings.json").exists():
            raise SystemExit(f"--report-only: there are no runs in {out}")
        check_settings(preset, out)
    else:
        run(preset, out, arguments.workers)
    from examples.countdown.study_report import write_report

    checkpoints = {task: prepare(task, preset, out) for task in preset.arms}
    print(write_report(out, arguments.preset, preset, checkpoints, arguments.report or out / "report"))


if __name__ == "__main__":
    main()
