"""Every field of the configuration x values of a wrong type or size, from Python, a command line and YAML.

A value is kept as plain Python data, or a ValueError (the parser's exit) names the field. Settings under which nothing
would be mixed or trained are refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import math
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from trl import TrlParser

from ngrpo_ops import MixingConfig
from ngrpo_ops._messages import shown
from ngrpo_ops.config import TOKEN_ID_FIELDS
from ngrpo_ops.integrations.openrlhf import launcher, settings
from ngrpo_ops.integrations.trl.config import TRAINER_FIELDS, NGRPOConfig
from ngrpo_ops.random import bernoulli, drawn_words

NUMBERS = ("mixing_rate", "temperature", "entropy_threshold", "noise_scale", "moi_beta")
INTEGERS = ("k", "seed")
TEXTS = ("metric", "strategy", "variant", "sampler")
FLAGS = ("loss_on_mixed_steps",)
READ_BY = {"noise_scale": {"strategy": "gaussian"}, "moi_beta": {"strategy": "moi"}}
NAMES = [one.name for one in dataclasses.fields(MixingConfig)]


def test_every_field_is_of_a_kind_that_is_swept():
    assert sorted(NAMES) == sorted((*NUMBERS, *INTEGERS, *TEXTS, *FLAGS, *TOKEN_ID_FIELDS))


class Odd:
    """Raises where it can: nothing of it may be looked at."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = None  # type: ignore[assignment]


HUGE = 10**5000  # of more digits than Python prints

ANYTHING = [
    "", "x", b"1", [], [[]], {}, {"a": 1}, {1}, Odd(), object, 1j, math.nan, math.inf, -math.inf, HUGE, -HUGE, -1, -1.0,
    "0.1", "1e-3", "3", "True", "None", torch.tensor(0.5), torch.tensor([1.5]), np.array([1.5, 2.0]), np.float64("nan"),
    np.array("x"), lambda: 0,
]  # fmt: skip
WRONG = {
    **{name: [*ANYTHING, True, False, np.True_] for name in NUMBERS},
    **{name: [*(v for v in ANYTHING if name != "seed" or v not in (-1,)), True, np.True_, 1.0, 0.5, np.float64(3)]
       for name in ("k",)},
    "seed": [*(v for v in ANYTHING if not isinstance(v, int) or abs(v) > 1), True, np.True_, 1.0, 2**63, -(2**63) - 1],
    **{name: [*ANYTHING, 0, True, None] for name in TEXTS},
    **{name: [*ANYTHING, 0, 1, None, "true", "no", np.int64(1)] for name in FLAGS},
    **{name: [*(v for v in ANYTHING if not isinstance(v, list)), [[]], 0, 7, True, "123", ["1"], [1.0], [True], [-1],
              [None], [[1]], [2**31], [HUGE], {1: 2}, range(-1, 3), (i for i in (1, 2, 3)), np.array([1.0, 2.0, 3.0]),
              np.array([True] * 3), np.array([[1, 2, 3]]), torch.tensor([True] * 3), torch.tensor([[1, 2, 3]]),
              torch.tensor([1.0, 2.0, 3.0]), torch.tensor(3), frozenset({1, 2, 3})]
       for name in TOKEN_ID_FIELDS},
}  # fmt: skip
WRONG["mixing_rate"] += [1.5, None, 1e-12, 2.0**-33]
WRONG["temperature"] += [0, 1e-39, 1e-31, 1e31, 10**40]
WRONG["entropy_threshold"] += [99, 21.5]
WRONG["moi_beta"] += [1e9]
WRONG["k"] += [0, 2**31]
CASES = [(name, value) for name in NAMES for value in WRONG[name]]


def case_ids(cases: list) -> list[str]:
    return [f"{name}-{i}" for i, (name, _) in enumerate(cases)]


def on_cpu(**fields: Any) -> NGRPOConfig:
    return NGRPOConfig("unused", use_cpu=True, bf16=False, **fields)


