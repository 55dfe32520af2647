"""Every notebook runs from its first cell to its last, in a kernel of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples/notebooks").glob("*.ipynb"))
# of one cell, in seconds
LIMIT = 300
# what a reader is meant to see
SHOWN = {
    "01_quick_start": ("text/html", "image/svg+xml", "text/latex"),
    "02_your_own_policy": ("image/svg+xml", "text/markdown"),
}

Run = Callable[[NotebookNode], None]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a notebook in an empty folder; nothing of the user's Jupyter is read or written."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # tqdm asks for widgets, which nothing here shows
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    # workers of a parallel test run share the cores
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def execute(notebook: NotebookNode) -> None:
        resources = {"metadata": {"path": str(tmp_path)}}
        client = NotebookClient(notebook, timeout=LIMIT, kernel_name="python3", resources=resources)
        client.execute()

    return execute


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, run):
    notebook = read(path)
    run(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert set(SHOWN[path.stem]) <= kinds


def test_every_notebook_is_found():
    assert {path.stem for path in NOTEBOOKS} == set(SHOWN)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_what_they_printed(path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert [cell.id for cell in code if cell.outputs or cell.execution_count is not None] == []


def test_a_cell_that_raises_is_noticed(run):
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run(new_notebook(cells=[new_code_cell("1 / 0")]))
