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
# that with Ra, the mean distance of the surface's heights from their own mean. The SSAM paper, like many others, looks
# at eigenvalues of the Hessian instead, the curvature at the solution itself. Here small networks are trained on digits
# with SGD, SAM, Sparse SAM and S2-SAM, and both are measured.

# %%
import os

TINY = os.environ.get("S2SAM_JAX_TINY") == "1"  # as the tests run it
EPOCHS, SEEDS, POINTS = (2, 1, 5) if TINY else (20, 3, 15)
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
# and Sparse SAM take two gradients a step, SGD and S2-SAM one. Seed and radius are arguments of the compiled run; SGD
# is S2-SAM with a radius of 0.

# %%
RHO = 0.05
FRONTS = {"S2-SAM": s2sam, "SAM": sam, "SSAM": lambda rho: ssam(rho, sparsity=0.5, mask="fisher", update_every=STEPS)}
COLOURS = {"SGD": "#0072B2", "SAM": "#009E73", "SSAM": "#CC79A7", "S2-SAM": "#D55E00"}
NAMES = ("SGD", "S2-SAM") if TINY else tuple(COLOURS)


def trainer(front, sparsity):
    """A run as a function of seed and radius: weights, masks and test accuracy."""
    clock = Every(start=0, every=STEPS, end=max(1, EPOCHS * 3 // 4) * STEPS)

    @jax.jit
    def run(seed, rho):
        rate = optax.cosine_decay_schedule(0.1, STEPS * EPOCHS)
        inner = optax.chain(front(lambda step: rho), optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))
        tx = sparsify(inner, methods.rigl(0.3), sparsity=sparsity, distribution="erk", when=clock, seed=seed)
        step = make_train_step(lambda params, *rest: (mean_loss(params, rest[1]), (rest[0], {})), tx)
        state = TrainState.create(initial_params(jax.random.key(seed)), tx, seed=seed)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), EPOCHS)
        orders = jax.vmap(lambda key: jax.random.permutation(key, len(train_x))[: STEPS * 64])(keys)
        orders = orders.reshape(EPOCHS * STEPS, 64)
        state, _ = jax.lax.scan(lambda state, rows: step(state, (train_x[rows], train_y[rows])), state, orders)
        accuracy = jnp.mean(jnp.argmax(net(state.params, test_x), axis=-1) == test_y)
        return state.params, get_masks(state.opt_state, state.params), accuracy

    return run


solutions = {}
for sparsity in SPARSITIES:
    runs = {name: trainer(FRONTS[name], sparsity) for name in NAMES if name != "SGD"}
    for name in NAMES:
        run, rho = (runs["S2-SAM"], 0.0) if name == "SGD" else (runs[name], RHO)
        solutions[name, sparsity] = [run(seed, rho) for seed in range(SEEDS)]

# %% [markdown]
# ## Measuring
#
# Two random directions are drawn for each network, scaled filter by filter to the length of its own weights: a net with
# ReLUs computes the same with one layer doubled and the next halved, and should not look flatter for that. Only live
# weights move: these are what training could have reached. The height at each point is the loss over all training
# images.
#
# λ1 is the Hessian's largest eigenvalue, among live weights, of the same loss: how fast it rises in the steepest
# direction out of the solution, found by Lanczos from products with the Hessian. It is not scaled by the weights.

# %%
SPAN = 1.0
batches = [(train_x, train_y)]


def surface(params, masks):
    directions = analysis.filter_normalized_directions(params, jax.random.key(0), masks=masks)
    return analysis.loss_surface(mean_loss, params, directions, batches, span=SPAN, n=POINTS)


def curvature(params, masks):
    values, bounds = analysis.top_eigenvalues(
        mean_loss, params, jax.random.key(0), batches, k=1, steps=5 if TINY else 20, masks=masks
    )
    return values[0], bounds[0]


surfaces = {key: [surface(params, masks) for params, masks, _ in runs] for key, runs in solutions.items()}
eigenvalues = {key: [curvature(params, masks) for params, masks, _ in runs] for key, runs in solutions.items()}
doubt = max(bound / value for found in eigenvalues.values() for value, bound in found)
print(f"Lanczos may be off by at most {doubt:.1e} of an eigenvalue")

# %% [markdown]
# ## Seeing
#
# Seed 0, one scale of heights for all.

