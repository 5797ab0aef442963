"""The example in every public docstring runs, and asserts something."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import ngrpo_ops
from ngrpo_ops import strategies

NEED_AN_ENGINE = tuple(f"ngrpo_ops.integrations.{name}" for name in ("vllm", "openrlhf", "verl", "trl.engine"))
OTHERS = ("ngrpo_ops.integrations.transformers:NeighborMixing", "ngrpo_ops.integrations.trl:NGRPOConfig")


def modules() -> list[str]:
    """Of this package and its adapters; the kernels are compiled, not run."""
    found = [name for _, name, _ in pkgutil.walk_packages(ngrpo_ops.__path__, "ngrpo_ops.")]
    left_out = ("ngrpo_ops.kernels", "ngrpo_ops.__main__", *NEED_AN_ENGINE)
    return [name for name in found if not name.startswith(left_out)]


@pytest.mark.parametrize("name", modules())
def test_examples_run(name, monkeypatch):
    monkeypatch.setattr(strategies, "_registry", dict(strategies._registry))  # some register a strategy
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


@pytest.mark.parametrize("name", [*(f"ngrpo_ops:{name}" for name in ngrpo_ops.__all__), *OTHERS])
def test_every_public_docstring_has_an_example_that_asserts(name):
    module, _, attribute = name.partition(":")
    thing = getattr(importlib.import_module(module), attribute)
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return  # ADVANTAGE_PRESETS: a mapping, without a docstring of its own
    examples = doctest.DocTestParser().get_examples(thing.__doc__ or "")
    assert any(example.want or example.source.startswith("assert") for example in examples), thing.__doc__
