"""Figures of tables: gains, intervals and prices, as the rows have them."""

import numpy as np
from table_rows import synthetic

from experiments import recipes, table
from experiments.figures import tables
from experiments.rows import comparison


def test_gains_are_drawn_against_the_share_of_zeros(tmp_path, monkeypatch):
    """Of each method with what belongs to all; with intervals, and the paper's where there are some."""
    figures = []
    monkeypatch.setattr(tables.Figure, "savefig", lambda figure, file, dpi: figures.append(figure))
    rng, rows = np.random.default_rng(0), []
    for recipe in recipes.of_table("sparsities"):
        if recipe.sparsity in (None, 0.9, 0.98) and recipe.config.optimizer != "sam":
            rows += [{"recipe": table.described(recipe), "seed": s, "value": rng.normal(90, 1)} for s in range(3)]
    lines = comparison.compare(rows)
    tables.draw_gains(lines, "sparsities", tmp_path / "gains.png")
    panels = figures[0].axes
    assert [axes.get_title() for axes in panels] == ["MEST (EM)", "RigL (ERK)"]
    found = {line.name: line for line in lines}
    (bars,) = panels[1].containers
    names = ["sparsities.dense.s2sam", "sparsities.rigl-erk-0.9.s2sam", "sparsities.rigl-erk-0.98.s2sam"]
    np.testing.assert_allclose(bars.lines[0].get_ydata(orig=False), [found[name].difference for name in names])
    np.testing.assert_allclose(bars.lines[0].get_xdata(orig=False), [0, 90, 98])
    ends = np.array(bars.lines[2][0].get_segments())[:, :, 1]
    np.testing.assert_allclose((ends[:, 1] - ends[:, 0]) / 2, [found[name].interval for name in names])
    printed = [line for line in panels[1].lines if line.get_markerfacecolor() == "none"]
    np.testing.assert_allclose([line.get_xydata()[0] for line in printed], [[0, 0.41], [90, 0.20], [98, 0.94]])


def test_a_comparison_has_deviations_of_means_and_intervals_of_gains(tmp_path, monkeypatch):
    """Wide intervals are cut off, so that they do not make all gains look alike."""
    figures = []
    monkeypatch.setattr(tables.Figure, "savefig", lambda figure, file, dpi: figures.append(figure))
    sgd, s2sam, alone, _ = comparison.compare(synthetic())
    wide = s2sam._replace(difference=0.1, difference_spread=99.0)
    tables.draw_comparison([sgd, s2sam, alone, wide], "table1", tmp_path / "table.png")
    means, gains = figures[0].axes

    def halves(axes):
        return [np.ptp(bars.lines[2][0].get_segments()[0][:, 0]) / 2 for bars in axes.containers if bars.has_xerr]

    np.testing.assert_allclose(halves(means), [sgd.spread, s2sam.spread, alone.spread, wide.spread])
    np.testing.assert_allclose(halves(gains), [s2sam.interval, wide.interval])
    reach = 2.5 * max(abs(s2sam.difference), s2sam.paper_difference)
    np.testing.assert_allclose(gains.get_xlim(), (-reach, reach))
    assert figures[0].get_suptitle() == "table1; hollow: the paper's"


def test_prices_have_a_panel_for_each_line_of_sgd_and_the_cheapest_first(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(tables.Figure, "savefig", lambda figure, file, dpi: figures.append(figure))
    names = ["dense-sgd", "dense-sam-0.2", "dense-s2sam-0.2", "rigl-erk-sgd", "rigl-erk-s2sam-0.2"]
    rows = [
        {"recipe": table.described(recipes.get(f"label-noise.{name}")), "seed": seed, "value": 90.0 + place * seed}
        for place, name in enumerate(names)
        for seed in range(3)
    ]
    lines = comparison.compare(rows)
    tables.draw_prices(lines[:1], "label-noise", tmp_path / "gains.png")
    assert figures == []
    tables.draw_prices(lines, "label-noise", tmp_path / "gains.png")
    dense, rigl = figures[0].axes
    assert [axes.get_title().split("\n") for axes in (dense, rigl)] == [
        ["dense", "(SGD: 90.0)"],
        ["RigL (ERK), 90 %", "(SGD: 93.0)"],
    ]
    assert [word.get_text() for word in dense.get_yticklabels()] == ["S2-SAM, rho 0.2 (1)", "SAM, rho 0.2 (2)"]
    points = [bars.lines[0].get_xydata()[0] for bars in dense.containers]
    np.testing.assert_allclose(points, [[2.0, 0], [1.0, 1]])
    np.testing.assert_allclose([bars.lines[0].get_xydata()[0] for bars in rigl.containers], [[1.0, 0]])


def test_prices_are_named_after_the_optimizer_that_takes_the_step(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(tables.Figure, "savefig", lambda figure, file, dpi: figures.append(figure))
    recipe = recipes.get("label-noise-adamw.dense-s2sam-0.2")
    assert recipe.baseline == "label-noise-adamw.dense-adamw"
    named = [table.described(recipes.get(name)) for name in (recipe.baseline, recipe.name)]
    lines = comparison.compare([{"recipe": r, "seed": seed, "value": 90.0} for r in named for seed in range(2)])
    tables.draw_prices(lines, "label-noise-adamw", tmp_path / "gains.png")
    (axes,) = figures[0].axes
    assert (axes.get_title(), axes.get_xlabel()) == ("dense\n(AdamW: 90.0)", "points over AdamW")
    assert [word.get_text() for word in axes.get_yticklabels()] == ["S2-SAM, rho 0.2 (1)"]


def test_no_gains_no_figure_and_no_interval_no_bar(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(tables.Figure, "savefig", lambda figure, file, dpi: drawn.append(figure))
    rows = [
        {"recipe": table.described(recipes.get(f"sparsities.rigl-erk-0.9.{name}")), "seed": 0, "value": 90.0}
        for name in ("sgd", "s2sam")
    ]
    tables.draw_gains(comparison.compare(rows[:1]), "sparsities", tmp_path / "gains.png")
    assert drawn == []
    tables.draw_gains(comparison.compare(rows), "sparsities", tmp_path / "gains.png")
    (bars,) = drawn[0].axes[0].containers
    assert all(np.isnan(segment).any() or not len(segment) for segment in bars.lines[2][0].get_segments())
