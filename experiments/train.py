"""The main job: trains one network, or the same one with several optimizers, and shows the result."""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

from experiments import cli, recipes, sharding, tasks
from experiments.config import Config, OptimizerName, check_read
from experiments.config.variants import RANDOM, in_library
from experiments.figures import training
from experiments.rows import provenance
from experiments.rows.jsonl import Row
from experiments.tasks.base import Task
from experiments.training import display, flops, loop, optimizers, runs, seeds
from experiments.training.checkpoint import Checkpoints
from s2sam_jax import TrainState, get_masks


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains a sparse network; without arguments, scikit-learn's digits with RigL and S2-SAM.

    ``--recipe NAME`` starts from a row of a paper's table, such as table1.rigl-erk-0.95.s2sam; other options change it.
    An unknown name is answered by the nearest ones, or by a list of all tables.
    """

    config: tyro.conf.OmitArgPrefixes[Config] = dataclasses.field(default_factory=Config)
    compare: tuple[OptimizerName, ...] = ()  # Train with each of these optimizers, from the same seed.
    seeds: tuple[int, ...] = ()  # Which seeds, not how many: train with each of them, one after another.
    vmap: bool = False  # Train the --seeds side by side, as one program on one device; for accelerators.
    overwrite: bool = False  # Train anew, even if the result is there or an interrupted run could continue.
    mesh: str | None = None  # Devices to train on, as data=8 or data=4,fsdp=2; default: one.
    # This is one of several processes. On TPU pods, Slurm, Open MPI and Kubernetes nothing else is needed; elsewhere
    # also give the next three options.
    distributed: bool = False
    coordinator: str | None = None  # HOST:PORT of the first process.
    num_processes: int | None = None  # How many processes there are.
    process_id: int | None = None  # Which of them this one is, from 0.
    layers: bool = False  # Also print the FLOPs of every layer and, for several runs, the zeros of every layer.
    debug: bool = False  # Check masks, gradients and states at every step; the first fault ends the run with its name.
    tensorboard: bool = False  # Also write event files into the run's folder; needs tensorboardX.


class _Recorder:
    """Writes every row to the run's folder, and passes it on to the progress bar if that is the run's."""

    def __init__(self, config: Config, folder: Path, bar: display.ProgressBar | None, arguments: Arguments):
        options = {"mesh": arguments.mesh, "debug": arguments.debug}
        self._provenance = provenance.of_run(config) | {name: value for name, value in options.items() if value}
        self._folder, self._bar = folder, bar
        self._events = _event_writer(folder) if arguments.tensorboard and sharding.writes() else None

    def steps(self, count: int) -> None:
        if self._bar is not None:
            self._bar.steps(count)

    def row(self, row: Row) -> None:
        runs.append(self._folder, self._provenance | row)
        if self._bar is not None:
            self._bar.row(row)
        if self._events is not None:
            for name, value in row.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Waits for the events, which a thread of their writer's own puts on disk."""
        if self._events is not None:
            self._events.close()


