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
# # S2-SAM in your own loop
#
# SAM looks for flat minima: it takes the gradient not at the weights `w` but a little uphill of them, and pays a second
# gradient to know where uphill is. S2-SAM asks the step before instead. Its gradient is still at hand, so a step costs
# one gradient, as with SGD:
#
# $$\epsilon_t = \rho\, \frac{g_{t-1}}{\|g_{t-1}\|}, \qquad g_t = \nabla L(w_t + \epsilon_t), \qquad
#   w_{t+1} = w_t - \eta\, g_t$$
#
# Here that is an optax transformation, `s2sam`, which remembers the gradient, and a function, `perturb`, which tells a
# loop where to take the next one. Below are four loops, in plain JAX, Flax NNX, Flax Linen and Equinox. What S2-SAM
# adds to each is the call of `perturb`, and nothing else. Then come SAM, a step that is ready-made, and sparsity.
#
# The notebooks run from a checkout of the repository (`uv sync --all-extras` installs what they need): the data come
# from its folder `experiments`, which is not part of the installed library.

# %%
import os

TINY = os.environ.get("S2SAM_JAX_TINY") == "1"  # as the tests run it
EPOCHS = 2 if TINY else 20

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from flax.training import train_state

from experiments.datasets import in_memory
from s2sam_jax import (
    Every,
    TrainState,
    apply_masks,
    check_masks,
    get_masks,
    make_train_step,
    methods,
    perturb,
    s2sam,
    sam,
    sparsify,
)

# %% [markdown]
# The data are scikit-learn's handwritten digits, 8 x 8 pixels each; all loops see the same batches.

# %%
digits = in_memory.load("digits")
train_x, test_x = (x.reshape(len(x), 64) / 255 for x in (digits.train_images, digits.test_images))
train_y, test_y = digits.train_labels, digits.test_labels


def batches():
    for epoch in range(EPOCHS):
        for rows in in_memory.epoch_order(0, epoch, len(train_x), batch_size=64):
            yield train_x[rows], train_y[rows]


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def report(logits):
    print(f"test accuracy {jnp.mean(jnp.argmax(logits, axis=-1) == test_y):.1%}")


# %% [markdown]
# One optimizer for all. `s2sam` comes first in its chain: it has to remember the gradient itself, not what weight decay
# and momentum make of it.

# %%
tx = optax.chain(s2sam(rho=0.05), optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))

# %% [markdown]
# ## Plain JAX


# %%
def net(params, x):
    hidden = jax.nn.relu(x @ params["one"]["kernel"] + params["one"]["bias"])
    return hidden @ params["two"]["kernel"] + params["two"]["bias"]


def loss_fn(params, x, y):
    return cross_entropy(net(params, x), y)


def make_step(tx):
    @jax.jit
    def step(params, opt_state, x, y):
        grads = jax.grad(loss_fn)(perturb(params, opt_state), x, y)  # plain SGD would have params here
        updates, opt_state = tx.update(grads, opt_state, params)  # the update is of the weights, not of that point
        return optax.apply_updates(params, updates), opt_state

    return step


def layer(key, inputs, outputs):
    return {"kernel": jax.random.normal(key, (inputs, outputs)) / np.sqrt(inputs), "bias": jnp.zeros(outputs)}


one, two = jax.random.split(jax.random.key(0))
start = {"one": layer(one, 64, 128), "two": layer(two, 128, 10)}
params, opt_state, step = start, tx.init(start), make_step(tx)
for x, y in batches():
    params, opt_state = step(params, opt_state, x, y)
report(net(params, test_x))

# %% [markdown]
# `perturb` moves the weights by `rho`, whatever the length of the gradient; before the first step there is no gradient,
# and it leaves them as they are. Look at that once in a new loop: one that forgets `perturb` raises no error, and is
# plain SGD. (`checked`, for debugging, finds it if the loop passes `grad_fn` to `tx.update`, as below.)

# %%
for when, weights, its_state in (("at the start", start, tx.init(start)), ("now", params, opt_state)):
    moved = optax.tree.norm(optax.tree.sub(perturb(weights, its_state), weights))
    print(f"length of the perturbation, {when}: {moved:.3f}")

# %% [markdown]
# ## Flax NNX
#
# The model is split into parameters and the rest, and only the parameters are perturbed. This net has no rest; with
# BatchNorm or dropout that is the statistics and random counts, which the last line of the step brings back from the
# perturbed copy.


