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
# # The loss surface of sparse networks
#
# The S2-SAM paper argues that sparse training is hard because the loss around a sparse solution is rough, and measures
# that with Ra, the mean distance of the surface's heights from their own mean. Here small networks are trained on
# digits with SGD, SAM, Sparse SAM and S2-SAM, and looked at in the same way.

# %%
import os

TINY = os.environ.get("S2SAM_JAX_TINY") == "1"  # as the tests run it
EPOCHS, SEEDS, POINTS = (2, 1, 5) if TINY else (20, 3, 21)
SPARSITIES = (0.9,) if TINY else (0.9, 0.95, 0.98)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from experiments.datasets import in_memory
from s2sam_jax import Every, TrainState, analysis, get_masks, make_train_step, methods, s2sam, sam, sparsify, ssam

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %%
digits = in_memory.load("digits")
train_x, test_x = (x.reshape(len(x), 64) / 255 for x in (digits.train_images, digits.test_images))
train_y, test_y = digits.train_labels, digits.test_labels
STEPS = len(train_x) // 64


def initial_params(key):
    keys = jax.random.split(key, 3)
    sizes = (64, 128, 128, 10)
    return {
        name: {"kernel": jax.random.normal(k, (m, n)) * np.sqrt(2 / m), "bias": jnp.zeros(n)}
        for name, k, m, n in zip(("one", "two", "three"), keys, sizes, sizes[1:])
    }


def net(params, x):
    for name in ("one", "two"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["three"]["kernel"] + params["three"]["bias"]


def mean_loss(params, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(net(params, x), y).mean()


# %% [markdown]
# ## Training
#
# All are RigL networks; only the transformation in front of SGD differs. Sparse SAM perturbs half of the weights. SAM
# and Sparse SAM take two gradients a step, SGD and S2-SAM one.

# %%
SHARPNESS = {
    "SGD": optax.identity(),
    "SAM": sam(rho=0.05),
    "SSAM": ssam(rho=0.05, sparsity=0.5, mask="fisher", update_every=STEPS),
    "S2-SAM": s2sam(rho=0.05),
}
if TINY:
    SHARPNESS = {name: SHARPNESS[name] for name in ("SGD", "S2-SAM")}


def train(sharpness, sparsity, seeds):
    """Weights, masks and test accuracy, seed by seed."""
    clock = Every(start=0, every=STEPS, end=max(1, EPOCHS * 3 // 4) * STEPS)
    rate = optax.cosine_decay_schedule(0.1, STEPS * EPOCHS)
    inner = optax.chain(sharpness, optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))
    method = methods.rigl(drop_fraction=0.3)

    @jax.jit
    def run(seed):
        tx = sparsify(inner, method, sparsity=sparsity, distribution="erk", when=clock, seed=seed)
        step = make_train_step(lambda params, *rest: (mean_loss(params, rest[1]), (rest[0], {})), tx)
        state = TrainState.create(initial_params(jax.random.key(seed)), tx, seed=seed)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), EPOCHS)
        orders = jax.vmap(lambda key: jax.random.permutation(key, len(train_x))[: STEPS * 64])(keys)
        orders = orders.reshape(EPOCHS * STEPS, 64)
        state, _ = jax.lax.scan(lambda state, rows: step(state, (train_x[rows], train_y[rows])), state, orders)
        accuracy = jnp.mean(jnp.argmax(net(state.params, test_x), axis=-1) == test_y)
        return state.params, get_masks(state.opt_state, state.params), accuracy

    return [run(seed) for seed in seeds]


solutions = {
    (name, sparsity): train(sharpness, sparsity, range(SEEDS))
    for sparsity in SPARSITIES
    for name, sharpness in SHARPNESS.items()
}

# %% [markdown]
# ## Measuring
#
# Two random directions are drawn for each network, scaled filter by filter to the length of its own weights, so that
# networks with large and with small weights can be compared. Only live weights move. The height at each point is the
# loss over all training images.

# %%
SPAN = 1.0
batches = [(train_x, train_y)]


def surface(params, masks):
    directions = analysis.filter_normalized_directions(params, jax.random.key(0), masks=masks)
    return analysis.loss_surface(mean_loss, params, directions, batches, span=SPAN, n=POINTS)


surfaces = {key: [surface(params, masks) for params, masks, _ in runs] for key, runs in solutions.items()}

# %% [markdown]
# ## Seeing
#
# Seed 0, one scale of heights for all.

# %%
line = np.linspace(-SPAN, SPAN, POINTS)
alpha, beta = np.meshgrid(line, line, indexing="ij")
top = max(found[0].max() for found in surfaces.values())
size = (2.2 * len(SHARPNESS), 2.2 * len(SPARSITIES))
figure, panels = plt.subplots(
    len(SPARSITIES), len(SHARPNESS), figsize=size, squeeze=False, subplot_kw={"projection": "3d"}
)
for (name, sparsity), found in surfaces.items():
    axes = panels[SPARSITIES.index(sparsity), list(SHARPNESS).index(name)]
    axes.plot_surface(alpha, beta, found[0], cmap="viridis", vmin=0, vmax=top, linewidth=0, antialiased=False)
    axes.set_title(f"{name}, {sparsity:.0%} zeros\nRa = {analysis.roughness(found[0]):.3f}", fontsize=9, y=0.97)
    axes.set_box_aspect(None, zoom=1.1)
    axes.set_zlim(0, top)
    axes.set_xlabel("α", labelpad=-8)
    axes.set_ylabel("β", labelpad=-8)
    axes.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    axes.tick_params(labelsize=6, pad=-3)
figure.suptitle("Training loss (nats) around the solution, in filter norms")
figure.subplots_adjust(left=0.01, right=0.97, bottom=0.03, top=0.88, wspace=0.05, hspace=0.3)
plt.show()

# %% [markdown]
# ## Counting
#
# Ra and test accuracy over all seeds. Ra is a mean over many points but of one pair of directions, and seeds differ:
# trust a difference no further than its spread.

# %%
colours = dict(zip(SHARPNESS, ("#0072B2", "#009E73", "#CC79A7", "#D55E00")))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for shift, (name, marker) in enumerate(zip(SHARPNESS, "o^Ds")):
    ra = np.array([[analysis.roughness(z) for z in surfaces[name, s]] for s in SPARSITIES])
    accuracy = np.array([[100 * float(a) for *_, a in solutions[name, s]] for s in SPARSITIES])
    places = np.arange(len(SPARSITIES)) + 0.12 * (shift - 1.5)
    for axes, values in ((left, ra), (right, accuracy)):
        spread = values.std(axis=1, ddof=1) if SEEDS > 1 else None
        axes.errorbar(places, values.mean(axis=1), spread, fmt=marker, color=colours[name], capsize=2, label=name)
for axes, label in ((left, "Ra (nats)"), (right, "test accuracy (%)")):
    axes.set(xlabel="zeros", ylabel=label)
    axes.set_xticks(range(len(SPARSITIES)), [f"{s:.0%}" for s in SPARSITIES])
    axes.grid(alpha=0.3)
left.legend(frameon=False, fontsize=8)
plt.tight_layout()
plt.show()

# %% [markdown]
# With SGD, SAM and Sparse SAM the surface gets rougher as weights go: that much of the paper's argument shows even
# here. That S2-SAM makes it smoother, does not, or not alone. At 90 and 95 % it is as rough as SGD's; at 98 % it is the
# flattest of all, and the accuracy the lowest. A network that fits its data less well may well be flatter for that
# reason. `experiments.flatness` asks the same of a ResNet, with eigenvalues of the Hessian beside Ra.
