"""The bounds: their constants, the inequalities they are made of, step by step, and the page, on tiny settings."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from experiments import convergence, precision
from experiments.pages import convergence as convergence_page
from experiments.pages import precision as precision_page
from experiments.solution import Solution
from experiments.theory import nonconvex, stability
from s2sam_jax import s2sam, stochastic_round

RNG = np.random.default_rng(0)


def test_constants_of_the_non_convex_problem():
    """Slope and curvature of Welsch's loss on a fine grid; both bounds are attained."""
    z = np.linspace(-6, 6, 100_001)
    slope, curvature = z * np.exp(-(z**2) / 2), (1 - z**2) * np.exp(-(z**2) / 2)
    assert np.abs(slope).max() == pytest.approx(nonconvex.LARGEST_GRADIENT)
    assert np.abs(curvature).max() == pytest.approx(nonconvex.SMOOTHNESS)
    assert curvature.min() < -0.44
    rows = nonconvex.problem(0)
    np.testing.assert_allclose(np.linalg.norm(rows.x, axis=1), 1, rtol=1e-6)
    assert nonconvex.lowest_curvature(jnp.zeros(nonconvex.DIMENSION), rows) < 0
    w = RNG.normal(size=nonconvex.DIMENSION).astype(np.float32)
    residual = np.asarray(rows.x, np.float64) @ w - np.asarray(rows.y)
    each = (residual * np.exp(-(residual**2) / 2))[:, None] * np.asarray(rows.x)
    np.testing.assert_allclose(jax.grad(nonconvex.loss)(w, rows), each.mean(0), rtol=1e-4, atol=1e-6)
    assert np.square(each - each.mean(0)).sum(1).mean() <= nonconvex.VARIANCE * nonconvex.BATCH
    assert nonconvex.RATE * nonconvex.SMOOTHNESS <= 1 / 4


def test_bounds_are_the_worked_numbers():
    bound = nonconvex.gradient_bound(np.array([1, 100]), 0.5, 0.2)
    fixed = 2 * 0.5 / 0.25 + 2 * 2.612376 * 0.04 * 1.25
    noise = 2 * np.exp(-1) * 0.25
    np.testing.assert_allclose(bound, [fixed + noise, (fixed + noise * (1 + np.log(100))) / 10], rtol=1e-5)
    assert sum(t**-1.5 for t in range(1, 10**6)) < 2.612376
    paper = nonconvex.paper_bound(np.array([1]), 0.5, 0.2)
    np.testing.assert_allclose(paper, 4 + 2 * (0.25 * np.exp(-1) + 0.2 * np.exp(-0.5)), rtol=1e-5)
    found, n, rho = stability.risk_bound(3, 0.5), 3, 0.5
    distance = sum(1 / np.sqrt(t) * (2 / n + 0.5 * rho / np.sqrt(t) * (1 - (2 / 3) ** (t - 1))) for t in range(1, 16))
    total = sum(1 / np.sqrt(t) for t in range(1, 16))
    wander = sum(1 / t for t in range(1, 16)) + 0.25 * sum(rho**2 / t**1.5 for t in range(1, 16))
    assert found["distance"] == pytest.approx(distance)
    assert found["gap"] == pytest.approx(distance)
    assert found["excess"] == pytest.approx((25 + wander) / (2 * total) + distance)


def s2sam_path(gradient, w, steps, rate, rho):
    """Weights and step directions, in float64."""
    last, path = np.zeros_like(w), []
    for t in range(1, steps + 1):
        length = np.linalg.norm(last)
        last = gradient(w + (rho / np.sqrt(t) / length * last if length else 0), t)
        path.append((w, last))
        w = w - rate / np.sqrt(t) * last
    return path


