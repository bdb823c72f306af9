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
# # Sparse training, side by side
#
# A method of sparse training decides which weights live. Everything else, that pruned weights are exactly zero, that
# momentum forgets them, that a weight grown anew starts from nothing, is `sparsify`'s work and the same for all. So a
# comparison is a loop over names. Here are six of them:
#
# | method | first masks | then |
# |---|---|---|
# | `static` | random | never change |
# | `snip` | dense; at the first call, those with the largest weight times gradient | never change |
# | `gmp` | dense | prunes the smallest weights, more and more of them |
# | `set` | random | drops the smallest weights, grows others at random |
# | `rigl` | random | drops the smallest weights, grows those with the largest gradient |
# | `mest` | the largest initial weights | drops the smallest weights, grows at random, and less as time goes on |

# %%
import os

TINY = os.environ.get("S2SAM_JAX_TINY") == "1"  # as the tests run it
EPOCHS, SEEDS = (3, 2) if TINY else (20, 3)
SPARSITIES = (0.9,) if TINY else (0.9, 0.98)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from experiments.datasets import in_memory
from s2sam_jax import Every, TrainState, get_masks, make_train_step, methods, s2sam, sparsify

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# A net of one hidden layer on 8 x 8 digits. Its first kernel connects 64 pixels with 256 units.

# %%
digits = in_memory.load("digits")
train_x, test_x = (x.reshape(len(x), 64) / 255 for x in (digits.train_images, digits.test_images))
train_y, test_y = digits.train_labels, digits.test_labels
STEPS = len(train_x) // 64


def initial_params(key):
    one, two = jax.random.split(key)
    return {
        "one": {"kernel": jax.random.normal(one, (64, 256)) / 8, "bias": jnp.zeros(256)},
        "two": {"kernel": jax.random.normal(two, (256, 10)) / 16, "bias": jnp.zeros(10)},
    }


def net(params, x):
    hidden = jax.nn.relu(x @ params["one"]["kernel"] + params["one"]["bias"])
    return hidden @ params["two"]["kernel"] + params["two"]["bias"]


def loss_fn(params, model_state, batch, key):
    x, y = batch
    loss = optax.softmax_cross_entropy_with_integer_labels(net(params, x), y).mean()
    return loss, (model_state, {})


# %% [markdown]
# ## What a mask is
#
# `get_masks` returns a tree like the parameters, of booleans: true where a weight lives. `distribution` says how many
# of them each layer gets. With "erk" large layers are sparser than small ones; biases stay dense, whatever it is.

# %%
for distribution in ("uniform", "erk"):
    tx = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.98, distribution=distribution)
    masks = get_masks(tx.init(initial_params(jax.random.key(0))))
    leaves = {f"{layer}/{name}": mask for layer in masks for name, mask in masks[layer].items()}
    counts = ", ".join(f"{name} {int(mask.sum())} of {mask.size}" for name, mask in leaves.items())
    print(f"{distribution:8}{counts}")

# %% [markdown]
# ## The runs
#
# `make_train_step` makes the step. Called inside `jit` it is a pure function, so that a whole run is one program: an
# inner scan over the steps of an epoch, an outer one over epochs, which keeps accuracy and masks. The seed is an
# argument like any other, and so is the radius: with 0 S2-SAM is SGD, and one program serves both.

# %%
clock = Every(start=0, every=STEPS, end=EPOCHS * 3 // 4 * STEPS)  # once an epoch, for three quarters
METHODS = {
    "static": (methods.static(), None),
    "snip": (methods.snip(), None),
    "gmp": (methods.gmp(), clock),
    "set": (methods.set(drop_fraction=0.3), clock),
    "rigl": (methods.rigl(drop_fraction=0.3), clock),
    "mest": (methods.mest(extra=((0.0, 0.005), (0.6, 0.002), (0.8, 0.0))), clock),  # 0.5 % of all weights at first
}


def trainer(method, when, sparsity):
    """A run as a function of seed and radius: test accuracy after every epoch, and the masks before and after each."""

    @jax.jit
    def run(seed, rho):
        rate = optax.cosine_decay_schedule(0.1, STEPS * EPOCHS)
        inner = optax.chain(s2sam(rho=lambda step: rho), optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))
        tx = sparsify(inner, method, sparsity=sparsity, distribution="erk", when=when, seed=seed)
        step = make_train_step(loss_fn, tx)
        state = TrainState.create(initial_params(jax.random.key(seed)), tx, seed=seed)

        def epoch(state, key):
            order = jax.random.permutation(key, len(train_x))[: STEPS * 64].reshape(STEPS, 64)
            state, _ = jax.lax.scan(lambda state, rows: step(state, (train_x[rows], train_y[rows])), state, order)
            right = jnp.mean(jnp.argmax(net(state.params, test_x), axis=-1) == test_y)
            return state, (right, get_masks(state.opt_state)["one"]["kernel"])

        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), EPOCHS)
        first = get_masks(state.opt_state)["one"]["kernel"]
        state, (accuracy, masks) = jax.lax.scan(epoch, state, keys)
        return accuracy, jnp.concatenate([first[None], masks])

    return run


# %%
RADII = {"SGD": 0.0, "S2-SAM": 0.05}
runs = {}
for method in ("set", "rigl") if TINY else METHODS:
    for sparsity in SPARSITIES:
        run = trainer(*METHODS[method], sparsity)
        for name, rho in RADII.items():
            runs[method, sparsity, name] = jax.device_get([run(seed, rho) for seed in range(SEEDS)])

