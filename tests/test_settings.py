"""Settings and uses of JAX that few have, in which everything is to work all the same, or to say that it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from s2sam_jax import (
    NM,
    ChannelAxis,
    ChannelGroup,
    Every,
    TrainState,
    analysis,
    esam,
    eval_params,
    gsam,
    looksam,
    make_train_step,
    methods,
    msam,
    nm_pack,
    perturb,
    recalibrate_batch_stats,
    s2sam,
    s2sam_wrapper,
    sam,
    select,
    sharpness_metrics,
    sparsify,
    ssam,
)

PARAMS = {"kernel": jnp.arange(1.0, 33.0).reshape(4, 8), "head": jnp.ones((8, 4))}
GROUPS = [ChannelGroup("hidden", (ChannelAxis("kernel", -1),), inputs=(ChannelAxis("head", -2),))]
WHEN = Every(0, 2, 8)


def loss_fn(params, model_state, batch, key):
    return jnp.mean(jnp.square(jnp.tanh(batch @ params["kernel"]) @ params["head"])), (model_state, {})


def train(tx, steps=4, **options):
    state, step = TrainState.create(PARAMS, tx), make_train_step(loss_fn, tx, **options)
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


# Ranks and dtypes are not promoted


METHODS = {
    "snip": methods.snip(keep_at_least=1), "grasp": methods.grasp(keep_at_least=1), "lottery": methods.lottery(0.5),
    **{name: getattr(methods, name)() for name in ("rigl", "set", "dsr", "gmp", "mest", "itop")},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_methods_without_rank_promotion(no_rank_promotion, method):
    when = None if METHODS[method].when else WHEN
    train(sparsify(optax.chain(s2sam(), optax.adam(0.1)), METHODS[method], sparsity=0.5, when=when))


def test_the_rest_without_rank_promotion(no_rank_promotion):
    masks = select(PARAMS, structure=NM(2, 4, axis=-1))
    nm_pack(jnp.where(masks["kernel"], PARAMS["kernel"], 0), masks["kernel"], NM(2, 4, axis=-1))
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
        lambda p, b: loss_fn(p, (), b, None)[0], PARAMS, jax.random.key(0), [jnp.ones((4, 4))], k=1
    )


def test_chase_and_accumulation_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        train(sparsify(optax.sgd(0.1), methods.chase(GROUPS, removal_end=1.0), sparsity=0.5, when=WHEN))
        narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
        tx = optax.sgd(0.1)
        step = make_train_step(loss_fn, tx, accumulate=2)
        state, _ = step(TrainState.create(narrow, tx), jnp.ones((4, 4), jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    assert int(state.first_bad_step) == -1


# Derivatives through a perturbation


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_perturbation_is_a_constant(adaptive):
    """Both ways to write it: the gradient at the perturbed point, and that of the loss there."""
    scales = jnp.array([1.0, 2.0, 4.0])
    loss, weights = lambda w: 0.5 * jnp.sum(scales * w * w), jnp.array([1.0, -2.0, 0.5])
    tx = s2sam(rho=0.5, adaptive=adaptive)
    _, state = tx.update(jax.grad(loss)(weights), tx.init(weights), weights)
    there = jax.grad(loss)(perturb(weights, state))
    np.testing.assert_allclose(jax.grad(lambda w: loss(perturb(w, state)))(weights), there, rtol=1e-6)


# Complex parameters, with optax's conjugated gradients


@pytest.mark.parametrize("make", [gsam, lambda rho: looksam(rho, every=2)], ids=["gsam", "looksam"])
def test_complex_parameters_train_as_their_parts(make):
    matrix = jax.random.normal(jax.random.key(0), (4, 4))

    def loss(parts):
        return jnp.sum(jnp.square(matrix @ parts)) + jnp.sum(parts[0] ** 3)

    def joined(z):
        return jnp.stack([z.real[0], z.imag[0], z.real[1], z.imag[1]])

    parts, whole, tx = (
        jnp.array([1.0, -0.5, 0.3, 2.0]),
        jnp.array([1 - 0.5j, 0.3 + 2j]),
        optax.chain(make(rho=0.1), optax.sgd(0.01)),
    )
    of_parts, of_whole = tx.init(parts), tx.init(whole)
    real, conjugated = jax.grad(loss), lambda z: jnp.conj(jax.grad(lambda z: loss(joined(z)))(z))
    for _ in range(3):
        updates, of_parts = tx.update(real(parts), of_parts, parts, grad_fn=real)
        parts = optax.apply_updates(parts, updates)
        updates, of_whole = tx.update(conjugated(whole), of_whole, whole, grad_fn=conjugated)
        whole = optax.apply_updates(whole, updates)
        np.testing.assert_allclose(joined(whole), parts, rtol=1e-5, atol=1e-6)


def test_analyses_refuse_complex_parameters():
    def loss(w, batch):
        return jnp.sum(jnp.abs(w) ** 2)

    z = jnp.array([3 + 4j])
    state = s2sam().init(z)
    for look in (
        lambda: analysis.sam_sharpness(loss, z, [None]),
        lambda: analysis.top_eigenvalues(loss, z, jax.random.key(0), [None], k=1),
        lambda: sharpness_metrics(z, state, compute_dtype="bfloat16"),
    ):
        with pytest.raises(TypeError, match="these parameters are complex"):
            look()


def test_the_cosine_of_a_complex_gradient_with_itself_is_one():
    tx, z, grads = s2sam(), jnp.array([3 + 4j]), jnp.array([1 - 2j])
    _, state = tx.update(grads, tx.init(z), z)
    np.testing.assert_allclose(sharpness_metrics(z, state, grads)["cosine_last_gradient"], 1.0, rtol=1e-6)


# States that are not what they seem


def test_two_sparsify_of_the_same_leaves_are_refused():
    one, other = (sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5, seed=seed) for seed in (0, 1))
    with pytest.raises(ValueError, match=r"two sparsify have masks of \['head', 'kernel'\]"):
        TrainState.create(PARAMS, optax.chain(one, other))


def test_eval_params_of_a_state_without_types_are_refused():
    """As from a checkpoint that was restored without a structure."""
    state = s2sam_wrapper(optax.sgd(0.1)).init(PARAMS)
    with pytest.raises(ValueError, match="the state of s2sam_wrapper as a plain dict"):
        eval_params(PARAMS, [state._asdict()])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_model_state_that_changes_its_type_is_refused(accumulate):
    def widening(params, model_state, batch, key):
        return loss_fn(params, model_state, batch, key)[0], ({"mean": model_state["mean"].astype(jnp.float32)}, {})

    tx = optax.sgd(0.1)
    state = TrainState.create(PARAMS, tx, model_state={"mean": jnp.zeros(3, jnp.bfloat16)})
    with pytest.raises(ValueError, match=r"turns 'mean' of the model state from bfloat16\[3\] into float32\[3\]"):
        make_train_step(widening, tx, accumulate=accumulate)(state, jnp.ones((4, 4)))


@pytest.mark.parametrize(("momentum", "kept"), [(0.9, False), (0.99, True), (0.999, True)])
def test_statistics_of_which_rounding_hides_the_momentum_are_kept(momentum, kept):
    """In bfloat16, of which one step near 1 is 0.8 %."""
    batches = [jnp.full((2, 1), x) for x in (1.0, 2.0, 3.0)]

    def with_mean(params, mean, batch, key):
        return batch.sum(), ((momentum * mean + (1 - momentum) * batch.mean()).astype(jnp.bfloat16), {})

    mean = jnp.array(5.0, jnp.bfloat16)
    if kept:
        with pytest.warns(UserWarning, match="too little of the batch gets in"):
            assert recalibrate_batch_stats(with_mean, None, mean, batches) == 5.0
    else:
        np.testing.assert_allclose(np.float32(recalibrate_batch_stats(with_mean, None, mean, batches)), 2.0, rtol=0.05)


def test_chase_as_released_removes_channels_of_a_dense_network():
    tx = sparsify(optax.sgd(0.1), methods.chase(GROUPS, compat="authors", removal_end=1.0), sparsity=0.0, when=WHEN)
    state = train(tx, steps=9)
    assert int((state.params["head"] != 0).any(axis=1).sum()) == 4


# 64-bit types


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
