"""A user's mistake ends in one line and exit code 1; a bug keeps its traceback."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from checking import at

import experiments
from experiments import cli, convergence, draw, evaluate, flatness, precision, recipes, report, table, train, tune
from experiments.config import Config
from experiments.pages import flatness as flatness_page
from experiments.recipes.scales import scaled
from experiments.rows import jsonl
from experiments.training import loop, runs
from s2sam_jax import sam


def test_without_its_extra_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the packages of its extra.* pip install '\.\[experiments\]'"):
        importlib.reload(experiments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "1.5"], "sparsity must be"),
        (["--model", "resnet99"], "resnet99"),
        (["--recipe", "table1.rigl-erk-0.95.s2sma"], "Unknown recipe"),
        (["--dataset", "cifar10"], "--data"),
        (["--dataset", "cifar10", "--data", "nowhere.npz"], "nowhere.npz"),
        (["--structure", "nm:2"], "nm:2"),
        (["--init-from", "nowhere"], "nowhere"),
        (["--rho", "-1"], "rho must be"),
        (["--method", "lottery", "--rounds", "0"], "rounds must be at least 1"),
        (["--method", "lottery", "--prune-fraction", "1"], "prune_fraction must be in (0, 1)"),
        (["--epochs", "0"], "epochs must be"),
        (["--rho", "inf"], "rho must be finite"),
        (["--seed", "99999999999999999999"], "seed must be in"),
        (["--batch-size", "100000"], "batch"),
    ],
)
def test_a_mistake_ends_in_a_message_that_names_it(options, message, tmp_path, monkeypatch, capsys):
    """What a config refuses tyro says, with exit code 2; what a run refuses, we."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^(error: .*|2)$") as stop:
        train.main(options)
    assert message in str(stop.value) + capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (evaluate.main, ["nowhere"], "nowhere"),
        (draw.main, ["sparsity", "nowhere.jsonl"], "nowhere.jsonl"),
        (table.main, ["table9"], "table9"),
        (table.main, ["table1", "--methods", "riggle", "--scale", "smoke"], "riggle"),
        (tune.main, ["causes", "--rows", "rows.jsonl"], "compares radii"),
    ],
)
def test_so_do_the_other_commands(main, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: ") as stop:
        main(options)
    assert message in str(stop.value)


def test_in_a_process_of_its_own_the_line_is_all_there_is(tmp_path):
    run = [sys.executable, "-m", "experiments.report", "--results", str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"error: there are no rows in {tmp_path}.\n")


def test_an_error_that_our_code_raises_within_a_compiled_function_is_a_mistake():
    tx = optax.chain(sam(), optax.sgd(0.1))
    params = {"w": jnp.ones(3)}
    with pytest.raises(SystemExit, match=r"^error: .*grad_fn"), cli.one_line():
        jax.jit(tx.update)(params, tx.init(params), params)


@pytest.mark.parametrize(
    ("bug", "error"),
    [
        (lambda: jnp.ones(3) + jnp.ones(4), TypeError),  # a library raises it
        (lambda: cli.PACKAGES.index("other"), ValueError),  # Python raises it, for our line
        (lambda: {}["other"], KeyError),
        (lambda: next(iter(zip([1], [1, 2], strict=True))) and list(zip([1], [], strict=True)), ValueError),
    ],
)
def test_a_bug_keeps_its_traceback(bug, error, monkeypatch):
    monkeypatch.setattr(cli, "PACKAGES", (*cli.PACKAGES, __name__.partition(".")[0]))
    with pytest.raises(error), cli.one_line():
        bug()


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return str(file)


ROW = {"seed": 0, "final": True, "test_accuracy_recalibrated": 0.5}
TWO_RADII = [dataclasses.replace(Config(), rho=rho).to_json() for rho in (0.05, 0.2)]


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (draw.main, ["curves", "{text}"], "line 1, is not a row"),
        (draw.main, ["curves", "{rows}"], "line 1, is a row of another kind: it lacks config, seed, epoch"),
        (draw.main, ["surfaces", "{rows}"], "it lacks config, seed, surface"),
        (evaluate.main, ["{run}"], "config.json is not the config of a run"),
        (table.main, ["budget", "--tuned", "{rows}"], "it lacks setting, accuracy"),
        (table.main, ["budget", "--tuned", "{none}"], "No rho was tuned for dense.sam"),
        (train.main, ["--dataset", "cifar10", "--data", "{text}"], "cannot be read as an .npz of plain arrays"),
        (
            train.main,
            ["--method", "dense", "--drop-fraction", "0.3"],
            "drop_fraction=0.3 has no effect with method=dense",
        ),
        (tune.main, ["budget", "--held-out", "0", "--scale", "digits", "--rows", "new.jsonl"], "share of the training"),
        (
            train.main,
            ["--method", "dense", "--structure", "channel"],
            "structure=channel has no effect with method=dense",
        ),
        (train.main, ["--method", "dense", "--sparsity", "0.5"], "sparsity=0.5 has no effect with method=dense"),
        (train.main, ["--rewind-epochs", "2"], "it is for method lottery or lrr"),
        (train.main, ["--seed", "3", "--seeds", "1", "2"], "--seed 3 is not among --seeds (1, 2)"),
        (train.main, ["--num-processes", "2"], "are for --distributed"),
        (
            train.main,
            ["--drop-fraction", "0.3", "--method", "static"],
            "drop_fraction=0.3 has no effect with method=static",
        ),
        (draw.main, ["spectra", "{rows}"], "it lacks config, seed, nodes, weights"),
        (draw.main, ["ratios", "{rows}"], "it lacks config, seed, r_edges"),
        (draw.main, ["sparsity", "{twice}", "--field", "config"], "has a number as config"),
        (draw.main, ["sparsity", "{twice}", "--out", "x.xyz"], "--out must end in one of"),
        (train.main, ["--out", "{text}/runs"], "Not a directory"),
        (draw.main, ["sparsity", "{twice}"], "they differ in what this figure does not tell apart"),
    ],
)
def test_so_do_files_of_another_kind_and_options_without_effect(main, options, message, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    files = {
        "text": write(tmp_path / "text.npz", "no row\n"),
        "rows": write(tmp_path / "rows.jsonl", "{}\n"),
        "none": write(tmp_path / "none.jsonl", ""),
        "twice": write(tmp_path / "twice.jsonl", "".join(json.dumps(ROW | {"config": c}) + "\n" for c in TWO_RADII)),
        "run": str(tmp_path / "run"),
    }
    write(tmp_path / "run" / "config.json", "[1, 2]")
    with pytest.raises(SystemExit, match=r"^error: ") as stop:
        main([option.format(**files) for option in options])
    assert message in str(stop.value)
    assert list((tmp_path / "work").iterdir()) == []


def test_a_row_of_another_run_is_not_replaced(tmp_path):
    """Rows made with a tuned radius outlive the command without it."""
    recipe = recipes.get("budget.dense.s2sam")
    config = dataclasses.replace(scaled(recipe, "digits"), rho=0.2)
    row = {"recipe": {"name": recipe.name}, "seed": 0, "config": config.to_json()}
    file = tmp_path / "budget_digits.jsonl"
    file.write_text(json.dumps(row) + "\n")
    options = ["--scale", "digits", "--methods", "dense", "--optimizers", "s2sam", "--results", str(tmp_path)]
    with pytest.raises(
        SystemExit, match=r"(?s)row of budget\.dense\.s2sam, 0, but of another config.*rho: 0\.2 there, 0\.05 asked for"
    ):
        table.main(["budget", *options, "--out", str(tmp_path / "runs")])
    assert json.loads(file.read_text()) == row
    assert not (tmp_path / "runs").exists()


def test_a_bad_file_does_not_keep_the_others_from_their_pages(tmp_path, capsys):
    good = jsonl.RESULTS / "table3-cifar10_cpu.jsonl"
    (tmp_path / good.name).write_text(good.read_text())
    (tmp_path / "a_cpu.jsonl").write_text("no row\n")
    with pytest.raises(SystemExit, match=r"^error: no page was made from a_cpu.jsonl: .*line 1, is not a row"):
        report.main(["--results", str(tmp_path)])
    assert capsys.readouterr().out == f"from {good.name}\n"
    assert (tmp_path / good.with_suffix(".md").name).read_text() == good.with_suffix(".md").read_text()


def test_a_run_without_rows_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run: it has no metrics\.jsonl"):
        runs.rows(tmp_path)
    write(tmp_path / "metrics.jsonl", "")
    with pytest.raises(ValueError, match=r"metrics\.jsonl has no rows\. Train anew"):
        runs.rows(tmp_path)


def test_flatness_refuses_a_run_that_its_figures_could_not_tell_apart(tmp_path):
    config = Config(rho=0.2)
    write(tmp_path / "run" / "config.json", json.dumps(config.to_json()))
    row = {"method": "rigl", "optimizer": "s2sam", "sparsity_asked": 0.9, "seed": 0, "examples": 512}
    rows = write(tmp_path / "rows.jsonl", json.dumps(row | {"config": Config().to_json()}) + "\n")
    with pytest.raises(SystemExit, match=r"(?s)^error: .*rho: 0\.05 there, 0\.2 asked for\nGive another file"):
        flatness.main(["--runs", str(tmp_path / "run"), "--rows", rows])


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (convergence, ["--steps", "1000"], "last_step=100000, not 1000"),
        (precision, ["--draws", "2"], "draws=4, not 2"),
        (precision, ["--radii", "0.05"], "radii=[0.005, 0.01, 0.05, 0.1, 0.5], not [0.05]"),
        (precision, ["--epochs", "1"], "epochs: 20 there, 1 asked for"),
        (flatness, ["--n", "3", "--examples", "64"], "examples=512, not 64; n=15, not 3"),
    ],
)
def test_rows_that_were_made_otherwise_are_not_passed_off_as_what_is_asked_for(command, options, message, tmp_path):
    """Copies of the committed rows, on which the command without options finds nothing left to do."""
    committed = command.Arguments().rows
    rows = tmp_path / committed.name
    rows.write_bytes(committed.read_bytes())
    here = ["--rows", str(rows), *(["--cache", str(tmp_path / "cache")] if command is not convergence else [])]
    with pytest.raises(SystemExit, match=r"^error: .* has a row of ") as stop:
        command.main([*options, *here])
    assert message in str(stop.value)
    assert rows.read_bytes() == committed.read_bytes()
    command.main(here)
    assert rows.read_bytes() == committed.read_bytes()


