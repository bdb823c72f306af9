# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write your own method
#
# A sparse-training method is two pure functions. `init` gives the first masks; `update` is called when the clock fires,
# sees weights, dense gradient, masks and whatever it chose to remember, and gives the next masks. That is all: zeroing
# weights, forgetting momentum, working under S2-SAM, `jit`, checkpoints and sharding come from `sparsify`.
#
# As an example, a method that RigL's authors did not try: drop not the weights that *are* smallest, but those that have
# *shrunk* most since the last update, and grow where the gradient is largest.

# %%
import os

TINY = os.environ.get("S2SAM_JAX_TINY") == "1"  # as the tests run it
EPOCHS, SEEDS = (2, 1) if TINY else (20, 5)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.experimental import checkify

from experiments.datasets import in_memory
from s2sam_jax import (
    Every,
    MaskUpdate,
    SparseMethod,
    TrainState,
    apply_masks,
    check_masks,
    checked,
    make_train_step,
    methods,
    s2sam,
    select,
    sparsify,
)

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## The method
#
# `select` does the ranking. It takes scores and a count for each layer, chooses exactly so many, settles ties by the
# lower index, and needs no sort, so that it is quick for millions of weights. `x` is a `MaskInputs`. Its leaves that
# are to stay dense, biases for example, have sparsity 0. They are in every tree, and a method must hand them back as
# they are, all alive: here `moved` is 0 for them, so that `keep` is the whole leaf.
#
# What a method remembers is a tree of arrays, returned as `state` and given back at the next update. `invariant` is its
# promise: "per_layer" says that no update changes how many weights of a leaf live.


# %%
def shrinking(fraction=0.3):
    """Drops the weights that have shrunk most since the last update, and grows those with the largest gradient."""

    def init(x):
        first = methods.static().init(x)
        return MaskUpdate(first.masks, state=jax.tree.map(jnp.zeros_like, x.params))

    def update(x, before):
        moved = jax.tree.map(lambda n, s: jnp.int32(fraction * n) if s > 0 else 0, x.nnz, x.sparsities)
        growth = jax.tree.map(lambda w, b: jnp.abs(w) - b, x.params, before)
        keep = select(growth, count=jax.tree.map(jnp.subtract, x.nnz, moved), among=x.masks)
        free = jax.tree.map(jnp.logical_not, keep)  # the dropped ones are among them, as in RigL
        grown = select(jax.tree.map(jnp.abs, x.grads), count=moved, among=free)  # x.grads is dense
        masks = jax.tree.map(jnp.logical_or, keep, grown)
        return MaskUpdate(masks, state=jax.tree.map(lambda w, k: jnp.where(k, jnp.abs(w), 0), x.params, keep))

    return SparseMethod(init=init, update=update, invariant="per_layer")


# %% [markdown]
# ## A look at one update
#
# Half of eight weights live. All start at one, the gradient is constant, and the masks change at the second and at the
# third call.

# %%
tx = sparsify(optax.sgd(1.0), shrinking(fraction=0.5), sparsity=0.5, when=Every(start=1, every=1), seed=3)
params = {"kernel": jnp.ones((2, 4))}
state = TrainState.create(params, tx)
masks = state.opt_state.masks["kernel"]
print(masks.astype(int))

# %%
grads = {"kernel": jnp.where(masks, jnp.array([[0.5, 0.1, -0.2, 0.4], [0.3, 0.2, -0.1, 0.6]]), 0.9)}
params, opt_state = state.params, state.opt_state
for _ in range(3):
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    check_masks(params, opt_state)
    print(np.round(np.asarray(params["kernel"]), 2), f"{int(opt_state.nnz.sum())} live")

# %% [markdown]
# At its first update the method remembers nothing, so that the smallest weights go, as in RigL. The second shows the
# difference: the two new weights have grown by 0.9 from nothing, and so it is an old one of 1.4, the largest of all,
# that has to leave. Whether that is wise is a question for an experiment.
#
# ## Does it keep its promise?
#
# `check_masks` compares masks and weights, and knows nothing of promises. `checked` around the optimizer makes every
# update check itself: trees, zeros, counts, and whether the method kept its invariant and left dense leaves alone. It
# needs `checkify`, since such checks depend on values. Below, 100 updates of the masks on random gradients, rounded so
# that many scores tie, with leaves of odd shapes.


# %%
def tree(seed):
    draw = np.random.default_rng(seed)
    shapes = {"conv": (3, 3, 2, 5), "head": (7, 11), "bias": (5,), "scale": ()}
    return {name: jnp.asarray(np.round(draw.normal(size=shape)), jnp.float32) for name, shape in shapes.items()}


def first_fault(method, steps=200):
    inner = optax.chain(s2sam(rho=0.05), optax.sgd(0.1, momentum=0.9))
    tx = checked(sparsify(inner, method, sparsity=0.6, when=Every(start=1, every=2)))
    step = jax.jit(checkify.checkify(tx.update))
    opt_state = tx.init(tree(0))
    params = apply_masks(tree(0), opt_state)
    for seed in range(1, steps + 1):
        error, (updates, opt_state) = step(tree(seed), opt_state, params)
        if error.get() is not None:
            return f"step {seed}: {error.get().split(' (')[0]}"
        params = optax.apply_updates(params, updates)
    return f"none in {seed} steps"


