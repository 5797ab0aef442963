"""Imports, for the API pages, what has its help or its values only then: the configurations and the presets."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import griffe

CONFIGURATIONS = ("ngrpo_ops.config.MixingConfig", "ngrpo_ops.integrations.trl.config.NGRPOConfig")


def _default(field: dataclasses.Field[Any]) -> str:
    made = field.default_factory
    return repr(field.default if made is dataclasses.MISSING else made())


class Imported(griffe.Extension):
    """Gives them the docstrings, the defaults and the values that they have once they are imported."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for path in CONFIGURATIONS:
            module, _, name = path.rpartition(".")
            loaded = getattr(importlib.import_module(module), name)
            documented = pkg[path.removeprefix(f"{pkg.name}.")]
            documented.docstring.value = inspect.cleandoc(loaded.__doc__)
            for field in dataclasses.fields(loaded):
                if field.name in documented.members:
                    documented.members[field.name].value = _default(field)
        module = "ops.group_advantages.presets"
        presets = importlib.import_module(f"{pkg.name}.{module}").ADVANTAGE_PRESETS
        pkg[f"{module}.ADVANTAGE_PRESETS"].value = repr({name: dict(settings) for name, settings in presets.items()})
