"""The rollout study of a real model: its tasks, paths and figures, and a miniature of it with a tiny model."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import byte_tokenizer, tiny_model

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from examples import measure  # noqa: E402
from examples.real_model import report, results, sample, step_times, study, tasks, train_study  # noqa: E402
from examples.real_model.cells import CELLS, kind_of  # noqa: E402
from examples.real_model.paths import path_of  # noqa: E402
from ngrpo_ops import MixingConfig, selective_log_softmax  # noqa: E402
from ngrpo_ops.files import FileError, read_json, write_json  # noqa: E402
from ngrpo_ops.integrations.transformers import NeighborMixing  # noqa: E402

HERE = ROOT / "examples" / "real_model"


# Tasks and paths ----------------------------------------------------------------------------------------------------


def test_word_problems_repeat_differ_and_are_right() -> None:
    task = tasks.WordProblems()
    problems = task.problems(40, seed=3)
    assert problems == task.problems(40, seed=3) != task.problems(40, seed=4)
    assert problems[:10] == task.problems(10, seed=3), "a study that is cut short has the first of them"
    assert len({problem.prompt for problem in problems}) == 40
    for i, problem in enumerate(problems):
        a, b = (int(word) for word in problem.prompt.replace(".", " ").split() if word.isdecimal())
        assert problem.answer == str(a + b if i % 2 == 0 else a * b)
        assert 2 <= min(a, b) <= max(a, b) <= 9


def test_more_word_problems_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="count must be at most"):
        tasks.WordProblems().problems(10**6, seed=0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 5 = 8 apples.", "8"),
        ("8.0", "8"),
        ("1,200 coins", "1200"),
        ("-2", "-2"),
        ("2.50", "2.5"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_is_the_answer(text: str, answer: str | None) -> None:
    assert tasks.last_number(text) == answer


def test_a_wrong_answer_and_none_are_wrong() -> None:
    task = tasks.WordProblems()
    problem = tasks.Problem("", "8")
    assert task.is_right(task.answer("it is 8."), problem)
    assert not task.is_right(task.answer("8, no, 9"), problem)
    assert not task.is_right(task.answer("eight"), problem)


class _Gym(types.ModuleType):
    """reasoning-gym, as far as it is used here: a task whose answers are numbers, and one of words."""

    class factory:
        DATASETS = ("chain_sum", "spell")

    class _Dataset(list):
        def score_answer(self, answer: str | None, entry: dict) -> float:
            return 1.0 if answer == entry["answer"] else 0.01  # it gives something for trying

    @classmethod
    def create_dataset(cls, name: str, size: int, seed: int) -> Any:
        answers = {"chain_sum": lambda i: str(seed + i), "spell": lambda i: "b c"}[name]
        return cls._Dataset({"question": f"{name} {i}?", "answer": answers(i)} for i in range(size))


def test_a_task_of_reasoning_gym_has_its_own_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", _Gym("reasoning_gym"))
    task = tasks.task_named("chain_sum")
    _, second = task.problems(2, seed=5)
    assert second.prompt == "chain_sum 1?"
    assert task.is_right(task.answer("5 and 1 are 6."), second)
    assert not task.is_right(task.answer("7"), second)
    words = tasks.task_named("spell")
    (problem,) = words.problems(1, seed=0)
    assert words.is_right(words.answer("Let me see.\nAnswer: b c"), problem)
    with pytest.raises(ValueError, match="task must be 'word_problems' or one of chain_sum, spell, got 'sums'"):
        tasks.task_named("sums")


@pytest.mark.parametrize(
    ("texts", "path"),
    [
        (["3 + 5 = 8", "5+3", "$3 plus $5", "5 apples + 3 red apples are 9", "3 \\plus 5", "3 + 5, so 5 + 3"], ["3+5"]),
        (["3 x 4 = 12", "4 × 3", "4 multiplied by 3", "3 bags * 4 coins/bag", "3 \\times 4"], ["3*4"]),
        (["12 / 3 = 4", "12 ÷ 3", "12 divided by 3"], ["12/3"]),
        (["3 + 5 = 8 + 2 = 10", "(3 + 5), then 2 + 8"], ["3+5", "2+8"]),
        (["(3 + 5) * 2", "2 * (5 + 3)"], ["(3+5)*2"]),
        (["Tom has 8 apples.", "", "He buys 5 - no more", "7 of 8", "3 +"], []),
    ],
)
def test_texts_of_one_solution_have_one_path(texts: list[str], path: list[str]) -> None:
    (found,) = {path_of(text) for text in texts}
    assert len(found) == len(path)


def test_paths_tell_solutions_apart() -> None:
    sums = ["3 + 5", "5 - 3", "3 - 5", "3 + 5 + 0", "3 + 5. 8 * 2", "none"]
    texts = [*sums, "3 * 5", "(3 + 5) * 2", "3 + 5 * 2", "5 / 3", "3 / 5"]
    assert len({path_of(text) for text in texts}) == len(texts)


def test_kinds_of_tokens() -> None:
    assert [kind_of(text) for text in (" the", "7", ".", "\n", " x2", "²")] == [
        "word", "digit", "punctuation", "other", "word", "punctuation",
    ]  # fmt: skip


# Estimates ----------------------------------------------------------------------------------------------------------


def test_the_temperature_of_an_entropy() -> None:
    found, entropy = measure.temperature_of_entropy(lambda temperature: temperature**2, 0.36, (0.1, 1.5))
    assert found == pytest.approx(0.6, rel=1e-3) and entropy == found**2
    with pytest.raises(RuntimeError, match=r"no temperature within \[0.5, 1.5\] has the entropy of N-GRPO, 9.000 nats"):
        measure.temperature_of_entropy(lambda temperature: temperature, 9.0)


def sampled(right: list[list[int]], paths: list[list[str]]) -> results.Sampled:
    """A cell of these outcomes and paths, a text and a number of tokens of each."""
    rows = [
        [
            {"right": bool(ok), "path": [path], "answer": str(ok), "text": f"a {path}", "tokens": 2, "ended": True,
             "logprob": -1.0, "entropy": 0.5}
            for ok, path in zip(*problem, strict=True)
        ]
        for problem in zip(right, paths, strict=True)
    ]  # fmt: skip
    mixes = {"ids": [[1, 2]], "weights": [[0.75, 0.25]], "cosine": [0.9], "texts": {"1": " the", "2": "7"}}
    return results.Sampled(np.array(right, dtype=bool), rows, [mixes])


def test_figures_of_a_cell() -> None:
    found = results.figures(sampled([[1, 1, 0, 0], [0, 0, 0, 0]], [["a", "b", "c", "c"], ["a", "a", "a", "a"]]))
    assert found["pass@1"] == 0.25
    assert found["pass@2"] == pytest.approx(5 / 12)
    assert found["pass@4"] == 0.5
    assert found["right_paths"] == 1.0, "two, and none"
    assert found["paths"] == 2.0
    assert found["distinct_answers"] == 1.5
    assert found["usable_groups"] == 0.5
    assert found["interval"] == [0.0, 0.5]
    assert (found["logprob"], found["entropy"]) == (-0.5, 0.25), "of a token"
    assert found["mixes"]["cosine"] == {"mean": 0.9, "min": 0.9, "below_0.95": 1.0}
    assert found["mixes"]["anchor_weight"] == 0.75
    assert found["mixes"]["kinds"] == {
        "word": {"share": 1.0, "others_weight": 0.25, "within_kind": 0.0, "pairs": [[" the", "7", 1, 0.25]]}
    }


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(40) < 0.5  # problems differ much, the cells by one path of each
    right = [[int(not one)] * 4 for one in hard]
    one = sampled(right, [["a", "a", "a", "b"]] * 40)
    other = sampled(right, [["a", "a", "a", "a"]] * 40)
    found = results.compare(one, other)
    assert found["paths"] == pytest.approx([1.0, 1.0, 1.0]), "of the same problems: no interval"
    assert found["pass@1"] == [0.0, 0.0, 0.0]
    value, low, high = found["right_paths"]
    assert low < value < high and value == pytest.approx(1 - hard.mean())


@pytest.mark.parametrize(
    ("accuracy", "paths", "said"),
    [
        ([(-0.04, 0.04), (-0.06, 0.01)], [(1, 2), (1, 2)], "no answer"),
        ([(-0.04, 0.04), (0.0, 0.051)], [(1, 2), (1, 2)], "no answer"),
        ([(-0.04, 0.04)] * 2, [(0.1, 0.2), (0.01, 0.3)], "yes"),
        ([(-0.04, 0.04)] * 2, [(0.1, 0.2), (-0.01, 0.3)], "not told apart"),
        ([(-0.04, 0.04)] * 2, [(-0.4, -0.2), (-0.3, -0.1)], "no: it has fewer"),
        ([(-0.04, 0.04)] * 2, [(-0.2, 0.1), (-0.1, 0.25)], "no: as many"),
        ([(-0.04, 0.04)] * 2, [(-0.2, 0.1), (-0.1, 0.26)], "not told apart"),
    ],
)
def test_the_answer_follows_the_rule(accuracy: list, paths: list, said: str) -> None:
    against = [
        {"pass@1": [0.0, *one], "right_paths": [0.0, *other]} for one, other in zip(accuracy, paths, strict=True)
    ]
    assert results.answer(against).startswith(said)


def test_distinct_n() -> None:
    assert sample.distinct_n(["a b", "a c"], 1) == 0.75
    assert sample.distinct_n(["a b a b"], 2) == pytest.approx(2 / 3)
    assert sample.distinct_n(["a"], 2) is None


# Sampling -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return tiny_model("llama", vocab_size=258, scale=6.0), byte_tokenizer()


@pytest.mark.parametrize("strategy", ["neighbor", "moi"])
def test_what_is_measured_is_what_a_plain_forward_says(tiny: tuple[Any, Any], strategy: str) -> None:
    model, tokenizer = tiny
    forces = strategy == "neighbor"
    config = MixingConfig(mixing_rate=0.5, temperature=9.0 if forces else None, strategy=strategy, k=3,
                          sampler="counter_based")  # fmt: skip
    mixing = NeighborMixing(model, config)
    batch = sample.encode(tokenizer, ["1 + 2", "a longer one"])
    rollouts = sample.sample(mixing, batch, 3, 0.7, 8, torch.arange(6))
    mixing_error = sample.replay_error(mixing, rollouts, 0.7)
    assert mixing_error < 1e-4
    with torch.no_grad():
        positions = (rollouts.mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": rollouts.sequences, "attention_mask": rollouts.mask, "position_ids": positions}
        start = rollouts.record.prompt_length
        plain = selective_log_softmax(model(**inputs).logits[:, start - 1 : -1], rollouts.completions)
        with mixing.replay(rollouts.record):
            logits = model(**inputs).logits[:, start - 1 : -1]
        _, entropy = selective_log_softmax(logits, rollouts.completions, temperature=0.7, return_entropy=True)
    drawn = entropy.masked_fill(rollouts.record.gate, 0.0) if forces else entropy
    expected = (plain * rollouts.live).sum(1)
    assert torch.allclose(sample.plain_logprobs(model, rollouts, 3), expected, atol=1e-3)
    assert torch.allclose(rollouts.emitted_entropy(forces), (drawn * rollouts.live).sum(1), atol=1e-3)
    cosines = sample.cosines(model.get_input_embeddings().weight.detach(), rollouts.record)
    assert torch.allclose(cosines, torch.cat(mixing.mixer.cosines), atol=1e-5)
    rollouts.record.weights.fill_(1 / 3)
    assert sample.replay_error(mixing, rollouts, 0.7) > 100 * mixing_error, "of another rollout"


def test_rows_are_the_same_in_any_batch(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.3, sampler="counter_based"))
    batch = sample.encode(tokenizer, ["1 + 2", "a longer one"])
    both = sample.sample(mixing, batch, 2, 0.7, 6, torch.arange(4))
    second = sample.sample(mixing, {name: rows[1:] for name, rows in batch.items()}, 2, 0.7, 6, torch.arange(2, 4))
    assert torch.equal(both.sequences[2:], second.sequences)


def test_digits_and_special_tokens_are_no_neighbors(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    preset = replace(study.PRESETS["quick"], cells=("ngrpo", "no_digits", "k_8"))
    found = study.find_neighbors(preset, model, tokenizer, tmp_path / "neighbors.json")
    digits = set(tokenizer.convert_tokens_to_ids(list("0123456789")))
    assert set(found["excluded"]["digits"]) == set(found["excluded"]["special"]) | digits
    assert found["excluded"]["special"] == [0, 1]
    ids = {name: np.array(rows) for name, rows in found["ids"].items()}
    assert ids["special"].shape == (258, 7) and ids["digits"].shape == (258, 2)
    assert not np.isin(ids["digits"], found["excluded"]["digits"]).any()
    assert np.isin(ids["special"], list(digits)).any()
    # NeighborMixing would have found the same.
    mixing = NeighborMixing(model, CELLS["ngrpo"].config(found["excluded"]))
    mixing.refresh()
    assert np.array_equal(mixing.neighbor_ids.numpy(), ids["special"][:, :2])


# A miniature --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    for part in tiny:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[Any]:
    """The command, with a study of four cells, two problems in two batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(study.PRESETS, "quick", replace(study.PRESETS["quick"], problems=2, at_once=1, tokens=6))
        patch.setattr(study, "commit", lambda: "some commit")

        def run(out: Path, *arguments: str) -> None:
            study.main(["--model", str(folder), "--out", str(out), "--workers", "1", *arguments])

        yield run


