"""MixingConfig: the paper's defaults, and every bad field names itself."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings

import pytest

from ngrpo_ops import MixingConfig


def test_defaults_are_the_papers():
    config = MixingConfig()
    assert (config.k, config.mixing_rate, config.metric, config.strategy) == (3, 0.1, "cosine", "neighbor")
    assert (config.variant, config.temperature, config.loss_on_mixed_steps) == ("paper", None, True)
    assert (config.stop_token_ids, config.allowed_token_ids, config.excluded_token_ids) == ((), None, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"k": 1, "mixing_rate": 0.0, "temperature": 1e-3},
        {"mixing_rate": 1.0, "metric": "l1", "strategy": "topk", "variant": "released"},
        {"strategy": "moi", "moi_beta": 0.0, "k": 9},
        {"strategy": "multiplex", "k": 2},
        {"stop_token_ids": [3, 4], "allowed_token_ids": range(3)},
        {"excluded_token_ids": [3, 4], "allowed_token_ids": range(5)},
        {"excluded_token_ids": []},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
    ],
)
def test_good_fields_are_kept(fields):
    config = MixingConfig(**fields)
    for name, value in fields.items():
        assert getattr(config, name) == (tuple(value) if name.endswith("ids") else value)
    assert hash(config) == hash(dataclasses.replace(config))


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MixingConfig().k = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", 0),
        ("k", -1),
        ("k", 2.0),
        ("k", True),
        ("k", "3"),
        ("mixing_rate", -0.1),
        ("mixing_rate", 1.1),
        ("mixing_rate", math.nan),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("metric", "euclid"),
        ("strategy", "nearest"),
        ("variant", "official"),
        ("stop_token_ids", [-1]),
        ("allowed_token_ids", [5, -1, 2]),
        ("allowed_token_ids", [1, 2]),
        ("allowed_token_ids", []),
        ("excluded_token_ids", [5, -1]),
        ("excluded_token_ids", ["5"]),
        ("excluded_token_ids", "all"),
        ("excluded_token_ids", 5),
        ("moi_beta", 1.0),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
    ],
)
def test_bad_fields_name_themselves(name, value):
    with pytest.raises(ValueError, match=name):
        MixingConfig(**{name: value})


def test_a_field_says_everything_about_itself():
    """Help of every field, which the docstring has too; ranges and choices in the metadata hold what is refused."""
    for one in dataclasses.fields(MixingConfig):
        assert f"{one.name}: {one.metadata['help']}" in " ".join(MixingConfig.__doc__.split())
        for value in one.metadata.get("choices", ()):
            strategy = {"variant": "topk"}.get(one.name, "neighbor")
            assert getattr(MixingConfig(strategy=strategy, **{one.name: value}), one.name) == value
    ranges = {one.name: one.metadata["range"] for one in dataclasses.fields(MixingConfig) if "range" in one.metadata}
    assert set(ranges) == {"mixing_rate", "temperature", "entropy_threshold", "noise_scale", "moi_beta"}
    for name, allowed in ranges.items():
        strategy = {"noise_scale": "gaussian", "moi_beta": "moi"}.get(name, "neighbor")
        for value in (-1.0, 0.0, 1e-3, 1.0, 1.5, math.inf, math.nan):
            if value in allowed:
                assert getattr(MixingConfig(strategy=strategy, **{name: value}), name) == value
            else:
                with pytest.raises(ValueError, match=f"^{name} must be {re.escape(str(allowed))}"):
                    MixingConfig(strategy=strategy, **{name: value})


def test_the_samplers_old_name_works_and_warns():
    with pytest.warns(DeprecationWarning, match="'ngrpo' is called 'counter_based' now"):
        config = MixingConfig(sampler="ngrpo")
    assert config.sampler == "counter_based"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert MixingConfig(**dataclasses.asdict(config)) == dataclasses.replace(config, sampler="counter_based")
