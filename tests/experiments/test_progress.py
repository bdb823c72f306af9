"""What a run tells while it goes on: whether its perturbation survives, and how far it has got."""

import io
import re
import warnings

import pytest
from interrupted import start as resumed
from interrupted import stop_in
from rich.console import Console

from experiments import train
from experiments.training import display, runs
from s2sam_jax import sharpness_metrics

SHORT = ["--subset", "128", "--epochs", "3"]
ROW = {"epoch": 2, "step": 44, "train_loss": 0.25, "test_accuracy": 0.9, "sparsity": 0.87, "images_per_second": 2000.0}


def start(out, *options):
    return next(iter(train.main([*SHORT, "--out", str(out), *options]).values()))


def lost(options, out):
    """The folder of a run, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = start(out, *options)
    return folder, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("optimizer", ["s2sam", "msam"])
def test_a_run_warns_once_if_low_precision_takes_the_perturbation_away(optimizer, toy, tmp_path):
    options = ["--optimizer", optimizer, "--rho", "0.005"]
    _, warned = lost([*options, "--compute", "bfloat16"], tmp_path)
    assert len(warned) == 1
    assert "Low precision takes the perturbation away" in warned[0]


@pytest.mark.parametrize("options", [["--rho", "0.005"], ["--rho", "2", "--compute", "bfloat16"]])
def test_a_run_whose_perturbation_is_kept_does_not_warn(options, toy, tmp_path):
    assert lost(options, tmp_path)[1] == []


def test_a_run_warns_of_a_layer_that_has_lost_all_its_weights(toy, tmp_path):
    warned = lost(["--method", "snip", "--sparsity", "0.9995"], tmp_path)[1]
    assert warned[0].startswith("No weight is left in ['hidden/kernel']")


def test_what_a_row_says_of_the_perturbation_is_that_of_its_checkpoint(toy, tmp_path):
    folder = start(tmp_path, "--compute", "bfloat16", "--rho", "2")
    state, rows = runs.restore(folder), runs.rows(folder)
    expected = sharpness_metrics(state.params, state.opt_state, compute_dtype="bfloat16")
    for name in ("epsilon_norm", "epsilon_cosine"):
        assert rows[-1][name] == pytest.approx(float(expected[name]), rel=1e-5)
    assert len({row["epsilon_cosine"] for row in rows}) == 3
    assert rows[-1]["epsilon_norm"] == pytest.approx(2, rel=1e-4)
    assert 0.9 < rows[-1]["epsilon_cosine"] < 1


@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_of_an_ascent_inside_the_update_a_row_says_nothing(optimizer, toy, tmp_path):
    folder, warned = lost(["--optimizer", optimizer, "--compute", "bfloat16"], tmp_path)
    assert warned == []
    assert not {"epsilon_norm", "epsilon_cosine"} & set().union(*runs.rows(folder))


def test_a_radius_of_zero_is_warned_of_unless_its_schedule_has_come_to_it(toy, tmp_path):
    ends = ["--method", "static", "--rho-schedule", "learning-rate", "--eval-every", "3"]
    assert lost(["--rho", "0"], tmp_path)[1][0].startswith("Sharpness-aware training is off")
    folder, warned = lost(ends, tmp_path)
    assert (runs.rows(folder)[-1]["epsilon_norm"], warned) == (0, [])


def test_in_a_file_every_row_is_a_line(toy, tmp_path, capsys):
    start(tmp_path)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("s2sam ")]
    assert [line[:4] for line in lines] == [["s2sam", f"{2 * n}/6", "epoch", str(n)] for n in (1, 2, 3)]


@pytest.mark.parametrize("terminal", [False, True])
def test_news_are_those_of_the_row(terminal):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=100)
    console.is_interactive = terminal
    with display.ProgressBar(console, "s2sam-opposite", 200, 22) as bar:
        bar.steps(44)
        bar.row(ROW)
        assert terminal or shown.getvalue().startswith("s2sam-opposite 44/4400 epoch 2 loss")
    *_, last = [line for line in re.split(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n", shown.getvalue()) if "epoch" in line]
    assert last.strip().endswith("epoch 2 loss 0.250 test 90.0% zeros of all 87% 2,000 img/s")
    assert ("44/4400" in shown.getvalue(), "…" in shown.getvalue()) == (True, False)


def test_a_run_that_goes_on_says_from_where(toy, tmp_path, monkeypatch, capsys):
    stop_in(monkeypatch, runs, "append", 4, tmp_path)
    assert "goes on" not in capsys.readouterr().out
    resumed(tmp_path)
    assert "s2sam goes on from epoch 5\n" in capsys.readouterr().out
