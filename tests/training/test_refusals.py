"""What the train step refuses: each error says what was expected, what came, and what to do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from misfits import SGD, static, two_kernels, untyped

from s2sam_jax import TrainState, analysis, checked, esam, gsam, looksam, make_train_step, s2sam, sam, ssam


def test_fisher_examples_must_be_some():
    with pytest.raises(ValueError, match="fisher_examples >= 1; got 0"):
        make_train_step(lambda p, m, b, k: (p, (m, {})), optax.sgd(0.1), fisher_examples=0)


def two_kernel_loss(params, model_state, batch, key):
    return jnp.mean(batch @ params["a"]["kernel"] @ params["b"]["kernel"] + params["a"]["bias"]), (model_state, {})


@pytest.mark.parametrize("sharp", [sam, lambda: ssam(total_steps=9)], ids=["sam", "ssam"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_train_step_refuses_sam_inside_multi_steps(sharp, sparse):
    inner = optax.chain(sharp(), SGD)
    tx = optax.MultiSteps(static(inner) if sparse else inner, 2).gradient_transformation()
    state = TrainState.create(two_kernels(), tx)
    with pytest.raises(ValueError, match=r"inside optax\.MultiSteps .* use make_train_step\(\.\.\., accumulate=k\)"):
        make_train_step(two_kernel_loss, tx)(state, jnp.ones((4, 4)))


SHARP = {"sam": sam, "ssam": lambda: ssam(total_steps=9), "looksam": looksam, "gsam": gsam, "esam": esam}
BEHIND = {
    "an optimizer": lambda sharp: optax.chain(SGD, sharp),
    "clipping": lambda sharp: optax.chain(optax.clip(1.0), sharp, SGD),
    "a chain": lambda sharp: optax.chain(optax.chain(optax.zero_nans(), optax.clip(1.0)), optax.chain(sharp, SGD)),
    "inside": lambda sharp: static(optax.chain(optax.add_decayed_weights(0.1), sharp, SGD)),
    "outside": lambda sharp: optax.chain(optax.clip(1.0), static(optax.chain(sharp, SGD))),
}


@pytest.mark.parametrize("build", BEHIND.values(), ids=BEHIND)
@pytest.mark.parametrize("sharp", SHARP.values(), ids=SHARP)
def test_what_stands_before_sam_would_be_lost_and_is_refused(sharp, build):
    behind = pytest.raises(ValueError, match=r"stands behind something in an optax\.chain, .* Put it first")
    with behind:
        tx = build(sharp())
        make_train_step(two_kernel_loss, tx)(TrainState.create(two_kernels(), tx), jnp.ones((4, 4)))
    with behind:
        tx = checked(build(sharp()))
        tx.update(two_kernels(), tx.init(two_kernels()), two_kernels(), grad_fn=lambda params: params)


def test_sparsify_refuses_what_stands_before_sam_as_soon_as_it_has_parameters():
    with pytest.raises(ValueError, match=r"stands behind something in an optax\.chain"):
        BEHIND["inside"](sam()).init(two_kernels())


@pytest.mark.parametrize("sharp", SHARP.values(), ids=SHARP)
def test_sam_that_comes_first_is_not(sharp):
    """Also in a chain of chains, behind what only looks on, and inside wrappers, one with a tuple of its own."""
    inner = optax.chain(optax.chain(sharp(), optax.clip(1.0)), optax.chain(optax.add_decayed_weights(0.1), SGD))
    looked_at = optax.chain(optax.snapshot("first", optax.tree.norm), inner)
    for tx in (
        optax.apply_if_finite(static(inner), 3),
        static(looked_at),
        counting(looked_at),
        static(counting(inner)),
    ):
        _, metrics = make_train_step(two_kernel_loss, tx)(TrainState.create(two_kernels(), tx), jnp.ones((4, 4)))
        assert metrics["update_norm"] > 0


def counting(inner):
    def update(updates, state, params=None, **extra_args):
        updates, inner_state = inner.update(updates, state[1], params, **extra_args)
        return updates, (state[0] + 1, inner_state)

    return optax.GradientTransformationExtraArgs(lambda params: (jnp.int32(0), inner.init(params)), update)


def test_a_loss_of_another_signature_is_told_which_it_needs():
    needed = r"calls loss_fn\(params, model_state, batch, key\), .* this one takes \(params, batch\): too many"
    with pytest.raises(TypeError, match=needed):
        make_train_step(lambda params, batch: jnp.sum(params), SGD)
    scaled = functools.partial(lambda scale, *rest: (scale * two_kernel_loss(*rest)[0], ((), {})), 2.0)
    make_train_step(jax.jit(scaled), SGD)

    def plain(params, batch):
        return jnp.sum(params)

    @functools.wraps(plain)
    def adapter(params, model_state, batch, key):
        return plain(params, batch), (model_state, {})

    make_train_step(adapter, SGD)


def test_a_loss_that_is_no_function_is_told():
    with pytest.raises(TypeError, match="needs a function loss_fn; got None"):
        make_train_step(None, SGD)


def test_a_state_that_was_donated_is_named():
    step, old = make_train_step(two_kernel_loss, SGD), TrainState.create(two_kernels(), SGD)
    step(old, jnp.ones((4, 4)))
    with pytest.raises(ValueError, match="donated to an earlier step: go on from the state which that one returned"):
        step(old, jnp.ones((4, 4)))


def test_train_step_refuses_another_state():
    state = TrainState.create(two_kernels(), optax.adam(0.1))
    with pytest.raises(ValueError, match=r"(?s)opt_state is not a state of this tx.*expected.*got.*ScaleByAdamState"):
        make_train_step(two_kernel_loss, SGD)(state, jnp.ones((4, 4)))
    tx = optax.chain(s2sam(), SGD)
    state = TrainState.create(two_kernels(), tx)
    with pytest.raises(ValueError, match="opt_state is not a state of this tx"):
        make_train_step(two_kernel_loss, tx)(state._replace(opt_state=untyped(state.opt_state)), jnp.ones((4, 4)))


def test_train_step_refuses_a_batch_that_does_not_divide():
    state = TrainState.create(two_kernels(), SGD)
    with pytest.raises(ValueError, match=r"accumulate=4 does not divide a batch leaf of shape \(6, 4\)"):
        make_train_step(two_kernel_loss, SGD, accumulate=4)(state, jnp.ones((6, 4)))


LOOK = {
    "surface": lambda loss, w, batches: analysis.loss_surface(loss, w, [w], batches, n=3),
    "barrier": lambda loss, w, batches: analysis.error_barrier(loss, w, w, batches, n=3),
    "trace": lambda loss, w, batches: analysis.hessian_trace(loss, w, jax.random.key(0), batches),
    "sharpness": lambda loss, w, batches: analysis.sam_sharpness(loss, w, batches),
}


@pytest.mark.parametrize("look", LOOK.values(), ids=LOOK)
def test_batches_that_would_not_count_alike_are_refused(look):
    with pytest.raises(ValueError, match=r"weights all batches alike.* got \(8,\) and \(3,\)"):
        look(lambda w, batch: jnp.sum(w**2) * jnp.mean(batch), jnp.ones(3), [jnp.ones(8), jnp.ones(3)])


TWO_LAYERS = {"kernel": jnp.arange(1.0, 33.0).reshape(4, 8), "head": jnp.ones((8, 4))}


def tanh_loss(params, model_state, batch, key):
    return jnp.mean(jnp.square(jnp.tanh(batch @ params["kernel"]) @ params["head"])), (model_state, {})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_model_state_that_changes_its_type_is_refused(accumulate):
    def widening(params, model_state, batch, key):
        return tanh_loss(params, model_state, batch, key)[0], ({"mean": model_state["mean"].astype(jnp.float32)}, {})

    tx = optax.sgd(0.1)
    state = TrainState.create(TWO_LAYERS, tx, model_state={"mean": jnp.zeros(3, jnp.bfloat16)})
    with pytest.raises(ValueError, match=r"turns 'mean' of the model state from bfloat16\[3\] into float32\[3\]"):
        make_train_step(widening, tx, accumulate=accumulate)(state, jnp.ones((4, 4)))


KERNEL = {"kernel": jnp.linspace(0.1, 1.0, 100).reshape(10, 10)}


def scaled_squares(params, model_state, batch, key):
    return jnp.sum(params["kernel"] ** 2) * jnp.mean(batch), (model_state, {})


def test_a_metric_that_the_step_has_itself_is_refused():
    def named(params, model_state, batch, key):
        return jnp.sum(params["kernel"]), (model_state, {"loss": 1.0, "mine": 2.0})

    step = make_train_step(named, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"has itself: \['loss'\]"):
        step(TrainState.create(KERNEL, optax.sgd(0.1)), jnp.ones(4))


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}])
def test_a_model_state_that_was_forgotten_is_asked_for(options):
    def with_statistics(params, model_state, batch, key):
        return scaled_squares(params, (), batch, key)[0], ({"batch_stats": jnp.ones(3)}, {})

    step = make_train_step(with_statistics, optax.sgd(0.1), **options)
    with pytest.raises(ValueError, match=r"loss_fn returns a model state .*'batch_stats'.* model_state=\.\.\."):
        step(TrainState.create(KERNEL, optax.sgd(0.1)), jnp.ones((4, 2)))


@pytest.mark.parametrize(
    ("returned", "error", "text"),
    [
        (
            lambda loss: loss,
            TypeError,
            r"must return \(loss, \(model_state, metrics\)\), .* of arrays, \(\)\.",
        ),
        (lambda loss: (loss, {}), TypeError, r"arrays, \(\(\), \{\}\)\."),
        (lambda loss: (loss, {"a": loss}), TypeError, r"arrays, \(\(\), \{'a': \(\)\}\)\."),
        (lambda loss: (loss, ({"a": loss}, ())), TypeError, "metrics a dict, and"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}])
def test_a_loss_that_returns_something_else_is_told_what(returned, error, text, options):
    step = make_train_step(lambda p, m, b, k: returned(jnp.sum(p["kernel"])), optax.sgd(0.1), **options)
    with pytest.raises(error, match=text):
        step(TrainState.create(KERNEL, optax.sgd(0.1)), jnp.ones((4, 2)))


def test_a_state_that_was_restored_without_its_structure_is_refused():
    step, state = make_train_step(scaled_squares, optax.sgd(0.1)), TrainState.create(KERNEL, optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"needs a TrainState; got a dict\. Restore .*TrainState\.create\(params, tx\)"):
        step(state._asdict(), jnp.ones((4, 2)))


IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)


def product_loss(params, model_state, batch, key):
    return jnp.mean(jnp.square(batch @ params["kernel"])), (model_state, {})


def test_a_batch_leaf_without_examples_is_named():
    def loss(params, model_state, batch, key):
        return product_loss(params, model_state, batch["x"], key)

    tx = optax.chain(ssam(0.1, mask="fisher"), optax.sgd(0.1))
    state = TrainState.create({"kernel": jnp.ones((4, 8))}, tx)
    with pytest.raises(ValueError, match=r"fisher_examples takes some of .*\['epoch'\]\W+\(\), .*\['x'\]\W+\(16, 4\)"):
        make_train_step(loss, tx)(state, {"x": IMAGES, "epoch": jnp.int32(1)})


def losses(params, model_state, batch, key):
    return batch["y"]


@pytest.mark.parametrize(
    ("sharp", "options"),
    [
        (optax.identity(), {"accumulate": 2}),
        (sam(0.1), {"sharpness_parts": 2}),
        (sam(0.1), {"sharpest_fraction": 0.5, "example_loss_fn": losses}),
        (ssam(0.1, mask="fisher"), {"fisher_examples": 8}),
    ],
    ids=["accumulate", "sharpness_parts", "sharpest_fraction", "fisher_examples"],
)
def test_a_batch_leaf_of_another_length_is_not_cut_up(sharp, options):
    """Indices beyond its end would be clamped, and the loss would be another."""

    def loss(params, model_state, batch, key):
        weights = batch["of_classes"][batch["y"].astype(int)]
        return jnp.mean(weights * jnp.square(batch["x"] @ params["kernel"]).sum(-1)), (model_state, {})

    batch = {"x": IMAGES, "y": jnp.arange(16.0) % 4, "of_classes": jnp.arange(4.0)}
    tx = optax.chain(sharp, optax.sgd(0.1))
    state = TrainState.create({"kernel": jnp.ones((4, 8))}, tx)
    with pytest.raises(
        ValueError, match=rf"^{next(iter(options))} takes some of the examples, .*\['of_classes'\]\W+\(4,\)"
    ):
        make_train_step(loss, tx, **options)(state, batch)
