"""Parameters, losses, optimizers and checks that several test files share."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

from s2sam_jax import (
    Every,
    SparseState,
    TrainState,
    apply_masks,
    erdos_renyi_kernel,
    make_train_step,
    methods,
    perturb,
    s2sam,
    sparsify,
)

RHO, SPARSITY, STEPS = 0.1, 0.6, 6


def make_params() -> Any:
    """Modules of one name at three depths and with one shape, so that a confusion of paths would show."""
    shapes = {
        "a": {"kernel": (6, 6), "bias": (6,)},
        "b": {"a": {"kernel": (6, 6)}},
        "kernel": (6, 6),
    }
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(3), len(leaves))
    return treedef.unflatten([jax.random.normal(k, shape) for k, shape in zip(keys, leaves, strict=True)])


KERNELS = ("a/kernel", "b/a/kernel", "kernel")


def loss_fn(params: Any) -> jax.Array:
    """Smooth and convex, with another target for every weight."""
    leaves = jax.tree.leaves(params)
    targets = [2 + jnp.cos(jnp.arange(w.size) + 5.0 * index).reshape(w.shape) for index, w in enumerate(leaves)]
    return sum(jnp.sum(jnp.log(jnp.cosh(w - t))) for w, t in zip(leaves, targets, strict=True))


def named(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") for path, _ in leaves]
    return {name: fetch(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}


def fetch(leaf: Any) -> np.ndarray:
    """A copy on the host: a view would hold on to the buffer and prevent its donation."""
    return np.array(jax.random.key_data(leaf) if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key) else leaf)


def on_host(tree: Any) -> Any:
    return jax.tree.map(fetch, tree)


def find(tree: Any, kind: type) -> Any:
    """The one state of a type inside an optimizer state."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    (state,) = (leaf for leaf in leaves if isinstance(leaf, kind))
    return state


def norm(leaves: Any) -> float:
    return math.sqrt(sum(float(np.square(np.float64(x)).sum()) for x in leaves))


def assert_trees_close(a: Any, b: Any, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    a, b = named(a), named(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(np.float64(a[name]), np.float64(b[name]), rtol, atol, err_msg=name)


class Step(NamedTuple):
    clean: Any
    point: Any
    grads: Any
    params: Any
    opt_state: Any


def run(tx, params, *, loss=loss_fn, steps=STEPS, bad=(), **extras) -> list[Step]:
    """A jitted, donating S2-SAM loop: one trace, one gradient a step. ``bad`` steps get NaN gradients."""
    tx = optax.with_extra_args_support(tx)
    traces, evaluations, history = [], [], []

    def counted(params):
        jax.debug.callback(lambda: evaluations.append(1))
        return loss(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, fault):
        traces.append(1)
        point = perturb(params, opt_state)
        value, grads = jax.value_and_grad(counted)(point)
        grads = jax.tree.map(lambda g: g + fault, grads)
        updates, opt_state = tx.update(grads, opt_state, params, value=value, **extras)
        return point, grads, optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)  # not jitted: an alias between params and state would break donation
    if any(
        isinstance(x, SparseState) for x in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, SparseState))
    ):
        params = apply_masks(params, opt_state)
    for index in range(steps):
        clean, donated = on_host(params), (params, opt_state)
        point, grads, params, opt_state = step(params, opt_state, jnp.nan if index in bad else 0.0)
        assert all(x.is_deleted() for x in jax.tree.leaves(donated) if x.size > 1)
        history.append(Step(clean, *on_host((point, grads, params, opt_state))))
    jax.effects_barrier()
    assert len(traces) == 1, "compiled again"
    assert len(evaluations) == steps, "not one gradient a step"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    return history


def labels(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "left" if path[0].key == "a" else "right", params)


def s2sgd(rho=RHO):
    return optax.chain(s2sam(rho), optax.sgd(0.1, momentum=0.9))


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2)(jax.nn.tanh(linen.Dense(4)(x)))


INPUTS = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


class BatchNormNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(jax.nn.tanh(self.norm(self.first(x))))


def rigl(inner, **options):
    options = {"sparsity": SPARSITY, "when": Every(0, 2, 100), **options}
    return sparsify(inner, methods.rigl(0.5), **options)


def planned(params: Any, sparsity: float = SPARSITY) -> dict[str, int]:
    """Ones per leaf: ``N - floor(S N)``."""
    plan = named(erdos_renyi_kernel(params, sparsity))
    return {name: p.size - math.floor(round(plan[name].item() * p.size, 6)) for name, p in named(params).items()}


OUTER = {
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(optax.scale(rate), tx))(
        rate=1.0
    ),
    "named_chain": lambda tx: optax.named_chain(("sparse", tx)),
}


def squared(tree):
    return jax.tree.map(jnp.square, tree)


MOMENTUM = functools.partial(optax.sgd, 0.1, momentum=0.9)


def mlp_params():
    keys = jax.random.split(jax.random.key(5), 2)
    return {"one": {"kernel": jax.random.normal(keys[0], (3, 8)), "bias": jnp.zeros(8)},
            "two": {"kernel": jax.random.normal(keys[1], (8, 2)), "bias": jnp.zeros(2)}}  # fmt: skip


def mlp_loss(params, model_state, batch, key):
    hidden = jax.nn.tanh(batch @ params["one"]["kernel"] + params["one"]["bias"])
    outputs = hidden @ params["two"]["kernel"] + params["two"]["bias"]
    return jnp.mean(jnp.square(outputs - 1)), (model_state + 1, {"largest": jnp.max(jnp.abs(outputs))})


BATCHES = np.random.default_rng(1).normal(size=(5, 8, 3)).astype(np.float32)


def start(tx):
    return TrainState.create(mlp_params(), tx, model_state=jnp.zeros(()))


def train(tx, loss=mlp_loss, after=lambda: None, **options):
    step, state, rows = make_train_step(loss, tx, **options), start(tx), []
    for batch in BATCHES:
        state, metrics = step(state, batch)
        rows.append(metrics)
        after()
    return state, rows


def numbers(make: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """The module that is made, with random values for every parameter, biases and scales too, and those by name."""
    rng = np.random.default_rng(0)
    graphdef, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), nnx.as_pure(params))
    rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nnx.as_pure(rest))
    return nnx.merge(graphdef, params, rest), {path: np.float64(x) for path, x in named(params).items()}
