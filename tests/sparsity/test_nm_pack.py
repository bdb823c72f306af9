"""N:M weights as values and indices, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2sam_jax import NM, nm_pack, nm_unpack, select


def draw(seed, shape, ties=False):
    values = np.random.default_rng(seed).normal(size=shape)
    return np.float32(np.round(values) if ties else values)


@pytest.mark.parametrize("structure", [NM(2, 4, pad=True), NM(3, 4, axis=-1, pad=True)])
def test_packed_weights_come_back_bit_for_bit(structure):
    """Whole groups, groups cut short above and below n, negative zeros among what lives, and a dense leaf."""
    shapes = {"conv": (3, 3, 6, 5), "matrix": (5, 8)}
    params = {name: jnp.asarray(draw(7, shape)).at[..., 0].set(-0.0) for name, shape in shapes.items()}
    params["matrix"] = params["matrix"].astype(jnp.bfloat16)
    masks = select(params, structure=structure) | {"bias": jnp.ones(3, bool)}
    params |= {"bias": jnp.ones(3)}
    sparse = {name: jnp.where(masks[name], p, 0) for name, p in params.items()}
    packed = nm_pack(sparse, masks, structure)
    weights, again = nm_unpack(packed)
    assert packed["bias"] is sparse["bias"]
    for name in params:
        np.testing.assert_array_equal(again[name], masks[name])
        assert weights[name].dtype == params[name].dtype
        assert np.asarray(weights[name]).tobytes() == np.asarray(sparse[name]).tobytes()
    for name, shape in shapes.items():
        groups = -(-shape[structure.axis] // structure.m)
        assert packed[name].values.shape[structure.axis] == groups * structure.n
        assert packed[name].indices.shape == packed[name].values.shape
        assert packed[name].indices.dtype == jnp.uint8


def test_packed_two_of_four_by_hand():
    weights = jnp.array([[0.0, 5.0, 0.0, 7.0, 1.0, 2.0, 0.0, 0.0]])
    packed = nm_pack(weights, weights != 0, NM(2, 4, axis=-1))
    np.testing.assert_array_equal(packed.values, [[5, 7, 1, 2]])
    np.testing.assert_array_equal(packed.indices, [[1, 3, 0, 1]])


@pytest.mark.parametrize("axis", [0, -2, 1])
def test_what_is_packed_may_be_stacked(axis):
    """As the layers of a scan are; the axis of the groups then is another from the front."""
    structure, weights = NM(2, 4, axis=axis), jnp.asarray(draw(3, (8, 4)))
    packed = nm_pack(weights, select(jnp.abs(weights), structure=structure), structure)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), packed)
    one, two = nm_unpack(packed)[0], nm_unpack(stacked)[0]
    np.testing.assert_array_equal(two, jnp.stack([one, one]))
