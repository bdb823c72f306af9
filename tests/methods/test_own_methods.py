"""Methods of users: what they return is looked at while traced, what they promise under checkify."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify
from rows import METHODS

from s2sam_jax import NM, Every, MaskUpdate, SparseMethod, apply_masks, methods, sparsify

PARAMS = {"bias": jnp.ones(4), "kernel": jnp.arange(1.0, 17.0).reshape(4, 4)}


def complement(x, state):
    """12 of the kernel's weights in place of 4, none of them among those."""
    return MaskUpdate(x.masks | {"kernel": ~x.masks["kernel"]}, state)


def sparse(update, invariant="bounded", **options):
    method = SparseMethod(methods.static().init, update, invariant=invariant)
    return sparsify(optax.sgd(0.1), method, sparsity=0.75, when=Every(0, 2, 9), **options)


def fault(update, invariant):
    """What checkify says of the first update, in a program in which the clock is traced."""
    tx = sparse(update, invariant)
    state = tx.init(PARAMS)
    error, (_, new) = jax.jit(checkify.checkify(tx.update))(PARAMS, state, apply_masks(PARAMS, state))
    return error.get(), [int(n) for n in new.nnz]


@pytest.mark.parametrize("invariant", ["per_layer", "total", "monotone"])
def test_a_broken_promise_is_an_error_under_checkify(invariant):
    said, ones = fault(complement, invariant)
    assert f"broke its invariant {invariant!r}; ones of each leaf: [ 4 12], before: [4 4]" in said
    assert ones == [4, 12]


def test_what_is_not_promised_is_not_asked_for():
    assert fault(complement, "bounded") == (None, [4, 12])

    def move(x, state):  # as many, elsewhere
        return MaskUpdate(x.masks | {"kernel": jnp.roll(x.masks["kernel"], 1)}, state)

    assert fault(move, "per_layer") == fault(move, "total") == (None, [4, 4])
    assert "broke its invariant 'monotone'" in fault(move, "monotone")[0]


def test_dense_leaves_must_stay_dense():
    said, ones = fault(lambda x, state: MaskUpdate(jax.tree.map(jnp.logical_not, x.masks), state), "total")
    assert "must leave the masks of dense leaves all true; ones of each leaf: [ 0 12], before: [4 4]" in said
    assert ones == [0, 12]


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_no_method_of_the_library_breaks_its_promise(row):
    """On the network of the hand-worked masks, whose scales the channel methods prune too."""
    shapes = {"conv": {"kernel": (3, 3, 2, 8)}, "head": {"kernel": (8, 6)}, "norm": {"conv": (8,), "head": (6,)}}

    def tree(seed):
        draw = np.random.default_rng(seed)
        leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda node: isinstance(node, tuple))
        return treedef.unflatten([jnp.asarray(draw.normal(size=shape)) for shape in leaves])

    tx = sparsify(optax.sgd(0.1), row.make(), sparsity=0.5, distribution="uniform", when=Every(0, 2, 9))
    params, state = tree(0), tx.init(tree(0))
    step = jax.jit(checkify.checkify(lambda g, s, p: tx.update(g, s, p, grad_fn=lambda w: w)))
    for seed in range(1, 7):
        error, (updates, state) = step(tree(seed), state, params)
        assert error.get() is None
        params = optax.apply_updates(params, updates)


def test_without_checkify_nothing_is_looked_at():
    tx = sparse(complement, "per_layer")
    state = tx.init(PARAMS)
    _, state = jax.jit(tx.update)(PARAMS, state, apply_masks(PARAMS, state))
    np.testing.assert_array_equal(state.nnz, [4, 12])


def floats(tree):
    return jax.tree.map(jnp.float32, tree)


def halves(tree):
    return jax.tree.map(jnp.float16, tree)


UNFIT = {
    "a tuple": (lambda x, s: (x.masks, s), TypeError, r"must return MaskUpdate\(masks, state, ...\); got a tuple"),
    "masks": (lambda x, s: MaskUpdate(floats(x.masks), s), TypeError, "masks of .* must be bool; .*'bias': 'float32'"),
    "restart": (lambda x, s: MaskUpdate(x.masks, s, restart=floats(x.masks)), TypeError, "The restart of .* be bool"),
    "values": (lambda x, s: MaskUpdate(x.masks, s, values=PARAMS | {"bias": 0.0}), ValueError, r"bias: shape \(\) in"),
    "state": (
        lambda x, s: MaskUpdate(x.masks, (1,)),
        ValueError,
        r"state like the one it is given, \(\); got \('int32\[\]',\)",
    ),
    "none": (lambda x, s: MaskUpdate(None, s), ValueError, "bias: missing in the masks of the method's update"),
    "types": (
        lambda x, s: MaskUpdate(x.masks, s, values=halves(x.params)),
        ValueError,
        "kernel: float16.4, 4., not float32",
    ),
    "inner": (lambda x, s: MaskUpdate(x.masks, s, inner_state=x.params), ValueError, "inner_state like the one it is"),
    "leaves": (lambda x, s: MaskUpdate({"kernel": x.masks["kernel"]}, s), ValueError, "bias: missing in the masks of"),
}


