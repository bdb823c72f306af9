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
# adds to each is the call of `perturb`, and nothing else.

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
from s2sam_jax import Every, apply_masks, check_masks, get_masks, methods, perturb, s2sam, sparsify

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
# One optimizer for all. `s2sam` comes first in its chain, so that it remembers the raw gradient.

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


@jax.jit
def step(params, opt_state, x, y):
    grads = jax.grad(loss_fn)(perturb(params, opt_state), x, y)  # plain SGD would have params here
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def layer(key, inputs, outputs):
    return {"kernel": jax.random.normal(key, (inputs, outputs)) / np.sqrt(inputs), "bias": jnp.zeros(outputs)}


one, two = jax.random.split(jax.random.key(0))
start = {"one": layer(one, 64, 128), "two": layer(two, 128, 10)}
params, opt_state = start, tx.init(start)
for x, y in batches():
    params, opt_state = step(params, opt_state, x, y)
report(net(params, test_x))

# %% [markdown]
# ## Flax NNX


# %%
class Net(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(64, 128, rngs=rngs)
        self.two = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.two(nnx.relu(self.one(x)))


@nnx.jit
def nnx_step(model, optimizer, x, y):
    graph, params = nnx.split(model)
    point = perturb(params, optimizer.opt_state)
    grads = jax.grad(lambda p: cross_entropy(nnx.merge(graph, p)(x), y))(point)
    optimizer.update(model, grads)


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
# ## Sparse from the first step
#
# `sparsify` goes around the optimizer, and the loop stays what it was. Nine in ten weights are zero here, and RigL
# rewires the net once an epoch: it drops the smallest weights and grows those with the largest gradient.
# `apply_masks` is called once, because the fresh weights know nothing of their masks yet.

# %%
STEPS = len(train_x) // 64
tx = sparsify(
    optax.chain(s2sam(rho=0.05), optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9)),
    methods.rigl(drop_fraction=0.3),
    sparsity=0.9,
    distribution="erk",
    when=Every(start=0, every=STEPS, end=STEPS * EPOCHS * 3 // 4),
)


@jax.jit
def sparse_step(params, opt_state, x, y):
    grads = jax.grad(loss_fn)(perturb(params, opt_state), x, y)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


opt_state = tx.init(start)
params = apply_masks(start, opt_state)
for x, y in batches():
    params, opt_state = sparse_step(params, opt_state, x, y)
report(net(params, test_x))

# %% [markdown]
# Pruned weights are exactly zero, not just small, and `check_masks` raises if any is not.

# %%
check_masks(params, opt_state)
for name in ("one", "two"):
    mask = get_masks(opt_state)[name]["kernel"]
    print(
        f"{name}: {1 - mask.mean():.1%} zeros, {(np.asarray(params[name]['kernel']) != 0).sum()} weights of {mask.size}"
    )

# %% [markdown]
# ## Where to go from here
#
# `make_train_step` is this loop body ready-made, with BatchNorm statistics, accumulation and donated buffers, for every
# optimizer and method. The next notebook compares the sparse methods.
