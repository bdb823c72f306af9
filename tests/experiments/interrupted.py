"""Short runs that are stopped, and what a run that went on from there must have in common with one that was not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train
from experiments.training import runs
from s2sam_jax import TrainState

SHORT = ["--subset", "256", "--epochs", "5"]


CASES = {
    "rigl-s2sam": ["--eval-every", "2"],
    "mest-ems-sam": ["--method", "mest-ems", "--optimizer", "sam", "--checkpoint-every", "2"],
    "chex-sam": ["--method", "chex", "--sparsity", "0.5", "--optimizer", "sam"],
    "lottery-s2sam": ["--method", "lottery", "--rounds", "1", "--prune-fraction", "0.9", "--eval-every", "3"],
}


TIMES = ("seconds", "images_per_second")


class StoppedError(Exception):
    pass


def start(out, *options):
    return next(iter(train.main([*SHORT, "--out", str(out), *options]).values()))


def rows(folder):
    return [{k: v for k, v in row.items() if k not in (*TIMES, "config")} for row in runs.rows(folder)]


def assert_same_run(folder, reference):
    """Every leaf bit by bit, every row but for its times, and nothing left over."""
    for which in ("last", "best"):
        a, b = (runs.restore(x, which) for x in (folder, reference))
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)
    assert rows(folder) == rows(reference)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in reference.iterdir())
    assert not list(folder.parent.glob("*.partial"))


def raw(x):
    """Bits, so that -0.0 is not 0.0."""
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x).view(f"u{x.dtype.itemsize}") if x.dtype != bool else np.asarray(x)


def stop_in(monkeypatch, owner, name, calls, out, *options):
    """A run that is stopped in that call of a function."""
    real, count = getattr(owner, name), iter(range(1, 1000))

    def stopping(*arguments, **options):
        if next(count) == calls:
            raise StoppedError
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        with pytest.raises(StoppedError):
            start(out, *options)


def small_state(value):
    params = {"kernel": jnp.full((64, 64), float(value)), "bias": jnp.arange(7.0) + value}
    momentum = jax.tree.map(jnp.array, params)
    return TrainState(jnp.int32(value), params, (), {"momentum": momentum}, jax.random.key(value), jnp.int32(-1))


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
