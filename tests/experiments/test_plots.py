"""Counts of masks, and figures of several runs, from their rows."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from experiments import bench, draw, ratio, spectrum, surface, tasks, train
from experiments.config import Config
from experiments.figures import curves, landscapes, masks
from experiments.rows import jsonl, provenance
from experiments.solution import Solution
from experiments.training import churn, loop

RNG = np.random.default_rng(0)


@pytest.fixture
def figures(monkeypatch):
    """What would be saved."""
    saved = []
    for module in (curves, masks, landscapes):
        monkeypatch.setattr(module.Figure, "savefig", lambda self, *_, **__: saved.append(self))
    return saved


def test_counts_of_masks():
    before, after = ({"a": RNG.random((7, 9)) < 0.4, "b": RNG.random(5) < 0.5} for _ in range(2))
    old, new = before["a"], after["a"]
    counts = churn.count(*(jax.tree.map(jnp.asarray, masks) for masks in (before, after)))
    assert counts == {"a": [(~new).sum(), 63, (old & ~new).sum(), (~old & new).sum()]}
    assert churn.total({"a": [50, 63, 2, 3]}, {"a": [40, 63, 5, 15]}) == {"a": [40, 63, 7, 18]}
    assert churn.total({}, {"a": [40, 63, 5, 15]}) == {"a": [40, 63, 5, 15]}
    assert churn.count(None, None) == {}


class Rows(list):
    steps, row = (lambda self, count: None), list.append


def trained(eval_every):
    """Rows of four epochs of RigL with the small network."""
    config, rows = Config(optimizer="sgd", subset=256, epochs=4, eval_every=eval_every), Rows()
    loop.train(config, tasks.make(config, tasks.load(config)), rows)
    return rows


def test_rows_say_what_died_and_grew(toy):
    """RigL keeps each layer's count; rows that are further apart hold the sums."""
    every, last = (trained(n) for n in (1, 4))
    for name, (zeros, size) in every[-1]["layers"].items():
        changes = np.array([row["masks"][name] for row in every])
        assert (changes[:, :2] == [zeros, size]).all()
        np.testing.assert_array_equal(changes[:, 2], changes[:, 3])
        assert changes[0, 2] > changes[-1, 2] == 0  # the last quarter is without updates
        assert last[-1]["masks"][name] == [zeros, size, *changes[:, 2:].sum(0)]


def rows_of(optimizer, seed, losses, **settings):
    config = Config(optimizer=optimizer, seed=seed, **settings).to_json()
    return [
        {"config": config, "seed": seed, "epoch": epoch, "train_loss": loss, "test_accuracy": 1 - loss / 10}
        for epoch, loss in enumerate(losses, start=1)
    ]


def test_curves_are_means_over_seeds_with_their_deviation(figures, tmp_path):
    rows = [*rows_of("sgd", 0, [4.0, 1.0]), *rows_of("sgd", 1, [2.0, 3.0]), *rows_of("s2sam", 0, [5.0, 4.0])]
    curves.draw_curves(curves.grouped(rows), "title", tmp_path / "x.png")
    losses, accuracies = figures[0].axes
    assert [line.get_label() for line in losses.lines] == ["sgd", "s2sam"]
    np.testing.assert_allclose(losses.lines[0].get_xydata(), [[1, 3], [2, 2]])
    np.testing.assert_allclose(accuracies.lines[1].get_ydata(), [50, 60])
    band = losses.collections[0].get_paths()[0].vertices
    deviation = np.sqrt(2)
    assert {round(y, 4) for x, y in band if x == 1} == {round(3 - deviation, 4), round(3 + deviation, 4)}
    assert "1 or 2 seeds" in figures[0].get_suptitle()


def test_groups_are_named_by_what_differs():
    rows = [*rows_of("sgd", 0, [1.0]), *rows_of("sgd", 3, [1.0], sparsity=0.95), *rows_of("sam", 0, [1.0], rho=0.1)]
    names = curves.grouped(rows)
    assert list(names) == ["sgd, sparsity 0.9", "sgd, sparsity 0.95", "sam, sparsity 0.9"]
    rows += [*rows_of("sam", 0, [1.0], rho=0.2), *rows_of("sam", 0, [1.0], method="dense")]
    assert list(curves.grouped(rows))[2:] == [
        "sam, rigl, sparsity 0.9, rho 0.1",
        "sam, rigl, sparsity 0.9, rho 0.2",
        "sam, dense, rho 0.05",
    ]
    assert list(curves.grouped(rows_of("sam", 0, [1.0]) + rows_of("sam", 1, [1.0]))) == ["sam"]


def test_masks_show_density_and_change(figures, tmp_path):
    rows = [
        {"epoch": 2, "masks": {"a/kernel": [60, 100, 3, 4], "b": [10, 20, 0, 5]}},
        {"epoch": 4, "masks": {"a/kernel": [80, 100, 22, 2], "b": [10, 20, 1, 1]}},
    ]
    masks.draw_masks(rows, "title", tmp_path / "x.png")
    density, change, total = figures[0].axes[:3]
    np.testing.assert_allclose(density.collections[0].get_array(), [[40, 20], [50, 50]])
    np.testing.assert_allclose(change.collections[0].get_array(), [[10, 10], [50, 10]])
    assert [label.get_text() for label in density.get_yticklabels()] == ["a", "b"]
    assert [bar.get_height() for bar in total.patches] == [9, 3, -3, -23]
    masks.draw_masks(rows[:1], "of one row", tmp_path / "x.png")
    with pytest.raises(ValueError, match="no counts of masks"):
        masks.draw_masks([{"epoch": 1}], "title", tmp_path / "x.png")