# %%
class Net(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(64, 128, rngs=rngs)
        self.two = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.two(nnx.relu(self.one(x)))


@nnx.jit
def nnx_step(model, optimizer, x, y):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    point = nnx.merge(graph, perturb(params, optimizer.opt_state), rest)
    grads = nnx.grad(lambda m: cross_entropy(m(x), y))(point)
    optimizer.update(model, grads)
    nnx.update(model, nnx.state(point, nnx.Not(nnx.Param)))


model = Net(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
for x, y in batches():
    nnx_step(model, optimizer, x, y)
report(model(test_x))

# %% [markdown]
# ## Flax Linen


# %%
class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(10)(linen.relu(linen.Dense(128)(x)))


@jax.jit
def linen_step(state, x, y):
    point = perturb(state.params, state.opt_state)
    grads = jax.grad(lambda p: cross_entropy(state.apply_fn({"params": p}, x), y))(point)
    return state.apply_gradients(grads=grads)


module = LinenNet()
variables = module.init(jax.random.key(0), train_x[:1])
state = train_state.TrainState.create(apply_fn=module.apply, params=variables["params"], tx=tx)
for x, y in batches():
    state = linen_step(state, x, y)
report(module.apply({"params": state.params}, test_x))

# %% [markdown]
# ## Equinox

# %%
mlp = eqx.nn.MLP(in_size=64, out_size=10, width_size=128, depth=1, key=jax.random.key(0))
weights, static = eqx.partition(mlp, eqx.is_inexact_array)


def predict(weights, x):
    return jax.vmap(eqx.combine(weights, static))(x)


@eqx.filter_jit
def eqx_step(weights, opt_state, x, y):
    point = perturb(weights, opt_state)
    grads = jax.grad(lambda p: cross_entropy(predict(p, x), y))(point)
    updates, opt_state = tx.update(grads, opt_state, weights)
    return eqx.apply_updates(weights, updates), opt_state


opt_state = tx.init(weights)
for x, y in batches():
    weights, opt_state = eqx_step(weights, opt_state, x, y)
report(predict(weights, test_x))

# %% [markdown]
# ## SAM, and a step that is ready-made
#
# SAM's second gradient depends on the first, so its update has to take one itself: a loop takes its gradient at the
# weights and gives `tx.update` the function, too.


# %%
@jax.jit
def sam_step(params, opt_state, x, y):
    grad_fn = jax.grad(loss_fn)
    updates, opt_state = tx_sam.update(
        grad_fn(params, x, y), opt_state, params, grad_fn=lambda point: grad_fn(point, x, y)
    )
    return optax.apply_updates(params, updates), opt_state


tx_sam = optax.chain(sam(rho=0.05), optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
params, opt_state = start, tx_sam.init(start)
for x, y in batches():
    params, opt_state = sam_step(params, opt_state, x, y)
report(net(params, test_x))

# %% [markdown]
# `make_train_step` is all of these loop bodies in one. It looks into the optimizer, and does what that needs: nothing
# for SGD, `perturb` for S2-SAM, a `grad_fn` for SAM. It also keeps BatchNorm statistics, accumulates gradients and
# donates its buffers. Its loss function takes and returns a model state, which is empty here.


# %%
def full_loss(params, model_state, batch, key):
    return loss_fn(params, *batch), (model_state, {})


for name, front in {"SGD": optax.identity(), "S2-SAM": s2sam(rho=0.05), "SAM": sam(rho=0.05)}.items():
    optimizer = optax.chain(front, optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    ready, state = make_train_step(full_loss, optimizer), TrainState.create(start, optimizer)
    for batch in batches():
        state, metrics = ready(state, batch)
    print(f"{name:7}", end="")
    report(net(state.params, test_x))

# %% [markdown]
# S2-SAM and SAM end where their loops above did. That they are no better than SGD is no mistake: on digits, with
# correct labels, none of them has a gain that could be told from noise. The last notebook shows where there is one.
#
# ## Sparse from the first step
#
# `sparsify` goes around the optimizer, and the loop stays what it was. Nine in ten weights are zero here, and RigL
# rewires the net once an epoch: it drops the smallest weights and grows those with the largest gradient.
# `apply_masks` is called once, because the fresh weights know nothing of their masks yet. (In the other loops:
# `weights = apply_masks(weights, opt_state)` for Equinox, `state.replace(params=apply_masks(state.params,
# state.opt_state))` for Linen, and `nnx.update(model, apply_masks(nnx.state(model, nnx.Param), optimizer.opt_state))`
# for NNX. `TrainState.create` does it by itself.)

# %%
STEPS = len(train_x) // 64
sparse_tx = sparsify(
    tx,
    methods.rigl(drop_fraction=0.3),
    sparsity=0.9,
    distribution="erk",
    when=Every(start=0, every=STEPS, end=STEPS * EPOCHS * 3 // 4),
)
step, opt_state = make_step(sparse_tx), sparse_tx.init(start)
params = apply_masks(start, opt_state)
for x, y in batches():
    params, opt_state = step(params, opt_state, x, y)
report(net(params, test_x))

# %% [markdown]
# Pruned weights are exactly zero, not just small, and `check_masks` raises if any is not. "erk" leaves small layers
# denser than large ones, so that nine in ten are zero over both; biases are not pruned.

# %%
check_masks(params, opt_state)
masks = get_masks(opt_state)
for name in ("one", "two"):
    mask, kernel = masks[name]["kernel"], params[name]["kernel"]
    print(f"{name}: {1 - mask.mean():.1%} zeros, {int((kernel != 0).sum())} weights of {mask.size}")
live, size = (sum(int(of(masks[name]["kernel"])) for name in masks) for of in (jnp.sum, jnp.size))
print(f"both: {1 - live / size:.1%} zeros; all biases live: {all(bool(masks[name]['bias'].all()) for name in masks)}")

# %% [markdown]
# The zeros are simulated: a masked network takes the time and memory of a dense one. The next notebook compares the
# methods that choose them.
