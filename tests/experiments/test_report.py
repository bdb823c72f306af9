"""Every page and figure of results follows from the rows beside it."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experiments import report
from experiments.pages import markdown
from experiments.rows import files, jsonl

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


def test_rows_that_several_add_to_one_file_are_all_whole(tmp_path):
    rows = [{"number": number, "long": "x" * 30_000} for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: jsonl.append(tmp_path / "rows.jsonl", row), rows))
    assert sorted(row["number"] for row in jsonl.read(tmp_path / "rows.jsonl")) == list(range(200))


def test_a_last_line_without_an_end_does_not_spoil_the_next(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}')
    jsonl.append(file, {"b": 2})
    assert jsonl.read(file) == [{"a": 1}, {"b": 2}]
    file.write_text('{"a": 1}\n{"b"')
    jsonl.append(file, {"c": 3})
    with pytest.raises(ValueError, match="line 2, is not a row"):
        jsonl.read(file)
    assert file.read_text().splitlines()[2] == '{"c": 3}'


def test_a_row_of_a_newer_version_keeps_no_other_file_from_its_page(tmp_path, capsys):
    shutil.copy(jsonl.RESULTS / "table1_cpu.jsonl", tmp_path)
    text = (jsonl.RESULTS / "table3-cifar10_cpu.jsonl").read_text()
    (tmp_path / "newer.jsonl").write_text(text.replace('"recipe": {', '"recipe": {"newer": 1, ', 1))
    with pytest.raises(SystemExit, match=r"no page was made from newer\.jsonl: TypeError: .*'newer'"):
        report.main(["--results", str(tmp_path)])
    assert capsys.readouterr().out == "from table1_cpu.jsonl\n"


def test_files_are_utf8_whatever_the_locale(tmp_path):
    script = (
        "import sys, pathlib; from experiments.rows import files; files.write_text(pathlib.Path(sys.argv[1]), chr(949))"
    )
    plain = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONPATH": "."}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "page.md")], env=plain, check=True)
    assert (tmp_path / "page.md").read_bytes() == "ε".encode()


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    def fails(path):
        path.write_text("half")
        raise OSError("No space left on device")

    file = tmp_path / "page.md"
    file.write_text("before")
    with pytest.raises(OSError, match="No space"):
        files.write_whole(file, fails)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("page.md", "before")]


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
