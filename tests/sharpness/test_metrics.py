"""Telemetry and rounding, against NumPy and exact arithmetic."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import norm

from s2sam_jax import (
    eval_params,
    get_masks,
    methods,
    msam,
    perturb,
    s2sam,
    s2sam_wrapper,
    sam,
    sharpness_metrics,
    sparsify,
    stochastic_round,
    warn_if_perturbation_lost,
)
from s2sam_jax._sharpness.rounding import FORMATS, round_to_nearest

RNG = np.random.default_rng(0)
BITS = {"bfloat16": 7, "tensorfloat32": 10}
metrics_of = jax.jit(sharpness_metrics, static_argnames=("loss_fn", "compute_dtype"))


# All magnitudes, ties of both parities, and what must not change.
NUMBERS = np.float32(
    [*RNG.normal(size=500) * 10.0 ** RNG.integers(-20, 20, 500), 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11,
     -1 - 2**-8, 0.0, -0.0, 65519, 65520, 1e-6, np.inf, -np.inf, np.nan, np.finfo(np.float32).max]
)  # fmt: skip


def nearest(x, bits):
    """Ties to even, by scaling to integers in float64."""
    with np.errstate(invalid="ignore"):
        mantissa, exponent = np.frexp(np.float64(x))
        rounded = np.ldexp(np.round(np.ldexp(mantissa, bits + 1)), exponent - bits - 1)
    return np.where(np.isfinite(x), rounded, x)


def total(params):
    return sum(jnp.sum(p) for p in params.values())


def cos(a, b):
    a, b = (np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


@pytest.mark.parametrize("dtype", FORMATS)
def test_rounding_to_nearest_is_exact(dtype):
    found = np.asarray(jax.jit(round_to_nearest, static_argnames="dtype")(NUMBERS, dtype=dtype), np.float64)
    with np.errstate(over="ignore"):
        expected = {"float32": NUMBERS, "float16": np.float16(NUMBERS)}.get(dtype)
        expected = np.float32(nearest(NUMBERS, BITS[dtype])) if expected is None else expected
    np.testing.assert_array_equal(found, np.float64(expected))
    assert (np.signbit(found) == np.signbit(NUMBERS))[np.isfinite(NUMBERS)].all()


@pytest.mark.parametrize("dtype", BITS)
def test_stochastic_rounding_takes_a_neighbour_and_is_unbiased(dtype):
    draws, x = 2000, np.float32(RNG.normal(size=40))
    tree = {"a": jnp.broadcast_to(x, (draws, 40)), "b": jnp.asarray(NUMBERS)}
    found = jax.jit(stochastic_round, static_argnames="dtype")(tree, jax.random.key(0), dtype=dtype)
    assert found["a"].dtype == (jnp.bfloat16 if dtype == "bfloat16" else jnp.float32)
    values = np.float64(np.asarray(found["a"], np.float32))
    step = np.ldexp(1.0, np.frexp(x)[1] - 1 - BITS[dtype])
    below = np.floor(np.float64(x) / step) * step
    share = (x - below) / step
    assert ((values == below) | (values == below + step)).all()
    deviation = step * np.sqrt(share * (1 - share) / draws)
    assert (np.abs(values.mean(0) - x) < 5 * deviation + 1e-12).all()
    fixed = np.asarray(stochastic_round(found["a"], jax.random.key(1), dtype), np.float32)
    np.testing.assert_array_equal(fixed, values)  # on the grid there is nothing to round
    kept = np.asarray(found["b"], np.float32)
    np.testing.assert_array_equal(kept[~np.isfinite(NUMBERS)], NUMBERS[~np.isfinite(NUMBERS)])
    twice = stochastic_round([tree["a"], tree["a"]], jax.random.key(0), dtype)
    assert (np.asarray(twice[0]) != np.asarray(twice[1])).any(), "each leaf has a draw of its own"
    other = stochastic_round(tree, jax.random.key(1), dtype)
    assert (np.asarray(other["a"]) != np.asarray(found["a"])).any()
    with pytest.raises(ValueError, match="got 'float16'"):
        stochastic_round(tree, jax.random.key(0), "float16")


def test_formats_may_be_given_as_types():
    x, key = jnp.asarray(RNG.normal(size=40), jnp.float32), jax.random.key(0)
    for dtype in (jnp.bfloat16, np.dtype(jnp.bfloat16)):
        assert (stochastic_round(x, key, dtype) == stochastic_round(x, key, "bfloat16")).all()
        named, typed = (
            sharpness_metrics(x, (), perturbed=x + 0.01, compute_dtype=given) for given in ("bfloat16", dtype)
        )
        assert named == typed
    with pytest.raises(ValueError, match=r"compute_dtype must be one of .*; got 'int8'"):
        sharpness_metrics(x, (), perturbed=x, compute_dtype=jnp.int8)


@pytest.mark.parametrize("dtype", BITS)
def test_stochastic_rounding_is_differentiated_as_a_cast(dtype):
    """A quadratic's gradient, 2 (w - target), and its Hessian, 2, at the rounded weights."""
    key, target = jax.random.key(3), np.float32(RNG.normal(size=6))
    params = {"a": jnp.asarray(RNG.normal(size=6), jnp.float32), "b": jnp.asarray(RNG.normal(size=6), jnp.bfloat16)}

    def loss(params, key):
        return sum(
            jnp.sum((w.astype(jnp.float32) - target) ** 2) for w in stochastic_round(params, key, dtype).values()
        )

    def expected(key):
        rounded = stochastic_round(params, key, dtype)
        return {name: 2 * (np.float32(w) - target) for name, w in rounded.items()}

    gradient = jax.jit(jax.grad(loss))
    grads = gradient(params, key)
    assert {name: g.dtype for name, g in grads.items()} == {"a": jnp.float32, "b": jnp.bfloat16}
    for name, wanted in expected(key).items():
        np.testing.assert_allclose(np.float32(grads[name]), wanted, rtol=1e-2)  # a cotangent of bfloat16
    keys = jax.random.split(key, 3)
    several = jax.vmap(jax.grad(loss), (None, 0))(params, keys)
    for index, one in enumerate(keys):
        np.testing.assert_allclose(several["a"][index], expected(one)["a"], rtol=1e-2)
    ones = jax.tree.map(jnp.ones_like, params)
    _, slope = jax.jvp(lambda p: loss(p, key), (params,), (ones,))
    np.testing.assert_allclose(slope, sum(g.sum() for g in expected(key).values()), rtol=1e-2, atol=0.1)
    curvature = jax.jvp(lambda p: jax.grad(loss)(p, key), (params,), (ones,))[1]["a"]
    np.testing.assert_allclose(curvature, 2.0)


