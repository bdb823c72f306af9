"""Whole training steps: time, memory and compilation of S2-SAM, SAM and SSAM against SGD under RigL."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import tasks
from experiments.benchmarks import masks, timing
from experiments.benchmarks.timing import Row, cost, figure, paired, ratio_row
from experiments.config import Config
from experiments.trees import stack
from s2sam_jax import Every, TrainState, make_train_step, methods, s2sam, sam, sparsify, ssam

SHARPNESS = {
    "sgd": optax.identity,
    "s2sam": partial(s2sam, 0.05),
    "s2sam-bf16": partial(s2sam, 0.05, grad_dtype=jnp.bfloat16),
    "sam": partial(sam, 0.05),
    "ssam": partial(ssam, 0.05, sparsity=0.5, mask="dynamic", update_every=1_000_000, total_steps=10_000_000),
}


def optimizer(name: str, *, sparse: bool = True, when: Every = masks.RARELY) -> optax.GradientTransformationExtraArgs:
    """Momentum SGD with decay behind a sharpness transform, under RigL-ERK at 90 % if sparse."""
    chain = optax.chain(SHARPNESS[name](), masks.sgd())
    return sparsify(chain, methods.rigl(), sparsity=0.9, distribution="erk", when=when) if sparse else chain


class Workload:
    """A network, its loss, and a batch of noise."""

    def __init__(self, config: Config):
        self.config = config
        self.network = tasks.build(config)
        self.loss_fn = tasks.losses(config, self.network).loss_fn
        self.batch = tasks.noise(config)

    def state(self, tx: optax.GradientTransformation) -> TrainState:
        return TrainState.create(self.network.params, tx, model_state=self.network.model_state)

    def runner(self, name: str) -> Any:
        """A case that goes on training with this optimizer, by one step at each call."""
        tx = optimizer(name)
        step, state = make_train_step(self.loss_fn, tx), [self.state(tx)]

        def run():
            state[0], metrics = step(state[0], self.batch)
            return state[0], metrics

        return run

    def compiled(self, tx: optax.GradientTransformation) -> Any:
        """The step as one program."""
        return make_train_step(self.loss_fn, tx).lower(self.state(tx), self.batch).compile()


def step_times(workload: Workload, rounds: int) -> Iterator[Row]:
    """The price of sharpness in a whole step."""
    seconds = paired({name: workload.runner(name) for name in ("sgd", "s2sam", "sam", "ssam")}, rounds)
    goal = "<= 1.02" if jax.default_backend() == "cpu" else "<= 1.01"
    yield ratio_row("step, S2-SAM / SGD", seconds["s2sam"], seconds["sgd"], goal)
    yield ratio_row("step, SAM / SGD", seconds["sam"], seconds["sgd"], "<= 2.0")
    yield ratio_row("step, SSAM / SAM, no refresh", seconds["ssam"], seconds["sam"], "<= 1.05")
    share = masks.update_seconds(workload.network.params, rounds) / (100 * float(np.median(seconds["sgd"])))
    yield figure("mask updates every 100 steps, share of training", 100 * share, "%", "<= 0.5")


def memory(workload: Workload) -> Iterator[Row]:
    """XLA's own figures of the step as one program: peak memory, operations, bytes."""
    size = sum(p.nbytes for p in jax.tree.leaves(workload.network.params))
    peaks, costs = {}, {}
    for name in ("sgd", "s2sam", "s2sam-bf16"):
        compiled = workload.compiled(optimizer(name, sparse=False))
        peaks[name] = timing.memory(compiled).peak
        costs[name] = cost(compiled)
    detail = f"peaks {peaks['s2sam'] / 1e6:.1f} / {peaks['sgd'] / 1e6:.1f} MB"
    yield figure(
        "memory of one program, S2-SAM - SGD", (peaks["s2sam"] - peaks["sgd"]) / size, "params", "<= 1.05", detail
    )
    extra = (peaks["s2sam-bf16"] - peaks["sgd"]) / size
    yield figure("memory of one program, S2-SAM in bfloat16 - SGD", extra, "params", "<= 0.55")
    for what, unit in (("flops", "GFLOP"), ("bytes", "GB")):
        s2, sgd = costs["s2sam"][what], costs["sgd"][what]
        detail = f"{s2 / 1e9:.4g} / {sgd / 1e9:.4g} {unit}"
        yield figure(f"{what} counted, S2-SAM / SGD", s2 / sgd, "x", detail=detail)
    state = workload.state(optimizer("sgd"))
    mask_bytes = sum(m.nbytes for m in jax.tree.leaves(state.opt_state.masks))
    count = sum(p.size for p in jax.tree.leaves(state.params))
    yield figure("masks, bytes a parameter", mask_bytes / count, "B", "<= 1.0")


def compilation(workload: Workload) -> Iterator[Row]:
    """From nothing to a loop that trains, and to one that has changed its masks, with and without sparsify."""
    dense, sparse = _first_calls(workload, sparse=False), _first_calls(workload, sparse=True)
    for number, what in enumerate(("the step", "the step and the mask update")):
        over, under = sum(sparse[: number + 1]), dense[0]
        ratio, detail = over / under, f"{over:.3g} s / {under:.3g} s"
        yield figure(f"compilation of {what}, with sparsify / without", ratio, "x", "<= 1.5", detail)


def _first_calls(workload: Workload, sparse: bool) -> list[float]:
    """Seconds by which the first two calls take longer than the same calls do later; every second changes the masks."""
    jax.clear_caches()
    tx = optimizer("sgd", sparse=sparse, when=Every(1, 2, 10_000_000))
    step, state = make_train_step(workload.loss_fn, tx), workload.state(tx)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        state, _ = step(state, workload.batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - begin)
    return [seconds[0] - seconds[2], seconds[1] - seconds[3]]


def seeds_at_once(workload: Workload, rounds: int) -> Iterator[Row]:
    """Several seeds in one program against one after another, as ``--vmap`` and without it."""
    count, tx = 4, optimizer("s2sam")
    alone, together = (make_train_step(workload.loss_fn, tx, vmap=vmap) for vmap in (False, True))
    states = [workload.state(tx) for _ in range(count)]
    all_states, batches = [stack(*states)], stack(*[workload.batch] * count)

    def one_after_another():
        states[:] = [alone(state, workload.batch)[0] for state in states]
        return states

    def at_once():
        all_states[0], metrics = together(all_states[0], batches)
        return all_states[0], metrics

    seconds = paired({"single": one_after_another, "many": at_once}, rounds)
    goal = "" if jax.default_backend() == "cpu" else ">= 2.0"
    yield ratio_row(f"{count} seeds, one after another / vmap", seconds["single"], seconds["many"], goal)
