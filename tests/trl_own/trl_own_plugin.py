"""A pytest plugin for TRL's own GRPO tests: models and data from this machine, and the trainer that is asked for.

`run.py` sets its environment. With TRL_OWN_TRAINER=zero the names `trl.GRPOTrainer` and `trl.GRPOConfig` are those of
N-GRPO at a rate of 0. What each test came to, and the numbers of each of its trainings, goes to TRL_OWN_REPORT.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import hub
import pytest
import torch
import torchvision_kernels  # noqa: F401
import transformers
import trl
from PIL import Image
from trl import import_utils

torch.set_num_threads(1)

# Data ---------------------------------------------------------------------------------------------------------------

with contextlib.redirect_stdout(None):
    import this
_ZEN = codecs.decode(this.s, "rot13").splitlines()[2:]
_KEPT = (4, 2, 3, 1, 4, 3, 1, 4, 3, 3, 2, 6)  # words of a line, as in TRL's data
_TESTED = 2  # rows to evaluate on


def _images(row: int, count: int) -> list[Image.Image]:
    side = 56 + 8 * (row % 2)
    return [Image.new("RGB", (side, side), (40 * (row % 6), 60, 50 * i)) for i in range(count)]


def _rows(name: str, config: str, count: int) -> list[dict[str, Any]]:
    lines = zip(_ZEN, _KEPT, strict=False)
    prompts: list[Any] = [" ".join(line.split()[:kept]) for line, kept in lines][:count]
    if config.startswith("conversational"):
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    if name == "zen-image":
        return [{"prompt": prompt, "image": _images(row, 1)[0]} for row, prompt in enumerate(prompts)]
    if name == "zen-multi-image":
        return [{"prompt": prompt, "images": _images(row, 1 + row % 2)} for row, prompt in enumerate(prompts)]
    return [{"prompt": prompt} for prompt in prompts]


def load_dataset(path: str, name: str, split: str | None = None, streaming: bool = False) -> Any:
    """Data of the shape of TRL's. Takes what TRL's GRPO tests give to `datasets.load_dataset`."""
    kind = path.removeprefix("trl-internal-testing/")
    counts = {"train": len(_KEPT), "test": _TESTED}
    made = {part: datasets.Dataset.from_list(_rows(kind, name, count)) for part, count in counts.items()}
    if streaming:
        made = {part: data.to_iterable_dataset() for part, data in made.items()}
    whole = (datasets.IterableDatasetDict if streaming else datasets.DatasetDict)(made)
    return whole if split is None else whole[split]


datasets.load_dataset = load_dataset


def _available(name: str) -> Any:
    """TRL's `is_..._available`, also for packages for which the installed TRL no longer asks."""
    if name.startswith("is_") and name.endswith("_available"):
        package = name.removeprefix("is_").removesuffix("_available")
        return lambda: importlib.util.find_spec(package) is not None
    raise AttributeError(name)


# Tests that make a trainer without its __init__ know the attributes of their own version.
trl.GRPOTrainer.eos_token_ids = [2]
import_utils.__getattr__ = _available  # type: ignore[method-assign]

# The trainer --------------------------------------------------------------------------------------------------------

if os.environ["TRL_OWN_TRAINER"] == "zero":
    from ngrpo_ops.integrations.trl import NGRPOConfig, NGRPOTrainer
    from ngrpo_ops.integrations.trl import trainer as adapter

    @dataclass
    class ZeroConfig(NGRPOConfig):
        mixing_rate: float = 0.0

    adapter.NGRPOConfig = ZeroConfig  # type: ignore[misc]  # of a trainer without args
    trl.GRPOConfig, trl.GRPOTrainer = ZeroConfig, NGRPOTrainer

# What the tests come to ---------------------------------------------------------------------------------------------

_TIMES = ("runtime", "per_second", "step_time", "flos")
_trainings: list[str] = []
_report: dict[str, dict[str, Any]] = {}


def _digest(trainer: transformers.Trainer) -> str:
    """Of every number that was logged, but for times, and of every weight."""
    logged = [
        {key: value for key, value in entry.items() if not any(word in key for word in _TIMES)}
        for entry in trainer.state.log_history
    ]
    found = hashlib.sha256(json.dumps(logged, sort_keys=True, default=repr).encode())
    for key, weight in trainer.accelerator.unwrap_model(trainer.model).state_dict().items():
        found.update(key.encode() + weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


_train = transformers.Trainer.train


@functools.wraps(_train)
def _recorded_train(self: transformers.Trainer, *args: Any, **kwargs: Any) -> Any:
    result = _train(self, *args, **kwargs)
    _trainings.append(_digest(self))
    return result


transformers.Trainer.train = _recorded_train  # type: ignore[method-assign]


def _shortened(value: Any) -> Any:
    """A constant of a test, code included, with the ids of Qwen's vocabulary that the models here have instead."""
    if isinstance(value, tuple):
        return tuple(map(_shortened, value))
    if isinstance(value, types.CodeType):
        return value.replace(co_consts=_shortened(value.co_consts))
    return hub.SHORT.get(value, value) if type(value) is int else value


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for function in {inspect.unwrap(item.function) for item in items}:
        function.__code__ = _shortened(function.__code__)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    _trainings.clear()
    torch.manual_seed(0)
    result = yield
    _report[item.nodeid]["trainings"] = list(_trainings)
    Path(os.environ["TRL_OWN_REPORT"]).write_text(json.dumps(_report, indent=1))
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    entry = _report.setdefault(report.nodeid, {"outcome": "passed", "reason": ""})
    if report.outcome == "passed" or (report.when == "teardown" and entry["outcome"] != "passed"):
        return
    entry["outcome"] = "xfailed" if report.skipped and hasattr(report, "wasxfail") else report.outcome
    if isinstance(report.longrepr, tuple):
        entry["reason"] = report.longrepr[2]
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        entry["reason"] = crash.message if crash else str(report.longrepr)
