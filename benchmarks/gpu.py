"""Everything that is worth running on a machine with a CUDA GPU, in one command of at most 9 minutes: `make gpu`.

The tests of the kernels on the GPU, compute-sanitizer's memcheck and racecheck over a few of them where it is
installed, then the benchmarks. Logs and CSV files go to the folder NGRPO_OPS_RESULTS (default: benchmarks/results). A
short table comes last, with what benchmarks/predictions.py had predicted for an H100 beside what was measured. Nothing
is installed: the packages of this Python are used, with this checkout on its path.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TESTED = (
    "mix_embeddings",
    "group_advantages",
    "selective_log_softmax",
    "nearest_neighbors",
    "decode_step",
    "candidate_weights",
    "gaussian_noise",
    "random",
)
ON_THE_CPU = ("_sharded", "_trainers")  # their processes and trainers run there
TESTS = [
    str(path.relative_to(ROOT))
    for name in TESTED
    for path in sorted(ROOT.glob(f"tests/test_{name}*.py"))
    if not path.stem.endswith(ON_THE_CPU)
]
# compute-sanitizer's; memory that was never written is poisoned by the tests themselves.
TOOLS = ("memcheck", "racecheck")
LIMIT = {"tests": 220, "memcheck": 60, "racecheck": 60, "benchmarks": 180}  # seconds; 520 together


def step(name: str, command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Runs a command with its output in a log; one line of what came of it."""
    began = time.monotonic()
    log = folder / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(LIMIT[name])
        except subprocess.TimeoutExpired:  # with its children, which would run beside the next step
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = -1
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    summary = next((line for line in reversed(lines) if "passed" in line or "failed" in line), "")
    if name in TOOLS:
        summary = next((line for line in reversed(lines) if re.search("(ERROR|RACECHECK) SUMMARY", line)), summary)
    state = {0: "ok", -1: f"stopped after {LIMIT[name]} s"}.get(code, f"exit {code}")
    return f"{name:<11} {state:<20} {time.monotonic() - began:4.0f} s  {summary.strip('= ')}"


def copy_bandwidth(device: str) -> float:
    """GB/s of a large copy on the device, bytes read and written."""
    x = torch.randn(2**28 if device == "cuda" else 2**24, device=device)
    y = torch.empty_like(x)
    times = []
    for _ in range(20):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        y.copy_(x)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * x.numel() * x.element_size() / sorted(times)[len(times) // 2] / 1e9


def predictions() -> dict[tuple[str, ...], str]:
    """By who, op, shape and dtype of a benchmark, the milliseconds that an H100 was predicted to take."""
    path = ROOT / "benchmarks" / "results" / "predictions_h100.csv"
    with path.open(newline="") as file:
        return {
            ("ours", row["op"], row["shape"], row["dtype"]): f"{1e3 * float(row['predicted_s']):.3f}"
            for row in csv.DictReader(file)
            if row["predicted_s"] and not row["published_s"]
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try this script itself")
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA GPU here", file=sys.stderr)
        return 2
    folder = Path(os.environ.get("NGRPO_OPS_RESULTS") or ROOT / "benchmarks" / "results").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "NGRPO_OPS_TEST_DEVICE": device,
        "NGRPO_OPS_RESULTS": str(folder),
    }
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    report = [step("tests", [*pytest, *workers, *TESTS], folder, environment)]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and device == "cuda":
        few = [*pytest, "-x", *TESTS, "-k", "kernel_against_oracle"]
        checked = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for tool in TOOLS:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "99", *few]
            report.append(step(tool, command, folder, checked))
    else:
        report.append("sanitizer   not installed")
    report.append(step("benchmarks", [*pytest, "benchmarks", "--benchmark-only", "-k", device], folder, environment))
    copy = copy_bandwidth(device)
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, copy {copy:.0f} GB/s; all of it in {folder}")
    for line in report:
        print(line)
    tables = sorted(folder.glob("*torch*.csv"), key=lambda path: path.stat().st_mtime)
    if tables:
        predicted = predictions()
        print(
            f"{'op':<42} {'dtype':<9} {'median ms':>10} {'predicted':>10} {'GB/s':>8} {'of copy':>8} "
            f"{'best peer / ours':>17}"
        )
        for row in csv.DictReader(tables[-1].open()):
            if row["who"].startswith("ours"):
                bandwidth = float(row["gb_per_s"])
                name = row["op"] + ", " + row["who"]
                expected = predicted.get(tuple(row[column] for column in ("who", "op", "shape", "dtype")), "-")
                print(
                    f"{name:<42.42} {row['dtype']:<9} {1e3 * float(row['median_s']):10.3f} {expected:>10} "
                    f"{bandwidth:8.0f} {bandwidth / copy:8.0%} {row['speed_to_best_peer'][:6]:>17}"
                )
    return 0 if all(" ok " in line or "not installed" in line for line in report) else 1


if __name__ == "__main__":
    sys.exit(main())
