"""Runs the cases, or the timed calls, on the checkout that PYTHONPATH names, and saves what they gave.

Arguments: the checkout; "eager", "triton" or "time"; a word that a case's name must contain ("": any); the file.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

torch.set_num_threads(1)
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
sys.path.append(str(Path(__file__).parents[1]))  # for `models`

import ngrpo_ops

checkout, what, only, file = Path(sys.argv[1]).resolve(), *sys.argv[2:]
assert Path(ngrpo_ops.__file__).resolve().is_relative_to(checkout), f"{ngrpo_ops.__file__} is not of {checkout}"

import cases_decode
import cases_search
import cases_training
import small_calls
from inputs import RENAMED, Case, Inputs


def every_case(backend: str) -> Iterator[Case]:
    for module in (cases_search, cases_decode, cases_training):
        yield from module.cases(backend)
    if backend == "eager":
        import cases_refusals
        import cases_rollout  # imports transformers

        yield from cases_refusals.cases()
        yield from cases_rollout.cases()


def plain(value: Any) -> Any:
    """Nested values as what `torch.load` reads back without the package, under the names of today."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {RENAMED.get(name, name): plain(x) for name, x in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if dataclasses.is_dataclass(value):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, tuple | list):
        return type(value)(plain(x) for x in value)
    if isinstance(value, str):
        return RENAMED.get(value, value)
    assert value is None or isinstance(value, bool | int | float), f"{type(value)} cannot be compared"
    return value


def run(case: Case) -> Any:
    """The result of a case, and what torch's global generator gives afterwards."""
    torch.manual_seed(0)
    try:
        result = plain(case.run(Inputs(f"{case.group}: {case.name}")))
    except Exception:
        return ("failed", traceback.format_exc())
    return {"result": result, "torch's generator": torch.randint(2**62, (2,))}


if what == "time":
    torch.save(small_calls.timed(only), file)
else:
    found: dict[str, dict[str, Any]] = {}
    for case in every_case(what):
        if only in f"{case.group}: {case.name}":
            of_group = found.setdefault(case.group, {})
            assert case.name not in of_group, f"two cases are called {case.group}: {case.name}"
            of_group[case.name] = run(case)
    torch.save(found, file)
