"""The transformer: what each token may see, and decoding step by step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract import count, shapes
from flax import nnx
from oracles_models import close

from experiments import models
from experiments.models import transformer


def test_transformer_size_by_hand():
    attention, feed_forward, norm = 4 * 512**2, 2 * 512 * 2048 + 2048 + 512, 2 * 512
    encoder, decoder = attention + feed_forward + 2 * norm, 2 * attention + feed_forward + 3 * norm
    assert count(shapes("transformer-base").params) == 6 * (encoder + decoder) + 37_000 * 512


@pytest.fixture(scope="module")
def translator():
    model = transformer.Transformer(2, 0.1, width=8, classes=11, widths={}, dtype=jnp.float32, rngs=nnx.Rngs(0))
    return jax.jit(partial(model, train=False))


SOURCES = np.array([[3, 4, 5, 6, 0, 0], [7, 8, 9, 1, 2, 3]])
TARGETS = np.array([[1, 5, 2, 6, 4], [1, 3, 9, 0, 0]])


def test_no_token_sees_a_later_one(translator):
    before = translator(SOURCES, TARGETS)
    changed = TARGETS.copy()
    changed[:, 3] = 8
    after = translator(SOURCES, changed)
    close(after[:, :3], before[:, :3])
    assert (np.abs(after - before)[:, 3:].max((1, 2)) > 1e-3).all()


def test_padding_changes_nothing(translator):
    padded = translator(np.pad(SOURCES, ((0, 0), (0, 3))), np.pad(TARGETS, ((0, 0), (0, 2))))
    close(padded[:, :5], translator(SOURCES, TARGETS))
    close(translator(SOURCES[:1, :4], TARGETS[:1])[0], padded[0, :5])
    assert np.isfinite(translator(np.zeros((1, 4), int), TARGETS[:1])).all()


def test_a_token_of_the_source_changes_its_own_sentence_only(translator):
    changed = SOURCES.copy()
    changed[0, 1] = 10
    difference = np.abs(translator(changed, TARGETS) - translator(SOURCES, TARGETS))
    assert difference[0].max() > 1e-3
    close(difference[1], 0)


def test_encoding_once_and_decoding_is_a_call(shallow):
    network = models.build("transformer-base", width=4, classes=11, seed=0)
    apply = jax.jit(partial(network.apply, network.params, network.model_state), static_argnames=("train", "method"))
    memory, _ = apply((SOURCES,), train=False, method="encode")
    logits, _ = apply((memory, SOURCES, TARGETS), train=False, method="decode")
    close(logits, apply((SOURCES, TARGETS), train=False)[0])