@pytest.mark.parametrize(("name", "value"), CASES, ids=case_ids(CASES))
def test_a_wrong_value_names_its_field(name, value):
    fields = READ_BY.get(name, {}) | {name: value}
    with pytest.raises(ValueError) as error:
        MixingConfig(**fields)
    assert str(error.value).split()[0] == name, error.value
    if name == "seed" and value is None:
        return
    trainers = {TRAINER_FIELDS[field]: value for field, value in fields.items()}
    with pytest.raises(ValueError) as error:
        NGRPOConfig.mixing(mock.Mock(**({ours: _default(ours) for ours in TRAINER_FIELDS.values()} | trainers), seed=0))
    assert str(error.value).split()[0] == TRAINER_FIELDS[name], error.value


def _default(ours: str) -> Any:
    field = next(f for f in dataclasses.fields(NGRPOConfig) if f.name == ours)
    return field.default if field.default_factory is dataclasses.MISSING else "special"


@pytest.mark.parametrize("name", NAMES)
def test_the_trainers_own_constructor_refuses_too(name):
    value = Odd()
    with pytest.raises(ValueError, match=f"^{TRAINER_FIELDS[name]} "):
        on_cpu(**{TRAINER_FIELDS[name]: value})


def test_a_trainers_seed_that_is_none_of_ours_is_named_as_its_own():
    with pytest.raises(ValueError, match=r"^seed must be an integer"):
        NGRPOConfig.mixing(mock.Mock(**{ours: _default(ours) for ours in TRAINER_FIELDS.values()}, seed=1.5))


class Named(enum.StrEnum):
    L2 = "l2"


RIGHT = [
    ("mixing_rate", np.float64(0.25), 0.25), ("mixing_rate", np.float32(0.25), 0.25), ("mixing_rate", 1, 1.0),
    ("mixing_rate", np.int64(1), 1.0), ("mixing_rate", 0, 0.0), ("mixing_rate", 2.0**-32, 2.0**-32),
    ("temperature", np.float16(0.5), 0.5), ("temperature", 1e-30, 1e-30), ("temperature", None, None),
    ("entropy_threshold", np.float64(1.5), 1.5), ("noise_scale", np.float64(0.5), 0.5), ("moi_beta", np.int32(2), 2.0),
    ("k", np.int64(4), 4), ("k", np.uint8(4), 4), ("k", None, 3), ("seed", np.int64(-5), -5),
    ("seed", np.uint64(2**63 - 1), 2**63 - 1), ("metric", np.str_("l2"), "l2"), ("metric", Named.L2, "l2"),
    ("variant", np.str_("released"), "released"), ("strategy", np.str_("topk"), "topk"),
    ("sampler", np.str_("counter_based"), "counter_based"), ("loss_on_mixed_steps", np.False_, False),
    *((name, value, (1, 2, 3)) for name in TOKEN_ID_FIELDS for value in (
        [1, 2, 3], (1, 2, 3), range(1, 4), np.array([1, 2, 3]), np.array([1, 2, 3], dtype=np.uint16),
        [np.int64(1), np.int32(2), 3], torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3], dtype=torch.int32))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "expected"), RIGHT, ids=case_ids([r[:2] for r in RIGHT]))
def test_numpys_values_are_kept_as_pythons(name, value, expected):
    config = MixingConfig(**READ_BY.get(name, {}), **{name: value})
    found = getattr(config, name)
    assert found == expected and type(found) is type(expected)
    if isinstance(found, tuple):
        assert all(type(one) is int for one in found)
    plain = MixingConfig(**READ_BY.get(name, {}), **{name: expected})
    assert config == plain and hash(config) == hash(plain)
    assert MixingConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_a_trainers_config_of_numpys_values_is_written_as_json():
    args = on_cpu(mixing_k=np.int64(4), mixing_rate=np.float32(0.5), mixing_allowed_token_ids=np.arange(9), seed=7)
    assert (args.mixing_k, args.mixing_rate, args.mixing_allowed_token_ids) == (4, 0.5, list(range(9)))
    written = json.loads(args.to_json_string())
    assert written["mixing_k"] == 4 and written["mixing_allowed_token_ids"] == list(range(9))
    assert args.mixing_seed is None and args.mixing_stop_token_ids is None
    args.seed = 8
    assert args.mixing().seed == 8