# %%
line = np.linspace(-SPAN, SPAN, POINTS)
alpha, beta = np.meshgrid(line, line, indexing="ij")
top = max(found[0].max() for found in surfaces.values())
size = (2.3 * len(NAMES), 2.3 * len(SPARSITIES))
figure, panels = plt.subplots(
    len(SPARSITIES), len(NAMES), figsize=size, squeeze=False, subplot_kw={"projection": "3d"}
)
for (name, sparsity), found in surfaces.items():
    axes = panels[SPARSITIES.index(sparsity), NAMES.index(name)]
    axes.plot_surface(alpha, beta, found[0], cmap="viridis", vmin=0, vmax=top, linewidth=0, antialiased=False)
    axes.set_title(f"{name}, {sparsity:.0%} zeros\nRa = {analysis.roughness(found[0]):.1f} nats", fontsize=9, y=0.97)
    axes.set_box_aspect(None, zoom=1.1)
    axes.set_zlim(0, top)
    axes.set_xlabel("α", labelpad=-8)
    axes.set_ylabel("β", labelpad=-8)
    axes.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    axes.tick_params(labelsize=6, pad=-3)
figure.suptitle("Height: training loss (nats). α, β: way along two directions (filter norms)", fontsize=10)
figure.subplots_adjust(left=0.01, right=0.97, bottom=0.03, top=0.9, wspace=0.05, hspace=0.3)
plt.show()

# %% [markdown]
# One such picture settles little: at 90 % S2-SAM's is the roughest of the four, but not so over three seeds, as below.
#
# ## Counting
#
# Each seed is a dot, the line their mean. Ra is a mean over many points but of one pair of directions: trust no
# difference that is smaller than the distance between dots of one colour.

# %%
measures = {
    "Ra (nats)": {key: [analysis.roughness(z) for z in found] for key, found in surfaces.items()},
    "λ1 (nats per squared weight)": {key: [value for value, _ in found] for key, found in eigenvalues.items()},
    "test accuracy (%)": {key: [100 * float(a) for *_, a in runs] for key, runs in solutions.items()},
}
figure, panels = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for axes, (label, found) in zip(panels, measures.items()):
    for shift, (name, marker) in enumerate(zip(NAMES, "o^Ds")):
        for place, sparsity in enumerate(SPARSITIES):
            x, values = place + 0.15 * (shift - 1.5), found[name, sparsity]
            axes.plot([x] * len(values), values, marker, color=COLOURS[name], markersize=5)
            axes.plot([x - 0.05, x + 0.05], [np.mean(values)] * 2, color=COLOURS[name], linewidth=2)
        axes.plot([], [], marker, color=COLOURS[name], label=name)
    axes.set(xlabel="zeros", ylabel=label, xlim=(-0.5, len(SPARSITIES) - 0.5))
    axes.set_xticks(range(len(SPARSITIES)), [f"{s:.0%}" for s in SPARSITIES])
    axes.grid(alpha=0.3)
for axes in panels[:2]:
    axes.set_ylim(0, None)
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
plt.show()

# %%
losses = {key: [z[POINTS // 2, POINTS // 2] for z in found] for key, found in surfaces.items()}
print("means over seeds          loss (nats)     Ra      λ1   accuracy (%)")
for key in surfaces:
    ra, eigenvalue, accuracy = (np.mean(found[key]) for found in measures.values())
    print(f"{key[1]:.0%} zeros, {key[0]:12} {np.mean(losses[key]):12.4f} {ra:6.2f} {eigenvalue:7.1f} {accuracy:10.1f}")

# %% [markdown]
# Both measures are larger with 98 % zeros than with 90, whatever the optimizer: that much of the paper's argument shows
# even here. Does S2-SAM smooth the surface? By Ra hardly: it is lower than SGD's on average, but at 90 and 95 % by less
# than its seeds differ, and that of SAM and Sparse SAM is lower too. By λ1, yes: at each sparsity it is lowest with
# S2-SAM, and no seed of S2-SAM has one as large as the smallest of SGD. That is not for a worse fit, since the training
# losses of these two are about equal. And accuracy does not follow it: S2-SAM is ahead of SGD at 90 and 98 % and behind
# it at 95, SAM ahead at 90 and behind at 98.
#
# Two measures of flatness, two answers, and this is one small net. With a ResNet-8 on the same data, in the notebook of
# results, λ1 falls less clearly. `experiments.flatness` measures both for trained networks.