def test_each_step_of_the_descent_keeps_to_its_inequality():
    """Without noise it holds for every step, here with radii far above those of training."""
    rows = nonconvex.problem(0)
    x, y = np.asarray(rows.x, np.float64), np.asarray(rows.y, np.float64)

    def gradient(w, t=0):
        residual = x @ w - y
        return x.T @ (residual * np.exp(-(residual**2) / 2)) / len(y)

    def loss(w):
        return np.mean(1 - np.exp(-((x @ w - y) ** 2) / 2))

    rate, rho = nonconvex.RATE, 0.5
    path = s2sam_path(gradient, np.zeros(nonconvex.DIMENSION), 200, rate, rho)
    for t, ((w, _), (after, _)) in enumerate(itertools.pairwise(path), 1):
        eta, radius = rate / np.sqrt(t), rho / np.sqrt(t)
        gained = loss(w) - loss(after) + eta * radius**2 * (1 + eta)
        assert eta / 2 * np.sum(gradient(w) ** 2) <= gained


def test_neighbours_part_no_faster_than_the_bound_and_the_library_walks_the_same_way():
    """The recursion of the stability proof, step by step, and the averages of the experiment, in float64."""
    n, rho, key = 12, 1.0, jax.random.key(3)
    examples = stability.draw(key, n)
    x, y = np.asarray(examples.x, np.float64), np.asarray(examples.y, np.float64)
    order = np.asarray(jax.random.randint(key, (5 * n,), 0, n))
    first = int(np.argmax(order == 0))
    assert order[first] == 0
    others = x.copy(), y.copy()
    others[0][0], others[1][0] = -x[1], y[0]

    def walk(x, y):
        def gradient(w, t):
            row = order[t - 1]
            return -y[row] * x[row] / (1 + np.exp(y[row] * x[row] @ w))

        return s2sam_path(gradient, np.zeros(stability.DIMENSION), len(order), stability.RATE, rho)

    one, other = walk(x, y), walk(*others)
    apart = [np.linalg.norm(a - b) for (a, _), (b, _) in zip(one, other, strict=True)]
    for t in range(1, len(order)):
        grown = 2 * stability.LIPSCHITZ if order[t - 1] == 0 else 2 * stability.SMOOTHNESS * rho / np.sqrt(t)
        allowed = stability.RATE / np.sqrt(t) * grown if t > first else 0.0
        assert apart[t] <= apart[t - 1] + allowed + 1e-12
    assert apart[first] == 0 < apart[first + 1]
    rates = stability.RATE / np.sqrt(np.arange(1, len(order) + 1))
    mean = sum(rate * w for rate, (w, _) in zip(rates, one, strict=True)) / rates.sum()
    np.testing.assert_allclose(jax.jit(stability.average)(examples, order, rho), mean, rtol=1e-4, atol=1e-6)


def test_page_comes_from_rows_and_says_when_a_bound_does_not_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(nonconvex, "OPTIMIZERS", ("sgd", "ssam, refreshed masks", "s2sam"))
    file = tmp_path / "convergence.jsonl"
    words = "--radii 0.075 --steps 100 --seeds 2 --sizes 10 --sets 4 --risk-radii 0.5 --rows"
    small = [*words.split(), str(file)]
    convergence.main(small)
    lines = file.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["of"] for row in rows] == ["sgd", *nonconvex.OPTIMIZERS[1:], 10]
    assert all(row["steps"] == [10, 32, 100] for row in rows[:-1])
    assert len({row["mean"][-1] for row in rows[:-1]}) == len(nonconvex.OPTIMIZERS)  # none is another in disguise
    page = file.with_suffix(".md").read_text()
    assert "Every measured mean is below its bound." in page
    assert "| s2sam, ρ₀ = 0.075 |" in page
    assert imread(file.with_suffix(".png")).std() > 0.05
    convergence.main(small)  # nothing is missing
    assert file.read_text().splitlines() == lines
    rows[-1]["mean"]["gap"] = 10.0
    assert "A measured mean is above its bound." in convergence_page.page(rows, "convergence.jsonl")
    assert "1.00e+01" not in page


