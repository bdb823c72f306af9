"""What the fuzzing draws from: trees, dtypes, optimizers, methods, structures and clocks."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.config import DistributionName
from s2sam_jax import (
    NM,
    Block,
    Channel,
    Every,
    SparseMethod,
    Unstructured,
    esam,
    gsam,
    looksam,
    methods,
    msam,
    s2sam,
    sam,
    sparsify,
    ssam,
)


class Pair(NamedTuple):
    """A container that is neither dict nor list."""

    kernel: Any
    bias: Any


# Few shapes, so that each operation is compiled once for thousands of cases.
TREES: dict[str, Any] = {
    "one": (4, 8),
    "dense": {"kernel": (4, 8), "bias": (8,)},
    "deep": {"a": {"kernel": (4, 8), "bias": (8,)}, "b": {"kernel": (8, 4), "bias": (4,)}, "scale": ()},
    "conv": {"conv": Pair((3, 3, 4, 8), (8,)), "head": [(8, 4), (4,)]},
    "empty": {"kernel": (4, 8), "none": (0,), "none2": (0, 8), "scalar": ()},
    "tiny": [(1, 1), (1,), (2, 2)],
    "tuple": ((4, 8), ((8, 4), {"x": (16, 16)})),
    "vectors": {"a": (8,), "b": (4,)},
    "stack": {"layers": {"kernel": (3, 4, 8), "bias": (3, 8)}, "head": (8, 4)},
}
STACKED = {"stack": {"layers/*": 0}}  # The axis of the layers, by tree.
DTYPES = ("float32", "bfloat16", "float16", "float64", "mixed")
# Not among them: sm3, which has an IndexError for scalar parameters; prodigy, whose state changes its types where those
# of the parameters are mixed; and rprop, which raises a step size from zero where overflow makes NaN.
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "adabelief": lambda: optax.adabelief(1e-2),
    "adan": lambda: optax.adan(1e-2),
    "adagrad": lambda: optax.adagrad(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2),
    "ademamix": lambda: optax.contrib.ademamix(1e-2),
    "lamb": lambda: optax.lamb(1e-2),
    "lars": lambda: optax.lars(1e-2),
    "lion": lambda: optax.lion(1e-2),
    "muon": lambda: optax.contrib.muon(1e-2),
    "nadam": lambda: optax.nadam(1e-2),
    "noisy": lambda: optax.noisy_sgd(0.1, key=0),
    "novograd": lambda: optax.novograd(1e-2),
    "radam": lambda: optax.radam(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9),
    "yogi": lambda: optax.yogi(1e-2),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
    "schedule_free": lambda: optax.contrib.schedule_free_sgd(0.1),
    "schedule": lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 6), momentum=0.9),
    "inject": lambda: optax.inject_hyperparams(optax.sgd, "momentum")(learning_rate=0.1, momentum=0.9),
}
SHARPNESS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "none": optax.identity,
    "s2sam": lambda: s2sam(0.05),
    "s2sam-adaptive": lambda: s2sam(0.5, adaptive=True),
    "s2sam-pruned": lambda: s2sam(0.05, perturb_pruned=True),
    "s2sam-bf16": lambda: s2sam(0.05, grad_dtype=jnp.bfloat16),
    "sam": lambda: sam(0.05),
    "asam": lambda: sam(0.5, adaptive=True),
    "ssam-f": lambda: ssam(0.05, mask="fisher", sparsity=0.5, update_every=2, total_steps=6),
    "ssam-d": lambda: ssam(0.05, mask="dynamic", sparsity=0.5, update_every=2, total_steps=6),
    "msam": lambda: msam(0.05),
    "looksam": lambda: looksam(0.05, every=2),
    "gsam": lambda: gsam(0.05),
    "esam": lambda: esam(0.05, beta=0.6),
}
PERTURBING = ("s2sam", "s2sam-adaptive", "s2sam-pruned", "s2sam-bf16", "msam")
METHODS: dict[str, Callable[[float], SparseMethod]] = {
    "static": lambda _: methods.static(),
    "magnitude": lambda _: methods.magnitude(),
    "magnitude-global": lambda _: methods.magnitude(scope="global"),
    "gmp": lambda _: methods.gmp(),
    "snip": lambda _: methods.snip(),
    "grasp": lambda _: methods.grasp(),
    "set": lambda fraction: methods.set(fraction),
    "dsr": lambda _: methods.dsr(),
    "rigl": lambda fraction: methods.rigl(fraction),
    "itop": lambda fraction: methods.itop("gradient", drop_fraction=fraction),
    "itop-random": lambda fraction: methods.itop("random", drop_fraction=fraction),
    "mest": lambda _: methods.mest(((0.0, 0.1), (0.5, 0.0))),
    "mest-ems": lambda _: methods.mest(((0.0, 0.1), (0.5, 0.0)), soft_bound=True),
    "lottery": lambda _: methods.lottery(0.5),
    "lrr": lambda _: methods.lrr(0.5),
}
STRUCTURES: dict[str, Any] = {
    "unstructured": Unstructured(),
    "2:4": NM(2, 4),
    "1:4": NM(1, 4, pad=True),
    "2:4 out": NM(2, 4, axis=-1),
    "blocks": Block((2, 2)),
    "padded blocks": Block((3, 3), pool="l2", pad=True),
    "channels": Channel(),
    "inputs": Channel(-2, pool="max"),
}
GRADIENTS = ("normal", "zero", "nan behind masks", "ties", "huge", "tiny")
# These hand a weight that they grow the gradient of the same step, of what was behind the mask.
GROW_AND_STEP = ("set", "dsr", "itop", "itop-random", "mest", "mest-ems")
OUTER = ("none", "none", "MultiSteps", "apply_if_finite")
# These add an epsilon to the squares of the gradient, and so keep it where the gradient is masked as well.
EPSILON_OFF_MASKS = ("adabelief", "adafactor")


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration."""

    number: int
    jitted: bool
    tree: str
    dtype: str
    optimizer: str
    sharpness: str
    method: str
    structure: str
    distribution: DistributionName | None
    sparsity: float
    fraction: float
    start: int
    every: int
    end: int | None
    mask_grads: bool
    outer: str
    gradients: str


