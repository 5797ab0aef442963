"""TRL's own GRPO tests, with TRL's trainer and with N-GRPO's at a rate of 0: what passes there must pass here.

    python tests/trl_own/run.py TRL_CHECKOUT [-k EXPRESSION] [--results FOLDER]

TRL_CHECKOUT is a checkout of TRL; its tests run against the TRL that is installed, so that the nearest version is the
one to take. Nothing is downloaded: models are random, see hub.py. With jmespath and torchvision importable fewer tests
are skipped. Exits with 1 where the two differ: an outcome, or a number or weight of a training.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS = "tests/test_grpo_trainer.py"


def run(checkout: Path, trainer: str, folder: Path, cache: Path, expression: str) -> dict[str, Any]:
    """The report of one run: a test's name, its outcome, the reason, the digests of its trainings."""
    report = folder / f"{trainer}.json"
    report.unlink(missing_ok=True)
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PYTHONPATH": path,
        "HF_HUB_CACHE": str(cache),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "TRL_OWN_TRAINER": trainer,
        "TRL_OWN_REPORT": str(report),
    }
    command = [sys.executable, "-m", "pytest", "-p", "trl_own_plugin", "-p", "no:cacheprovider", "-q", "--tb=short"]
    command += ["-k", expression, "--durations=15", "--rootdir", str(checkout), str(checkout / TESTS)]
    with (folder / f"{trainer}.log").open("w") as log:
        # Not in the checkout: its TRL is not the one under test.
        subprocess.run(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not report.exists():
        raise SystemExit(f"no test ran: see {log.name}")
    return json.loads(report.read_text())


def difference(stock: dict[str, Any], zero: dict[str, Any]) -> str:
    if stock["outcome"] != zero["outcome"]:
        return f"outcome: {zero['reason'] or zero['outcome']}".splitlines()[0][:160]
    if stock["trainings"] != zero["trainings"]:
        return "numbers of the training"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="of pytest: the tests to run")
    parser.add_argument("--results", type=Path, help="where logs, reports and the models go; kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.results or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        cache = folder / "hub"
        subprocess.run([sys.executable, str(HERE / "hub.py"), str(cache)], check=True)
        stock, zero = (run(options.checkout.resolve(), name, folder, cache, options.k) for name in ("stock", "zero"))
        nothing = {"outcome": "not run", "reason": "", "trainings": []}
        differing = 0
        print("| test | stock | at rate 0 | difference |\n|---|---|---|---|")
        for name in stock | zero:
            a, b = stock.get(name, nothing), zero.get(name, nothing)
            found = difference(a, b)
            differing += bool(found)
            print(f"| {name.partition('::')[2]} | {a['outcome']} | {b['outcome']} | {found} |")
        for title, report in (("stock", stock), ("at rate 0", zero)):
            counts = Counter(entry["outcome"] for entry in report.values())
            print(f"{title}: {len(report)} tests, " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
        compared = sum(len(entry["trainings"]) for entry in stock.values())
        print(f"{compared} trainings compared, {differing} tests differ")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
