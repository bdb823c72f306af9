"""Mask updates and selection: beside jaxpruner's sorts, and over sizes."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.peers import Jaxpruner
from experiments.benchmarks.timing import Row, figure, memory, paired, ratio_row
from s2sam_jax import Every, apply_masks, get_masks, methods, select, sparsify

SPARSITY = 0.9
RARELY = Every(1_000_000, 1_000_000, 10_000_000)  # mask updates are timed apart


def large_params(size: int) -> dict[str, jax.Array]:
    """Ten convolution kernels of about ``size`` weights in all."""
    side = max(1, round((size / 90) ** 0.5))
    keys = jax.random.split(jax.random.key(0), 10)
    return {f"kernel{i}": jax.random.normal(key, (3, 3, side, side)) for i, key in enumerate(keys)}


def sgd() -> optax.GradientTransformation:
    """SGD with momentum and weight decay."""
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.01, momentum=0.9))


def _like(params: Any, tied: bool) -> Any:
    """Gradients: noise, or all equal."""
    return jax.tree.map(lambda p: jnp.ones_like(p) if tied else jax.random.normal(jax.random.key(1), p.shape), params)


def optimizer_alone(name: str, params: Any, rounds: int, peer: Path | None) -> Iterator[Row]:
    """The optimizer's time away from mask updates: bare, wrapped by sparsify, wrapped by the peer."""
    grads = _like(params, tied=False)
    seconds = paired(dict(_optimizers(params, grads, peer)), rounds)
    yield ratio_row(f"optimizer, sparsify / bare, {name}", seconds["ours"], seconds["bare"], "<= 1.3")
    yield ratio_row(f"optimizer, sparsify with the clock inside / bare, {name}", seconds["clock"], seconds["bare"])
    if peer:
        yield ratio_row(f"optimizer, jaxpruner / bare, {name}", seconds["peer"], seconds["bare"])


def _optimizers(params: Any, grads: Any, peer: Path | None) -> Iterator[tuple[str, Any]]:
    tx = sparsify(sgd(), methods.rigl(), sparsity=SPARSITY, when=RARELY)
    yield "bare", _stepper(sgd(), params, grads)
    yield "ours", _stepper(tx, params, grads, refresh_masks=False)
    yield "clock", _stepper(tx, params, grads)
    if peer:
        other = Jaxpruner(peer, params, SPARSITY)
        yield "peer", _stepper(other.wrap(sgd()), other.params, _like(other.params, False), other.updater)


def _stepper(tx: Any, params: Any, grads: Any, updater: Any = None, **extra: Any) -> Any:
    """A case that takes one step at each call, on parameters of its own, which are donated."""
    update = optax.with_extra_args_support(tx).update

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (updater.post_gradient_update(params, state) if updater else params), state

    held = [jax.tree.map(jnp.array, params), tx.init(params)]

    def run():
        held[:] = step(*held, grads)
        return held

    return run


def mask_update(name: str, params: Any, rounds: int, peer: Path | None) -> Iterator[Row]:
    """One RigL-ERK update, which leaves the inner optimizer alone, against the peer's mask calculation."""
    for tied in (False, True):
        what = f"{name}, {'all scores tie' if tied else 'no ties'}"
        cases, counts_kept = _mask_updates(params, tied, peer)
        seconds = paired(cases, rounds)
        if peer:
            goal = ("8" if tied else "15") if jax.default_backend() == "cpu" else "3"
            row = ratio_row(f"mask update, jaxpruner / ours, {what}", seconds["peer"], seconds["ours"], f">= {goal}")
            yield row
        else:
            yield figure(f"mask update, {what}", 1e3 * float(np.median(seconds["ours"])), "ms")
        yield figure(f"mask update, counts exact, {what}", float(counts_kept), "", ">= 1")


def update_seconds(params: Any, rounds: int) -> float:
    """The time of one update of the masks."""
    return float(np.median(paired(_mask_updates(params, False, None)[0], rounds)["ours"]))


def _mask_updates(params: Any, tied: bool, peer: Path | None) -> tuple[dict[str, Any], bool]:
    params = jax.tree.map(jnp.ones_like, params) if tied else params
    grads = _like(params, tied)
    tx = sparsify(sgd(), methods.rigl(0.3), sparsity=SPARSITY, when=Every(0, 100, 25_000))
    state = tx.init(params)
    live = apply_masks(params, state)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, refresh_masks=True))
    after = get_masks(update(grads, state, live)[1])
    pairs = zip(jax.tree.leaves(get_masks(state)), jax.tree.leaves(after), strict=True)
    kept = all(int(a.sum()) == int(b.sum()) for a, b in pairs)
    cases = {"ours": lambda: update(grads, state, live)}
    if peer:
        other = Jaxpruner(peer, params, SPARSITY)
        tree = other.params
        theirs = jax.jit(other.wrap(sgd()).init)(tree)
        refresh, their_grads = jax.jit(other.updater.update_state), _like(tree, tied)
        sparse = other.updater.post_gradient_update(tree, theirs)
        cases["peer"] = lambda: refresh(theirs, sparse, their_grads)
    return cases, kept


def growth(sizes: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Seconds and extra bytes of selecting a tenth of n scores, for each size and way."""
    for size in sizes:
        scores = jax.random.normal(jax.random.key(0), (size // 100, 100))
        count = scores.size // 10
        ways = {
            "select": jax.jit(lambda s, k=count: select(s, count=k)),
            "argsort": jax.jit(lambda s, k=count: _by_argsort(s, k)),
            "top_k": jax.jit(lambda s, k=count: s >= jax.lax.top_k(s.reshape(-1), k)[0][-1]),
        }
        seconds = paired({name: partial(way, scores) for name, way in ways.items()}, rounds if size < 1e7 else 1)
        for name, way in ways.items():
            yield {
                "way": name,
                "parameters": scores.size,
                "seconds": float(np.median(seconds[name])),
                "temporary_bytes": memory(way.lower(scores).compile()).temporary,
            }


def _by_argsort(scores: jax.Array, count: int) -> jax.Array:
    flat = scores.reshape(-1)
    return jnp.zeros(flat.shape, bool).at[jnp.argsort(-flat)[:count]].set(True).reshape(scores.shape)