@pytest.mark.parametrize("dtype", FORMATS)
def test_rounding_to_nearest_has_a_derivative(dtype):
    x = jnp.array([0.3, -1.7])
    np.testing.assert_array_equal(jax.grad(lambda x: 3 * round_to_nearest(x, dtype).sum())(x), 3.0)


def params_and_grads(scale=0.05):
    shapes = {"a": (30, 20), "b": (20,)}
    params, first, second = ({k: np.float32(RNG.normal(size=s) * scale) for k, s in shapes.items()} for _ in range(3))
    return params, first, second


def after(tx, params, grads):
    return tx.update(grads, tx.init(params), params)[1]


@pytest.mark.parametrize("dtype", BITS)
def test_metrics_against_numpy(dtype):
    params, first, second = params_and_grads()
    state = after(optax.chain(s2sam(rho=0.002), optax.sgd(0.1, momentum=0.9)), params, first)

    found = metrics_of(params, state, second, loss_fn=total, compute_dtype=dtype)
    found = {name: float(value) for name, value in found.items()}
    length = norm(first.values())
    point = {k: np.float32(params[k] + 0.002 * np.float64(first[k]) / length) for k in params}
    epsilon = {k: np.float64(point[k]) - params[k] for k in params}
    kept = {k: nearest(point[k], BITS[dtype]) - nearest(params[k], BITS[dtype]) for k in params}
    expected = {
        "epsilon_norm": 0.002,
        "cosine_last_gradient": cos(first, second),
        "loss_increase": sum(e.sum() for e in epsilon.values()),
        "epsilon_kept": norm(kept.values()) / 0.002,
        "epsilon_cosine": cos(kept, epsilon),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    assert expected["epsilon_cosine"] < 0.999


def test_float32_keeps_everything():
    params, first, _ = params_and_grads()
    metrics = metrics_of(params, after(s2sam(rho=0.05), params, first), compute_dtype="float32")
    assert float(metrics["epsilon_kept"]) == pytest.approx(1)
    assert float(metrics["epsilon_cosine"]) == pytest.approx(1)


def test_bfloat16_parameters_are_judged_by_the_perturbation_that_was_meant():
    params, first, _ = params_and_grads()
    params = jax.tree.map(jnp.bfloat16, params)
    state = after(s2sam(rho=0.002, grad_dtype=jnp.float32), params, first)
    metrics = metrics_of(params, state, compute_dtype="bfloat16")
    assert float(metrics["epsilon_norm"]) == pytest.approx(0.002, rel=1e-3)
    lost = jax.tree.map(jnp.subtract, perturb(params, state), params)
    assert float(metrics["epsilon_kept"]) == pytest.approx(norm(jax.tree.leaves(lost)) / 0.002, rel=1e-3)
    assert float(metrics["epsilon_cosine"]) < 0.9


def test_cosine_is_over_live_weights_where_those_are_remembered():
    params, first, second = params_and_grads()
    for pruned in (False, True):
        tx = sparsify(s2sam(perturb_pruned=pruned), methods.static(), sparsity=0.5)
        state = after(tx, params, first)
        masks = jax.tree.map(lambda m: m | pruned, get_masks(state))
        live = [jax.tree.map(np.multiply, masks, g) for g in (first, second)]
        found = float(metrics_of(params, state, second)["cosine_last_gradient"])
        assert found == pytest.approx(cos(*live), abs=1e-5)


def test_perturbed_parameters_may_be_given():
    params, first, _ = params_and_grads()
    state = sam(rho=0.1).init(params)
    with pytest.raises(ValueError, match=r"found no state of s2sam.* give perturbed="):
        sharpness_metrics(params, state)
    point = jax.tree.map(lambda p, g: p + 0.1 * g / norm(first.values()), params, first)
    assert float(metrics_of(params, state, perturbed=point)["epsilon_norm"]) == pytest.approx(0.1, rel=1e-5)
    with pytest.raises(ValueError, match="no S2SAMState"):
        sharpness_metrics(params, state, first, perturbed=point)
    with pytest.raises(ValueError, match="b: missing in perturbed"):
        sharpness_metrics(params, state, perturbed={"a": point["a"]})
    wrapper = s2sam_wrapper(optax.sgd(0.1), rho=0.2)
    updates, state = wrapper.update(first, wrapper.init(params), params)
    point = optax.apply_updates(params, updates)
    metrics = metrics_of(eval_params(point, state), state, perturbed=point)
    assert float(metrics["epsilon_norm"]) == pytest.approx(0.2, rel=1e-4)


def test_momentum_sam_is_served_as_well():
    params, first, second = params_and_grads()
    state = after(optax.chain(msam(rho=0.03), optax.sgd(0.1, momentum=0.9)), params, first)
    assert float(metrics_of(params, state, compute_dtype="bfloat16")["epsilon_norm"]) == pytest.approx(0.03, rel=1e-4)
    with pytest.raises(ValueError, match="Leave grads out"):
        sharpness_metrics(params, state, second)


def test_bad_input_is_named():
    params, first, _ = params_and_grads()
    state = after(s2sam(), params, first)
    with pytest.raises(ValueError, match="float32, tensorfloat32, bfloat16, float16; got 'tf32'"):
        sharpness_metrics(params, state, compute_dtype="tf32")
    with pytest.raises(ValueError, match=r"grads lack the leaf b\(20,\)"):
        sharpness_metrics(params, state, {"a": first["a"]})


def test_warnings():
    params, first, _ = params_and_grads()
    tx = s2sam(rho=0.002)
    off = metrics_of(params, tx.init(params), first, compute_dtype="bfloat16")
    assert all(float(value) == 0 for value in off.values())
    with pytest.warns(UserWarning, match="exactly zero"):
        warn_if_perturbation_lost(off)
    state = after(tx, params, first)
    with pytest.warns(UserWarning, match=r"cosine .* is 0\.\d\d, below 0\.9"):
        warn_if_perturbation_lost(metrics_of(params, state, compute_dtype="bfloat16"))
    with pytest.warns(UserWarning, match="cosine .* is nan"):
        warn_if_perturbation_lost({"epsilon_norm": 0.05, "epsilon_cosine": jnp.nan})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_perturbation_lost(metrics_of(params, state, compute_dtype="float32"))
        warn_if_perturbation_lost(metrics_of(params, state))
        warn_if_perturbation_lost(metrics_of(params, state, compute_dtype="bfloat16"), threshold=0.0)


@pytest.mark.parametrize("options", [{}, {"compute_dtype": "bfloat16"}])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_perturbation_that_is_not_finite_is_no_matter_of_precision(bad, options):
    params, first, _ = params_and_grads()
    first["b"][3] = bad
    metrics = metrics_of(params, after(s2sam(rho=0.05), params, first), **options)
    with pytest.warns(UserWarning, match="perturbation is not finite: its norm is nan"):
        warn_if_perturbation_lost(metrics)
