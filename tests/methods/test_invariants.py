"""Every method through the same invariants, and RigL against its equations."""

import functools
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from rows import METHODS

from s2sam_jax import Every, check_masks, erdos_renyi_kernel, get_masks, methods, set_masks, sparsify, uniform
from s2sam_jax._base.schedules import cosine

WHEN = Every(0, 2, 150)
rows = pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)


def tree(seed, ties=False):
    """Odd shapes: a conv kernel, a matrix, a leaf of one weight, an all-zero matrix, dense leaves, norms."""
    draw = np.random.default_rng(seed)

    def leaf(*shape):
        values = draw.normal(size=shape)
        return jnp.asarray(np.round(values) if ties else values, jnp.float32)

    return {
        "conv": {"kernel": leaf(3, 3, 2, 5), "bias": leaf(5)},
        "one": leaf(1, 1),
        "zeros": jnp.zeros((4, 6)),
        "head": {"kernel": leaf(7, 11), "scale": leaf()},
        "norm": {"conv": leaf(5), "head": leaf(11)},
    }


def make(row, inner=None, **kwargs):
    options = dict(sparsity=0.6, distribution="uniform", when=WHEN, prunable=lambda path, p: p.size > 1 and p.ndim > 1)
    return sparsify(inner or optax.sgd(0.1, momentum=0.9), row.make(), **options | kwargs)


def with_grad_fn(tx):
    """For methods that ask for another gradient: that of sum(w**4) / 4, whatever the gradients given."""
    return lambda grads, state, params: tx.update(
        grads, state, params, grad_fn=lambda p: jax.tree.map(lambda x: x**3, p)
    )


@functools.cache
def compiled(name):
    """The transformation and its update, compiled once for all tests."""
    tx = make(next(row for row in METHODS if row.name == name))
    return tx, jax.jit(with_grad_fn(tx))


def walk(row, steps, ties=False):
    """Random gradients; yields the state before and after each step, and the parameters after it."""
    tx, update = compiled(row.name)
    params = tree(0)
    state = tx.init(params)
    for step in range(steps):
        updates, new = update(tree(step + 1, ties), state, params)
        params = optax.apply_updates(params, updates)
        yield state, new, params
        state = new


def test_folder_and_rows_agree():
    files = {module.name for module in pkgutil.iter_modules(methods.__path__)}
    assert files == {row.name for row in METHODS}
    assert all(callable(getattr(methods, name)) for name in files)


@rows
def test_optax_finds_what_mirrors_the_parameters(row):
    """As for partition specs: the state of every method goes through ``optax.tree.map_params``."""
    tx, params = make(row, optax.adam(0.1)), tree(0)
    state = tx.init(params)

    def kind(leaf, param):
        assert leaf.shape == param.shape
        return "parameter"

    kinds = optax.tree.map_params(tx, kind, state, params, transform_non_params=lambda leaf: "other")
    assert jax.tree.structure(kinds) == jax.tree.structure(state)
    for mirrored in (kinds.masks, kinds.inner_state[0].mu):
        assert set(jax.tree.leaves(mirrored)) == {"parameter"}
    assert (kinds.step, kinds.key, kinds.inner_state[0].count) == ("other",) * 3


@rows
@pytest.mark.parametrize("ties", [False, True])
def test_invariants_over_many_updates(row, ties):
    plan = jax.tree.map(lambda p, s: p.size - int(np.floor(round(s * p.size, 6))), tree(0), uniform(
        tree(0), 0.6, prunable=lambda path, p: p.size > 1 and p.ndim > 1))  # fmt: skip
    promise = row.make().invariant
    before = jax.tree.map(jnp.size, tree(0))
    for old, new, params in walk(row, 200, ties):
        check_masks(params, new)
        counts = jax.tree.map(lambda m: int(m.sum()), new.masks)
        assert jax.tree.structure(counts) == jax.tree.structure(plan)
        assert bool(new.masks["conv"]["bias"].all())
        assert bool(new.masks["one"].all())
        assert bool(new.masks["head"]["scale"].all())
        if promise == "per_layer":
            assert counts == plan
        if promise == "total":
            assert sum(jax.tree.leaves(counts)) == sum(jax.tree.leaves(plan))
        if promise == "monotone":
            assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a <= b, counts, before)))
        if WHEN.at_or_after(old.step) != old.step:
            jax.tree.map(np.testing.assert_array_equal, old.masks, new.masks)
        before = counts