# Command lines ----------------------------------------------------------------------------------------------------

WRONG_WORDS = {
    **{name: ["x", "-1", "nan", "inf", "1e400", "0.1.2", "True"] for name in NUMBERS},
    "k": ["x", "0", "-1", "1.5", "1e1", "True", "9" * 30],
    "seed": ["x", "1.5", "True", "9" * 30],
    **{name: ["x", "0", "None"] for name in TEXTS},
    **{name: ["x", "2", "maybe"] for name in FLAGS},
    **{name: ["x", "-1", "1.5", "1,2", "[1]", "9" * 30] for name in TOKEN_ID_FIELDS},
}
WORDS = [(name, word) for name in NAMES for word in WRONG_WORDS[name]]
OF_OPTIONS = {"noise_scale": "gaussian", "moi_beta": "moi"}


@pytest.fixture(scope="module")
def parser() -> TrlParser:
    return TrlParser((NGRPOConfig,))


def refused(capsys: pytest.CaptureFixture, parse: Any) -> str:
    """What a ValueError or an exit of the parser says."""
    with pytest.raises((ValueError, SystemExit)) as error:
        parse()
    return capsys.readouterr().err if isinstance(error.value, SystemExit) else str(error.value)


BASE = ["--output_dir", "unused", "--use_cpu", "true", "--bf16", "false"]


@pytest.mark.parametrize(("name", "word"), WORDS, ids=case_ids(WORDS))
def test_a_wrong_word_of_trls_command_line_names_its_field(parser, capsys, name, word):
    ours, words = TRAINER_FIELDS[name], list(BASE)
    if name in OF_OPTIONS:
        words += ["--mixing_strategy", OF_OPTIONS[name]]
    said = refused(capsys, lambda: parser.parse_args_and_config([*words, f"--{ours}", word]))
    assert ours in said, said


@pytest.mark.parametrize(("name", "word"), WORDS, ids=case_ids(WORDS))
def test_a_wrong_word_of_openrlhfs_command_line_names_its_field(capsys, name, word):
    parser = argparse.ArgumentParser()
    launcher.add_arguments(parser)
    words = ["--ngrpo.strategy", OF_OPTIONS[name]] if name in OF_OPTIONS else []

    def parse() -> None:
        values = vars(parser.parse_args([*words, f"--ngrpo.{name}", word]))
        mixing = {field: values[f"ngrpo.{field}"] for field in NAMES}
        with launcher._usage_errors(parser, "--ngrpo."):
            MixingConfig(
                **{field: 0 if field == "seed" and value is None else value for field, value in mixing.items()}
            )

    said = refused(capsys, parse)
    assert f"--ngrpo.{name}" in said, said


WRONG_YAML = {
    **{name: ["x", "yes", "[0.1]", "{a: 1}", ".nan", "-.inf", "-1"] for name in NUMBERS},
    "k": ["x", "0", "3.0", "yes", "[3]", "{a: 1}"],
    "seed": ["x", "1.5", "yes", "[3]"],
    **{name: ["x", "0", "yes", "[cosine]", "{a: 1}"] for name in TEXTS},
    **{name: ["x", "3", "[true]", "{a: 1}"] for name in FLAGS},
    **{name: ["x", "7", "'7'", "[x]", "[1.0]", "['1']", "[yes]", "[[1]]", "[-1]", "{a: 1}", "1.5"]
       for name in TOKEN_ID_FIELDS},
}  # fmt: skip
YAMLS = [
    (name, text)
    for name in NAMES
    for text in WRONG_YAML[name]
    if (name, text) not in {("excluded_token_ids", "7"), ("excluded_token_ids", "'7'"), ("excluded_token_ids", "['1']")}
]


