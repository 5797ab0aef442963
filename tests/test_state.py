"""The state of a checkpoint: written whole or not at all; what is damaged, missing or different is said by its name."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import sys
import time
import warnings
from pathlib import Path

import pytest

from ngrpo_ops import MixingConfig
from ngrpo_ops.files import FileError, read_json, write_json
from ngrpo_ops.state import make_state, next_row_of, read_state, write_state


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "mixing_state.json"


CONFIGS = [
    MixingConfig(),
    MixingConfig(k=5, mixing_rate=0.3, temperature=0.7, stop_token_ids=[3], allowed_token_ids=range(9), seed=-(2**63)),
    MixingConfig(strategy="moi", moi_beta=0.5, loss_on_mixed_steps=False, sampler="counter_based"),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("row", [0, 1, 2**63 - 1])
def test_what_was_written_is_read_without_a_word(path, config, row):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_state(path, row, config)
        assert read_state(path, dataclasses.replace(config)) == row
        assert next_row_of(make_state(row, config), config) == row
    assert os.listdir(path.parent) == [path.name]
    content = json.loads(path.read_text())
    assert (content["version"], content["next_row"]) == (1, row)
    assert MixingConfig(**content["config"]) == config


OTHER = {
    "k": 4, "mixing_rate": 0.2, "temperature": 0.5, "metric": "dot", "variant": "released", "entropy_threshold": 1.0,
    "sampler": "counter_based", "stop_token_ids": (5,), "allowed_token_ids": (1, 2, 3), "loss_on_mixed_steps": False,
    "seed": 1, "strategy": "topk", "excluded_token_ids": "special", "noise_scale": 0.5, "moi_beta": 0.5,
}  # fmt: skip
NEEDS = {"noise_scale": {"strategy": "gaussian"}, "moi_beta": {"strategy": "moi"}}


@pytest.mark.parametrize("name", [one.name for one in dataclasses.fields(MixingConfig)])
def test_every_field_that_differs_is_named_with_both_values(path, name):
    """Also a field that is new: it must be given another value in OTHER, here."""
    before = MixingConfig(**NEEDS.get(name, {}))
    after = dataclasses.replace(before, **{name: OTHER[name]})
    write_state(path, 7, before)
    with pytest.warns(UserWarning, match=f"{name} ") as said:
        assert read_state(path, after) == 7
    (message,) = (str(one.message) for one in said)
    assert message.startswith(f"{path}: the run goes on at row 7 with other settings than were saved: {name} ")
    plain = json.loads(json.dumps([getattr(before, name), getattr(after, name)]))
    assert message.endswith(f"{name} {plain[0]!r}, now {plain[1]!r}")


def test_all_that_differ_are_named_at_once_to_who_is_told(path):
    write_state(path, 7, MixingConfig())
    said: list[str] = []
    assert read_state(path, MixingConfig(k=5, seed=3, mixing_rate=0.5), said.append) == 7
    (message,) = said
    assert message.endswith("k 3, now 5; mixing_rate 0.1, now 0.5; seed 0, now 3")


def test_a_state_of_0_6_1_goes_on_and_says_so(path):
    path.write_text('{"next_row": 16}')
    with pytest.warns(UserWarning, match=r"mixing_state\.json: was written by ngrpo_ops 0\.6\.1 or older.*row 16"):
        assert read_state(path, MixingConfig()) == 16


def test_fields_of_other_versions(path):
    """A file from before a field existed was at its default; one with a field that is gone says so."""
    content = make_state(3, MixingConfig())
    del content["config"]["loss_on_mixed_steps"]
    path.write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_state(path, MixingConfig()) == 3
    with pytest.warns(UserWarning, match="loss_on_mixed_steps True, now False"):
        read_state(path, MixingConfig(loss_on_mixed_steps=False))
    content["config"]["gone"] = [1]
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"gone \[1\], which this version does not have"):
        assert read_state(path, MixingConfig()) == 3


def test_the_configuration_of_a_file_is_compared_and_not_used(path, tmp_path, monkeypatch):
    (tmp_path / "evil_strategy.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(tmp_path)
    content = make_state(3, MixingConfig())
    content["config"] |= {"strategy": "evil_strategy:run", "mixing_rate": "nonsense"}
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"mixing_rate 'nonsense', now 0\.1; strategy 'evil_strategy:run', now 'nei"):
        assert read_state(path, MixingConfig()) == 3
    assert "evil_strategy" not in sys.modules


GOOD = json.dumps(make_state(16, MixingConfig()))


def changed(**change: object) -> str:
    return json.dumps({name: value for name, value in (json.loads(GOOD) | change).items() if value != "left out"})


DAMAGED = {
    "empty": ("", "is empty"),
    "blank": (" \n", "is empty"),
    "zeros": ("\0" * 64, "is no JSON"),
    "cut off": (GOOD[: len(GOOD) // 2], "is no JSON, or cut off"),
    "cut off by one": (GOOD[:-1], "is no JSON, or cut off"),
    "twice": (GOOD + GOOD, "is no JSON"),
    "a list": ("[1]", "must hold a JSON object, got list"),
    "a number": ("16", "must hold a JSON object, got int"),
    "null": ("null", "must hold a JSON object, got NoneType"),
    "nested": ("[" * 100_000, "is no JSON"),
    "a long number": ('{"next_row": ' + "9" * 10_000 + "}", "is no JSON"),
    "nothing in it": ("{}", "version must be"),
    "newer": (changed(version=2), "is of version 2, of a newer ngrpo_ops"),
    "version 0": (changed(version=0), "version must be an integer of at least 1, got 0"),
    "version text": (changed(version="1"), "version must be an integer of at least 1, got '1'"),
    "version true": (changed(version=True), "version must be"),
    "no version": (changed(version="left out"), "version must be"),
    "no row": (changed(next_row="left out"), "lacks next_row"),
    "no config": (changed(config="left out"), "lacks config"),
    "config list": (changed(config=[1]), "config must hold the fields"),
    "config null": (changed(config=None), "config must hold the fields"),
    "row negative": (changed(next_row=-1), "next_row must be an integer in [0, 2^63), got -1"),
    "row float": (changed(next_row=16.0), "next_row must be an integer in [0, 2^63), got 16.0"),
    "row true": (changed(next_row=True), "next_row must be an integer in [0, 2^63), got True"),
    "row text": (changed(next_row="16"), "next_row must be"),
    "row null": (changed(next_row=None), "next_row must be"),
    "row NaN": (changed(next_row=float("nan")), "next_row must be"),
    "row 2^63": (changed(next_row=2**63), "next_row must be"),
    "old, negative": ('{"next_row": -1}', "next_row must be"),
    "old, text": ('{"next_row": "1"}', "next_row must be"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named(path, kind):
    text, message = DAMAGED[kind]
    path.write_text(text)
    with pytest.raises(FileError) as error:
        read_state(path, MixingConfig())
    assert str(error.value).startswith(f"{path}: {message}"), error.value


def test_what_is_no_file_is_named(path, tmp_path):
    with pytest.raises(FileError, match=r"mixing_state\.json: No such file"):
        read_state(path, MixingConfig())
    path.mkdir()
    with pytest.raises(FileError, match=r"mixing_state\.json: must be a file, got a folder"):
        read_state(path, MixingConfig())
    (tmp_path / "endless").symlink_to("/dev/zero")
    with pytest.raises(FileError, match="endless: must be a file, got a device"):
        read_state(tmp_path / "endless", MixingConfig())
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileError, match="loop: Too many levels"):
        read_state(tmp_path / "loop", MixingConfig())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="pipe: must be a file, got a pipe"):  # and does not wait for a writer
        read_state(tmp_path / "pipe", MixingConfig())
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="bytes: is no JSON"):
        read_state(tmp_path / "bytes", MixingConfig())


@pytest.mark.parametrize("state", [None, 16, [16], "16"])
def test_a_state_dict_of_another_type(state):
    with pytest.raises(ValueError, match="state: must be a dict"):
        next_row_of(state, MixingConfig())


@pytest.mark.parametrize("row", [-1, 1.0, True, None, "1", 2**63])
def test_a_row_that_is_none_is_not_written(path, row):
    write_state(path, 5, MixingConfig())
    with pytest.raises(ValueError, match=r"next_row must be an integer in \[0, 2\^63\)"):
        write_state(path, row, MixingConfig())
    assert read_state(path, MixingConfig()) == 5


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    write_state(path, 5, MixingConfig())
    with pytest.raises(OSError, match="No such file"):
        write_state(path.parent / "nowhere" / "state.json", 6, MixingConfig())

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_state(path, 6, MixingConfig())
    assert os.listdir(path.parent) == [path.name] and read_state(path, MixingConfig()) == 5


def test_the_new_file_is_on_the_disk_before_it_takes_the_place(path, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr("os.fsync", lambda fd, sync=os.fsync: (calls.append("fsync"), sync(fd)))
    monkeypatch.setattr("os.replace", lambda a, b, move=os.replace: (calls.append("replace"), move(a, b)))
    write_state(path, 5, MixingConfig())
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def _write_on_and_on(path: Path) -> None:
    for row in range(10**9):
        write_json(path, {"row": row, "ids": [row] * 20_000})  # long enough that a kill is within it


def test_a_writer_that_is_killed_leaves_the_old_file_or_the_new_one(path):
    rng, last = random.Random(0), -1
    for _ in range(25):
        writer = multiprocessing.get_context("fork").Process(target=_write_on_and_on, args=(path,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's of a fork beside threads: this child only writes
            writer.start()
        time.sleep(0.02 + 0.08 * rng.random())
        writer.kill()
        writer.join()
        if not path.exists():
            continue
        content = read_json(path)
        assert content["ids"] == [content["row"]] * 20_000
        last = max(last, content["row"])
    assert last > 0