@rows
def test_key_matters_only_where_a_method_draws(row):
    (tx, update), params = compiled(row.name), tree(0)
    first = tx.init(params)

    def final(seed):
        state = jax.tree.map(jnp.array, first)._replace(key=jax.random.key(seed))
        for step in range(4):
            _, state = update(tree(step + 1), state, params)
        return state.masks

    same = jax.tree.map(lambda a, b: bool((a == b).all()), final(1), final(1))
    other = jax.tree.map(lambda a, b: bool((a == b).all()), final(1), final(2))
    assert all(jax.tree.leaves(same))
    assert all(jax.tree.leaves(other)) != row.random_updates


@rows
def test_nan_in_a_masked_gradient_cannot_leak(row):
    (tx, update), params = compiled(row.name), tree(0)
    state = tx.init(params)
    params = optax.apply_updates(params, jax.tree.map(lambda m, p: jnp.where(m, 0, -p), state.masks, params))
    step = 1 if row.make().update else 0  # not a mask update
    state = state._replace(step=jnp.int32(step), next_update=jnp.int32(2))
    grads = jax.tree.map(lambda m, g: jnp.where(m, g, jnp.nan), state.masks, tree(1))
    updates, state = update(grads, state, params)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state.inner_state)))


@rows
def test_scan_and_donation_equal_a_python_loop(row):
    tx, params = make(row), tree(0)
    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[tree(i + 1) for i in range(6)])

    def step(carry, g):
        params, state = carry
        updates, state = with_grad_fn(tx)(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    scanned, _ = jax.lax.scan(step, (params, tx.init(params)), grads)
    donating = jax.jit(step, donate_argnums=0)
    carry = jax.tree.map(jnp.array, params), tx.init(params)
    for i in range(6):
        carry, _ = donating(carry, jax.tree.map(lambda g, i=i: g[i], grads))
    jax.tree.map(np.testing.assert_array_equal, carry[1].masks, scanned[1].masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), carry[0], scanned[0])


@rows
def test_worked_example(row):
    if row.golden is None:
        assert row.make().update is None, "a method that updates needs a worked example"
        return

    def leaves(values, dtype=jnp.float32):
        """One leaf, or a tree for methods that need several."""
        tree = values if isinstance(values, dict) else {"kernel": np.asarray(values)}
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)

    golden = row.golden
    params = leaves(golden.weights)
    tx = make(row, sparsity=0.5, prunable=lambda path, p: True)
    state = set_masks(tx.init(params), leaves(golden.mask, bool))
    state = state._replace(step=jnp.int32(golden.step), next_update=jnp.int32(golden.step))
    _, state = with_grad_fn(tx)(leaves(golden.grads), state, params)
    jax.tree.map(np.testing.assert_array_equal, state.masks, leaves(golden.new_mask, bool))


@pytest.mark.parametrize("skip_step", [True, False])
def test_rigl_equals_its_equations_over_a_trajectory(skip_step):
    """SGD with momentum and decay, an update every third call; the oracle starts from masked weights."""
    when, lr, momentum, decay = Every(0, 3, 40), 0.05, 0.9, 1e-2
    inner = optax.chain(optax.add_decayed_weights(decay), optax.sgd(lr, momentum=momentum))
    tx = sparsify(inner, methods.rigl(0.5, skip_step=skip_step), sparsity=0.7, distribution="uniform", when=when)
    draw = np.random.default_rng(3)
    with jax.enable_x64(True):
        params = {"kernel": jnp.asarray(draw.normal(size=(9, 8)))}
        state, update = tx.init(params), jax.jit(tx.update)
        mask = np.asarray(state.masks["kernel"])
        w, v = np.asarray(params["kernel"]) * mask, np.zeros((9, 8))
        for step in range(60):
            g = draw.normal(size=(9, 8))
            updates, state = update({"kernel": jnp.asarray(g)}, state, params)
            params = optax.apply_updates(params, updates)
            due = step % 3 == 0 and step <= 40
            if due:
                mask = oracles.rigl_update(w, g, mask, 0.25 * (1 + np.cos(np.pi * step / 40)))
                w, v = w * mask, v * mask
            if not (due and skip_step):
                w, v = oracles.sgd_step(w, g * mask, v, lr=lr, momentum=momentum, decay=decay)
                w, v = w * mask, v * mask
            np.testing.assert_array_equal(state.masks["kernel"], mask)
            np.testing.assert_allclose(params["kernel"], w, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("fraction", "moved"), [(0.53, 53), (0.59, 59), (0.535, 53)])