print(first_fault(shrinking(0.3)))

# %% [markdown]
# And here is what it says of one that grows a weight too many:


# %%
def greedy(fraction=0.3):
    right = shrinking(fraction)

    def update(x, before):
        new = right.update(x, before)
        extra = select(x.grads, count=1, among=jax.tree.map(jnp.logical_not, new.masks))
        return new._replace(masks=jax.tree.map(jnp.logical_or, new.masks, extra))

    return right._replace(update=update)


print(first_fault(greedy(0.3)))

# %% [markdown]
# ## Against others
#
# The method is used like any other; here with S2-SAM. To learn something, change one thing at a time. RigL as its
# authors have it anneals its drop fraction, and takes no gradient step when it changes the masks. `rigl` below does
# neither, so that it differs from `shrinking` only in what it drops, and from `set` in what it grows (and a little in
# what it drops: SET takes the smallest of each sign). `rigl, annealed` is the published one.

# %%
digits = in_memory.load("digits")
train_x, test_x = (x.reshape(len(x), 64) / 255 for x in (digits.train_images, digits.test_images))
train_y, test_y = digits.train_labels, digits.test_labels
STEPS = len(train_x) // 64


def net(params, x):
    hidden = jax.nn.relu(x @ params["one"]["kernel"] + params["one"]["bias"])
    return hidden @ params["two"]["kernel"] + params["two"]["bias"]


def loss_fn(params, model_state, batch, key):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(net(params, x), y).mean(), (model_state, {})


def accuracies(method, sparsity=0.95):
    """Test accuracy in percent of each seed; the whole run is one program, so that it is compiled once for all."""
    clock = Every(start=0, every=STEPS, end=max(1, EPOCHS * 3 // 4) * STEPS) if method.update else None

    @jax.jit
    def run(seed):
        rate = optax.cosine_decay_schedule(0.1, STEPS * EPOCHS)
        inner = optax.chain(s2sam(rho=0.05), optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))
        tx = sparsify(inner, method, sparsity=sparsity, distribution="erk", when=clock, seed=seed)
        one, two, order = jax.random.split(jax.random.key(seed), 3)
        params = {
            "one": {"kernel": jax.random.normal(one, (64, 256)) / 8, "bias": jnp.zeros(256)},
            "two": {"kernel": jax.random.normal(two, (256, 10)) / 16, "bias": jnp.zeros(10)},
        }
        orders = jax.vmap(lambda key: jax.random.permutation(key, len(train_x))[: STEPS * 64])(
            jax.random.split(order, EPOCHS)
        )
        step = make_train_step(loss_fn, tx)
        state, _ = jax.lax.scan(
            lambda state, rows: step(state, (train_x[rows], train_y[rows])),
            TrainState.create(params, tx, seed=seed),
            orders.reshape(EPOCHS * STEPS, 64),
        )
        return state, jnp.mean(jnp.argmax(net(state.params, test_x), axis=-1) == test_y)

    ends = [run(seed) for seed in range(SEEDS)]
    for state, _ in ends:
        check_masks(state.params, state.opt_state)
    return np.array([100 * float(right) for _, right in ends])


contestants = {
    "static": methods.static(),
    "set": methods.set(0.3),
    "rigl": methods.rigl(lambda step: 0.3, skip_step=False),
    "shrinking": shrinking(0.3),
    "rigl, annealed": methods.rigl(0.3),
}
if TINY:
    contestants = {"rigl": contestants["rigl"], "shrinking": contestants["shrinking"]}
results = {name: accuracies(method) for name, method in contestants.items()}

# %%
figure, axes = plt.subplots(figsize=(6, 2.4))
for place, (name, values) in enumerate(results.items()):
    axes.plot(values, [place] * len(values), "o", color="#D55E00", alpha=0.6, markersize=5)
    axes.plot(np.mean(values), place, "|", color="black", markersize=16, markeredgewidth=2)
axes.set_yticks(range(len(results)), list(results))
axes.set(
    xlabel="test accuracy (%)", title="95 % zeros, S2-SAM: each seed, and the mean", ylim=(len(results) - 0.5, -0.5)
)
axes.grid(alpha=0.3)
plt.show()

# %%
print("Points over rigl, same seeds: mean, and each seed")
for name, values in results.items():
    gains = values - results["rigl"]
    print(f"{name:15}{gains.mean():+5.1f}  ({', '.join(f'{gain:+.1f}' for gain in gains)})")

# %% [markdown]
# The idea is no improvement: dropping what has shrunk most ends below dropping what is smallest, with each of five
# seeds, by 1.3 points on average. What both grow matters more: SET, which grows at random, is 3.7 points below RigL.
# Annealing makes little difference here.
#
# ## Making it part of the library
#
# A method in the library is one file in `s2sam_jax/methods/`, its line in that folder's `__init__.py`, its places in
# the documentation (`docs/contributing.md` lists them), and a row in `tests/rows.py`. The row puts it through the same
# tests as all the others: counts kept, zeros exact under any optimizer, nothing depending on where the data lie, and a
# mask worked out by hand. The cell above that looks for faults is a small copy of `tests/methods/test_invariants.py`.
