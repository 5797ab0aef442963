"""examples/quickstart.ipynb: as committed it has run whole, and it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"


def test_the_notebook_was_run_from_top_to_bottom() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and all(output["output_type"] != "error" for output in outputs)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="no nbclient: pip install -c constraints.txt '.[docs]'")
    nbformat = pytest.importorskip("nbformat", reason="no nbformat: pip install -c constraints.txt '.[docs]'")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('"../runs/quickstart"', repr(str(tmp_path)))  # nothing from a cache
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}})
    client.execute()  # its asserts too: a mixed rollout, a replay, five steps whose forwards read the mixes
