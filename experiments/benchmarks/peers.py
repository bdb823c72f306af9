"""Other libraries, where a checkout of them is at hand; nothing of theirs is needed or copied."""

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from s2sam_jax import erdos_renyi_kernel


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


class Jaxpruner:
    """google-research/jaxpruner's RigL, with ``jax.tree_map``, which newer JAX lacks, put back for it."""

    def __init__(self, folder: Path, params: Any, sparsity: float):
        module: Any = jax
        module.tree_map = jax.tree.map
        with _importable(folder):
            library: Any = importlib.import_module("jaxpruner")
            schedules: Any = importlib.import_module("jaxpruner.sparsity_schedules")
        # Newer JAX takes no None beside an array in another tree: only sparse leaves are given to it.
        plan = erdos_renyi_kernel(params, sparsity)
        self.params = [p for p, s in zip(jax.tree.leaves(params), jax.tree.leaves(plan), strict=True) if s > 0]
        sparsities = [s for s in jax.tree.leaves(plan) if s > 0]
        self.updater = library.RigL(
            scheduler=schedules.PeriodicSchedule(
                update_freq=1_000_000, update_start_step=1, update_end_step=10_000_000
            ),
            sparsity_distribution_fn=lambda _: sparsities,
        )

    def wrap(self, inner: optax.GradientTransformation) -> Any:
        return self.updater.wrap_optax(inner)


class Official:
    """The released PyTorch code of S2-SAM: its ResNet-32 and its optimizer, one training step at each call."""

    def __init__(self, folder: Path, name: str, images: np.ndarray, labels: np.ndarray):
        self.torch: Any = importlib.import_module("torch")
        # Its model file profiles a network when it is imported.
        profiler: Any = types.ModuleType("thop")
        profiler.profile, profiler.clever_format = lambda *_, **__: (0, 0), lambda *_: (0, 0)
        sys.modules.setdefault("thop", profiler)
        with _importable(folder):
            self.model = importlib.import_module("models.resnet_grasp").resnet(depth=32, dataset="cifar10")
            sharpness: Any = importlib.import_module("sam").SAM
        options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
        sgd = self.torch.optim.SGD
        if name == "sgd":
            self.optimizer = sgd(self.model.parameters(), **options)
        else:
            self.optimizer = sharpness(self.model.parameters(), sgd, rho=0.05, v2=True, **options)
        self.sharp = name != "sgd"
        self.images = self.torch.tensor(images.transpose(0, 3, 1, 2) / 255.0, dtype=self.torch.float32)
        self.labels = self.torch.tensor(labels.astype(np.int64))

    def __call__(self) -> None:
        if self.sharp:
            self.optimizer.first_step(zero_grad=False)
        loss = self.torch.nn.functional.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        if self.sharp:
            self.optimizer.second_step(zero_grad=True)
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()
