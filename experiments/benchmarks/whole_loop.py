"""The experiments' loop against its bare step."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments import tasks
from experiments.benchmarks.timing import Row, paired, ratio_row
from experiments.config import Config
from experiments.datasets import in_memory
from experiments.tasks import arrays, images
from experiments.training import loop, optimizers
from experiments.training.record import Last
from s2sam_jax import make_train_step


def throughput(name: str, config: Config, dataset: in_memory.Dataset, steps: int, rounds: int) -> Iterator[Row]:
    """Epochs of the loop (choice of rows, metrics) against as many calls of the step on one batch."""
    network = tasks.build(config)
    tx = optimizers.make(config, steps_per_epoch=10_000)
    step = make_train_step(images.loss_function(config, network), tx)
    held = {way: loop.initial_state(config, network, tx) for way in ("loop", "bare")}
    epoch = arrays.epoch_runner(step, dataset, Last())
    order = in_memory.epoch_order(0, 0, len(dataset.train_labels), config.batch_size)[:steps]
    batch = (dataset.train_images[order[0]], dataset.train_labels[order[0]])

    def looped():
        held["loop"], metrics = epoch(held["loop"], order)
        return held["loop"], metrics

    def bare():
        for _ in range(len(order)):
            held["bare"], _ = step(held["bare"], batch)
        return held["bare"]

    seconds = paired({"loop": looped, "bare": bare}, rounds)
    yield ratio_row(f"throughput, loop / bare step, {name}", seconds["bare"], seconds["loop"], ">= 0.97")


def noise_images(rows: int) -> in_memory.Dataset:
    """Random images of CIFAR's shape."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (rows, 32, 32, 3), np.uint8))
    labels = jnp.asarray(rng.integers(0, 10, rows), jnp.int32)
    return jax.device_put(in_memory.Dataset(images, labels, images[:1], labels[:1]))