@pytest.mark.parametrize("name", ["sgd", "sam", "ssam, fixed mask", "s2sam"])
def test_squared_gradients_are_those_of_the_path(name):
    """One example a step, replayed in NumPy: where the step's gradient is taken is all that tells them apart."""
    rows, key, steps, rho = nonconvex.problem(1), jax.random.key(2), 30, 1.0
    x, y = np.asarray(rows.x, np.float64), np.asarray(rows.y, np.float64)
    squares, last = nonconvex.squared_gradients(rows, key, rho, name=name, steps=steps)
    w, stale, expected = np.zeros(nonconvex.DIMENSION), np.zeros(nonconvex.DIMENSION), []
    perturbed = np.ones(nonconvex.DIMENSION, bool)
    if name.startswith("ssam"):
        perturbed = np.asarray(nonconvex.optimizer(name, rho, steps, key).init(jnp.zeros(len(w)))[0].perturb_masks)
        assert perturbed.sum() == len(w) / 2

    def slopes(w):
        residual = x @ w - y
        return (residual * np.exp(-(residual**2) / 2))[:, None] * x

    for t, k in enumerate(jax.random.split(key, steps), 1):
        row = int(jax.random.randint(k, (1,), 0, len(y))[0])
        along = {"sgd": np.zeros(len(w)), "s2sam": stale}.get(name, slopes(w)[row])
        length = np.linalg.norm(along) or 1
        expected.append(np.sum(slopes(w).mean(0) ** 2))
        stale = slopes(w + np.where(perturbed, rho / np.sqrt(t) * along / length, 0))[row]
        w = w - nonconvex.RATE / np.sqrt(t) * stale
    np.testing.assert_allclose(squares, expected, rtol=1e-4)
    np.testing.assert_allclose(last, w, rtol=1e-4, atol=1e-6)
    if name.startswith("ssam"):
        others, _ = nonconvex.squared_gradients(rows, key, rho, name="ssam, refreshed masks", steps=steps)
        assert np.abs(np.asarray(others) / expected - 1).max() > 1e-3


def test_measured_risks_are_those_of_the_averages():
    """Of one training set and its neighbour: means over all labels of the test points, and over the examples."""
    n, rho, key = 6, 0.5, jax.random.key(2)
    found = {name: float(x[0]) for name, x in stability.measure(key, rho, n=n, sets=1).items()}
    keys = jax.random.split(jax.random.split(jax.random.fold_in(key, 1), 1)[0], 3)
    examples, order = stability.draw(keys[0], n), jax.random.randint(keys[2], (5 * n,), 0, n)
    other = stability.draw(keys[1], 1)
    assert other.y[0] != examples.y[0]
    assert 0 in order
    neighbour = stability.Examples(*(jnp.concatenate([new, old[1:]]) for new, old in zip(other, examples, strict=True)))
    average = jax.jit(stability.average)
    w, moved = (np.asarray(average(each, order, rho), np.float64) for each in (examples, neighbour))
    truth = np.full(20, 5 / np.sqrt(20))
    x = np.asarray(stability.draw(jax.random.fold_in(key, 0), stability.TEST).x, np.float64)

    def risk(w):
        right = 1 / (1 + np.exp(-x @ truth))
        return np.mean(right * np.log1p(np.exp(-x @ w)) + (1 - right) * np.log1p(np.exp(x @ w)))

    seen = np.mean(np.log1p(np.exp(-np.asarray(examples.y) * (np.asarray(examples.x) @ w))))
    assert found["gap"] == pytest.approx(risk(w) - seen, abs=1e-4)
    assert found["excess"] == pytest.approx(risk(w) - risk(truth), abs=1e-4)
    assert found["distance"] == pytest.approx(np.linalg.norm(w - moved), rel=1e-3)
    assert found["excess"] > 0


def test_labels_are_drawn_apart_from_their_points():
    """On the unit sphere, and as often right as the truth says."""
    found = stability.draw(jax.random.key(0), 20_000)
    x, y = np.asarray(found.x, np.float64), np.asarray(found.y)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(x.mean(0), 0, atol=0.01)
    right = 1 / (1 + np.exp(-x @ np.full(20, 5 / np.sqrt(20))))
    for low in (0.1, 0.3, 0.5, 0.7):
        near = (low < right) & (right < low + 0.2)
        assert abs((y[near] == 1).mean() - right[near].mean()) < 0.05


