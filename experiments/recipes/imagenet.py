"""S2-SAM on ImageNet with a sparse ResNet-50: Tables 2, 4 and 5, and what the rebuttal adds to them."""

import itertools
from collections.abc import Iterator
from typing import Any, cast

from experiments.config import Config, OptimizerName
from experiments.recipes.base import (
    ACCURACY,
    CORRUPTED,
    REBUTTAL,
    S2SAM,
    SPEED,
    Metric,
    Printed,
    Recipe,
    cell,
    lines,
    recipe,
)
from experiments.recipes.cifar import OPTIMIZERS
from experiments.training import sparse_methods

EPOCHS = 100

# Columns: method, optimizer, accuracy and images a second, at 90 %.
TABLE_4 = """
grasp   sgd   68.10 2148
grasp   sam   68.95 1021
grasp   s2sam 68.78 2132
rigl    sgd   72.00 3133
rigl    sam   72.75 1508
rigl    s2sam 72.44 3098
mest-em sgd   73.60 2981
mest-em sam   74.88 1398
mest-em s2sam 74.58 2977
"""
# Columns: method, optimizer, accuracy on ImageNet and on ImageNet-C, at 80 %.
TABLE_5 = """
snip    sgd   69.70        31.12
snip    s2sam 70.55(+0.85) 34.87(+3.75)
grasp   sgd   72.10        32.24
grasp   s2sam 72.66(+0.56) 35.17(+2.93)
mest-em sgd   75.70        33.87
mest-em s2sam 76.35(+0.65) 36.98(+3.11)
rigl    sgd   74.60        33.68
rigl    s2sam 75.39(+0.79) 36.80(+3.12)
"""
# Columns: method, sparsity, SGD and S2-SAM.
REBUTTAL_IMAGENET = """
rigl    0.95 69.02 69.83
mest-em 0.95 69.95 70.81
set-5x  0.8  74.60 75.43
set-5x  0.9  72.43 73.16
"""

_RIGL_CLOCK = {"update_every": 0.32, "update_end": 25 / 32}  # 100 of 32 000 steps of 4096 images; up to step 25 000
_MEST_CLOCK = {"update_every": 5.0, "update_end": 1.0}  # its phases are fractions of the clock
_SET = {"method": "set", "distribution": "uniform"} | _RIGL_CLOCK
_RIGL = {"method": "rigl", "distribution": "uniform"} | _RIGL_CLOCK
_MEST = {"method": "mest-em", "distribution": "uniform"} | _MEST_CLOCK

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lottery": ("LT", {"method": "lottery"}),
    "snip": ("SNIP", {"method": "snip"}),
    "grasp": ("GraSP", {"method": "grasp"}),
    "set": ("SET", _SET),
    "set-5x": ("SET 5x", _SET | {"epochs": 5 * EPOCHS}),
    "rigl": ("RigL", _RIGL),
    "rigl-erk": ("RigL (ERK)", _RIGL | {"distribution": "erk"}),
    "rigl-5x": ("RigL 5x", _RIGL | {"epochs": 5 * EPOCHS}),
    "mest-em": ("MEST (EM)", _MEST),
    "mest-em-1.7x": ("MEST (EM) 1.7x", _MEST | {"epochs": round(1.7 * EPOCHS)}),
}

KNOWN = "Network, data and sparsity (paper)."
UNKNOWN = (
    "All of the training: here 100 epochs, batch 256, SGD with Nesterov momentum 0.9, 0.1 after 5 epochs of warm-up, "
    "then a cosine to 0, weight decay 1e-4 for all, label smoothing 0.1, rho 0.05; RigL and SET with RigL's clock "
    "(SET's an interval later), every 100 steps of 4096 images up to 25/32; MEST every 5 epochs, its extra zeros as "
    "on CIFAR (none from 130/160 on), 100 and 170 epochs for 1x and 1.7x (MEST's own take about 150 and 250); SNIP "
    "and GraSP scored on the first batch at temperature 1; LT with whole runs as rounds, from the start; RigL, SET "
    "and MEST uniform unless ERK is said; every kernel is pruned."
)
SPEED_UNKNOWN = "The device, the batch, the network (the accuracies are those of ResNet-50)."


def config(key: str, sparsity: float, optimizer: OptimizerName) -> Config:
    options = {"epochs": EPOCHS} | METHODS[key][1]
    run = dense(model="resnet50", optimizer=optimizer, sparsity=sparsity, **options)
    return sparse_methods.for_each_training(run)


def dense(**options: Any) -> Config:
    """What runs on ImageNet share."""
    common = {
        "dataset": "imagenet2012",
        "method": "dense",
        "rho": 0.05,
        "epochs": EPOCHS,
        "batch_size": 256,
        "learning_rate": 0.1,
        "warmup_epochs": 5.0,
        "nesterov": True,
        "weight_decay": 1e-4,
        "label_smoothing": 0.1,
    }
    return Config(**common | options)


def row(
    table: str,
    key: str,
    sparsity: float,
    optimizer: OptimizerName,
    printed: Printed,
    *,
    metric: Metric = ACCURACY,
    known: str = KNOWN,
    unknown: str = "",
    paper: str = S2SAM,
) -> Recipe:
    run, unknown = config(key, sparsity, optimizer), f"{unknown} {UNKNOWN}".strip()
    label = METHODS[key][0]
    return recipe(table, key, label, run, printed, known=known, unknown=unknown, paper=paper, metric=metric)


def table_2() -> Iterator[Recipe]:
    """The table is not at hand: its methods are those that the other tables and the rebuttal name."""
    known = "80 and 90 % with uniform and other distributions, RigL 5x and MEST 1.7x among the rows (rebuttal)."
    for key, sparsity, optimizer in itertools.product(METHODS, (0.8, 0.9), OPTIMIZERS):
        if key != "set-5x":
            unknown = "The numbers, and exactly which rows there are."
            yield row("table2", key, sparsity, optimizer, Printed(), known=f"{KNOWN} {known}", unknown=unknown)


def table_4() -> Iterator[Recipe]:
    for key, word, accuracy, speed in lines(TABLE_4):
        optimizer = cast(OptimizerName, word)
        yield row("table4", key, 0.9, optimizer, cell(speed), metric=SPEED, unknown=SPEED_UNKNOWN)
        yield row("table4-accuracy", key, 0.9, optimizer, cell(accuracy), unknown=SPEED_UNKNOWN)


def table_5() -> Iterator[Recipe]:
    unknown = "How corruptions and severities are averaged (here plainly, top-1)."
    for key, word, clean, corrupted in lines(TABLE_5):
        optimizer = cast(OptimizerName, word)
        yield row("table5", key, 0.8, optimizer, cell(corrupted), metric=CORRUPTED, unknown=unknown)
        yield row("table5-clean", key, 0.8, optimizer, cell(clean))


def rebuttal() -> Iterator[Recipe]:
    for key, sparsity, *cells in lines(REBUTTAL_IMAGENET):
        table = "rebuttal-set5x" if key == "set-5x" else "rebuttal-imagenet95"
        for optimizer, text in zip(OPTIMIZERS, cells, strict=True):
            yield row(table, key, float(sparsity), optimizer, cell(text), paper=REBUTTAL)


def recipes() -> Iterator[Recipe]:
    yield from table_2()
    yield from table_4()
    yield from table_5()
    yield from rebuttal()
