"""compare_checkouts, which is run by hand: that it still runs, and that it can fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def compared(other: Path, only: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tests" / "compare_checkouts"), str(other), "--only", only]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_checkout_equals_itself_and_not_one_with_another_constant(tmp_path: Path) -> None:
    same = compared(ROOT, "random: gumbel")
    assert same.returncode == 0 and "0 differences" in same.stdout, same.stdout + same.stderr
    shutil.copytree(ROOT / "ngrpo_ops", tmp_path / "ngrpo_ops")  # with what its links point to
    module = tmp_path / "ngrpo_ops" / "random.py"
    module.write_text(module.read_text().replace("(math.sqrt(2) *", "(1.4142135 *"))
    other = compared(tmp_path, "random: normal")
    assert other.returncode == 1 and "random.normal, 4 a row" in other.stdout, other.stdout + other.stderr
