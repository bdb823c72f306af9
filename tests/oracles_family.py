"""NumPy float64 of Momentum-SAM, LookSAM, GSAM and ESAM, from their equations. Never imports the package it judges."""

import numpy as np
from oracles import ascent, sgd_step


def at(value, step):
    return value(step) if callable(value) else value


def across(g, to):
    """What is left of ``g`` without its projection."""
    return g - (g @ to) / (to @ to) * to


def msam_trajectory(grad, w, steps, *, rho, lr, momentum, decay=0.0, mask=None):
    mask = np.ones_like(w) if mask is None else mask
    w, v, path = w * mask, np.zeros_like(w), []
    for step in range(steps):
        g = grad(w - ascent(v, at(rho, step))) * mask
        w, v = sgd_step(w, g, v, lr=lr, momentum=momentum, decay=decay)
        path.append(w.copy())
    return path


def looksam_trajectory(grad, w, steps, *, rho, lr, every, alpha, momentum=0.0, decay=0.0, mask=None):
    mask = np.ones_like(w) if mask is None else mask
    w, v, path = w * mask, np.zeros_like(w), []
    for step in range(steps):
        g = grad(w) * mask
        if step % every == 0:
            direction = grad(w + ascent(g, at(rho, step))) * mask
            g_v = across(direction, g)
        else:
            direction = g + np.linalg.norm(g) * ascent(g_v, at(alpha, step))
        w, v = sgd_step(w, direction, v, lr=lr, momentum=momentum, decay=decay)
        path.append(w.copy())
    return path


def gsam_direction(grad, w, *, rho, alpha, mask=1.0):
    g = grad(w) * mask
    g_p = grad(w + ascent(g, rho)) * mask
    return g_p - alpha * across(g, g_p)


def gsam_trajectory(grad, w, steps, *, rho, lr, alpha, momentum=0.0, decay=0.0, mask=None):
    mask = np.ones_like(w) if mask is None else mask
    w, v, path = w * mask, np.zeros_like(w), []
    for step in range(steps):
        direction = gsam_direction(grad, w, rho=at(rho, step), alpha=at(alpha, step), mask=mask)
        w, v = sgd_step(w, direction, v, lr=lr, momentum=momentum, decay=decay)
        path.append(w.copy())
    return path


def esam_trajectory(grad, w, steps, *, rho, lr, beta, drawn, momentum=0.0, decay=0.0, mask=None, eps=1e-7):
    """``drawn[step]`` is one on the coordinates of the leaves that take part."""
    mask = np.ones_like(w) if mask is None else mask
    w, v, path = w * mask, np.zeros_like(w), []
    for step in range(steps):
        e = ascent(grad(w) * mask * drawn[step], at(rho, step), eps) / beta
        w, v = sgd_step(w, grad(w + e) * mask, v, lr=lr, momentum=momentum, decay=decay)
        path.append(w.copy())
    return path


def sharpest(before, after, count):
    rise = np.asarray(after) - np.asarray(before)
    return sorted(range(len(rise)), key=lambda i: (-rise[i], i))[:count]