# %% [markdown]
# ## Who gets how far
#
# Mean and standard deviation over seeds of the test accuracy after the last epoch. One test image is 0.28 points.

# %%
colours = {"SGD": "#0072B2", "S2-SAM": "#D55E00"}
figure, panels = plt.subplots(
    1, len(SPARSITIES), figsize=(4.4 * len(SPARSITIES), 2.8), squeeze=False, layout="constrained"
)
for axes, sparsity in zip(panels[0], SPARSITIES):
    names = [method for method, other, name in runs if other == sparsity and name == "SGD"]
    for shift, (name, marker) in zip((-0.12, 0.12), {"SGD": "o", "S2-SAM": "s"}.items()):
        finals = np.array([[100 * accuracy[-1] for accuracy, _ in runs[m, sparsity, name]] for m in names])
        places, spread = np.arange(len(names)) + shift, finals.std(axis=1, ddof=1)
        axes.errorbar(finals.mean(axis=1), places, xerr=spread, fmt=marker, color=colours[name], capsize=2, label=name)
    axes.set(title=f"{sparsity:.0%} zeros", xlabel="test accuracy (%)")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
plt.show()

# %%
for sparsity in SPARSITIES:
    for method in dict.fromkeys(method for method, *_ in runs):
        ends = [np.array([100 * accuracy[-1] for accuracy, _ in runs[method, sparsity, name]]) for name in RADII]
        gains = ends[1] - ends[0]
        print(
            f"{sparsity:.0%} zeros, {method:6} SGD {ends[0].mean():.1f} %, "
            f"S2-SAM {gains.mean():+.1f} points (deviation over seeds {gains.std(ddof=1):.1f})"
        )

# %% [markdown]
# At 90 % zeros all methods lie within three points. At 98 % the method decides: masks that are drawn once at random
# lose half of the accuracy, growing at random wins some of it back, and RigL and GMP hardly notice. This is no ranking
# for other tasks: nothing is tuned, and GMP is dense at first, so that it trains more weights than the others.
#
# Between SGD and S2-SAM no method differs by more than half a point, two test images. What the paper reports at its own
# scale is not to be seen on a task this small, which a net of this size fits anyway.
#
# ## Masks at work
#
# Rows of the first kernel are pixels. How many live connections has each?

# %%
sparsity = SPARSITIES[-1]
shown = [epoch for epoch in (0, 1, 4, 12, EPOCHS) if epoch <= EPOCHS]
strips = [name for name in ("snip", "gmp", "set", "rigl", "mest") if (name, sparsity, "S2-SAM") in runs]
ink = np.mean(digits.train_images, axis=0)[..., 0]
figure, panels = plt.subplots(
    len(strips), len(shown) + 1, figsize=(8, 1.4 * len(strips)), squeeze=False, layout="constrained"
)
for line, name in zip(panels, strips):
    _, masks = runs[name, sparsity, "S2-SAM"][0]
    pixels = masks.sum(axis=-1).reshape(-1, 8, 8)
    for axes, epoch in zip(line, shown):
        drawn = axes.imshow(pixels[epoch], cmap="viridis", vmin=0, vmax=10)
        axes.set_title(f"epoch {epoch}", fontsize=9)
    line[-1].imshow(ink, cmap="gray")
    line[-1].set_title("mean digit", fontsize=9)
    for axes in line:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    line[0].set_ylabel(name)
figure.colorbar(drawn, ax=panels, label="connections (10: or more)", fraction=0.02)
figure.suptitle(f"Live connections of each pixel, {sparsity:.0%} zeros, S2-SAM, seed 0")
plt.show()

# %%
empty = ink.ravel() < 0.01 * ink.max()
print(f"{empty.sum()} of 64 pixels are as good as empty. Connections that end there, means over seeds:")
for name in strips:
    shares = [[m[empty].sum() / m.sum() for m in (masks[0], masks[-1])] for _, masks in runs[name, sparsity, "S2-SAM"]]
    print("{:5} {:.0%} at the start, {:.0%} at the end".format(name, *np.mean(shares, axis=0)))

# %% [markdown]
# SNIP and GMP choose among all weights of a dense net, and keep none where there is no ink. RigL gets nearly there on
# its own: a weight on an empty pixel has no gradient, so none is grown there. SET and MEST grow at random, a fifth of
# it on the empty fifth of the pixels. Such a weight stays zero, and is soon dropped again; but one that was large from
# the start keeps its size for lack of a gradient, and is never dropped.
#
# How much is replaced? RigL anneals it, MEST goes down in steps, SET replaces as much until the clock stops.

# %%
figure, axes = plt.subplots(figsize=(6, 2.6))
moving = [name for name in strips if name in ("set", "rigl", "mest")]
for name, shade, marker in zip(moving, ("black", "0.45", "0.7"), "osD"):
    _, masks = runs[name, sparsity, "S2-SAM"][0]
    grown = (masks[1:] & ~masks[:-1]).sum(axis=(1, 2)) / masks[1:].sum(axis=(1, 2))
    axes.plot(range(1, EPOCHS + 1), 100 * grown, color=shade, marker=marker, markersize=4, label=name)
axes.set(xlabel="epoch", ylabel="new weights (% of live)", title="First layer, from epoch to epoch", ylim=(0, None))
axes.grid(alpha=0.3)
axes.xaxis.get_major_locator().set_params(integer=True)
axes.legend(frameon=False)
plt.show()
