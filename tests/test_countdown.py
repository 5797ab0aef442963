"""The example: its task, its estimators, and a miniature of the whole study."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from examples.countdown import evaluate, study, study_report, supervised, task  # noqa: E402
from examples.countdown.__main__ import _arguments  # noqa: E402
from examples.countdown.arms import ARMS  # noqa: E402
from examples.countdown.model import build_model, build_tokenizer  # noqa: E402
from examples.countdown.task import EQUATION, STEPS, TASKS  # noqa: E402
from ngrpo_ops.integrations.trl import NGRPOConfig  # noqa: E402

trees = st.recursive(st.integers(1, 12), lambda node: st.tuples(st.sampled_from("+-*"), node, node), max_leaves=5)


@given(trees)
def test_an_equation_survives_rendering_and_parsing(tree: task.Tree) -> None:
    text = task.render(tree)
    parsed = task.parse(text)
    assert task.evaluate(parsed) == task.evaluate(tree) == eval(text)
    assert sorted(task.leaves(parsed)) == sorted(task.leaves(tree))
    assert task.normal_form(parsed) == task.normal_form(tree)
    problem = task.Problem(tuple(task.leaves(tree)), task.evaluate(tree))
    assert EQUATION.is_solution(text, problem)
    assert not EQUATION.is_solution(text, task.Problem(problem.numbers, problem.target + 1))
    assert not EQUATION.is_solution(text, task.Problem(problem.numbers[1:], problem.target))


@given(trees, st.randoms(use_true_random=False))
def test_normal_form_ignores_order_and_nothing_else(tree: task.Tree, rng: random.Random) -> None:
    def swap(node: task.Tree) -> task.Tree:
        if isinstance(node, int):
            return node
        symbol, left, right = node[0], swap(node[1]), swap(node[2])
        return (symbol, right, left) if symbol in "+*" and rng.random() < 0.5 else (symbol, left, right)

    assert task.normal_form(swap(tree)) == task.normal_form(tree)
    if not isinstance(tree, int) and tree[0] == "-" and task.evaluate(tree[2]) != 0:  # 1 - (1 - 1) is 1 + (1 - 1)
        assert task.normal_form(("+", tree[1], tree[2])) != task.normal_form(tree)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3 +",
        "+ 3",
        "- 3",
        "3 5",
        "3 ( 5 )",
        "( )",
        "3 / 5",
        "3 ** 5",
        "( 3",
        "x",
        "3 . 5",
        "1_0",
        "3 , 5",
        "012 + 1",
    ],
)
def test_what_is_not_an_equation_earns_nothing(text: str) -> None:
    assert task.parse(text) is None
    assert not EQUATION.is_solution(text, task.Problem((3, 5), 8))


def test_at_most_once_and_exact() -> None:
    problem = task.Problem((3, 3, 5, 2), 8)
    assert EQUATION.is_solution("3 + 5", problem) and EQUATION.is_solution("( 3 + 3 + 2 )", problem)
    assert not EQUATION.is_solution("5 + 5 - 2", problem)
    assert not EQUATION.is_solution("8", problem)
    assert task.normal_form(task.parse("1 + 2")) == task.normal_form(task.parse("( 2 + 1 )"))
    assert task.normal_form(task.parse("4 - ( 1 - 2 )")) == task.normal_form(task.parse("2 + 4 - 1"))
    assert task.normal_form(task.parse("1 - 2")) != task.normal_form(task.parse("2 - 1"))


@pytest.mark.parametrize("name", TASKS)
def test_no_held_out_problem_is_trained_on(name: str) -> None:
    small = dataclasses.replace(TASKS[name], numbers=3, largest=5)
    held_out = small.held_out(50, seed=0)
    keys = {problem.key for problem in held_out}
    assert len(keys) == 50 and held_out == small.held_out(50, seed=0)
    tokenizer = build_tokenizer(small)
    for problem, solution in itertools.islice(small.training(held_out, "x"), 2000):
        assert problem.key not in keys
        assert small.is_solution(solution, problem)
        assert len(solution.split()) < small.max_tokens  # and its end
        assert tokenizer.pad_token_id not in tokenizer(f"{problem.prompt} {solution}")["input_ids"]


# Steps in words ---------------------------------------------------------------------------------------------------


@given(trees, st.randoms(use_true_random=False))
def test_steps_survive_rendering_and_parsing(tree: task.Tree, rng: random.Random) -> None:
    if isinstance(tree, int) or not STEPS.writable(tree):
        return
    text = task.render_steps(tree, rng)
    parsed = task.parse_steps(text)
    assert parsed is not None and task.evaluate(parsed) == task.evaluate(tree)
    assert sorted(task.leaves(parsed)) == sorted(task.leaves(tree))
    problem = task.Problem(tuple(task.leaves(tree)), task.evaluate(tree))
    assert STEPS.is_solution(text, problem)
    assert not STEPS.is_solution(text, task.Problem(problem.numbers[1:], problem.target))
    words = text.split()
    words[5] = str(int(words[5]) + 1)
    assert task.parse_steps(" ".join(words)) is None  # a wrong result


@pytest.mark.parametrize(
    "text",
    [
        "",
        "first 2 plus 1",
        "then 2 plus 1 makes 3",  # does not begin
        "first 2 plus 1 makes 3 first 3 times 2 makes 6",
        "first 2 makes 1 makes 3",
        "first 2 plus 1 plus 3",
        "first 2 plus plus makes 3",
        "first 2 plus 1 makes 3 then 4 times 5 makes 20",  # the 3 is never used
        "first 2 + 1 = 3",
    ],
)
def test_what_are_not_steps_earns_nothing(text: str) -> None:
    assert task.parse_steps(text) is None


def test_steps_may_use_a_result_once() -> None:
    assert task.parse_steps("start 2 and 1 gives 3 now 3 by 3 equals 9") == ("*", ("+", 2, 1), 3)
    assert not STEPS.is_solution("start 2 and 1 gives 3 now 3 by 3 equals 9", task.Problem((2, 1, 4), 9))
    assert STEPS.is_solution("start 2 and 1 gives 3 now 3 by 3 equals 9", task.Problem((2, 1, 3), 9))


# Estimates --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_solution(case: tuple[int, int, int]) -> None:
    n, c, k = case
    outcomes = [True] * c + [False] * (n - c)
    subsets = list(itertools.combinations(outcomes, k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert evaluate.pass_at_k(n, np.array([c]), k)[0] == pytest.approx(expected, abs=1e-12)
    assert expected == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k))


def test_pass_at_k_names_a_k_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"k must be within \[1, 4\]"):
        evaluate.pass_at_k(4, np.array([1]), 5)


def test_summary_counts_usable_groups_and_averages_seeds() -> None:
    solved = np.zeros((2, 16), dtype=bool)
    solved[0, :8] = True  # one group all right, one all wrong
    solved[1, 3] = True  # one usable group, one not
    run = evaluate.Samples(solved, np.array([1, 3]), np.array([2.0, 4.0]))
    out = evaluate.summarize([run, run], (1,))
    assert out["usable_groups"] == 0.25
    assert out["unique_equations"] == 2 and out["first_divergence"] == 3
    assert out["pass@1"] == pytest.approx(9 / 32)
    assert out["pass@1_seeds"] == pytest.approx([9 / 32] * 2)
    low, high = out["pass@1_interval"]
    assert low == pytest.approx(1 / 16) and high == pytest.approx(0.5)


def test_sampling_scores_what_the_model_says_and_leaves_the_global_generator_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = build_tokenizer(EQUATION)
    model = build_model(tokenizer, tied=False).eval()
    problems = EQUATION.held_out(3, seed=0)
    before = torch.get_rng_state()
    first = evaluate.sample_solutions(model, tokenizer, EQUATION, problems, 4, seed=1, name="x")
    assert torch.equal(torch.get_rng_state(), before)
    assert first.right.shape == (3, 4)

    class Solver:
        def generate(self, input_ids: torch.Tensor, num_return_sequences: int, **kwargs: object) -> torch.Tensor:
            good = tokenizer("5 + 3", return_tensors="pt")["input_ids"]
            also = tokenizer("3 + 5", return_tensors="pt")["input_ids"]
            rows = torch.cat([good, also]).repeat(len(input_ids) * num_return_sequences // 2, 1)
            return torch.cat([input_ids.repeat_interleave(num_return_sequences, 0), rows], dim=1)

    eight = [task.Problem((3, 5, 1, 1), 8), task.Problem((3, 5, 1, 1), 9)]
    found = evaluate.sample_solutions(Solver(), tokenizer, EQUATION, eight, 4, seed=0, name=None)  # type: ignore[arg-type]
    assert found.right.tolist() == [[True] * 4, [False] * 4] and found.unique.tolist() == [1, 0]
    assert found.divergence.tolist() == [0.0, 0.0]  # 5 + 3 and 3 + 5 take turns


def test_first_divergence() -> None:
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4], [5, 5, 5], [5, 5, 5], [1, 2, 3], [2, 2, 3], [7, 7, 7]])
    assert evaluate.first_divergence(tokens) == pytest.approx((2 + 3 + 0) / 3)


def test_the_supervised_checkpoint_is_reused_unless_its_settings_change(tmp_path: Path) -> None:
    small = dataclasses.replace(EQUATION, numbers=3, largest=5)
    settings = {"steps": 2, "tied": True, "fresh": False}
    first, _ = supervised.cached_checkpoint(tmp_path, small, [], **settings)  # type: ignore[arg-type]
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert supervised.cached_checkpoint(tmp_path, small, [], **settings)[0] == first  # type: ignore[arg-type]
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert supervised.cached_checkpoint(tmp_path, small, [], **settings | {"tied": False})[0] != first  # type: ignore[arg-type]
    assert supervised.cached_checkpoint(tmp_path, STEPS, [], **settings)[0] != first  # type: ignore[arg-type]
    supervised.cached_checkpoint(tmp_path, small, [], **settings | {"fresh": True})  # type: ignore[arg-type]
    assert (first / "model.safetensors").stat().st_mtime_ns > written


def test_supervised_training_learns(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    small = dataclasses.replace(EQUATION, numbers=2, largest=3)
    supervised.supervised_checkpoint(tmp_path, small, [], steps=30, tied=False, seed=0)
    losses = [float(part.split("]")[0]) for part in capfd.readouterr().err.split("loss=")[1:]]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--seeds", "0"),
        ("--steps", "0"),
        ("--rate", "2"),
        ("--arms", "ppo"),
        ("--k", "0"),
        ("--k", "110"),
        ("--out", __file__),
        ("--out", f"{__file__}/inside"),
    ],
)
def test_bad_arguments_name_themselves(
    argument: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["countdown", argument, value])
    with pytest.raises(SystemExit):
        _arguments()
    assert argument in capsys.readouterr().err


@pytest.mark.slow
def test_the_study_in_miniature(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.countdown", "--quick", "--out", str(tmp_path)]
    run = subprocess.run(
        [*command, "--arms", "grpo", "ngrpo", "anchor", "--seeds", "2"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "N-GRPO" in run.stdout and "pass@16" in run.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["arms"]) == ["supervised", "grpo", "ngrpo", "anchor"]
    for name, arm in results["arms"].items():
        assert 0 <= arm["pass@1"] <= arm["pass@16"] <= 1
        if name != "supervised":
            assert len(arm["history"]) == 2 and len(arm["history"][0]["reward"]) == 3
    assert max(results["arms"]["ngrpo"]["history"][0]["mix/replay_error"]) < 1e-5
    assert (tmp_path / "countdown.png").read_bytes().startswith(b"\x89PNG")


# The study --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_name", TASKS)
@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_configuration(name: str, task_name: str) -> None:
    fields = ARMS[name].fields(TASKS[task_name])
    if fields is None:
        assert name.startswith("grpo")
        return
    config = NGRPOConfig("unused", use_cpu=True, bf16=False, **fields).mixing()
    assert (config.allowed_token_ids is not None) == ARMS[name].words_only
    if ARMS[name].words_only:
        tokens = build_tokenizer(TASKS[task_name]).convert_ids_to_tokens(list(config.allowed_token_ids or ()))
        assert not any(token.isdecimal() or token.startswith("<") for token in tokens)


def test_a_study_cut_short_has_every_arm_of_the_seeds_it_has() -> None:
    preset = study.PRESETS["full"]
    jobs = study.jobs_of(preset)
    planned = [len(preset.seeds_of(arm)) for arms in preset.arms.values() for arm in arms]
    assert len(jobs) == len(set(jobs)) == sum(planned) == 222
    primary = [job for job in jobs if job.arm in study.PRIMARY]
    assert primary == jobs[: len(primary)]
    for part in (primary, jobs[len(primary) :]):
        assert [job.seed for job in part] == sorted(job.seed for job in part)
        assert {job.task for job in part if job.seed == 0} == set(TASKS)


def test_a_replication_shares_no_seeds_and_hardly_a_problem_with_the_study_it_repeats() -> None:
    first, second = study.PRESETS["full"], study.PRESETS["replication"]
    assert {arm for arms in second.arms.values() for arm in arms} == set(study.PRIMARY)
    assert not {job.seed for job in study.jobs_of(first)} & {job.seed for job in study.jobs_of(second)}
    for name in TASKS:
        problems = [{problem.key for problem in preset.held_out(name)} for preset in (first, second)]
        assert len(problems[0] & problems[1]) < 0.05 * first.problems


def runs(folder: Path, rng: np.random.Generator, after: dict[str, tuple[float, float]], seeds: int) -> dict:
    """A task's files, with samples of arms that solve a share `easy` of easy problems and `hard` of the others."""
    problems, samples = 40, 16

    def counts(easy: float, hard: float, of: int) -> list[int]:
        return [int(rng.binomial(of, easy if i < problems // 2 else hard)) for i in range(problems)]

    def write(path: Path, easy: float, hard: float, of: int, **more: object) -> None:
        rest = {"usable_groups": 0.5, "unique": [1] * problems, "divergence": [2.0] * problems}
        study._write(path, {"samples": of, "correct": counts(easy, hard, of), **rest, **more})

    write(folder / "supervised.json", 0.1, 0.1, 4 * samples)
    history = {"reward": [0.1] * 12, "usable_groups": [0.5] * 12, "entropy": [1.0] * 12, "num_tokens": [9.0] * 12}
    for arm, shares in after.items():
        for seed in range(seeds):
            write(folder / arm / f"{seed}.json", *shares, samples, seed=seed, history=history, seconds=1.0)
    return study_report.load(folder, dict.fromkeys(after, range(seeds)), samples)


def test_the_primary_question_is_answered_as_written(tmp_path: Path) -> None:
    """Arms that trade less, more, and the same, by construction."""
    rng = np.random.default_rng(0)
    much, little = (0.7, 0.005), (0.7, 0.08)  # pass@1 rises alike, pass@16 falls much, and little
    for name, ours, others, expected in (
        ("less", little, much, "yes"),
        ("more", much, little, "no:"),
        ("same", much, much, "not told apart"),
        ("none", (0.1, 0.1), much, "no answer"),
    ):
        arms = runs(tmp_path / name, rng, {"grpo": others, "anchor": others, "ngrpo": ours}, seeds=4)
        against = [study_report.compare(arms, "ngrpo", other, level=0.975) for other in ("grpo", "anchor")]
        assert study_report.answer(against, 4).startswith(expected), name
        assert study_report.answer(against, 5) == "incomplete: 4 of 5 seeds"
    mixed = runs(tmp_path / "mixed", rng, {"grpo": much, "anchor": little, "ngrpo": little}, seeds=4)
    against = [study_report.compare(mixed, "ngrpo", other) for other in ("grpo", "anchor")]
    assert study_report.answer(against, 4) == "not told apart"


def test_runs_are_paired_by_their_seeds(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    runs(tmp_path, rng, {"grpo": (0.6, 0.05), "ngrpo": (0.6, 0.05)}, seeds=4)
    (tmp_path / "ngrpo" / "1.json").unlink()
    (tmp_path / "ngrpo" / "9.json").write_text("of another study")
    arms = study_report.load(tmp_path, {"grpo": range(4), "ngrpo": range(4)}, 16)
    assert arms["ngrpo"].seeds == [0, 2, 3]
    found = study_report.compare(arms, "ngrpo", "grpo")
    rows = [0, 2, 3]
    difference = arms["ngrpo"].pass_at[1] - arms["grpo"].pass_at[1][rows]
    assert found["seeds"] == 3 and found["pass@1"].value == pytest.approx(difference.mean())


def test_a_cost_without_gain_is_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    arms = runs(tmp_path, rng, {"grpo": (0.7, 0.005), "ngrpo": (0.11, 0.1)}, seeds=3)
    assert study_report.compare(arms, "ngrpo", "grpo")["cost"] is None
    assert study_report.costs_of(arms, "ngrpo") == "no gain" != study_report.costs_of(arms, "grpo")


def test_runs_of_other_settings_are_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = study.PRESETS["quick"]
    study.check_settings(preset, tmp_path)
    study.check_settings(dataclasses.replace(preset, seeds=9, arms={"equation": ("grpo", "topk")}), tmp_path)
    with pytest.raises(SystemExit, match="samples"):
        study.check_settings(dataclasses.replace(preset, samples=32), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("examples.countdown.rl.LEARNING_RATE", 1.0)
        with pytest.raises(SystemExit, match="learning_rate"):
            study.check_settings(preset, tmp_path)
    monkeypatch.setitem(ARMS, "topk", ARMS["gumbel"])
    study.check_settings(preset, tmp_path)
    with pytest.raises(SystemExit, match="arm equation/topk"):
        study.check_settings(dataclasses.replace(preset, arms={"equation": ("topk",)}), tmp_path)


def test_intervals_are_paired_and_cover_the_difference(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arms = runs(tmp_path, rng, {"grpo": (0.6, 0.05), "ngrpo": (0.5, 0.05)}, seeds=6)
    found = study_report.compare(arms, "ngrpo", "grpo")
    assert found["pass@1"].low < -0.05 < found["pass@1"].high < 0  # of problems half differ by 0.1
    # Problems that differ much and arms that do not: the pairing is what makes the interval narrow.
    both = np.concatenate([np.zeros((3, 50)), np.ones((3, 50))], axis=1)
    draws = study_report.Draws.of(100, 3)
    for name in ("seeds", "problems"):
        assert np.allclose(getattr(draws, name).sum(1), 1)
    twins = {"supervised": arms["supervised"], "one": arms["ngrpo"], "other": arms["ngrpo"]}
    assert study_report.compare(twins, "one", "other")["cost"] == (0, 0, 0)  # the same draws for both
    assert np.std(draws.means(both - both + 0.1)) < 1e-12 and np.std(draws.means(both)) > 0.04


@pytest.mark.parametrize(
    "text", ["", '{"samples": 16, "corr', "[1]", "null", "{}", '{"samples": "16"}', "\0" * 20, None]
)
@pytest.mark.parametrize("name", ["settings", "supervised", "ngrpo/1", "matched"])
def test_a_damaged_file_of_a_study_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str | None
) -> None:
    """Also by a study that goes on: before it runs anything."""
    preset = dataclasses.replace(study.PRESETS["quick"], arms={"equation": ("ngrpo", "grpo_matched")})
    folder = tmp_path / "equation"
    runs(folder, np.random.default_rng(0), {"ngrpo": (0.5, 0.1)}, seeds=2)
    study.check_settings(preset, tmp_path)
    path = tmp_path / "settings.json" if name == "settings" else folder / f"{name}.json"
    path.unlink(missing_ok=True)
    path.mkdir() if text is None else path.write_text(text)
    monkeypatch.setattr(study, "prepare", lambda task, preset, out: out)
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *a, **k: nullcontext(mock.Mock()))
    with pytest.raises(SystemExit, match=re.escape(f"{path}: ")):
        monkeypatch.setattr(sys, "argv", ["study.py", "--out", str(tmp_path), "--workers", "1"])
        monkeypatch.setitem(study.PRESETS, "quick", preset)
        if name == "supervised":  # read by the report
            monkeypatch.setattr(study, "run", lambda *arguments: None)
        study.main()


@pytest.mark.slow
def test_the_big_study_in_miniature_and_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "examples/countdown/study.py", "--preset", "quick", "--out", str(tmp_path / "runs")]

    def run() -> str:
        done = subprocess.run([*command, "--workers", "1"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    report = Path(run().splitlines()[-1])
    text = report.read_text()
    for name in ("trade.png", "differences.png", "training.png", "mixes.png"):
        assert f"]({name})" in text and (report.parent / name).read_bytes().startswith(b"\x89PNG")
    every = list(csv.DictReader((report.parent / "seeds.csv").open()))
    assert len(every) == 2 + len(study.jobs_of(study.PRESETS["quick"]))
    counts = list(csv.DictReader((report.parent / "correct.csv").open()))
    for mean, count in zip(every, counts, strict=True):
        right = [int(count[str(problem)]) for problem in range(study.PRESETS["quick"].problems)]
        assert count["seed"] == mean["seed"]
        assert float(mean["pass@1"]) == pytest.approx(np.mean(right) / int(count["samples"]), abs=1e-4)
    kept, lost = tmp_path / "runs/steps/ngrpo/0.json", tmp_path / "runs/steps/ngrpo/1.json"
    before, again = kept.stat().st_mtime_ns, json.loads(lost.read_text())
    lost.unlink()
    run()
    assert kept.stat().st_mtime_ns == before
    now = json.loads(lost.read_text())
    assert {**now, "seconds": 0} == {**again, "seconds": 0}  # the same run, bit for bit