def with_yaml(folder: Path, lines: dict[str, str]) -> NGRPOConfig:
    path = folder / "config.yaml"
    path.write_text("".join(f"{name}: {text}\n" for name, text in lines.items()))
    base = "output_dir: unused\nuse_cpu: true\nbf16: false\n"
    path.write_text(base + path.read_text())
    (args,) = TrlParser((NGRPOConfig,)).parse_args_and_config(["--config", str(path)])
    return args


@pytest.mark.parametrize(("name", "text"), YAMLS, ids=case_ids(YAMLS))
def test_a_wrong_value_in_yaml_names_its_field(tmp_path, capsys, name, text):
    ours = TRAINER_FIELDS[name]
    lines = {"mixing_strategy": OF_OPTIONS[name]} if name in OF_OPTIONS else {}
    said = refused(capsys, lambda: with_yaml(tmp_path, lines | {ours: text}))
    assert ours in said, said


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("mixing_rate", "1e-3", 1e-3), ("mixing_rate", "1.0e-3", 1e-3), ("mixing_rate", "'0.5'", 0.5),
        ("mixing_rate", "1", 1.0), ("temperature", "5e-1", 0.5), ("k", "4", 4), ("k", "'4'", 4),
        ("loss_on_mixed_steps", "no", False), ("stop_token_ids", "[5, 6]", (5, 6)),
        ("allowed_token_ids", "[5, 6, 7]", (5, 6, 7)), ("entropy_threshold", "null", None),
    ],
)  # fmt: skip
def test_yamls_texts_of_numbers_are_read_by_the_parser(tmp_path, name, text, expected):
    """YAML 1.1 reads 1e-3 as a text. TrlParser hands it to the flag's own type."""
    assert isinstance(yaml.safe_load("1e-3"), str)
    found = getattr(with_yaml(tmp_path, {TRAINER_FIELDS[name]: text}).mixing(), name)
    assert found == expected and type(found) is type(expected)


def test_a_text_from_python_says_what_to_write():
    with pytest.raises(
        ValueError, match=r"^mixing_rate must be within .*got '1e-3', a text: write numbers without quot"
    ):
        MixingConfig(mixing_rate="1e-3")  # type: ignore[arg-type]


# Without an effect ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixing_rate": 1e-12}, r"mixing_rate must be 0 or more than 2\^-33"),
        ({"mixing_rate": 5e-324}, r"mixing_rate must be 0 or more than 2\^-33"),
        ({"mixing_rate": 1.0, "loss_on_mixed_steps": False}, "mixing_rate must be below 1 where loss_on_mixed_steps="),
        ({"mixing_rate": 1 - 1e-12, "loss_on_mixed_steps": False}, "mixing_rate must be below 1"),
        ({"mixing_rate": 1.0, "loss_on_mixed_steps": False, "entropy_threshold": 0}, "mixing_rate must be below 1"),
        ({"mixing_rate": 1.0, "loss_on_mixed_steps": False, "entropy_threshold": 1e-9}, "mixing_rate must be below 1"),
        ({"entropy_threshold": 99}, r"entropy_threshold must be within \[0, 21\.4876\]"),
        ({"strategy": "moi", "moi_beta": 1e8}, "moi_beta must be within"),
        ({"k": 5, "allowed_token_ids": [1, 2, 3, 4]}, "allowed_token_ids must name at least k = 5"),
        ({"k": 3, "allowed_token_ids": [1, 1, 2]}, "allowed_token_ids must name at least k = 3"),
    ],
)
def test_settings_under_which_nothing_is_mixed_or_trained(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        MixingConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"mixing_rate": 0.0, "loss_on_mixed_steps": False},
        {"mixing_rate": 1.0, "loss_on_mixed_steps": False, "entropy_threshold": 0.5},
        {"mixing_rate": 1.0, "loss_on_mixed_steps": False, "stop_token_ids": [4]},
        {"strategy": "multiplex", "k": 1},
        {"strategy": "gumbel", "k": 1},
        {"strategy": "gaussian", "noise_scale": 0.0},
    ],
)
def test_settings_that_have_an_effect_or_are_grpo(fields):
    assert MixingConfig(**fields)


