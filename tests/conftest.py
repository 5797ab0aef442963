"""Settings every test runs under."""

from __future__ import annotations

import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Without a GPU the kernels are interpreted: tests ask for them with backend="triton". triton reads the variable when it
# is imported; left in the environment it would make the kernels the default on the CPU.
_interpret = os.environ.get("NGRPO_OPS_TEST_DEVICE", "cpu") == "cpu"
if _interpret:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton
from hypothesis import HealthCheck, Phase, settings

from ngrpo_ops.testing import poisoned_empty

if _interpret:
    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]

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
settings.register_profile("unshrunk", settings.get_profile("ngrpo"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("ngrpo")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `backend` runs on plain torch and, in the full layer, on the kernel."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_empty():
        yield


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium: playwright's own, or the system's; NGRPO_OPS_BROWSER names another."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("NGRPO_OPS_BROWSER") or next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as started:
        try:
            opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser that starts: {str(error).splitlines()[0]}")
        yield opened
        opened.close()