def test_rigl_rounds_as_its_equation(fraction, moved):
    """In float32 0.53 times 100 is below 53."""
    params = {"kernel": jnp.arange(1.0, 201.0).reshape(10, 20)}
    tx = sparsify(optax.sgd(0.1), methods.rigl(lambda step: fraction), sparsity=0.5, when=Every(0, 1, 10))
    state = tx.init(params)
    live, grads = state.masks["kernel"], {"kernel": jnp.where(state.masks["kernel"], 0.0, 1.0)}
    _, after = tx.update(grads, state, params)
    assert int((live & ~after.masks["kernel"]).sum()) == moved


def test_rigl_cosine():
    f = [0.3, 0.271353, 0.15, 0.028647, 0.0]

    got = [cosine(0.3, jnp.int32(t), 25_000) for t in (0, 5_000, 12_500, 20_000, 25_000)]
    np.testing.assert_allclose(got, f, atol=5e-7)


def test_rigl_clock_counts_as_the_paper():
    """T_end = 25000, every 100: 251 updates, the first call among them."""
    when = Every(0, 100, 25_000)
    fired = [step for step in range(0, 26_000, 50) if int(when.at_or_after(step)) == step]
    assert len(fired) == 251
    assert fired[0] == 0
    assert fired[-1] == 25_000


def test_rigl_grows_by_the_dense_gradient_and_starts_from_nothing():
    """Momentum from before growth is gone, an already zeroed weight grows, a regrown one keeps what it has."""
    params = {"kernel": jnp.array([[0.5, -0.05, 0.3, -0.9, 0.0, 0.0, 0.0, 0.0]])}
    inner = optax.sgd(1.0, momentum=0.9)
    tx = sparsify(inner, methods.rigl(lambda step: 0.5, skip_step=False), sparsity=0.5, when=Every(1, 100, 200))
    mask = jnp.array([[True] * 4 + [False] * 4])
    state = set_masks(tx.init(params), {"kernel": mask})
    first = {"kernel": jnp.full((1, 8), 0.01)}
    updates, state = tx.update(first, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], [[0.49, -0.06, 0.29, -0.91, 0, 0, 0, 0]], rtol=1e-6)
    grads = {"kernel": jnp.array([[0.1, 0.8, -0.05, 0.2, 0.3, -0.7, 0.05, 0.6]])}
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(get_masks(state)["kernel"], [[1, 1, 0, 1, 0, 1, 0, 0]])
    # old momentum 0.01 survives on 0, 1, 3 (1 was dropped and regrown); 5 is new: no momentum, no value
    momentum = np.array([[0.009 + 0.1, 0.009 + 0.8, 0, 0.009 + 0.2, 0, -0.7, 0, 0]])
    np.testing.assert_allclose(state.inner_state[0].trace["kernel"], momentum, rtol=1e-6)
    expected = np.array([[0.49 - 0.109, -0.06 - 0.809, 0, -0.91 - 0.209, 0, 0.7, 0, 0]])
    np.testing.assert_allclose(params["kernel"], expected, rtol=1e-6)


def test_rigl_on_erk_keeps_every_leaf_at_its_count():
    params = {"a": jnp.ones((3, 3, 4, 8)), "b": jnp.ones((3, 3, 8, 8)), "head": jnp.ones((8, 10))}
    tx = sparsify(optax.sgd(0.1), methods.rigl(), sparsity=0.8, when=Every(0, 1, 500))
    plan = erdos_renyi_kernel(params, 0.8)
    state, update, draw = tx.init(params), jax.jit(with_grad_fn(tx)), np.random.default_rng(0)
    for _ in range(200):
        grads = jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape), jnp.float32), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, p in params.items():
            assert int(state.masks[name].sum()) == p.size - int(np.floor(round(plan[name] * p.size, 6)))