def nearest(x, bits):
    """Float32 with fewer bits of mantissa; ties to the even one."""
    raw = np.float32(x).view(np.uint32).astype(np.int64)
    unit = 1 << (23 - bits)
    return np.uint32((raw + unit // 2 - 1 + (raw // unit) % 2) // unit * unit).view(np.float32).astype(np.float64)


def test_what_rounding_leaves_of_a_perturbation():
    """Of a quadratic on two batches, in NumPy but for the draws of rounding."""
    weights, curvature, along = RNG.normal(size=(3, 300)) * [[0.05], [1.0], [1.0]]
    tx = s2sam(0.1)
    stale = jnp.float32(along)
    _, opt_state = tx.update(stale, tx.init(stale), stale)
    found = Solution(jnp.float32(weights), None, lambda w, b: 0.5 * jnp.sum(b * jnp.float32(curvature) * w**2), [1, 3])
    rows = precision.measure(found, opt_state, precision.Arguments(radii=(0.003, 0.3), draws=3))

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    kinds = [(row["dtype"], row["stored"], row["rounding"]) for row in rows if row["rho_measured"] == 0.3]
    low_kinds = [(d, s, r) for d in ("tensorfloat32", "bfloat16") for s in ("float32", "format")
                 for r in ("nearest", "random")]  # fmt: skip
    assert kinds == [("float32", "float32", "nearest"), *low_kinds]
    assert len(rows) == 2 * len(kinds)
    for row in rows:
        dtype, stored, rounding, rho = (row[field] for field in ("dtype", "stored", "rounding", "rho_measured"))
        bits = {"float32": 23, "tensorfloat32": 10, "bfloat16": 7}[dtype]
        w = nearest(weights, bits) if stored == "format" else np.float64(np.float32(weights))
        epsilon = rho * along / np.linalg.norm(along)
        pairs = [[nearest(x, bits) if bits < 23 else x for x in (w, w + epsilon)]]
        if rounding == "random":
            pairs = [
                [np.float64(stochastic_round(jnp.float32(x), k, dtype)) for x in (w, w + epsilon)]
                for k in jax.random.split(jax.random.key(0), 3)
            ]
        slopes = 2 * curvature
        moves = [after - before for before, after in pairs]
        expected = {
            "kept": np.mean([np.linalg.norm(move) for move in moves]) / rho,
            "cosine": np.mean([cosine(move, epsilon) for move in moves]),
            "gradient": np.mean([cosine(slopes * after, slopes * (w + epsilon)) for _, after in pairs]),
            "change": np.mean([cosine(slopes * move, slopes * epsilon) for move in moves]),
            "mean_change": cosine(slopes * np.mean(moves, axis=0), slopes * epsilon),
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=2e-3), (dtype, stored, rounding)
        assert row["draws"] == len(pairs)
        if (dtype, rho, rounding) == ("bfloat16", 0.003, "random"):
            assert 1.05 * row["change"] < row["mean_change"] < 0.98


def test_page_of_precision_comes_from_its_rows(tmp_path):
    rows = [
        {"method": "dense", "seed": seed, "stored": "format", "dtype": "bfloat16", "rounding": rounding,
         "device": "cpu", "rho_measured": rho, "live_parameters": 100, "draws": 8, "config": {"epochs": 20}}
        | dict.fromkeys(precision_page.COLUMNS.values(), 0.25 + seed / 2)
        for seed in (0, 1)
        for rho in (0.05, 0.1)
        for rounding in precision_page.ROUNDINGS
    ]  # fmt: skip
    text = precision_page.page(rows, "precision.jsonl")
    assert "| bfloat16 | bfloat16 | nearest | 0.05 | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 |" in text
    assert dataclasses.asdict(precision.Arguments())["radii"] == (0.005, 0.01, 0.05, 0.1, 0.5)