def test_ratio_on_a_parabola():
    """The gradient of sum(a w**2) / 2 is a w, and SAM adds a epsilon to it: r = ln(rho |g_j| / (|g| |w_j|))."""
    a, w = RNG.random(500) + 0.5, RNG.normal(size=500)
    masks = RNG.random(500) < 0.7
    found = Solution(jnp.asarray(w), jnp.asarray(masks), lambda p, b: jnp.sum(b * p**2) / 2, [0.5 * a, 1.5 * a])
    row = ratio.measure(found, rho=3.0, pruned=False)
    g = (a * w)[masks]
    r = np.log(3.0 * np.abs(g) / np.linalg.norm(g) / np.abs(w[masks]))
    assert sum(row["r_counts"]) == masks.sum()
    np.testing.assert_allclose(row["r_counts"], np.histogram(r, ratio.EDGES)[0], atol=2)  # float32 at the edges
    assert row["r_below_zero"] == pytest.approx(np.mean(r < 0), abs=0.005)
    assert sum(ratio.measure(found, rho=3.0, pruned=True)["r_counts"]) == 500


def test_every_kind_of_figure_is_drawn_from_a_run(toy, tmp_path):
    words = f"--subset 128 --epochs 2 --out {tmp_path}"
    (folder,) = train.main(words.split()).values()
    row = ratio.main([str(folder), "--examples", "64"])
    assert json.loads((folder / ratio.ANALYSIS.rows).read_text()) == row
    assert imread(folder / ratio.ANALYSIS.figure).std() > 0.02
    heights = {"surface": RNG.random((3, 3)).tolist(), "span": 1.0, "n": 3, "roughness": 1.0}
    nodes = {"nodes": [[-1.0, 3.0]], "weights": [[0.2, 0.8]]}
    for name, found in ((surface.ANALYSIS.rows, heights), (spectrum.ANALYSIS.rows, nodes)):
        (folder / name).write_text(json.dumps({key: row[key] for key in ("config", "seed")} | found) + "\n")
    for kind in ("curves", "masks", "sparsity", "surfaces", "spectra", "ratios"):
        file = draw.main([kind, str(folder), "--out", str(tmp_path / f"{kind}.png")])
        assert imread(file).std() > 0.02


def test_a_figure_without_a_name_lies_among_the_runs_and_says_what_they_have_in_common(figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = [*rows_of("sgd", 0, [1.0], sparsity=0.95), *rows_of("sam", 0, [1.0], sparsity=0.95)]
    for rows in (both, [*both, *rows_of("sgd", 0, [1.0])], rows_of("sgd", 0, [1.0], method="dense")):
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert draw.main(["curves", "rows.jsonl"]) == Path("runs/curves.png")
    assert Path("runs").is_dir()
    titles = [figure.get_suptitle().partition(" (")[0] for figure in figures]
    network = "digits, resnet8"
    assert titles == [f"{network}, rigl, 95% zeros", network, f"{network}, dense"]


def test_rows_of_a_sweep_are_drawn_method_by_method(figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"method": method, "sparsity_asked": sparsity, "optimizer": "sgd", "test_accuracy_recalibrated": sparsity}
        | {"config": Config(method="mest-em-98").to_json(), "seed": 0}
        for method in ("rigl", "set", "static", "itop", "gmp")
        for sparsity in (0.9, 0.95)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw.main(["sparsity", str(file)])
    assert [axes.get_title() for axes in figures[0].axes] == ["rigl", "set", "static", "itop", "gmp"]
    np.testing.assert_allclose(figures[0].axes[4].lines[0].get_xydata(), [[90, 90], [95, 95]])
    draw.main(["sparsity", str(file), "--methods", "set", "gmp"])
    assert [axes.get_title() for axes in figures[1].axes] == ["set", "gmp"]


def test_what_cannot_be_drawn_is_said_in_a_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [*rows_of("sgd", 0, [1.0]), *rows_of("sgd", 1, [1.0])]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind, message in [
        ("masks", "Masks are drawn of one run; these rows are of several"),
        ("sparsity", "No row of a finished run has a number as test_accuracy_recalibrated"),
    ]:
        with pytest.raises(SystemExit, match=message):
            draw.main([kind, str(file)])
    with pytest.raises(SystemExit, match=r"error: .*surface\.jsonl"):
        draw.main(["surfaces", str(tmp_path)])
    with pytest.raises(SystemExit, match="There are no rows in nothing"):
        draw.main(["curves"])


def test_rows_of_how_selection_grows_say_where_they_were_made(tmp_path, monkeypatch):
    figures = {"parameters": 10, "seconds": 1.0, "temporary_bytes": 8}
    ways = [{"way": way, **figures} for way in ("select", "argsort", "top_k")]
    monkeypatch.setattr(bench.masks, "growth", lambda sizes, rounds: iter(ways))
    made = list(bench._growth(bench.Arguments(out=tmp_path / "new", rounds=3), Console(quiet=True)))
    assert [row.value for row in made] == [1.0, 1.0]
    (file,) = (tmp_path / "new").glob("bench_select_*.jsonl")
    where = provenance.environment() | {"bench": {"rounds": 3}}
    assert jsonl.read(file) == [where | way for way in ways]
    assert file.with_suffix(".png").is_file()