def test_a_command_reads_its_words_and_returns_what_its_function_does(capsys):
    @dataclasses.dataclass
    class Arguments:
        """Doubles."""

        number: int = 2

    @cli.command
    def main(arguments: Arguments) -> int:
        if arguments.number < 0:
            raise OSError("no  such\nfile")
        return 2 * arguments.number

    assert (main([]), main(["--number", "5"])) == (4, 10)
    with pytest.raises(SystemExit, match=r"^error: no  such\nfile$"):
        main(["--number", "-1"])
    with pytest.raises(SystemExit) as stop:
        main(["--numbr", "5"])
    assert stop.value.code == 2
    assert "--numbr" in capsys.readouterr().err


def test_claims_are_of_cells_that_have_sgd_beside():
    def row(optimizer, roughness, seed=0, sparsity=0.9):
        return dict(method="rigl", optimizer=optimizer, sparsity_asked=sparsity, seed=seed, roughness=roughness,
                    largest_eigenvalue=1.0, trace=-1.0)  # fmt: skip

    assert "| S2-SAM | 0 of 0 | – | 0 of 0 |" in flatness_page.claims([row("s2sam", 1.0), row("sgd", 2.0, seed=1)])
    one = [row("s2sam", 1.0), row("sgd", 2.0)]
    assert "| S2-SAM | 1 of 1 | – | 0 of 1 | – | 0 of 1 | – |" in flatness_page.claims(one)
    several = [*one, row("s2sam", 1.0, sparsity=0.8), row("sgd", 8.0, sparsity=0.8), row("sgd", 99.0, seed=1)]
    said = flatness_page.claims(several)
    (line,) = [line for line in said.splitlines() if line.startswith("| S2-SAM |")]
    assert line.startswith("| S2-SAM | 2 of 2 | 0.25 (")
    assert line.endswith("| 0 of 2 | 1.00 (1.00 to 1.00) | 0 of 2 | – |")  # no ratio of traces below zero
    assert "|" not in flatness_page.claims([row("s2sam", 1.0)])


def test_the_command_line_ends_with_a_line_that_names_the_fault(toy, tmp_path, monkeypatch):
    short = ["--subset", "64", "--epochs", "1", "--out", str(tmp_path), "--method", "static", "--debug"]
    fresh = loop.initial_state

    def dense(*arguments):
        state = fresh(*arguments)
        return state._replace(params=at(state.params, "head/kernel", lambda w: w + 1))

    monkeypatch.setattr(loop, "initial_state", dense)
    with pytest.raises(SystemExit) as stopped:
        train.main(short)
    line = r"error: checked found before the update: head/kernel: \d+ pruned weights are not zero; call apply_masks.*"
    assert re.fullmatch(line, str(stopped.value))
    with pytest.raises(SystemExit, match="--debug checks one run at a time; leave out --vmap"):
        train.main([*short, "--vmap", "--seeds", "0", "1"])
