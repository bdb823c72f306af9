"""Magnitude pruning, GMP, SET, DSR, ITOP and MEST in NumPy, from their equations. Never imports what it judges.

Leaves come as lists. Random draws are arguments: the scores by which random growth ranks its candidates.
"""

from fractions import Fraction
from math import ceil, floor

import numpy as np
from oracles import top_mask


def planned(size, sparsity):
    return size - floor(round(sparsity * size, 6))


def top_global(scores, count, among):
    flat, eligible = (np.concatenate([np.ravel(x) for x in leaves]) for leaves in (scores, among))
    cuts = np.cumsum([np.size(s) for s in scores])[:-1]
    parts = np.split(top_mask(flat, count, eligible), cuts)
    return [part.reshape(np.shape(s)) for part, s in zip(parts, scores, strict=True)]


def magnitude(weights, sparsities, scope):
    scores = [np.abs(w) for w in weights]
    if scope == "leaf":
        return [top_mask(s, planned(s.size, sparsity)) for s, sparsity in zip(scores, sparsities, strict=True)]
    size = sum(s.size for s in scores)
    mean = sum(s.size * sparsity for s, sparsity in zip(scores, sparsities, strict=True)) / size
    return top_global(scores, planned(size, mean), [np.ones(s.shape, bool) for s in scores])


def gmp_zeros(final, step, first, last):
    """Exact rational arithmetic."""
    progress = Fraction(min(max(step - first, 0), last - first), last - first)
    return floor((1 - (1 - progress) ** 3) * final)


def gmp(weights, masks, sparsities, scope, step, first, last):
    scores = [np.abs(w) for w in weights]
    sizes = [s.size for s in scores]
    if scope == "leaf":
        zeros = [gmp_zeros(n - planned(n, s), step, first, last) for n, s in zip(sizes, sparsities, strict=True)]
        return [top_mask(s, n - z, m) for s, n, z, m in zip(scores, sizes, zeros, masks, strict=True)]
    mean = sum(n * s for n, s in zip(sizes, sparsities, strict=True)) / sum(sizes)
    zeros = gmp_zeros(sum(sizes) - planned(sum(sizes), mean), step, first, last)
    return top_global(scores, sum(sizes) - zeros, masks)


def regrow(keep, scores, count):
    return keep | top_mask(scores, count, ~keep)


def set_update(w, mask, scores, zeta, by_sign):
    def smallest_gone(among):
        live = int(among.sum())
        return top_mask(np.abs(w), live - floor(round(live * zeta, 6)), among)

    keep = smallest_gone(mask & (w >= 0)) | smallest_gone(mask & (w < 0)) if by_sign else smallest_gone(mask)
    return regrow(keep, scores, int(mask.sum()) - int(keep.sum()))


def itop_update(w, mask, scores, first_fraction, final_fraction, step, last):
    fraction = final_fraction + (first_fraction - final_fraction) / 2 * (1 + np.cos(np.pi * step / last))
    live = int(mask.sum())
    moved = ceil(round(fraction * live, 5))
    return regrow(top_mask(np.abs(w), live - moved, mask), scores, moved)


def mest_update(importance, mask, scores, lower, upper):
    """Prunes to sparsity ``lower`` and grows to ``upper``; also returns what was left in between."""
    keep = top_mask(importance, planned(mask.size, lower), mask)
    return regrow(keep, scores, planned(mask.size, upper) - int(keep.sum())), keep


def dsr_update(weights, masks, scores, threshold, target, first):
    """One reallocation over all leaves. ``first`` is the leaf from which on leftovers are handed out."""
    live = [int(m.sum()) for m in masks]
    survivors = [int((m & (np.abs(w) >= np.float32(threshold))).sum()) for w, m in zip(weights, masks, strict=True)]
    survivors = [max(r, min(n, 1)) for r, n in zip(survivors, live, strict=True)]
    keep = [top_mask(np.abs(w), r, m) for w, r, m in zip(weights, survivors, masks, strict=True)]
    pruned = [n - r for n, r in zip(live, survivors, strict=True)]
    free = [m.size - n for m, n in zip(masks, live, strict=True)]
    grown = dsr_shares(sum(pruned), survivors, free, first)
    again = hand_out(sum(pruned) - sum(grown), pruned, first)
    new = []
    for k, m, s, here, back in zip(keep, masks, scores, grown, again, strict=True):
        new.append(k | top_mask(s, here, ~m) | top_mask(s, back, m & ~k))
    target = target * sum(live) if target < 1 else target
    if sum(pruned) > 1.1 * target:
        return new, threshold / 2
    return new, threshold * 2 if sum(pruned) < 0.9 * target else threshold


def dsr_shares(total, survivors, free, first, quotients=None):
    """The shares; ``quotients`` collects what was rounded on the way."""
    grown, quotients = [0] * len(free), [] if quotients is None else quotients
    for _ in free:
        open_to = [r if g < f else 0 for r, g, f in zip(survivors, grown, free, strict=True)]
        left = total - sum(grown)
        parts = [left * r / max(sum(open_to), 1) for r in open_to]
        quotients += parts
        grown = [min(max(g + round(p), 0), f) for g, p, f in zip(grown, parts, free, strict=True)]
    left = total - sum(grown)
    more = hand_out(left, [f - g for f, g in zip(free, grown, strict=True)], first)
    less = hand_out(-left, grown, first)
    return [g + m - n for g, m, n in zip(grown, more, less, strict=True)]


def hand_out(amount, room, first):
    given = [0] * len(room)
    for i in [*range(first, len(room)), *range(first)]:
        given[i] = min(max(amount, 0), room[i])
        amount -= given[i]
    return given
