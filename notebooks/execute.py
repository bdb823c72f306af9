"""Runs the notebooks' sources and stores them, with their outputs, beside these.

python notebooks/execute.py [01_quickstart ...]
"""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent


def execute(source: Path) -> Path:
    """Every cell from a fresh kernel; neither times nor the kernel's version are kept, so that a diff shows results."""
    notebook = jupytext.read(source)
    NotebookClient(notebook, timeout=None, record_timing=False, resources={"metadata": {"path": FOLDER}}).execute()
    notebook.metadata = {key: notebook.metadata[key] for key in ("jupytext", "kernelspec")}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    file = source.with_suffix(".ipynb")
    nbformat.write(notebook, file)
    return file


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("[0-9]*.py")):
        print(execute(FOLDER / f"{name}.py"))