@pytest.fixture(scope="module")
def whole(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that ran from its beginning to its end."""
    out = tmp_path_factory.mktemp("whole") / "study"
    run(out)
    return out


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def cells_of(out: Path) -> dict[str, Any]:
    """What the batches hold, but for their times."""
    files = {str(path.relative_to(out)): read_json(path) for path in sorted(out.glob("cells/*/*.json"))}
    for content in files.values():
        del content["seconds"]
    return files


def test_an_interrupted_study_goes_on_where_it_was(run: Any, whole: Path, tmp_path: Path, monkeypatch: Any) -> None:
    assert len(cells_of(whole)) == 8
    made = []
    real = study.run_batch

    def three(*arguments: Any) -> dict[str, Any]:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(arguments[2:4])
        return real(*arguments)

    monkeypatch.setattr(report, "draw", lambda *_: None)  # the pictures take longer than the study
    monkeypatch.setattr(study, "run_batch", three)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert len(cells_of(tmp_path)) == 3
    again = []
    monkeypatch.setattr(study, "run_batch", lambda *arguments: again.append(arguments[2:4]) or real(*arguments))
    run(tmp_path)
    assert len(again) == 5 and not set(again) & set(made)
    assert cells_of(tmp_path) == cells_of(whole)
    assert read_json(tmp_path / "matched.json") == read_json(whole / "matched.json")


def test_a_miniature_is_reported_from_its_files(run: Any, copied: Path) -> None:
    found = read_json(copied / "report" / "results.json")
    assert (copied / "report" / "report.md").read_text() == report.report(found)
    assert {path.name for path in (copied / "report").glob("*.png")} == {"trade.png", "differences.png", "mixes.png"}
    assert_form(found)
    assert found["commit"] == "some commit" and found["problems"] == 2
    answers = cells_of(copied)
    rows = [row for name in ("0000", "0001") for row in answers[f"cells/ngrpo/{name}.json"]["samples"][0]]
    assert found["arms"]["ngrpo"]["pass@1"] == np.mean([row["right"] for row in rows])
    # Cut short, it is of what every cell has.
    (copied / "cells" / "anchor" / "0001.json").unlink()
    run(copied, "--report-only")
    assert read_json(copied / "report" / "results.json")["arms"]["ngrpo"]["problems"] == 1


def test_other_settings_and_damaged_files_are_named(run: Any, copied: Path, monkeypatch: Any) -> None:
    batch = copied / "cells" / "grpo" / "0000.json"
    batch.write_text(batch.read_text()[:100])
    with pytest.raises(SystemExit, match=r"0000\.json: is no JSON, or cut off"):
        run(copied)
    monkeypatch.setattr(study, "commit", lambda: "another")
    monkeypatch.setattr(study, "TEMPERATURE", 0.8)
    with pytest.raises(SystemExit, match=r"other settings \(temperature, commit\): choose another folder"):
        run(copied)


def assert_form(found: dict[str, Any]) -> None:
    """The form of results.json that everything else reads."""
    assert {"model", "commit", "versions", "seed", "arms", "training", "mixes", "replay_error"} <= found.keys()
    assert {"grpo", "anchor", "ngrpo"} <= found["arms"].keys()
    assert (found["question"] is not None) == ("grpo_matched" in found["arms"])
    for arm in found["arms"].values():
        assert {"pass@1", "interval", "problems", "samples", f"pass@{arm['samples']}"} <= arm.keys()
        low, high = arm["interval"]
        assert low <= arm["pass@1"] <= high
    assert found["mixes"].keys() == {"cosine", "anchor_weight"}
    assert found["mixes"]["cosine"].keys() == {"mean", "min", "below_0.95"}
    assert 0 <= found["replay_error"] < 1e-3


# Training -----------------------------------------------------------------------------------------------------------


def test_training_problems_are_not_held_out() -> None:
    preset = train_study.PRESETS["full"]
    held_out, first = train_study.problems_of(preset, 0)
    again, second = train_study.problems_of(preset, 1)
    assert held_out == again and len(held_out) == 40 and first != second
    assert len(first) == preset.steps * preset.prompts
    assert not {problem.prompt for problem in held_out} & {problem.prompt for problem in [*first, *second]}


def test_the_reward_reads_texts_and_chats() -> None:
    chats = [[{"role": "assistant", "content": text}] for text in ("8", "9")]
    assert train_study.reward(completions=["3 + 5 = 8", "none"], answer=["8", "8"]) == [1.0, 0.0]
    assert train_study.reward(completions=chats, answer=["8", "8"], prompts=[]) == [1.0, 0.0]


def test_a_training_study_goes_on_from_its_last_checkpoint(
    folder: Path, copied: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(study, "commit", lambda: "some commit")
    monkeypatch.setattr(train_study, "_SAVE_STEPS", 1)
    monkeypatch.setitem(train_study.PRESETS, "quick", replace(train_study.PRESETS["quick"], arms=("ngrpo",), tokens=6))

    def run(out: Path) -> dict[str, Any]:
        train_study.main(["--model", str(folder), "--out", str(out)])
        run = read_json(out / "runs" / "ngrpo-0.json")
        return {name: run[name] for name in ("history", "correct")}

    whole = run(tmp_path / "whole")
    assert len(whole["history"]["mix/replay_error"]) == 2 and max(whole["history"]["mix/replay_error"]) < 1e-3
    real = train_study.reward
    steps = []

    def cut(**batch: Any) -> list[float]:
        if len(steps) == 1:
            raise KeyboardInterrupt
        steps.append(batch)
        return real(**batch)

    cut.__name__ = "reward"
    with monkeypatch.context() as patch:
        patch.setattr(train_study, "reward", cut)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut" / "checkpoints" / "ngrpo-0").glob("checkpoint-*")] == [
        "checkpoint-1"
    ]
    assert run(tmp_path / "cut") == whole
    assert not (tmp_path / "cut" / "checkpoints" / "ngrpo-0").exists()
    found = results.training_figures(tmp_path / "cut")
    assert found["arms"]["ngrpo"]["replay_error"] == max(whole["history"]["mix/replay_error"])
    assert found["arms"]["ngrpo"]["pass@1"] == np.mean(whole["correct"]) / 4
    # Its figures stand beside those of the rollout study, also when that one is reported anew.
    reported = copied / "report"
    before = read_json(reported / "results.json")
    train_study.main(["--out", str(tmp_path / "cut"), "--report-only", "--report", str(reported)])
    after = read_json(reported / "results.json")
    assert after == before | {"training": json.loads(json.dumps(found))} and (reported / "training.png").exists()
    study.main(["--out", str(copied), "--report-only"])
    assert read_json(reported / "results.json") == after
    write_json(reported / "results.json", after | {"model": "another"})
    with pytest.raises(SystemExit, match=r"results\.json must be of .*model, as .*cut is, got 'another'"):
        train_study.main(["--out", str(tmp_path / "cut"), "--report-only", "--report", str(reported)])


def test_the_parts_of_a_step_are_timed(folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    small = replace(train_study.PRESETS["full"], prompts=2, group=4, tokens=6)
    monkeypatch.setitem(train_study.PRESETS, "full", small)
    out = tmp_path / "times.json"
    step_times.main(["--model", str(folder), "--out", str(out), "--steps", "2", "--rounds", "1"])
    arms = read_json(out)["arms"]
    assert {arm: len(steps) for arm, steps in arms.items()} == {"grpo": 2, "ngrpo": 2}
    for arm, steps in arms.items():
        for step in steps:
            outer = {part: seconds for part, seconds in step.items() if part not in step_times.WITHIN_ROLLOUT}
            assert min(outer.values()) > 0 and sum(outer.values()) < 2 * outer.pop(step_times.STEP)
            inner = [step[part] for part in step_times.WITHIN_ROLLOUT]
            assert sum(inner) < step[step_times.ROLLOUT] and all((part > 0) == (arm == "ngrpo") for part in inner)
    table = capsys.readouterr().out
    assert table.count("\n") == 2 + 1 + len(step_times.PARTS) and "| GRPO | N-GRPO |" in table


def test_the_step_times_of_the_readme_are_those_of_the_file() -> None:
    if not step_times.RESULTS.exists():
        pytest.skip("not measured yet")
    assert step_times.table(read_json(step_times.RESULTS)) in (ROOT / "examples/real_model/README.md").read_text()


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/no/such/model"], "model '/no/such/model' cannot be loaded"),
        (["--task", "chain_sum"], "reasoning-gym, which is not installed: pip install reasoning-gym"),
        (["--report-only"], "--report-only: there is no study in"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SystemExit) as error:
        study.main(["--out", str(tmp_path / "out"), *arguments])
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists(), "the same command with what was missing must not find other settings"


@pytest.mark.parametrize(
    "arguments",
    [["--workers", "0"], ["--problems", "0"], ["--problems", "3", "--preset", "full"], ["--preset", "huge"]],
)
def test_bad_numbers_are_refused(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        study.main(arguments)
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--report-only"], "--report-only needs --report"),
        (["--report", "nowhere"], "--report nowhere must hold the results.json of a rollout study"),
    ],
)
def test_a_training_study_is_reported_beside_a_rollout_study(arguments: list[str], said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        train_study.main(arguments)
    assert said in capsys.readouterr().err


def test_a_prompt_longer_than_the_context_is_refused(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    mixing = NeighborMixing(model, MixingConfig(mixing_rate=0.0, sampler="counter_based"))
    context = model.config.max_position_embeddings
    batch = sample.encode(tokenizer, ["a" * context])
    with pytest.raises(ValueError, match=f"must fit the model's context of {context:,} tokens, got {context:,} and 4"):
        sample.sample(mixing, batch, 1, 0.7, 4, torch.arange(1))


def test_a_model_without_a_chat_template_reads_the_prompt_as_it_stands(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    assert sample.encode(tokenizer, ["ab"])["input_ids"].tolist() == tokenizer(["ab"])["input_ids"]


# What is committed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in HERE.rglob("results.json")), ids=lambda path: path.name
)
def test_the_report_s_figures_are_those_of_the_file(folder: Path) -> None:
    found = json.loads((folder / "results.json").read_text())
    assert (folder / "report.md").read_text() == report.report(found)
    assert_form(found)
    assert "dequantized from " in found["model"]
    for name in ("trade.png", "differences.png", "mixes.png"):
        assert (folder / name).stat().st_size > 10_000


def test_the_answer_follows_from_the_figures() -> None:
    found = json.loads((HERE / "results.json").read_text())
    assert results.answer(list(found["question"]["against"].values())) == found["question"]["answer"]


def test_a_damaged_study_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(FileError, match=r"settings\.json: must hold model"):
        results.collect(tmp_path)
