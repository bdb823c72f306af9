"""Figures of solutions are drawn from rows, also where there is little or nothing to see."""

import json

import jax
import numpy as np
import pytest
from matplotlib.image import imread

from experiments import flatness, solution, spectrum, surface, train
from experiments.figures import against_sparsity, landscapes
from experiments.pages import flatness as flatness_page
from experiments.training import runs

RNG = np.random.default_rng(0)


def row_of(heights):
    return {"surface": heights.tolist(), "span": 1.0, "n": len(heights), "roughness": 1.0}


@pytest.mark.parametrize(
    "heights",
    [RNG.random((5, 5)), np.full((5, 5), 2.0), np.zeros((5, 5)), np.array([[1, np.nan], [np.inf, 2]])],
    ids=["rough", "flat", "zero", "broken"],
)
def test_surfaces(heights, tmp_path):
    landscapes.draw_surfaces({"one": row_of(heights), "two": row_of(heights)}, tmp_path / "surface.png")
    picture = imread(tmp_path / "surface.png")
    assert picture.shape[1] > 500
    assert picture.std() > 0.05


def test_spectra(tmp_path):
    rows = {
        "many": {"nodes": [[-1.0, 0.0, 3.0]], "weights": [[0.2, 0.7, 0.1]]},
        "one": {"nodes": [[2.0]], "weights": [[1.0]]},
    }
    landscapes.draw_spectra(rows, tmp_path / "spectrum.png")
    assert imread(tmp_path / "spectrum.png").std() > 0.02


def test_against_sparsity_has_a_line_for_each_optimizer(tmp_path, monkeypatch):
    """Of means over seeds, with bars of the sample deviation."""
    figures = []
    monkeypatch.setattr(against_sparsity.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    rows = [
        {"method": "rigl", "optimizer": f"o{o}", "sparsity_asked": s, "x": o + s + seed}
        for o in range(8)
        for s in (0.9, 0.8)
        for seed in (0, 1)
    ]
    quantity = against_sparsity.Quantity("x", label="x", title="x", factor=2.0)
    against_sparsity.draw(rows, quantity, "title", tmp_path / "x.png")
    (axes,) = figures[0].axes
    means, dots = axes.lines[::2], axes.lines[1::2]
    assert len(means) == len(dots) == 8
    near = 0.3 * (3 - 3.5)
    np.testing.assert_allclose(
        means[3].get_xydata(), [[80 + near, 2 * (3 + 0.8 + 0.5)], [90 + near, 2 * (3 + 0.9 + 0.5)]]
    )
    assert sorted(dots[3].get_ydata()) == pytest.approx([2 * 3.8, 2 * 3.9, 2 * 4.8, 2 * 4.9])


@pytest.fixture
def folder(toy, tmp_path):
    words = f"--method static --sparsity 0.5 --subset 64 --epochs 1 --batch-size 32 --out {tmp_path}"
    return next(iter(train.main(words.split()).values()))


def test_surface_of_a_run(folder):
    """Its middle is the loss of the run's weights, its roughness that of the stored heights."""
    row = surface.main([str(folder), "--n", "3", "--examples", "64", "--span", "0.5"])
    heights = np.array(row["surface"])
    assert heights.shape == (3, 3)
    _, found = solution.of_run(folder, None, 64)
    logits = []
    hidden, head = found.params["hidden"], found.params["head"]["kernel"]
    mean = runs.restore(folder).model_state["mean"]
    for pixels, _ in found.batches:
        inputs = (np.asarray(pixels, np.float64).reshape(len(pixels), -1) / 255 - 0.3054) / 0.3760
        normed = (inputs @ hidden["kernel"] - mean) * hidden["scale"] + hidden["bias"]
        logits.append(np.tanh(normed) @ np.asarray(head, np.float64))
    logits, labels = np.concatenate(logits), np.concatenate([labels for _, labels in found.batches])
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(64), labels]
    assert heights[1, 1] == pytest.approx(losses.mean(), rel=1e-5)
    assert row["roughness"] == pytest.approx(np.abs(heights - heights.mean()).mean())
    assert row["examples"] == 64
    assert json.loads((folder / surface.ANALYSIS.rows).read_text()) == row
    assert imread(folder / surface.ANALYSIS.figure).std() > 0.05
    with pytest.raises(SystemExit, match="at least one batch of 32"):
        surface.main([str(folder), "--examples", "8"])
    with pytest.raises(SystemExit, match="not the folder of a finished run"):
        surface.main([str(folder.parent)])