def _event_writer(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs tensorboardX: install the extra s2sam-jax[tensorboard].") from error
    return SummaryWriter(str(folder))


def train(arguments: Arguments, console: Console) -> dict[str, Path]:
    """Runs what was asked for and prints the result; returns the folders of the runs, by optimizer or seed or both."""
    configs = _configs(arguments)
    fresh = [config for config in configs.values() if arguments.overwrite or not runs.finished(config)]
    for config in configs.values():
        runs.tidy(config.run_dir)
    with runs.says_what_goes_on(fresh):
        failed = _train(fresh, console, arguments)
    trained = {name: config for name, config in configs.items() if runs.finished(config)}
    folders = _show(trained, len(fresh) < len(configs), console, arguments) if trained else {}
    if failed:
        raise FloatingPointError("; ".join(failed))
    return folders


def _show(configs: dict[str, Config], stored: bool, console: Console, arguments: Arguments) -> dict[str, Path]:
    """Prints the results of finished runs and draws them; returns their folders."""
    folders = {name: config.run_dir for name, config in configs.items()}
    rows = {name: runs.rows(folder) for name, folder in folders.items()}
    console.print(_title(arguments), soft_wrap=True)
    finals = {name: rows[name][-1] for name in rows}
    console.print(display.result_table(finals), soft_wrap=True)
    if (arguments.layers or len(finals) == 1) and any(row["layers"] for row in finals.values()):
        console.print(display.layer_table(finals), soft_wrap=True)
    if len(set(arguments.seeds)) > 1:
        console.print(display.seeds_table(list(finals.values())), soft_wrap=True)
    if stored:
        console.print("Shown from stored runs where they exist; add --overwrite to train anew.")
    for folder in folders.values():
        console.print(f"Files: {folder}", soft_wrap=True)
    if arguments.compare and sharding.writes():
        file = arguments.config.out / _curves_name(list(configs.values()))
        training.draw(rows, _title(arguments), file)
        console.print(f"Curves: {file}", soft_wrap=True)
    return folders


def _train(fresh: list[Config], console: Console, arguments: Arguments) -> list[str]:
    """Trains runs, and prints their FLOPs; says which broke down, as the others are still wanted."""
    if not fresh:
        return []
    failed = []
    loaded, start = tasks.load(arguments.config), _start(arguments.config)
    costs: dict[str, tuple[Table, list[str]]] = {}  # by their figures, as many runs cost the same
    for group in _groups(fresh, arguments.vmap):
        try:
            cost = _run(group, loaded, start, console, arguments)
        except FloatingPointError as error:
            failed.append(f"{', '.join(config.name for config in group)}: {error}")
            console.print(failed[-1], soft_wrap=True)
            continue
        if cost is not None:
            figures = str([list(column.cells) for column in cost.columns])
            costs.setdefault(figures, (cost, []))[1].append(group[0].optimizer)
    for cost, names in costs.values():
        cost.title = f"{cost.title}: {', '.join(dict.fromkeys(names))}"
        console.print(cost)
    return failed


def _curves_name(configs: Sequence[Config]) -> str:
    """Readable by optimizers and network, and unique by a hash of all runs."""
    first, names = configs[0], [config.name for config in configs]
    network, _, _ = first.name.partition(f"-{first.optimizer}-")
    digest = hashlib.sha256(" ".join(names).encode()).hexdigest()[:8]
    return f"compare-{'-'.join(dict.fromkeys(config.optimizer for config in configs))}-{network}-{digest}.png"


def _configs(arguments: Arguments) -> dict[str, Config]:
    """The config of every run asked for, by what tells it from the others."""
    if arguments.vmap and len(set(arguments.seeds)) < 2:
        raise ValueError(f"--vmap trains several seeds side by side: give them as --seeds; got {arguments.seeds}.")
    if arguments.seeds and arguments.config.seed not in (0, *arguments.seeds):
        raise ValueError(f"--seed {arguments.config.seed} is not among --seeds {arguments.seeds}; give one of the two.")
    if arguments.vmap and arguments.debug:
        raise ValueError("--debug checks one run at a time; leave out --vmap.")
    if arguments.debug and "s2sam-opposite" in (arguments.config.optimizer, *arguments.compare):
        raise ValueError("--debug takes a perturbation of length -rho for a fault; s2sam-opposite has no other.")
    configs = {}
    for optimizer in arguments.compare or (arguments.config.optimizer,):
        for seed in arguments.seeds or (arguments.config.seed,):
            label = [optimizer] if arguments.compare or not arguments.seeds else []
            label += [f"seed {seed}"] if arguments.seeds else []
            configs[" ".join(label)] = dataclasses.replace(arguments.config, optimizer=optimizer, seed=seed)
    return configs


def _groups(configs: list[Config], vmap: bool) -> list[list[Config]]:
    """What is trained together: the seeds of an optimizer, or each run alone."""
    if not vmap:
        return [[config] for config in configs]
    return [list(group) for _, group in itertools.groupby(configs, lambda config: config.optimizer)]


def _run(
    configs: list[Config], loaded: Any, start: TrainState | None, console: Console, arguments: Arguments
) -> Table | None:
    """Trains one run, or several side by side, and returns the table of FLOPs; none if there was nothing to do."""
    made = [tasks.make(config, loaded, sharding.make_mesh(arguments.mesh)) for config in configs]
    steps = made[0].steps_per_epoch
    for config, task in zip(configs, made, strict=True):
        tx = optimizers.make(config, steps, task.network.groups)
        jax.eval_shape(tx.init, task.network.params)  # what these refuse leaves no folder
    with contextlib.ExitStack() as claims:
        for config in configs:
            claims.enter_context(runs.claim(config))
        if all(map(runs.finished, configs)) and not arguments.overwrite:  # by another process, meanwhile
            return None
        return _run_claimed(configs, made, start, console, arguments)


def _run_claimed(
    configs: list[Config], made: list[Task], start: TrainState | None, console: Console, arguments: Arguments
) -> Table:
    """No other process may begin with a run before it is finished, and its folder renamed."""
    say, steps = functools.partial(console.print, soft_wrap=True), made[0].steps_per_epoch
    with (
        contextlib.ExitStack() as stack,
        display.ProgressBar(console, configs[0].optimizer, configs[0].epochs, steps) as bar,
    ):
        folders = [runs.begin(config, arguments.overwrite, say) for config in configs]
        checkpoints = [stack.enter_context(Checkpoints(folder / runs.CHECKPOINTS)) for folder in folders]
        done = seeds.common_epoch(configs, checkpoints) or 0
        if 0 < done < configs[0].epochs:
            say(f"{configs[0].optimizer} goes on from epoch {done + 1}")
        bars = itertools.chain([bar], itertools.repeat(None))
        recorders = [_Recorder(*of_one, arguments) for of_one in zip(configs, folders, bars, strict=False)]
        for recorder in recorders:
            stack.callback(recorder.close)
        if arguments.vmap:
            states = seeds.train(configs, made, recorders, start, checkpoints)
        else:
            states = [loop.train(configs[0], made[0], recorders[0], start, checkpoints[0], arguments.debug)]
    for config, folder, state, kept in zip(configs, folders, states, checkpoints, strict=True):
        runs.finish(config, folder, state, kept.best)
    return _flops(configs[0], made[0], states[0], arguments.layers)


def _flops(config: Config, task: Task, state: TrainState, layers: bool) -> Table:
    """What the run would cost if zeros cost nothing; its seeds cost the same."""
    masks = None if config.method == "dense" else sharding.gather(get_masks(state.opt_state, state.params))
    rows = runs.rows(config.run_dir)
    recorded = [row["sparsity"] for row in rows] if len(rows) == config.epochs else None  # not with --eval-every
    entries = flops.ledger(config, task.network, task.steps_per_epoch, masks=masks, sparsities=recorded)
    return flops.table(entries, layers=layers)


def _start(config: Config) -> TrainState | None:
    """The run to start from, which must be of the same network."""
    if config.init_from is None:
        return None
    other = runs.read_config(config.init_from)
    for field in ("dataset", "model", "width"):
        if getattr(config, field) != getattr(other, field):
            raise ValueError(
                f"--init-from {config.init_from} has {field}={getattr(other, field)}, and this run "
                f"{getattr(config, field)}; they must agree."
            )
    if other.method != "dense" and in_library(config.method)[0] in RANDOM:
        kept = "magnitude-global" if other.structure == "unstructured" else f"magnitude --structure {other.structure}"
        if other.distribution is not None:
            kept += f" --distribution {other.distribution}"
        share = "and its share of zeros as --sparsity" if other.method == "chex" else f"--sparsity {other.sparsity}"
        raise ValueError(
            f"--init-from {config.init_from} is sparse, and --method {config.method} draws its first masks at random: "
            f"most of the weights would be lost. To go on with those, use --method {kept} {share}."
        )
    return runs.restore(config.init_from)


def _title(arguments: Arguments) -> str:
    config, trained = arguments.config, arguments.seeds or (arguments.config.seed,)
    kind = "dense" if config.method == "dense" else f"{config.method}, {config.sparsity:.0%} sparse"
    width = "" if config.width is None else f" x{config.width}"
    return f"{config.dataset}, {config.model}{width}, {kind}, seed {', '.join(map(str, trained))}"


def _recipe(argv: list[str] | None) -> tuple["recipes.Recipe | None", list[str]]:
    """``--recipe NAME`` gives other options their defaults, so it is read before them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    known, rest = parser.parse_known_args(argv)
    return None if known.recipe is None else recipes.get(known.recipe), rest


@cli.one_line()  # and no cli.command, as --recipe is read first
def main(argv: list[str] | None = None) -> dict[str, Path]:
    """The command line; returns the folders of the runs, by optimizer."""
    recipe, argv = _recipe(argv)
    default = Arguments() if recipe is None else Arguments(config=recipe.config)
    arguments = tyro.cli(Arguments, prog=cli.program(), args=argv, default=default)
    check_read(_configs(arguments).values(), default.config)
    one_of_several = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if arguments.distributed:
        sharding.join(*one_of_several)
    elif any(option is not None for option in one_of_several):
        raise ValueError("--coordinator, --num-processes and --process-id are for --distributed; add that.")
    console = Console(quiet=not sharding.writes())
    if recipe is not None:
        console.print(recipes.describe(recipe), soft_wrap=True)
    try:
        return train(arguments, console)
    except jax.errors.JaxRuntimeError as error:  # of the runtime; checkify has another of that name
        if jax.process_count() == 1:
            raise
        sharding.leave(error)


if __name__ == "__main__":
    main()
