"""CHEX and Chase in NumPy float64, from their equations. Never imports what it judges.

Groups come as lists, in their order; filters as matrices with one column a channel. Random draws are arguments.
"""

from fractions import Fraction
from math import ceil, cos, floor, pi

import numpy as np
from oracles import top_mask
from oracles_growth import planned, top_global


def columns(w):
    """The filters of a kernel whose last axis counts them."""
    return np.reshape(w, (-1, w.shape[-1]))


def cosine(fraction, step, last):
    return fraction / 2 * (1 + cos(pi * min(step / last, 1)))


def leverage(x, k):
    if x.shape[0] < x.shape[1]:
        return np.abs(x).sum(0)
    return np.square(np.linalg.svd(x)[2][:k]).sum(0)


def residual(x, keep):
    base = x[:, keep]
    return np.square(x - base @ np.linalg.lstsq(base, x)[0]).sum(0)


def draw(logits, uniform, count, among):
    """One after another by a softmax, which is the same as taking the largest with Gumbel noise."""
    with np.errstate(divide="ignore"):
        return top_mask(logits - np.log(-np.log(np.float64(uniform))), count, among)


def allocate(scores, count, at_least, among):
    reserved = [top_mask(s, n, a) for s, n, a in zip(scores, at_least, among, strict=True)]
    rest = [a & ~r for a, r in zip(among, reserved, strict=True)]
    more = top_global(scores, count - sum(r.sum() for r in reserved), rest)
    return [r | m for r, m in zip(reserved, more, strict=True)]


def shares(total, sizes, taken=None, at_least=0):
    """Sainte-Laguë, seat by seat."""
    room = [n - t for n, t in zip(sizes, taken or [0] * len(sizes), strict=True)]
    given = [min(at_least, r) for r in room]
    for _ in range(min(total, sum(room)) - sum(given)):
        worth = [Fraction(n, 2 * g + 1) if g < r else Fraction(-1) for n, g, r in zip(sizes, given, room, strict=True)]
        given[worth.index(max(worth))] += 1
    return given


def chex_init(weights, sparsity, explore, authors=False):
    sizes = [w.shape[-1] for w in weights]
    if authors:
        first = [int(n * (1 - (sparsity - explore))) for n in sizes]
    else:
        total = planned(sum(sizes), sparsity) + floor(round(explore * sum(sizes), 6))
        first = shares(total, sizes, at_least=1)
    return [top_mask(np.abs(columns(w)).sum(0), n) for w, n in zip(weights, first, strict=True)]


def chex_authors_widths(scales, sparsity):
    ranked = np.sort(np.concatenate([np.abs(s) for s in scales]))
    threshold = ranked[int(round(len(ranked) * sparsity, 6))]
    ratios = [float((np.abs(s) <= threshold).sum()) / len(s) for s in scales]
    return [max(1, int(len(s) * (1 - ratio))) for s, ratio in zip(scales, ratios, strict=True)]


def chex_update(weights, recent, scales, alive, uniforms, sparsity, explore, step, last, authors=False):
    """Live channels after one update: weights are masked, ``recent`` as they last were."""
    sizes = [len(s) for s in scales]
    delta = cosine(explore, step, last)
    if authors:
        down = chex_authors_widths(scales, sparsity)
        regrown = [u - d for u, d in zip(chex_authors_widths(scales, sparsity - delta), down, strict=True)]
    else:
        best = allocate([np.abs(s) for s in scales], planned(sum(sizes), sparsity), [1] * len(sizes), alive)
        down = [int(b.sum()) for b in best]
        regrown = shares(floor(delta * sum(sizes) + 1e-6), sizes, taken=down)
    new = []
    for w, r, a, u, k, more in zip(weights, recent, alive, uniforms, down, regrown, strict=True):
        keep = top_mask(leverage(columns(w), k), k, a)
        outside = residual(columns(r), keep)
        new.append(keep | draw(np.sqrt(outside) if authors else outside, u, more, ~keep))
    return new


def chase_channels(weights, alive, final, min_width, done, removals):
    """Live channels at the removal number ``done``."""
    sizes = [len(a) for a in alive]
    gone = sum(sizes) - planned(sum(sizes), final)
    count = sum(sizes) - floor((1 - (1 - Fraction(min(done, removals), removals)) ** 3) * gone)
    at_least = [max(1, int(round(n * (1 - final) * min_width, 6))) for n in sizes]
    return allocate([np.abs(columns(w)).mean(0) for w in weights], count, at_least, alive)


def chase_weights(weights, grads, live, places, lower, upper, authors=False):
    """New masks over all leaves, and what was kept in between."""
    magnitudes, slopes = [np.abs(w) for w in weights], [np.abs(g) for g in grads]
    if authors:
        ranked = np.sort(np.concatenate([m[a] for m, a in zip(magnitudes, live, strict=True)]))
        kills = len(ranked) - lower
        keep = [a & (m >= ranked[kills - 1]) if kills > 0 else a for m, a in zip(magnitudes, live, strict=True)]
        free = [p & ~k & (s > 0) for p, k, s in zip(places, keep, slopes, strict=True)]
        ranked = np.sort(np.concatenate([s[f] for s, f in zip(slopes, free, strict=True)]))[::-1]
        grows = min(upper - sum(int(k.sum()) for k in keep), len(ranked))
        threshold = ranked[grows - 1] if grows > 0 else np.inf
        return [k | f & (s > threshold) for k, f, s in zip(keep, free, slopes, strict=True)], keep
    keep = top_global(magnitudes, lower, live)
    free = [p & ~k for p, k in zip(places, keep, strict=True)]
    more = top_global(slopes, max(upper - sum(int(k.sum()) for k in keep), 0), free)
    return [k | m for k, m in zip(keep, more, strict=True)], keep


def chase_counts(budget, size, live, extra, exploration_end, first_fraction, final_fraction, step, last):
    if step < exploration_end * last:
        return budget, budget + floor(cosine(extra, step, round(exploration_end * last)) * size)
    fraction = final_fraction + cosine(first_fraction - final_fraction, step, last)
    return min(budget, live - ceil(round(fraction * live, 5))), budget