def test_the_least_rate_is_the_least_that_a_gate_can_draw():
    """By the gates themselves: the smallest word is drawn by every rate that is taken, and by no other above 0."""
    words = torch.tensor([0, 2**32 - 1])
    for rate in (2.0**-33, 1.1641532182693481e-10, 1e-12):
        assert not bernoulli(words, rate).any() and drawn_words(rate) == 0
        with pytest.raises(ValueError, match="mixing_rate"):
            MixingConfig(mixing_rate=rate)
    for rate in (math.nextafter(2.0**-33, 1), 2.0**-32):
        assert bernoulli(words, rate).tolist() == [True, False]
        assert MixingConfig(mixing_rate=rate).mixing_rate == rate


def test_a_threshold_that_no_policy_reaches():
    """The largest entropy over V tokens is that of equal logits."""
    for size in (2, 67, 151_936):
        largest = float(torch.distributions.Categorical(logits=torch.zeros(size, dtype=torch.float64)).entropy())
        MixingConfig(k=2, entropy_threshold=largest * 0.999).require_vocabulary(size)
        for threshold in (math.log(size), largest * 1.001):
            with pytest.raises(ValueError, match=rf"^entropy_threshold must be below log\({size}\)"):
                MixingConfig(k=2, entropy_threshold=threshold).require_vocabulary(size)
            MixingConfig(k=2, entropy_threshold=threshold, mixing_rate=0).require_vocabulary(size)  # is not read


@pytest.mark.parametrize("name", TOKEN_ID_FIELDS)
def test_ids_beyond_the_vocabulary(name):
    with pytest.raises(ValueError, match=rf"^{name} must be below the vocabulary size 8, got \[8, 9\]"):
        MixingConfig(**{name: [1, 2, 8, 9]}).require_vocabulary(8)


# OpenRLHF's variable ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "5", "{}", '{"mixing": {"k": 2}}', '{"mixing": null, "reward_url": "a"}',
     '{"mixing": ["k"], "reward_url": "a"}', '{"mixing": {"p": 1}, "reward_url": "a"}',
     '{"mixing": {}, "reward_url": 5}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_variable_is_named(text):
    with (
        mock.patch.dict(os.environ, {settings.VARIABLE: text}),
        pytest.raises(ValueError, match=f"^{settings.VARIABLE} must be what the launcher wrote, got ") as error,
    ):
        settings.read_settings()
    assert len(str(error.value)) < 600


def test_a_variable_that_is_not_there_or_holds_a_wrong_value():
    with mock.patch.dict(os.environ):
        os.environ.pop(settings.VARIABLE, None)
        with pytest.raises(ValueError, match=f"^{settings.VARIABLE} must be set"):
            settings.read_settings()
        os.environ[settings.VARIABLE] = '{"mixing": {"k": "2"}, "reward_url": "a"}'
        with pytest.raises(ValueError, match=r"^k must be"):
            settings.read_settings()


@pytest.mark.parametrize("name", TOKEN_ID_FIELDS)
def test_too_many_ids_for_the_variable_name_their_field(name):
    with mock.patch.dict(os.environ), pytest.raises(ValueError, match=f"^{name}: 40000 token ids are too many"):
        settings.write_settings(MixingConfig(**{name: range(40_000)}), "a")


def test_a_value_in_a_message_is_short_and_no_error():
    assert shown(Odd()) == "a value of type Odd" and shown(HUGE) == "a value of type int"
    assert len(shown(list(range(10**5)))) < 250 and shown("x") == "'x'"
