"""JAX's settings: strict dtype promotion, no rank promotion, 64-bit types."""

import jax
import jax.numpy as jnp
import optax
import pytest

from s2sam_jax import (
    NM,
    ChannelAxis,
    ChannelGroup,
    Every,
    TrainState,
    analysis,
    apply_masks,
    checked,
    esam,
    gsam,
    looksam,
    make_train_step,
    methods,
    msam,
    nm_pack,
    perturb,
    s2sam,
    sam,
    select,
    sparsify,
    ssam,
)

LEAVES = {"enc": jnp.arange(1.0, 17.0).reshape(4, 4), "head": jnp.ones((4, 4))}


@pytest.mark.parametrize("method", [methods.dsr(0.1), methods.rigl(0.3), methods.mest()], ids=["dsr", "rigl", "mest"])
def test_transformations_under_strict_promotion(method):
    tx = checked(sparsify(optax.chain(s2sam(0.1), optax.sgd(0.1)), method, sparsity=0.5, when=Every(0, 1, 9)))
    perturbing = ssam(rho=0.1, mask="dynamic", total_steps=9)
    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(LEAVES)
        tx.update(LEAVES, state, apply_masks(LEAVES, state))
        perturbing.update(LEAVES, perturbing.init(LEAVES), LEAVES, grad_fn=lambda p: p)


TWO_LAYERS = {"kernel": jnp.arange(1.0, 33.0).reshape(4, 8), "head": jnp.ones((8, 4))}
GROUPS = [ChannelGroup("hidden", (ChannelAxis("kernel", -1),), inputs=(ChannelAxis("head", -2),))]
WHEN = Every(0, 2, 8)


def loss_fn(params, model_state, batch, key):
    return jnp.mean(jnp.square(jnp.tanh(batch @ params["kernel"]) @ params["head"])), (model_state, {})


def train(tx, steps=4, **options):
    state, step = TrainState.create(TWO_LAYERS, tx), make_train_step(loss_fn, tx, **options)
    for seed in range(steps):
        state, _ = step(state, jax.random.normal(jax.random.key(seed), (4, 4)))
    assert int(state.first_bad_step) == -1
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    return state


@pytest.fixture
def no_rank_promotion():
    before = jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_rank_promotion", "raise")
    yield
    jax.config.update("jax_numpy_rank_promotion", before)


METHODS = {
    "snip": methods.snip(keep_at_least=1), "grasp": methods.grasp(keep_at_least=1), "lottery": methods.lottery(0.5),
    **{name: getattr(methods, name)() for name in ("rigl", "set", "dsr", "gmp", "mest", "itop")},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_methods_without_rank_promotion(no_rank_promotion, method):
    when = None if METHODS[method].when else WHEN
    train(sparsify(optax.chain(s2sam(), optax.adam(0.1)), METHODS[method], sparsity=0.5, when=when))


def test_the_rest_without_rank_promotion(no_rank_promotion):
    masks = select(TWO_LAYERS, structure=NM(2, 4, axis=-1))
    nm_pack(jnp.where(masks["kernel"], TWO_LAYERS["kernel"], 0), masks["kernel"], NM(2, 4, axis=-1))
    chase = methods.chase(GROUPS, removal_end=1.0)
    for tx in (
        ssam(total_steps=9),
        looksam(),
        gsam(),
        esam(),
        sparsify(sam(), methods.static(), sparsity=0.5, structure=NM(2, 4)),
        sparsify(optax.sgd(0.1), chase, sparsity=0.5, when=WHEN),
    ):
        train(tx)
    analysis.top_eigenvalues(
        lambda p, b: loss_fn(p, (), b, None)[0], TWO_LAYERS, jax.random.key(0), [jnp.ones((4, 4))], k=1
    )


def test_chase_and_accumulation_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        train(sparsify(optax.sgd(0.1), methods.chase(GROUPS, removal_end=1.0), sparsity=0.5, when=WHEN))
        narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), TWO_LAYERS)
        tx = optax.sgd(0.1)
        step = make_train_step(loss_fn, tx, accumulate=2)
        state, _ = step(TrainState.create(narrow, tx), jnp.ones((4, 4), jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    assert int(state.first_bad_step) == -1


ASCENTS = {
    "s2sam": s2sam(0.05), "s2sam, adaptive": s2sam(0.05, adaptive=True), "sam": sam(lambda step: 0.05),
    "asam": sam(0.5, adaptive=True), "looksam": looksam(0.05, every=2), "gsam": gsam(0.05), "esam": esam(0.05),
    "released": s2sam(0.05, adaptive=True, compat="authors", perturb_pruned=True), "msam": msam(0.05),
}  # fmt: skip


@pytest.mark.parametrize("name", ASCENTS)
def test_64_bit_types_leave_float32_leaves_alone(name):
    """Scalars may be float64, but no array as large as the parameters."""
    with jax.enable_x64(True):
        params = {"kernel": jnp.ones((5, 7), jnp.float32), "wide": jnp.ones((3, 2), jnp.float64)}
        tx = optax.chain(ASCENTS[name], optax.sgd(0.1, momentum=0.9))

        def step(params, opt_state, grads):
            grads = perturb(params, opt_state) if name in ("s2sam", "s2sam, adaptive", "released", "msam") else grads
            return tx.update(grads, opt_state, params, grad_fn=lambda params: params)

        lowered = jax.jit(step).lower(params, tx.init(params), params).as_text()
    assert "tensor<5x7xf32>" in lowered
    assert "tensor<5x7xf64>" not in lowered


KERNEL = {"kernel": jnp.linspace(0.1, 1.0, 100).reshape(10, 10)}


@pytest.mark.parametrize("name", ["rigl", "set", "itop", "mest", "gmp"])
def test_methods_under_strict_promotion(name):
    tx = sparsify(optax.sgd(0.1), getattr(methods, name)(), sparsity=0.5, when=Every(0, 2, 20))
    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(KERNEL)
        _, state = jax.jit(tx.update)(KERNEL, state, apply_masks(KERNEL, state))
    check = 100 if name == "gmp" else 50
    assert int(state.nnz[0]) == check
