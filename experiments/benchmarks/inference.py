"""Forward passes of a network that lacks half of its hidden channels: dense, masked, and with the channels removed."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import models
from experiments.benchmarks.timing import Row, cost, figure, paired, ratio_row
from experiments.trees import by_name
from s2sam_jax import channel_masks, materialize


def forward_passes(model: str, *, width: int, size: int, batch: int, rounds: int) -> Iterator[Row]:
    """Images a second in evaluation, and how far masked and materialized outputs are apart."""
    options: dict[str, Any] = {"width": width, "channels": 3, "classes": models.MODELS[model].classes, "seed": 0}
    network = models.build(model, **options)
    params, state = _random_vectors((network.params, network.model_state))
    masks = channel_masks(params, network.groups, _every_other(network))
    masked = jax.tree.map(lambda p, m: jnp.where(m, p, 0), params, masks)
    small = materialize(masked, state, network.groups, masks)
    rebuilt = models.build(model, widths=small.widths, **options)

    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
    full, fewer = _compiled(network, params, state, images), _compiled(rebuilt, *small[:2], images)
    cases = {
        "dense": lambda: full(params, state, images),
        "masked": lambda: full(masked, state, images),
        "materialized": lambda: fewer(*small[:2], images),
    }
    seconds = paired(cases, rounds)
    speed = {name: f"{batch / float(np.median(values)):.4g}" for name, values in seconds.items()}
    sizes = " / ".join(f"{sum(x.size for x in jax.tree.leaves(tree)):,}" for tree in (params, small.params))
    work = " / ".join(f"{cost(program)['flops'] / batch / 1e9:.3g}" for program in (full, fewer))
    cut = f"; {work} GFLOP an image; {sizes} parameters"
    for name, target, detail in (("masked", "", ""), ("materialized", ">= 1.5", cut)):
        detail = f"{speed['dense']} / {speed[name]} images/s{detail}"
        yield ratio_row(f"inference, dense / {name}, {model}", seconds["dense"], seconds[name], target, detail)
    expected, got = cases["masked"](), cases["materialized"]()
    largest = float(jnp.max(jnp.abs(expected)))
    difference = float(jnp.max(jnp.abs(got - expected)))
    what, detail = f"outputs, masked - materialized, {model}", f"{difference:.3g}, outputs up to {largest:.3g}"
    yield figure(what, difference / largest, "of the largest", "<= 1e-5", detail)


def _random_vectors(tree: Any) -> Any:
    """Scales, biases and statistics that are not zero or one, as after training: so the outputs are a test."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x if x.ndim > 1 else jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype), tree)


def _every_other(network: models.Network) -> dict[str, jax.Array]:
    params = by_name(network.params)
    parts = {group.name: group.filters[0] for group in network.groups}
    return {name: jnp.arange(params[part.path].shape[part.axis]) % 2 == 0 for name, part in parts.items()}


def _compiled(network: models.Network, *arguments: Any) -> Any:
    return (
        jax.jit(lambda params, state, images: network.apply(params, state, images, False)[0])
        .lower(*arguments)
        .compile()
    )
