"""The notebooks: every source runs as it stands, and the stored form has its cells and no error."""

import re
import runpy
import tempfile
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import nbformat
import pytest
from jupytext.compare import compare_notebooks

from experiments.rows import jsonl

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
LARGEST = 500_000  # bytes


def name(source):
    return source.stem


def test_there_are_sources():
    assert len(SOURCES) == 5
    assert [source.stem for source in SOURCES] == sorted(file.stem for file in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_source_runs(source, monkeypatch, capsys):
    """At the tiny setting; a warning is an error, too. A cell's last value is only shown in a notebook."""
    monkeypatch.setenv("S2SAM_JAX_TINY", "1")
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    with plt.rc_context():
        runpy.run_path(str(source), run_name="__main__")
    plt.close("all")
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_both_forms_are_in_step(source):
    stored = jupytext.read(source.with_suffix(".ipynb"))
    compare_notebooks(stored, jupytext.read(source), fmt="py:percent", compare_outputs=False)
    for form in (stored, jupytext.read(source)):
        assert form.metadata["jupytext"]["formats"] == "ipynb,py:percent"


def test_stored_results_are_those_of_today():
    """Of the committed rows; after new ones, run ``python notebooks/execute.py 05_results``."""
    cells = nbformat.read(FOLDER / "05_results.ipynb", as_version=4).cells
    text = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
    counts = dict(re.findall(r"(\S+\.jsonl): (\d+) rows", text))
    assert len(counts) > 10
    assert counts == {name: str(len(jsonl.read(jsonl.RESULTS / name))) for name in counts}


@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_stored_outputs_are_whole_and_small(source):
    """All cells were run, in order, without errors and warnings, and say nothing of the machine."""
    file = source.with_suffix(".ipynb")
    cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert file.stat().st_size < LARGEST
    text = str([{**output, "data": {**output.get("data", {}), "image/png": ""}} for output in outputs])
    assert not [place for place in (str(Path.home()), str(FOLDER.parent), tempfile.gettempdir()) if place in text]
