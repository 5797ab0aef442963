"""What the compiler makes of the kernels: no error-free form contracted away, no setting that compiles in mid-run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from compiled_kernels import contractions


def compiled(task: str) -> dict[str, Any]:
    """What tests/compiled_kernels.py finds, in a process whose kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), environment.get("PYTHONPATH", "")])
    script = Path(__file__).parent / "compiled_kernels.py"
    done = subprocess.run([sys.executable, str(script), task], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_contraction_is_found_in_ptx():
    product = "mul.f32 %r3, %r1, %r2;\n"
    assert contractions(product + "neg.f32 %r4, %r3;\nfma.rn.f32 %r5, %r1, %r2, %r4;") != []
    assert contractions(product + "neg.f32 %r4, %r1;\nfma.rn.f32 %r5, %r2, %r4, %r3;") != []
    assert contractions(product + "fma.rn.f32 %r5, %r1, %r2, %r3;") == []  # twice the product
    assert contractions(product + "neg.f32 %r4, %r3;\nfma.rn.f32 %r5, %r1, %r6, %r4;") == []


@pytest.mark.slow
def test_no_error_free_form_is_contracted():
    counts = compiled("contractions")
    assert counts.pop("contracted_kernel") == 1  # the compiler does it, and it is seen
    assert {kernel: count for kernel, count in counts.items() if count} == {}


def test_no_setting_compiles_in_mid_run():
    counts = compiled("variants")
    assert len(counts) == 12 and all(counts.values())
    assert {(call, kernel): n for call, kernels in counts.items() for kernel, n in kernels.items() if n != 1} == {}
