"""What S2-SAM, sparsify and mask updates cost, and removed channels save: speed and memory, measured, as one table."""

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import cli, models
from experiments.benchmarks import inference, masks, peak, steps, throughput, whole_loop
from experiments.benchmarks.peers import Official
from experiments.benchmarks.timing import Row, paired, ratio_row
from experiments.config import ComputeName, Config, ModelName
from experiments.datasets import in_memory
from experiments.figures import selection
from experiments.rows import jsonl, provenance

Section = Literal[
    "throughput", "step", "memory", "peak", "compile", "optimizer", "masks", "loop", "seeds", "inference", "official",
    "growth",
]  # fmt: skip
OTHER_NETWORKS = ("throughput", "peak", "loop", "inference")  # Not about the ResNet-32: their rows name the network.


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Times what is compared in turns, and prints medians with quartiles of the paired ratios."""

    sections: tuple[Section, ...] = get_args(Section)  # What is measured; default: everything.
    models: tuple[ModelName, ...] = ("resnet32",)  # Networks of the section throughput, at their own image sizes.
    formats: tuple[ComputeName, ...] = ("float32",)  # Number formats of the section throughput.
    width: int = 32  # Width of the ResNet-32 whose steps are timed.
    batch_size: int = 128  # Batch size of that ResNet-32, and of the section throughput.
    parameters: int = 25_000_000  # Weights in the large tree of the sections optimizer and masks.
    largest: int = 10_000_000  # The most scores of the section growth, in which their number grows tenfold each time.
    rounds: int = 7  # How often each case is timed.
    jaxpruner: Path | None = None  # A checkout of google-research/jaxpruner, to be measured beside.
    official: Path | None = None  # A checkout of the released S2-SAM code, to be measured beside; needs PyTorch.
    out: Path = jsonl.RESULTS  # Folder of bench_DEVICE.jsonl and the growth curve.


@cli.command
def main(arguments: Arguments) -> None:
    console = Console()
    config = Config(dataset="cifar10", model="resnet32", width=arguments.width, batch_size=arguments.batch_size)
    everything = _sections(arguments, config, console)
    measured = {"bench": {"rounds": arguments.rounds}}
    rows: list[jsonl.Row] = []
    file = arguments.out / f"bench_{_device()}.jsonl"
    for section in arguments.sections:
        begin = time.perf_counter()
        origin = provenance.environment() if section in OTHER_NETWORKS else provenance.of_run(config)
        for row in everything[section]():
            rows.append(origin | measured | {"section": section} | row._asdict() | {"met": row.met})
            console.print(f"{section}: {row.what} {row.value:.4g} {row.unit}  {row.detail}", soft_wrap=True)
        jsonl.write(file, _merged(file, rows))  # now, so that they outlast an interruption
        jax.clear_caches()
        console.print(f"[dim]{section} took {time.perf_counter() - begin:.0f} s[/dim]")
    console.print(table(rows))
    console.print(f"Rows: {file}", soft_wrap=True)


def table(rows: list[jsonl.Row]) -> Table:
    """What was measured beside what it should be."""
    versions = ", ".join(f"{name} {number}" for name, number in rows[0]["versions"].items())
    shown = Table(title=f"{rows[0]['device']}; {versions}")
    for column in ("what", "median", "quartiles", "target", "met", "detail"):
        shown.add_column(column)
    for row in rows:
        spread = f"{row['low']:.3g} to {row['high']:.3g}" if row["low"] != row["high"] else ""
        met = {True: "yes", False: "NO", None: ""}[row["met"]]
        shown.add_row(row["what"], f"{row['value']:.4g} {row['unit']}", spread, row["target"], met, row["detail"])
    return shown


def _sections(arguments: Arguments, config: Config, console: Console) -> dict[str, Callable[[], Iterator[Row]]]:
    workload, rounds, peer = steps.Workload(config), arguments.rounds, arguments.jaxpruner
    narrow = steps.Workload(dataclasses.replace(config, width=8, batch_size=32))
    trees = {
        f"ResNet-32 x{arguments.width}": workload.network.params,
        f"{arguments.parameters / 1e6:g}M": masks.large_params(arguments.parameters),
    }
    if peer is None:
        console.print("No --jaxpruner: its rows are left out.")

    def optimizer():
        for name, params in trees.items():
            yield from masks.optimizer_alone(name, params, 5 * rounds, peer)

    def mask_updates():
        for name, params in trees.items():
            yield from masks.mask_update(name, params, min(rounds, 3), peer)

    return {
        "throughput": lambda: _throughput(arguments),
        "step": lambda: steps.step_times(workload, rounds),
        "memory": lambda: steps.memory(workload),
        "peak": peak.rows,
        "compile": lambda: steps.compilation(steps.Workload(dataclasses.replace(config, batch_size=8))),
        "optimizer": optimizer,
        "masks": mask_updates,
        "loop": lambda: _loops(rounds),
        "seeds": lambda: steps.seeds_at_once(narrow, min(rounds, 3)),
        "inference": lambda: _inference(rounds),
        "official": lambda: _official(arguments, workload, console),
        "growth": lambda: _growth(arguments, console),
    }


def _throughput(arguments: Arguments) -> Iterator[Row]:
    count = 1 if jax.default_backend() == "cpu" else 20  # an accelerator's steps queue up, as in training
    for model in arguments.models:
        if models.MODELS[model].text:
            raise ValueError(f"throughput is measured on images; {model} takes text.")
        large = models.MODELS[model].image_size == 224
        config = Config(dataset="imagenet2012" if large else "cifar10", model=model, batch_size=arguments.batch_size)
        yield from throughput.rows(config, arguments.formats, arguments.rounds, count)


def _loops(rounds: int) -> Iterator[Row]:
    digits = Config()
    yield from whole_loop.throughput("digits, ResNet-8", digits, in_memory.load("digits"), 22, rounds)
    cifar = Config(dataset="cifar10", model="resnet32", width=8, batch_size=128)
    yield from whole_loop.throughput("ResNet-32 x8", cifar, whole_loop.noise_images(2560), 20, min(rounds, 3))


def _inference(rounds: int) -> Iterator[Row]:
    yield from inference.forward_passes("resnet34-cifar", width=64, size=32, batch=32, rounds=rounds)
    yield from inference.forward_passes("resnet50", width=64, size=224, batch=4, rounds=rounds)


def _official(arguments: Arguments, workload: steps.Workload, console: Console) -> Iterator[Row]:
    if arguments.official is None or importlib.util.find_spec("torch") is None:
        console.print("No --official, or no PyTorch: the released code's rows are left out.")
        return
    images, labels = map(np.asarray, workload.batch)
    cases: dict[str, Any] = {name: Official(arguments.official, name, images, labels) for name in ("sgd", "s2sam")}
    seconds = paired(cases | {"ours": workload.runner("s2sam")}, arguments.rounds)
    yield ratio_row("released PyTorch code, S2-SAM / SGD, dense", seconds["s2sam"], seconds["sgd"])
    goal = "" if jax.default_backend() == "cpu" else ">= 1.0"
    yield ratio_row("step, released PyTorch code / ours, S2-SAM", seconds["s2sam"], seconds["ours"], goal)


def _growth(arguments: Arguments, console: Console) -> Iterator[Row]:
    """A figure of how selection grows, from a file of its own; the rows compare the largest size."""
    sizes = [10**power for power in range(5, 10) if 10**power <= arguments.largest]
    points = list(masks.growth(sizes, arguments.rounds))
    file = arguments.out / f"bench_select_{_device()}.jsonl"
    origin = provenance.environment() | {"bench": {"rounds": arguments.rounds}}
    jsonl.write(file, [origin | point for point in points])
    selection.draw_growth(file)
    console.print(f"Growth: {file.with_suffix('.png')}", soft_wrap=True)
    largest = {point["way"]: point["seconds"] for point in points[-3:]}
    for way in ("argsort", "top_k"):
        times = np.array([largest[way]]), np.array([largest["select"]])
        yield ratio_row(f"selection of {points[-1]['parameters']:,} scores, {way} / ours", *times)


def _merged(file: Path, rows: list[jsonl.Row]) -> list[jsonl.Row]:
    """The rows of the file, without those that were measured again, and the new ones."""
    fresh = {(row["section"], row["what"]) for row in rows}
    return [row for row in jsonl.read(file) if (row["section"], row["what"]) not in fresh] + rows


def _device() -> str:
    return jax.devices()[0].device_kind.lower().replace(" ", "-")


if __name__ == "__main__":
    main()
