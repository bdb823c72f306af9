"""N:M, blocks and channels: loops over blocks, each block a tuple of slices."""

import itertools

import numpy as np
import oracles


def blocks(shape, block):
    starts = [range(0, length, size) for length, size in zip(shape, block, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(c, c + size) for c, size in zip(corner, block, strict=True))


def block_of(structure, shape):
    if type(structure).__name__ == "Block":
        return (1,) * (len(shape) - len(structure.shape)) + structure.shape
    channel = type(structure).__name__ == "Channel"
    whole = list(shape) if channel else [1] * len(shape)
    whole[structure.axis] = 1 if channel else structure.m
    return tuple(whole)


def groups_mask(scores, structure, taken=None, among=None):
    """The best ``n`` of each group less those taken there, ties to the lower index."""
    mask = np.zeros(scores.shape, bool)
    taken = np.zeros(scores.shape, bool) if taken is None else taken
    for at in blocks(scores.shape, block_of(structure, scores.shape)):
        eligible = ~taken[at] if among is None else among[at]
        mask[at] = oracles.top_mask(scores[at], max(structure.n - int(taken[at].sum()), 0), eligible)
    return mask


POOLS = {"mean": np.mean, "l2": lambda x: np.sqrt(np.square(x).sum()), "max": np.max}


def pooled(x, structure):
    x = np.float64(x)
    return np.array([POOLS[structure.pool](x[at]) for at in blocks(x.shape, block_of(structure, x.shape))])


def unit_mask(mask, structure):
    """One bool a unit; fails where a unit is not all of one kind."""
    units = [mask[at] for at in blocks(mask.shape, block_of(structure, mask.shape))]
    assert all(unit.all() or not unit.any() for unit in units)
    return np.array([unit.all() for unit in units])


def spread(units, structure, shape):
    mask = np.zeros(shape, bool)
    for unit, at in zip(units, blocks(shape, block_of(structure, shape)), strict=True):
        mask[at] = unit
    return mask
