"""Every page and figure of results follows from the rows beside it."""

import json
import shutil
from pathlib import Path

import pytest

from experiments import report
from experiments.pages import markdown
from experiments.rows import jsonl

ROWS = sorted(jsonl.RESULTS.glob("*.jsonl"))


BY_HAND = {
    "bench_cpu", "budget_digits_tuning", "fuzz", "mutation", "narrow_steps", "one_step", "resume",
}  # fmt: skip


def test_rows_without_a_page_of_their_own_are_those_that_pages_by_hand_speak_of():
    assert {file.stem for file in ROWS if report.writer(file) is None} == BY_HAND
    texts = " ".join(file.read_text() for file in (*jsonl.RESULTS.glob("*.md"), Path("README.md")))
    assert not [name for name in BY_HAND if f"{name}.jsonl" not in texts]


@pytest.mark.parametrize("file", [file for file in ROWS if file.stem not in BY_HAND], ids=lambda file: file.stem)
def test_pages_are_those_that_the_rows_make(file, tmp_path):
    shutil.copy(file, tmp_path)
    report.writer(file)(tmp_path / file.name)
    made = sorted(tmp_path.iterdir())
    assert len(made) > 1
    for page in made:
        committed = jsonl.RESULTS / page.name
        assert committed.is_file()
        if page.suffix in (".md", ".csv"):
            assert page.read_text() == committed.read_text()


def test_rows_are_added_and_read(tmp_path):
    file = tmp_path / "folder" / "rows.jsonl"
    assert jsonl.read(file) == []
    jsonl.append(file, {"a": 1}, {"b": [2.5]})
    jsonl.append(file, {"c": None})
    assert jsonl.read(file) == [{"a": 1}, {"b": [2.5]}, {"c": None}]
    assert [json.loads(line) for line in file.read_text().splitlines()] == jsonl.read(file)


def test_rows_that_are_not_there(tmp_path):
    with pytest.raises(SystemExit, match="there are no rows in"):
        report.main(["--results", str(tmp_path)])
    (tmp_path / "table1_cpu.jsonl").touch()
    report.main(["--results", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["table1_cpu.jsonl"]


def test_the_command_makes_what_there_are_rows_for(tmp_path, capsys):
    shutil.copy(jsonl.RESULTS / "table1_cpu.jsonl", tmp_path)
    shutil.copy(jsonl.RESULTS / "fuzz.jsonl", tmp_path)
    report.main(["--results", str(tmp_path)])
    assert capsys.readouterr().out == "from table1_cpu.jsonl\n"
    assert {file.name for file in tmp_path.iterdir()} == {
        "table1_cpu.jsonl", "table1_cpu.md", "table1_cpu.csv", "table1_cpu.png", "fuzz.jsonl",
    }  # fmt: skip


def test_tables_and_sources_of_pages():
    cells = [["a", "1"], ["b", ""]]
    assert markdown.table(("name", "n"), cells) == "| name | n |\n|---|---|\n| a | 1 |\n| b | |"
    assert markdown.table(("name", "n"), cells[:1], rule=" --- ") == "| name | n |\n| --- | --- |\n| a | 1 |"
    rows = [{"device": device, "width": width} for device, width in (("gpu", None), ("cpu", 8), ("gpu", 8))]
    assert markdown.values(rows, "width") == "8, None"
    assert (
        markdown.source(rows, "flatness", "a.jsonl")
        == "Device: cpu, gpu. Made by `python -m experiments.flatness` from `a.jsonl`"
    )
