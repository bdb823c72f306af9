"""Figures of solutions are drawn from rows, also where there is little or nothing to see."""

import numpy as np
import pytest
from matplotlib.image import imread

from experiments import landscapes

RNG = np.random.default_rng(0)


def surface(heights):
    return {"surface": heights.tolist(), "span": 1.0, "n": len(heights), "roughness": 1.0}


@pytest.mark.parametrize(
    "heights",
    [RNG.random((5, 5)), np.full((5, 5), 2.0), np.zeros((5, 5)), np.array([[1, np.nan], [np.inf, 2]])],
    ids=["rough", "flat", "zero", "broken"],
)
def test_surfaces(heights, tmp_path):
    landscapes.draw_surfaces({"one": surface(heights), "two": surface(heights)}, tmp_path / "surface.png")
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
    figures = []
    monkeypatch.setattr(landscapes.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    rows = [
        {"method": "rigl", "optimizer": f"o{o}", "sparsity_asked": s, "x": o + s + seed}
        for o in range(8)
        for s in (0.9, 0.8)
        for seed in (0, 1)
    ]
    landscapes.draw_against_sparsity(rows, "x", "x", "title", tmp_path / "x.png", scale=2.0)
    (axes,) = figures[0].axes
    lines = [container.lines[0] for container in axes.containers]
    assert len(lines) == 8
    np.testing.assert_allclose(lines[3].get_xydata(), [[80, 2 * (3 + 0.8 + 0.5)], [90, 2 * (3 + 0.9 + 0.5)]])
