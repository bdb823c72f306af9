"""Train steps as shapes alone, to be compiled for a device that is not there."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.benchmarks import masks, peak, steps
from experiments.config import Config, OptimizerName
from experiments.config.variants import method_names
from experiments.training import optimizers
from s2sam_jax import ChannelAxis, ChannelGroup, TrainState, make_train_step, methods, s2sam, sam, sparsify

STEPS_PER_EPOCH = 100
WIDTH = 6144  # Of the MLP: 453 MB, more than a TPU holds on its chip, outside of the memory that is counted.


class Program(NamedTuple):
    """A train step with the shapes of its arguments."""

    what: str
    step: Any
    state: Any
    batch: Any


def networks() -> Iterator[Program]:
    """ResNet-32 on CIFAR images, dense and under RigL-ERK at 90 %."""
    workload = steps.Workload(Config(dataset="cifar10", model="resnet32", batch_size=128))
    for name in steps.SHARPNESS:
        for sparse in (False, True):
            tx = steps.optimizer(name, sparse=sparse)
            step, state = make_train_step(workload.loss_fn, tx), jax.eval_shape(partial(workload.state, tx))
            yield Program(f"{name}{', RigL' if sparse else ''}", step, state, jax.eval_shape(lambda: workload.batch))


def weights() -> Iterator[Program]:
    """An MLP whose weights take most of the memory; with and without the option to freeze at a bad step."""
    for base, optimizer in {"SGD": masks.sgd(), "Adam": optax.adam(0.1)}.items():
        for name, sharpness in {base: optax.identity(), f"{base}, S2-SAM": s2sam(), f"{base}, SAM": sam()}.items():
            for freeze in (True, False):
                yield _mlp(f"{name}{'' if freeze else ', freeze=False'}", optax.chain(sharpness, optimizer), freeze)


def every_method() -> Iterator[Program]:
    """The same under each sparse method, with S2-SAM; and dense with each sharpness-aware transformation."""
    groups = [_group(n) for n in range(peak.DEPTH - 1)]
    for method in method_names():
        config = Config(optimizer="s2sam", method=method, epochs=100)
        yield _mlp(f"s2sam, {method}", optimizers.make(config, STEPS_PER_EPOCH, groups))
    for name in get_args(OptimizerName):
        yield _mlp(name, optimizers.make(Config(optimizer=name, method="dense", epochs=100), STEPS_PER_EPOCH))


def _group(layer: int) -> ChannelGroup:
    """Its biases stand for the scales of norms, which CHEX asks for."""
    return ChannelGroup(
        f"layer{layer}",
        filters=(ChannelAxis(f"layer{layer}/kernel", 1),),
        scales=(ChannelAxis(f"layer{layer}/bias", 0),),
        inputs=(ChannelAxis(f"layer{layer + 1}/kernel", 0),),
    )


def sharded(devices: list[Any]) -> Iterator[Program]:
    """The MLP with its matrices cut up among the devices, and a batch that is, too."""
    mesh = Mesh(devices, ("fsdp",))
    cases = {"SGD": masks.sgd(), "S2-SAM": optax.chain(s2sam(), masks.sgd()), "SAM": optax.chain(sam(), masks.sgd())}
    for method in ("rigl", "set", "gmp", "mest"):
        tx = sparsify(cases["S2-SAM"], getattr(methods, method)(), sparsity=0.9, when=masks.RARELY)
        cases[f"S2-SAM, {method}"] = tx
    for name, tx in cases.items():
        plain = _mlp(name, tx)
        state, batch = _placed(plain.state, mesh), _placed(plain.batch, mesh)
        where = jax.tree.map(lambda x: x.sharding, state)
        yield Program(name, make_train_step(peak.loss_fn, tx, state_sharding=where), state, batch)


def on_one(device: Any, program: Program) -> Program:
    """The program with its arguments on one device."""
    mesh = Mesh([device], ("fsdp",))
    return program._replace(state=_placed(program.state, mesh), batch=_placed(program.batch, mesh))


def _mlp(what: str, tx: optax.GradientTransformation, freeze: bool = True) -> Program:
    state = jax.eval_shape(lambda: TrainState.create(peak.mlp(WIDTH), tx))
    batch = jax.ShapeDtypeStruct((peak.EXAMPLES, WIDTH), jnp.float32)
    return Program(what, make_train_step(peak.loss_fn, tx, freeze=freeze), state, batch)


def _placed(tree: Any, mesh: Mesh) -> Any:
    """Matrices by their rows, among as many devices as the mesh has; the rest whole on each."""

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec("fsdp") if x.ndim > 1 and x.shape[0] % mesh.size == 0 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, tree)
