"""NumPy float64 written from the papers' equations. Never imports the package it judges."""

import numpy as np


def ascent(g, rho, eps=1e-12):
    return rho * g / (np.linalg.norm(g) + eps)


def asam_ascent(g, w, rho, eta, eps=1e-12):
    t = np.abs(w) + eta
    return rho * t**2 * g / (np.linalg.norm(t * g) + eps)


def sgd_step(w, g, v, *, lr, momentum, decay):
    """PyTorch's SGD: coupled weight decay at the unperturbed weights, no dampening."""
    v = momentum * v + g + decay * w
    return w - lr * v, v


def s2sam_trajectory(grad, w, steps, *, rho, lr, momentum=0.0, decay=0.0, mask=None, ascend=None):
    """S2-SAM on SGD. With a mask: gradient, perturbation and momentum live on it."""
    mask = np.ones_like(w) if mask is None else mask
    ascend = ascend or (lambda g, w: ascent(g, rho))
    w, v, last, path = w * mask, np.zeros_like(w), np.zeros_like(w), []
    for _ in range(steps):
        last = grad(w + ascend(last, w)) * mask
        w, v = sgd_step(w, last, v, lr=lr, momentum=momentum, decay=decay)
        path.append(w.copy())
    return path


def s2sam_authors_trajectory(grad, w, steps, *, rho, lr, momentum, decay, mask):
    """The released S2-SAM code: dense gradient, perturbation and momentum; weights masked after the step."""
    w, v, last, path = w * mask, np.zeros_like(w), np.zeros_like(w), []
    for _ in range(steps):
        last = grad(w + ascent(last, rho))
        w, v = sgd_step(w, last, v, lr=lr, momentum=momentum, decay=decay)
        w = w * mask
        path.append(w.copy())
    return path, v


def sam_trajectory(grad, w, steps, *, rho, lr, momentum=0.0, decay=0.0, mask=None, perturb_mask=None, eta=None):
    """SAM, ASAM (``eta``), SSAM (``perturb_mask``: full norm, masked vector), on SGD."""
    mask = np.ones_like(w) if mask is None else mask
    w, v, path = w * mask, np.zeros_like(w), []
    for step in range(steps):
        g, radius = grad(w) * mask, rho(step) if callable(rho) else rho
        e = ascent(g, radius) if eta is None else asam_ascent(g, w, radius, eta)
        if perturb_mask is not None:
            e = e * (perturb_mask(step) if callable(perturb_mask) else perturb_mask)
        w, v = sgd_step(w, grad(w + e) * mask, v, lr=lr, momentum=momentum, decay=decay)
        path.append(w.copy())
    return path


def top_mask(scores, count, among=None):
    """Exactly ``count`` ones on the largest eligible scores; NaN last, ties by lower index."""
    flat = np.where(np.isnan(scores), -np.inf, scores).astype(np.float64).ravel()
    nan = np.isnan(scores).ravel()
    eligible = np.ones(flat.size, bool) if among is None else np.asarray(among).ravel()
    order = sorted(np.flatnonzero(eligible), key=lambda i: (nan[i], -flat[i], i))
    mask = np.zeros(flat.size, bool)
    mask[order[:count]] = True
    return mask.reshape(np.shape(scores))


def rigl_update(w, g, mask, fraction):
    """RigL's Algorithm 1 on one layer."""
    moved = int(np.floor(round(int(mask.sum()) * float(fraction), 4)))
    keep = top_mask(np.abs(w), int(mask.sum()) - moved, mask)
    return keep | top_mask(np.abs(g), moved, ~keep)


def erk_densities(shapes, sparsity, power=lambda shape: sum(shape) / np.prod(shape)):
    """ERK with saturation, as a fixed point over the set of dense layers."""
    sizes = {k: int(np.prod(s)) for k, s in shapes.items()}
    raw = {k: power(s) for k, s in shapes.items()}
    dense = set()
    while True:
        budget = sum(n - int(np.floor(round(sparsity * n, 6))) for n in sizes.values()) - sum(sizes[k] for k in dense)
        rest = [k for k in sizes if k not in dense]
        if not rest:
            return dict.fromkeys(sizes, 1.0)
        scale = budget / sum(raw[k] * sizes[k] for k in rest)
        over = [k for k in rest if scale * raw[k] > 1]
        if not over:
            return {k: 1.0 if k in dense else scale * raw[k] for k in sizes}
        top = max(raw[k] for k in over)
        dense |= {k for k in rest if raw[k] == top}
