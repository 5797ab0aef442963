"""The example: its task, its estimators, and a miniature of the whole study."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from examples.countdown import evaluate, supervised, task  # noqa: E402
from examples.countdown.__main__ import _arguments, _checkpoint  # noqa: E402
from examples.countdown.model import build_model, build_tokenizer  # noqa: E402

trees = st.recursive(st.integers(1, 12), lambda node: st.tuples(st.sampled_from("+-*"), node, node), max_leaves=5)


@given(trees)
def test_an_equation_survives_rendering_and_parsing(tree: task.Tree) -> None:
    text = task.render(tree)
    parsed = task.parse(text)
    assert task.evaluate(parsed) == task.evaluate(tree) == eval(text)
    assert sorted(task.leaves(parsed)) == sorted(task.leaves(tree))
    assert task.normal_form(parsed) == task.normal_form(tree)
    problem = task.Problem(tuple(task.leaves(tree)), task.evaluate(tree))
    assert task.is_solution(text, problem)
    assert not task.is_solution(text, task.Problem(problem.numbers, problem.target + 1))
    assert not task.is_solution(text, task.Problem(problem.numbers[1:], problem.target))


@given(trees, st.randoms(use_true_random=False))
def test_normal_form_ignores_order_and_nothing_else(tree: task.Tree, rng: random.Random) -> None:
    def swap(node: task.Tree) -> task.Tree:
        if isinstance(node, int):
            return node
        symbol, left, right = node[0], swap(node[1]), swap(node[2])
        return (symbol, right, left) if symbol in "+*" and rng.random() < 0.5 else (symbol, left, right)

    assert task.normal_form(swap(tree)) == task.normal_form(tree)
    if not isinstance(tree, int) and tree[0] == "-":
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
    assert not task.is_solution(text, task.Problem((3, 5), 8))


def test_at_most_once_and_exact() -> None:
    problem = task.Problem((3, 3, 5, 2), 8)
    assert task.is_solution("3 + 5", problem) and task.is_solution("( 3 + 3 + 2 )", problem)
    assert not task.is_solution("5 + 5 - 2", problem)
    assert not task.is_solution("8", problem)
    assert task.normal_form(task.parse("1 + 2")) == task.normal_form(task.parse("( 2 + 1 )"))
    assert task.normal_form(task.parse("4 - ( 1 - 2 )")) == task.normal_form(task.parse("2 + 4 - 1"))
    assert task.normal_form(task.parse("1 - 2")) != task.normal_form(task.parse("2 - 1"))


def test_no_held_out_problem_is_trained_on() -> None:
    held_out = task.held_out_problems(50, 3, 5, seed=0)
    keys = {problem.key for problem in held_out}
    assert len(keys) == 50 and held_out == task.held_out_problems(50, 3, 5, seed=0)
    for problem, equation in itertools.islice(task.training_stream(held_out, 3, 5, "x"), 2000):
        assert problem.key not in keys
        assert task.is_solution(equation, problem)


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
    out = evaluate.summarize([solved, solved], [np.array([1, 3]), np.array([1, 3])], (1,))
    assert out["usable_groups"] == 0.25
    assert out["unique_equations"] == 2
    assert out["pass@1"] == pytest.approx(9 / 32)
    assert out["pass@1_seeds"] == pytest.approx([9 / 32] * 2)
    low, high = out["pass@1_interval"]
    assert low == pytest.approx(1 / 16) and high == pytest.approx(0.5)


def test_sampling_scores_what_the_model_says_and_leaves_the_global_generator_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, tied=False).eval()
    problems = task.held_out_problems(3, 4, 12, seed=0)
    before = torch.get_rng_state()
    first = evaluate.sample_solutions(model, tokenizer, problems, 4, seed=1, name="x")
    assert torch.equal(torch.get_rng_state(), before)
    assert first[0].shape == (3, 4)

    class Solver:
        def generate(self, input_ids: torch.Tensor, num_return_sequences: int, **kwargs: object) -> torch.Tensor:
            good = tokenizer("5 + 3", return_tensors="pt")["input_ids"]
            also = tokenizer("3 + 5", return_tensors="pt")["input_ids"]
            rows = torch.cat([good, also]).repeat(len(input_ids) * num_return_sequences // 2, 1)
            return torch.cat([input_ids.repeat_interleave(num_return_sequences, 0), rows], dim=1)

    eight = [task.Problem((3, 5, 1, 1), 8), task.Problem((3, 5, 1, 1), 9)]
    right, unique = evaluate.sample_solutions(Solver(), tokenizer, eight, 4, seed=0, name="x")  # type: ignore[arg-type]
    assert right.tolist() == [[True] * 4, [False] * 4] and unique.tolist() == [1, 0]


def test_the_supervised_checkpoint_is_reused_unless_its_settings_change(tmp_path: Path, monkeypatch: object) -> None:
    class Arguments:
        out, fresh = tmp_path, False

    settings = {"numbers": 3, "largest": 5, "steps": 2, "tied": True, "seed": 0}
    first = _checkpoint(Arguments, [], settings)  # type: ignore[arg-type]
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert _checkpoint(Arguments, [], settings) == first  # type: ignore[arg-type]
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert _checkpoint(Arguments, [], settings | {"tied": False}) != first  # type: ignore[arg-type]
    Arguments.fresh = True
    _checkpoint(Arguments, [], settings)  # type: ignore[arg-type]
    assert (first / "model.safetensors").stat().st_mtime_ns > written


def test_supervised_training_learns(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    supervised.supervised_checkpoint(tmp_path, [], numbers=2, largest=3, steps=30, tied=False, seed=0)
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
