"""What a row of a paper's table is: its configuration, what was printed, and what the source leaves open."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from experiments.config import LABELS, Config, OptimizerName
from experiments.training import flops

S2SAM = "S2-SAM (Ji et al., NeurIPS 2024)"
REBUTTAL = "S2-SAM (Ji et al., NeurIPS 2024), authors' rebuttal"
SSAM = "SSAM (Mi et al., NeurIPS 2022)"
OURS: dict[str, Any] = {"paper": "none: ours", "known": "Nothing: the comparison is ours."}  # a row that no paper has


class Metric(NamedTuple):
    """What a table reports, the field of a run's last row that holds it, and the factor between the two."""

    name: str
    field: str
    scale: float = 1.0


ACCURACY = Metric("accuracy (%)", "test_accuracy_recalibrated", 100.0)
CORRUPTED = Metric("ImageNet-C accuracy (%)", "mean_corruption_accuracy", 100.0)
SPEED = Metric("images/s", "images_per_second")
BLEU = Metric("SacreBLEU", "bleu")


class Printed(NamedTuple):
    """A cell of a table: the number, its ±, and the difference in brackets; None where there is none."""

    value: float | None = None
    spread: float | None = None
    difference: float | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One row of a paper's table, as a run.

    Attributes:
      name: unique, such as ``table1.rigl-erk-0.95.s2sam``.
      paper: where it is from.
      table: the name's first part.
      key: the row without sparsity and optimizer, such as ``rigl-erk``.
      row: the label in the paper.
      config: the run.
      printed: the figure that the paper has there.
      metric: what the figure is.
      known: what the sources say of the run.
      unknown: what they do not say, and what was chosen; and where the library differs.
      baseline: the recipe that the paper compares it with.
      share: its epochs, as a share of those that other rows of the table have.
    """

    name: str
    paper: str
    table: str
    key: str
    row: str
    config: Config
    printed: Printed
    metric: Metric
    known: str
    unknown: str
    baseline: str | None
    share: float = 1.0

    @property
    def expected(self) -> float | None:
        return self.printed.value

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros of the weights, or where these are dense of SSAM's perturbation; None where neither is."""
        if self.config.method != "dense":
            return self.config.sparsity
        return self.config.ssam_sparsity if self.config.optimizer.startswith("ssam") else None

    @property
    def gradients(self) -> float:
        """Gradient evaluations a step, other passes counted in proportion; those of SSAM by its paper's formula."""
        return flops.gradient_evaluations(self.config)

    @property
    def command(self) -> str:
        return f"python -m experiments.train --recipe {self.name} --seed 0"


def recipe(
    table: str,
    key: str,
    label: str,
    config: Config,
    printed: Printed,
    *,
    known: str,
    unknown: str,
    paper: str = S2SAM,
    metric: Metric = ACCURACY,
) -> Recipe:
    """A row of the S2-SAM paper, which compares with plain training under the same method."""
    stem = f"{table}.{key}" if config.method == "dense" else f"{table}.{key}-{config.sparsity:g}"
    return Recipe(
        name=f"{stem}.{config.optimizer}",
        paper=paper,
        table=table,
        key=key,
        row=label if config.optimizer == "sgd" else f"{label} + {LABELS[config.optimizer]}",
        config=config,
        printed=printed,
        metric=metric,
        known=known,
        unknown=unknown,
        baseline=None if config.optimizer == "sgd" else f"{stem}.sgd",
    )


def by_radius(
    table: str, stem: str, label: str, base: Config, radii: Iterable[tuple[OptimizerName, float]], unknown: str
) -> Iterator[Recipe]:
    """A comparison of our own: SGD or AdamW, which ``base`` has, and optimizers at several radii beside it."""
    for optimizer, rho in radii:
        plain = optimizer == "sgd"
        key = f"{stem}-{base.base}" if plain else f"{stem}-{optimizer}-{rho:g}"
        yield Recipe(
            name=f"{table}.{key}",
            table=table,
            key=key,
            row=f"{label}, " + (LABELS[base.base] if plain else f"{LABELS[optimizer]}, rho {rho:g}"),
            config=dataclasses.replace(base, optimizer=optimizer, rho=rho),
            printed=Printed(),
            metric=ACCURACY,
            unknown=unknown,
            baseline=None if plain else f"{table}.{stem}-{base.base}",
            **OURS,
        )


def cell(text: str) -> Printed:
    """Reads ``92.58±0.07(+0.27)``; a dash is an empty cell.

    Raises:
      ValueError: when it is written otherwise.
    """
    if text == "–":
        return Printed()
    found = re.fullmatch(r"([\d.]+)(?:±([\d.]+))?(?:\(([+-][\d.]+)\))?", text)
    if not found:
        raise ValueError(f"A cell looks like 92.58±0.07(+0.27), 92.58 or –; got {text!r}.")
    return Printed(*(None if part is None else float(part) for part in found.groups()))


def lines(table: str) -> list[list[str]]:
    """The words of each line."""
    return [line.split() for line in table.strip().splitlines()]
