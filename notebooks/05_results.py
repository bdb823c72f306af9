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
# # Results
#
# What has been run and committed, drawn from the rows in `experiments/results` and nothing else. Each row says which
# config, versions and commit it comes from. Files that do not exist yet are passed over; run this again when they do.

# %%
import itertools

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display

from experiments.figures.against_sparsity import FLATNESS
from experiments.pages import flatness, rendering
from experiments.pages.table import LEVEL
from experiments.rows import comparison, jsonl, spread

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})


def rows_of(name):
    rows = jsonl.read(jsonl.RESULTS / name)
    print(f"{name}: {len(rows)} rows" if rows else f"{name} is not there yet.")
    return rows


def mean_and_spread(values):
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0


# %% [markdown]
# ## Every method on digits, SGD and S2-SAM
#
# A ResNet-8 of width 8, 20 epochs; seeds are paired. The point is the mean of S2-SAM − SGD, the bar its 95 % interval.

# %%
lines = [line for line in comparison.compare(rows_of("methods_full.jsonl")) if line.difference is not None]
if lines:
    figure, axes = plt.subplots(figsize=(7, 0.22 * len(lines) + 1))
    colours = dict(zip(sorted({line.sparsity for line in lines}), ("#009E73", "#0072B2", "#D55E00", "#CC79A7")))
    for place, line in enumerate(lines):
        style = {"fmt": "o", "markersize": 4, "color": colours[line.sparsity]}
        axes.errorbar(line.difference, place, xerr=line.interval, **style)
    for sparsity, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=f"{sparsity:.0%} zeros")
    axes.axvline(0, color="#7F7F7F", linewidth=0.8)
    axes.set_yticks(range(len(lines)), [line.row.removesuffix(" + S2-SAM") for line in lines], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="S2-SAM − SGD, test accuracy (points)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    plt.show()

# %%
if lines:
    means = [line.difference for line in lines]
    larger = sum(abs(line.difference) > line.interval for line in lines if line.interval is not None)
    ahead, behind = sum(mean > LEVEL for mean in means), sum(mean < -LEVEL for mean in means)
    print(f"ahead {ahead}, behind {behind}, level {len(means) - ahead - behind}")
    print(f"mean over all cells {spread.with_interval(means)} points; beyond its own interval: {larger} of {len(lines)}")

# %% [markdown]
# At this scale no gain is seen, and on average none as large as the paper's on CIFAR-10 (0.7 points). The task is easy,
# the net small: that the machinery works for every method is what these rows show, and not much more.
#
# ## Flatness
#
# Is a solution flatter after SAM, Sparse SAM or S2-SAM, and rougher with more zeros? Ra, largest eigenvalue and
# accuracy; mean and standard deviation over seeds.

# %%
rows = rows_of("flatness_digits.jsonl")
if rows:
    display(Markdown(flatness.table(rows)))

# %%
if rows:
    methods, optimizers = (list(dict.fromkeys(row[field] for row in rows)) for field in ("method", "optimizer"))
    figure, panels = plt.subplots(
        len(FLATNESS), len(methods), figsize=(3.3 * len(methods), 7.5), sharex=True, sharey="row", squeeze=False
    )
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    for line, (field, label, _, scale, logarithmic) in zip(panels, FLATNESS):
        for axes, method in zip(line, methods):
            for optimizer, colour in zip(optimizers, palette):
                mine = [row for row in rows if (row["method"], row["optimizer"]) == (method, optimizer)]
                zeros = sorted({row["sparsity_asked"] for row in mine})
                values = [[scale * row[field] for row in mine if row["sparsity_asked"] == s] for s in zeros]
                means, spreads = zip(*map(mean_and_spread, values))
                axes.errorbar(100 * np.array(zeros), means, spreads, color=colour, capsize=2, label=optimizer)
            axes.grid(alpha=0.3)
        line[0].set_ylabel(label)
        if logarithmic:
            line[0].set_yscale("log")
    for axes, method in zip(panels[0], methods):
        axes.set_title(method)
    for axes in panels[-1]:
        axes.set_xlabel("zeros (%)")
    panels[0, 0].legend(frameon=False, fontsize=8)
    plt.tight_layout()
    plt.show()

# %% [markdown]
# ## Tables of the papers, the family of optimizers, and when they gain
#
# Rows that were trained on CIFAR at the small scale (a quarter of the width, 10,000 images, few epochs) or on digits,
# beside what the papers print for theirs, if they have them. The two columns cannot be compared; gains within ours can.
# Below them are the questions of our own: what causes what, images learnt by heart, wrong labels, short trainings.

# %%
papers = ("table*", "ssam-table*", "budget_digits", "budget_cpu", "budget-gradients_digits", "sparsities*")
tables = (*papers, "causes*", "overfit*", "label-noise*", "length*")
for file in itertools.chain.from_iterable(sorted(jsonl.RESULTS.glob(f"{name}.jsonl")) for name in tables):
    display(
        Markdown(
            f"**{file.stem.replace('_', ', ')}**\n\n" + rendering.markdown(comparison.compare(rows_of(file.name)))
        )
    )

# %% [markdown]
# ## Interrupted runs
#
# Runs were killed at random moments and started again; afterwards weights and rows were compared, bit by bit, with
# those of a run that nobody had disturbed.

# %%
rows = rows_of("resume.jsonl")
kills, same = sum(len(row["kills"]) for row in rows), sum(row["equal"] and row["rows_equal"] for row in rows)
print(f"{kills} kills of {len(rows)} runs; {same} of them ended bit by bit like the undisturbed one")