def draw(rng: random.Random, number: int, jitted: bool) -> Case:
    """Half of the cases are unstructured, and most mask gradients, as most uses are; most fit together."""
    start, foolish = rng.choice((0, 0, 1, 2)), rng.random() < 0.1
    structure = rng.choice(["unstructured"] * len(STRUCTURES) + list(STRUCTURES))
    names = [name for name, make in METHODS.items() if foolish or structure == "unstructured" or make(0.3).structured]
    sparsities = {"2:4": 0.5, "2:4 out": 0.5, "1:4": 0.75}
    any_sparsity = rng.choice((0.0, 0.5, 0.5, 0.75, 0.9, 0.99 * rng.random()))
    distributions = (None, "uniform", "er", "erk") if foolish or structure not in sparsities else (None, "uniform")
    leaves = rng.choice(list(TREES) if foolish else [name for name in TREES if name != "vectors"])
    return Case(
        number=number,
        jitted=jitted,
        tree=leaves,
        dtype=rng.choice(DTYPES),
        # Muon divides by zero in empty matrices.
        optimizer=rng.choice([name for name in OPTIMIZERS if (name, leaves) != ("muon", "empty")]),
        sharpness=rng.choice(list(SHARPNESS)),
        method=rng.choice(names),
        structure=structure,
        distribution=rng.choice(distributions),
        sparsity=any_sparsity if foolish else sparsities.get(structure, any_sparsity),
        fraction=rng.choice((0.0, 0.1, 0.3, 0.5, 1.0)),
        start=start,
        every=rng.choice((1, 1, 2, 3)),
        end=rng.choice((None, start) if foolish else (start, start + 4, start + 4)),
        mask_grads=rng.random() < 0.9,
        outer=rng.choice(OUTER),
        gradients=rng.choice(GRADIENTS),
    )


def tree(case: Case, rng: np.random.Generator) -> Any:
    """Parameters; of a mixed tree every leaf has a dtype of its own."""
    dtypes = iter(rng.choice(["float32", "bfloat16", "float16", "float64"], 16))

    def leaf(shape: tuple[int, ...]) -> jax.Array:
        dtype = next(dtypes) if case.dtype == "mixed" else case.dtype
        return jnp.asarray(rng.normal(size=shape), dtype)

    return jax.tree.map(leaf, TREES[case.tree], is_leaf=_is_shape)


def stays_finite(case: Case) -> bool:
    """Whether a weight that is not finite would be a fault; in float16 the epsilons of optimizers are zero."""
    seen = case.method in GROW_AND_STEP or case.sharpness == "s2sam-pruned" or not case.mask_grads
    harmless = case.gradients != "huge" and not (case.gradients == "nan behind masks" and seen)
    return harmless and case.dtype not in ("float16", "mixed")


def _is_shape(x: Any) -> bool:
    return type(x) is tuple and all(isinstance(length, int) for length in x)


def noise(case: Case, rng: np.random.Generator, params: Any, masks: Any) -> Any:
    """The part of a step's gradient that does not depend on the weights."""
    scale = {"zero": 0.0, "huge": 1e30, "tiny": 1e-30}.get(case.gradients, 1.0)

    def leaf(param: jax.Array, mask: jax.Array) -> jax.Array:
        values = scale * rng.normal(size=param.shape)
        if case.gradients == "ties":
            values = np.round(values)
        if case.gradients == "nan behind masks":
            values = np.where(np.asarray(mask), values, np.nan)
        with np.errstate(over="ignore"):
            return jnp.asarray(values.astype(param.dtype))

    return jax.tree.map(leaf, params, masks)


def optimizer(case: Case) -> optax.GradientTransformation:
    """The transformation of a case: sharpness and optimizer under sparsify, and what is around it."""
    tx = sparsify(
        optax.chain(SHARPNESS[case.sharpness](), OPTIMIZERS[case.optimizer]()),
        METHODS[case.method](case.fraction),
        sparsity=case.sparsity,
        distribution=case.distribution,
        when=Every(case.start, case.every, case.end),
        structure=STRUCTURES[case.structure],
        stacked=STACKED.get(case.tree),
        seed=case.number,
        mask_grads=case.mask_grads,
    )
    if case.outer == "MultiSteps":
        several: Any = optax.MultiSteps(tx, 2)  # Its gradient_transformation() would take no grad_fn.
        return optax.GradientTransformationExtraArgs(several.init, several.update)
    return optax.apply_if_finite(tx, 3) if case.outer == "apply_if_finite" else tx
