"""The full-size train step of every recipe, traced: shapes fit, whatever the method and the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import one_step, recipes
from experiments.config import Config
from s2sam_jax import SparseState
from s2sam_jax._tree import find_states


def kinds() -> dict[str, Config]:
    """Recipes whose programs differ: not in their sparsity, seed or schedule alone."""
    found = {}
    for name in recipes.names(""):
        config = recipes.get(name).config
        found.setdefault(
            (config.model, config.dataset, config.method, config.optimizer, config.distribution, config.base), name
        )
    return {name: recipes.get(name).config for name in found.values()}


@pytest.mark.parametrize(("name", "config"), kinds().items(), ids=kinds().keys())
def test_full_size_step(name, config):
    def step():
        train_step, first_state = one_step.step_and_state(config, steps_per_epoch=1000)
        state = first_state()
        return state, *train_step(state, one_step.batch_of(config))

    before, after, metrics = jax.eval_shape(step)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert metrics["loss"].shape == ()
    assert metrics["loss"].dtype == jnp.float32
    assert bool(find_states(after.opt_state, SparseState)) == (config.method != "dense")
    assert sum(np.prod(p.shape) for p in jax.tree.leaves(after.params)) > 1e6