def test_spectrum_of_a_run(folder):
    """Against the curvature along the vectors themselves: a Rayleigh quotient is never above the largest eigenvalue."""
    row = spectrum.main([str(folder), "--examples", "64", "--steps", "20", "--samples", "4"])
    values = np.array(row["eigenvalues"])
    assert (np.diff(values) <= 0).all()
    assert row["eigenvalue_bounds"][0] < 0.05 * values[0]
    assert row["eigenvalue_ratio"] == values[0] / values[4]
    _, found = solution.of_run(folder, None, 64)

    def loss(params):
        return sum(found.loss_fn(params, batch) for batch in found.batches) / len(found.batches)

    gradient = jax.tree.map(lambda m, g: np.where(m, g, 0), found.masks, jax.grad(loss)(found.params))
    product = jax.jvp(jax.grad(loss), (found.params,), (gradient,))[1]
    squares, quotient = (
        sum(np.vdot(g, x) for g, x in zip(*map(jax.tree.leaves, (gradient, other)), strict=True))
        for other in (gradient, product)
    )
    assert 0 < quotient / squares <= values[0] * 1.001
    assert np.sum(row["weights"]) == pytest.approx(1.0, abs=1e-6)
    assert row["sam_sharpness"] > 0
    assert imread(folder / spectrum.ANALYSIS.figure).std() > 0.02


def test_flatness_of_a_finished_run(folder, tmp_path):
    file = tmp_path / "rows.jsonl"
    few = {"examples": 32, "n": 3, "steps": 6, "samples": 2}
    for _ in range(2):  # the second time it has a row
        flatness.run(flatness.Arguments(runs=(folder,), rows=file, **few))
    (row,) = map(json.loads, file.read_text().splitlines())
    assert (row["method"], row["optimizer"], row["sparsity_asked"], row["examples"]) == ("static", "s2sam", 0.5, 32)
    assert {"roughness", "roughness_pruned_move", "largest_eigenvalue", "test_accuracy_recalibrated"} <= row.keys()
    assert str(tmp_path) not in json.dumps(row)


@pytest.mark.parametrize("of_digits", [False, True])
@pytest.mark.parametrize("change", ["width", "examples", "n", "span", "steps", "sharpness_rho"])
def test_what_cannot_stand_beside_the_rows_is_refused_before_it_is_measured(change, of_digits, folder, tmp_path):
    file, few = tmp_path / "rows.jsonl", {"examples": 64, "n": 3, "steps": 6}
    cell = {"methods": ("static",), "optimizers": ("s2sam",), "sparsities": (0.8,), "seeds": (0,)}
    config = flatness.config_of("static", "s2sam", 0.8, 0) if of_digits else runs.read_config(folder)
    row = {
        "method": "static",
        "optimizer": "s2sam",
        "sparsity_asked": 0.8,
        "seed": 3,
        "span": 1.0,
        "sharpness_rho": 0.05,
    }
    row |= few | {"config": config.to_json() | {"seed": 3}}
    (row["config"] if change == "width" else row)[change] = 5
    file.write_text(before := json.dumps(row) + "\n")
    asked = flatness.Arguments(**cell, runs=() if of_digits else (folder,), rows=file, **few)
    with pytest.raises(
        ValueError, match=f"in method, sparsity, optimizer and seed alone; these also differ in {change}"
    ):
        flatness.run(asked)
    assert file.read_text() == before


def test_lotteries_of_several_lengths_stand_on_one_page():
    def row(method, sparsity):
        config = flatness.config_of(method, "sgd", sparsity, 0)
        return {"config": config.to_json(), "examples": 512}

    flatness_page.check([row("lottery", 0.8), row("lottery", 0.9), row("static", 0.9)])


def test_page_of_flatness_comes_from_its_rows(tmp_path):
    common = {"examples": 512, "n": 15, "span": 1.0, "steps": 30, "device": "cpu", "eigenvalue_ratio": None}
    common["config"] = {"dataset": "digits", "model": "resnet8", "width": 8, "epochs": 20, "rho": 0.05}
    fields = ("test_accuracy_recalibrated", "roughness", "roughness_pruned_move", "largest_eigenvalue", "trace")
    rows = [
        common
        | {"method": "rigl", "optimizer": optimizer, "sparsity_asked": 0.9, "seed": seed, "sam_sharpness": 0.0}
        | dict.fromkeys(fields, 0.5 + seed)
        | ({"roughness": 0.25 + seed} if optimizer == "s2sam" else {})
        for optimizer in ("sgd", "s2sam")
        for seed in (0, 1)
    ]
    file = tmp_path / "flatness.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flatness_page.write(file)
    lines = file.with_suffix(".md").read_text().splitlines()
    cells = "100 ± 71 | 1 ± 0.71 | 1 ± 0.71 | 1 ± 0.71 | – | 1 ± 0.71 | 0 ± 0"
    assert f"| rigl | 90 | SGD | {cells} | 2 |" in lines
    assert "# Flatness of sparse solutions on digits" in lines
    assert {"| rigl | 1 |", "| S2-SAM | 1 of 1 | – | 0 of 1 | – | 0 of 1 | – |"} <= set(lines)
    pictures = [line.split("](")[1].removesuffix(")") for line in lines if line.startswith("![")]
    assert sorted(pictures) == sorted(found.name for found in tmp_path.glob("*.png"))
    assert len(pictures) == 3
