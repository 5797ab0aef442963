"""Settings every test runs under."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

# The models are tiny and the tests run side by side (pytest -n): more threads would only wait for each other.
torch.set_num_threads(1)

# Tensors are slow to make and the cores are few: few examples, no deadline, and the same ones in every run.
settings.register_profile(
    "ngrpo",
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("ngrpo")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