@pytest.mark.parametrize(("update", "error", "text"), UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize("refresh", [None, True])
def test_what_does_not_fit_is_named(update, error, text, refresh):
    tx = sparse(update)
    state = tx.init(PARAMS)
    with pytest.raises(error, match=text):
        tx.update(PARAMS, state, PARAMS, refresh_masks=refresh)


STATES = {
    "missing": ((), r", int32\[\]; got \(\)\."),
    "type": (jnp.float32(0), r", but:\n  state: float32\[\], not int32\[\]"),
}


@pytest.mark.parametrize(("new", "text"), STATES.values(), ids=STATES)
@pytest.mark.parametrize("refresh", [None, True])
def test_a_state_keeps_its_leaves_and_types(new, text, refresh):
    """Also where the clock is on the host, and no ``lax.cond`` would mind."""

    def init(x):
        return MaskUpdate(methods.static().init(x).masks, jnp.int32(0))

    method = SparseMethod(init, lambda x, state: MaskUpdate(x.masks, new), "bounded")
    tx = sparsify(optax.sgd(0.1), method, sparsity=0.75, when=Every(0, 2, 9))
    with pytest.raises(ValueError, match="state like the one it is given" + text):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, refresh_masks=refresh)


@pytest.mark.parametrize("axis", [0, 1])
def test_groups_must_stay_as_the_structure_has_them(axis):
    """Half of the kernel all along: by rows of each column, as NM(2, 4) has it, or whole columns."""
    half = jnp.broadcast_to(jnp.arange(4) < 2, (4, 4))
    masks = {"bias": jnp.ones(4, bool), "kernel": half if axis else half.T}
    method = SparseMethod(methods.static().init, lambda x, s: MaskUpdate(masks, s), "per_layer", structured=True)
    tx = sparsify(optax.sgd(0.1), method, sparsity=0.5, structure=NM(2, 4), when=Every(0, 2, 9))
    state = tx.init(PARAMS)
    error, _ = jax.jit(checkify.checkify(tx.update))(PARAMS, state, apply_masks(PARAMS, state))
    assert ("left more weights in a group than NM(n=2, m=4" in (error.get() or "")) == bool(axis)


def test_a_state_may_hold_what_init_is_given():
    """A buffer can be donated only once."""

    def init(x):
        masks = methods.static().init(x).masks
        return MaskUpdate(masks, (masks, x.params, x.inner_state, x.key))

    method = SparseMethod(init, lambda x, state: MaskUpdate(x.masks, state), "per_layer")
    tx = sparsify(optax.adam(0.1), method, sparsity=0.75, when=Every(0, 2, 9))
    params = jax.tree.map(jnp.array, PARAMS)
    state = tx.init(params)
    _, state, _ = jax.jit(lambda p, s: (*tx.update(p, s, p), p), donate_argnums=(0, 1))(params, state)
    np.testing.assert_array_equal(state.method_state[1]["kernel"], PARAMS["kernel"])


def test_first_masks_and_invariants_are_looked_at_as_well():
    with pytest.raises(TypeError, match="A method's init must return MaskUpdate"):
        sparsify(optax.sgd(0.1), SparseMethod(lambda x: x.masks, None, "monotone"), sparsity=0.5).init(PARAMS)
    with pytest.raises(ValueError, match=r"invariant is one of .*'per_layer', .*; got 'perlayer'"):
        sparse(complement, "perlayer")
    with pytest.raises(ValueError, match=r"ranks is one of \('leaf', 'global'\); got 'globl'"):
        sparsify(optax.sgd(0.1), methods.gmp()._replace(ranks="globl"), sparsity=0.5, when=Every(0, 2, 9))
    with pytest.raises(TypeError, match=r"needs when=Every\(start, every, end\), in calls of update; got 100"):
        sparsify(optax.sgd(0.1), methods.gmp()._replace(when=100), sparsity=0.5)
