"""The FLOPs of a run, as papers on sparse training count them: of every layer, of all layers, and of the training."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.ticker import EngFormatter
from rich.box import SIMPLE_HEAD
from rich.table import Table

from experiments import models
from experiments.config import Config
from experiments.config.variants import ROUNDS, in_library
from experiments.datasets import kinds
from experiments.models import Network
from experiments.tasks import images
from experiments.training import optimizers, sparse_methods
from experiments.trees import by_name
from s2sam_jax import ChannelGroup, erdos_renyi, erdos_renyi_kernel, uniform
from s2sam_jax.analysis import layer_flops, masked_flops, training_flops

# Of SSAM's second gradient, the share that its mask does not thin out. The paper prints only the relative FLOPs, 1.65
# to 1.30 at sparsities of 0.5 to 0.99; this share is inferred from them and reproduces all six.
SSAM_DENSE_SHARE = 0.294
GROWN_BY_GRADIENT = ("rigl", "rigl-itop", "chase", "chase-imagenet")

FORWARD, TRAINING, RUN, STATE = "forward", "training, a sample", "training, the run", "optimizer state"


class Entry(NamedTuple):
    """A line of the ledger.

    Attributes:
      name: a layer's path, or what the line sums up.
      unit: of its figures: "FLOP", or copies of the parameters.
      dense: of the dense network, trained with SGD.
      sparse: of this run, if zeros cost nothing.
    """

    name: str
    unit: str
    dense: float
    sparse: float


def ledger(
    config: Config,
    network: Network,
    steps_per_epoch: int,
    *,
    masks: Any = None,
    sparsities: Sequence[float] | None = None,
) -> list[Entry]:
    """Every layer, and then the sums: ``FORWARD``, ``TRAINING``, ``RUN`` and ``STATE``.

    A sample is one image, or one pair of sentences of ``max_length`` tokens. As in the papers, what a run does once
    (the gradients of SNIP and GraSP) or seldom (Fisher information) is left out, RigL counts as if masks changed to the
    end of training, and where the density changes, the zeros of all layers come and go alike.

    Args:
      config: the run.
      network: its network; shapes will do.
      steps_per_epoch: of the run.
      masks: at its end; default: as sparse as planned.
      sparsities: after each epoch, for the methods whose density is not known beforehand, chex and chase; their
        training has NaN without them.
    """
    layers = layer_flops(*_forward(config, network))
    sparse = _planned_flops(config, network, layers) if masks is None else masked_flops(layers, masks)
    f_dense, f_sparse = sum(layers.values()), sum(sparse.values())
    share = pruned_share(config, steps_per_epoch, network.groups, sparsities)
    training = math.nan
    if share is not None:
        if config.optimizer == "s2sam-released":  # pruned weights are perturbed too, so that no pass is sparse
            share = np.zeros_like(share)
        training = training_flops(
            f_dense,
            f_dense - share * (f_dense - f_sparse),
            gradients=gradient_evaluations(config),
            dense_gradient_every=_dense_gradient_every(config, steps_per_epoch),
        )
    samples = config.epochs * steps_per_epoch * config.batch_size
    plain = dataclasses.replace(config, method="dense", optimizer="sgd")
    copies = [_state_copies(each, network, steps_per_epoch) for each in (plain, config)]
    return [
        *(Entry(path, "FLOP", flops, sparse[path]) for path, flops in layers.items()),
        Entry(FORWARD, "FLOP", f_dense, f_sparse),
        Entry(TRAINING, "FLOP", 3 * f_dense, training),
        Entry(RUN, "FLOP", 3 * f_dense * samples, training * samples),
        Entry(STATE, "copies", *copies),
    ]


def forward_flops(config: Config, network: Network) -> int:
    """FLOPs of a dense forward pass on a sample."""
    return sum(layer_flops(*_forward(config, network)).values())


def table(entries: Sequence[Entry], *, layers: bool = False) -> Table:
    """The sums, and with ``layers`` every layer before them."""
    shown = entries if layers else entries[-4:]
    result = Table(title="FLOPs, if zeros cost nothing", title_justify="left", box=SIMPLE_HEAD)
    result.add_column("", no_wrap=True)
    for column in ("dense SGD", "this run", "ratio"):
        result.add_column(column, justify="right")
    for entry in shown:
        ratio = f"{entry.sparse / entry.dense:.4f}" if entry.dense and not math.isnan(entry.sparse) else ""
        result.add_row(entry.name, _figure(entry.dense, entry.unit), _figure(entry.sparse, entry.unit), ratio)
    return result


def gradient_evaluations(config: Config) -> float:
    """What the gradients of a step cost, in those of SGD."""
    match config.optimizer:
        case "sgd" | "s2sam" | "s2sam-adaptive" | "s2sam-released" | "s2sam-opposite" | "msam":
            return 1.0
        case "sam" | "asam" | "gsam":
            return 2.0
        case "looksam":
            return 1 + 1 / config.looksam_every
        case "esam":  # a forward pass is a third of a gradient; two of them choose the examples
            return 2.0 if config.sharpest_fraction == 1 else 1 + config.sharpest_fraction + 2 / 3
        case "ssam-f" | "ssam-d":
            return 1 + SSAM_DENSE_SHARE + (1 - SSAM_DENSE_SHARE) * (1 - config.ssam_sparsity)


def pruned_share(
    config: Config,
    steps_per_epoch: int,
    groups: Sequence[ChannelGroup] = (),
    sparsities: Sequence[float] | None = None,
) -> np.ndarray | None:
    """Planned zeros of each step, as a share of the final ones: 1.0 at all of them where the density never changes.

    Those recorded, for a method whose density is not known beforehand; None if there are none.

    Raises:
      ValueError: for recorded sparsities of other than all epochs.
    """
    steps = np.arange(config.epochs * steps_per_epoch)
    family, options = in_library(config.method)
    clock = None if family == "dense" else sparse_methods.clock(config, steps_per_epoch)
    if clock is None or not config.sparsity:
        return np.ones(len(steps))
    updates = np.maximum(steps - clock.start, 0) // clock.every
    if family in ROUNDS:
        left = (1 - (config.prune_fraction or sparse_methods.PRUNE_FRACTION)) ** updates
        return np.minimum((1 - left) / config.sparsity, 1)
    length = max((clock.end or 0) - clock.start, 1)
    progress = np.minimum(updates * clock.every / length, 1)  # of the clock, at the last update
    if family == "gmp":
        return 1 - (1 - progress) ** 3
    if options.get("soft_bound"):
        begins, extra = zip(*options["extra"], strict=True)
        phase = np.searchsorted(begins, progress, side="right") - 1
        return np.maximum(1 - np.where(progress < 1, np.asarray(extra)[phase], 0.0) / config.sparsity, 0)
    if family == "mest" or sparse_methods.make(config, groups).invariant in ("per_layer", "total"):
        return np.ones(len(steps))
    if sparsities is None:
        return None
    if len(sparsities) != config.epochs:
        raise ValueError(f"{config.method} needs a sparsity an epoch, {config.epochs}; got {len(sparsities)}.")
    recorded = np.asarray(sparsities, np.float64)
    return recorded / (recorded[-1] or 1.0)


def _forward(config: Config, network: Network) -> tuple[Any, ...]:
    """What :func:`layer_flops` takes, for one sample."""

    def forward(params: Any, model_state: Any, inputs: Any) -> Any:
        return network.apply(params, model_state, inputs, False)[0]

    if models.MODELS[config.model].text:
        tokens = jax.ShapeDtypeStruct((1, config.max_length), jnp.int32)
        return forward, network.params, network.model_state, (tokens, tokens)
    side = images.side(config)
    image = jax.ShapeDtypeStruct((1, side, side, kinds.KINDS[config.dataset].shape[2]), jnp.float32)
    return forward, network.params, network.model_state, image


def _planned_flops(config: Config, network: Network, layers: dict[str, int]) -> dict[str, float]:
    """FLOPs of every layer, as sparse as the distribution has it; where layers are ranked together, all alike."""
    if config.method == "dense":
        return dict(layers)
    ranks = sparse_methods.make(config, network.groups).ranks
    name = config.distribution or ("uniform" if ranks == "global" or config.structure.startswith("nm") else "erk")
    distribute = {"uniform": uniform, "er": erdos_renyi, "erk": erdos_renyi_kernel}[name]
    planned = by_name(distribute(network.params, config.sparsity))
    return {path: flops * (1 - planned.get(path, 0.0)) for path, flops in layers.items()}


def _dense_gradient_every(config: Config, steps_per_epoch: int) -> int | None:
    clock = sparse_methods.clock(config, steps_per_epoch)
    return clock.every if clock is not None and config.method in GROWN_BY_GRADIENT else None


def _state_copies(config: Config, network: Network, steps_per_epoch: int) -> float:
    """Bytes of the optimizer's state, masks included, in those of the parameters."""
    params, state = jax.eval_shape(
        lambda params: (params, optimizers.make(config, steps_per_epoch, network.groups).init(params)), network.params
    )
    size = [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) for tree in (state, params)]
    return size[0] / size[1]


def _figure(value: float, unit: str) -> str:
    if math.isnan(value):
        return "unknown"
    return f"{value:.2f} copies" if unit == "copies" else EngFormatter(unit, places=2)(value)
