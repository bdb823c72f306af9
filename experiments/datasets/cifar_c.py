"""Fourteen of the fifteen corruptions of CIFAR-10-C, computed from clean images with that data set's severities.

They follow its published definitions (Hendrycks & Dietterich, 2019), not its random draws, so a result is near to one
on the released files but not the same. Frost is missing, as it is made of photographs that come with the benchmark, and
a mean is over the other fourteen: to compare with published figures, take the released files.
"""

import io
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

SIZE = 32

Corruption = Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]


def corrupt(name: str, severity: int, images: np.ndarray, seed: int = 0) -> np.ndarray:
    """``uint8[n, 32, 32, 3]`` to the same, at a severity of 1 to 5; random by the seed, the name and the severity."""
    if name not in CORRUPTIONS:
        raise ValueError(f"Unknown corruption {name!r}; there are {', '.join(CORRUPTIONS)}.")
    if severity not in range(1, 6):
        raise ValueError(f"severity must be 1 to 5; got {severity}.")
    if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"images must be uint8[n, {SIZE}, {SIZE}, 3]; got {images.dtype}{list(images.shape)}.")
    apply, parameters = CORRUPTIONS[name]
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), severity])
    corrupted = apply(images.astype(np.float32) / 255, parameters[severity - 1], rng)
    return (np.clip(corrupted, 0, 1) * 255).astype(np.uint8)


# All functions below take and return pixels in [0, 1].


def gaussian_noise(x: np.ndarray, scale: float, rng: np.random.Generator) -> np.ndarray:
    return x + rng.normal(scale=scale, size=x.shape)


def shot_noise(x: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(x.shape) < amount, rng.integers(2, size=x.shape), x)


def defocus_blur(x: np.ndarray, parameters: tuple[float, float], _rng: np.random.Generator) -> np.ndarray:
    radius, smoothing = parameters
    across = np.arange(-2, 3)
    disk = (across**2 + across[:, None] ** 2 <= radius**2).astype(np.float32)
    smooth = np.exp(-(np.arange(-1, 2) ** 2) / (2 * smoothing**2))
    smooth /= smooth.sum()
    kernel = ndimage.convolve(disk / disk.sum(), np.outer(smooth, smooth), mode="constant")
    return ndimage.convolve(x, kernel[None, :, :, None], mode="mirror")


def glass_blur(x: np.ndarray, parameters: tuple[float, int], rng: np.random.Generator) -> np.ndarray:
    """Pixels take the colour of a random neighbour, one after the other from the far corner, between two blurs."""
    sigma, rounds = parameters
    x, rows = _blur(x, sigma), np.arange(len(x))
    for _ in range(rounds):
        for i in range(SIZE - 1, 1, -1):
            for j in range(SIZE - 1, 1, -1):
                di, dj = rng.integers(-1, 1, size=(2, len(x)))
                x[:, i, j] = x[rows, i + di, j + dj]
    return _blur(x, sigma)


def motion_blur(x: np.ndarray, parameters: tuple[int, float], rng: np.random.Generator) -> np.ndarray:
    return _smear(x, *parameters, rng.uniform(-45, 45, len(x)))


def zoom_blur(x: np.ndarray, end: float, _rng: np.random.Generator) -> np.ndarray:
    """The mean of the image and its enlargements in steps of 1 %, the first of which is the image again."""
    factors = [1.0, *np.arange(1, end, 0.01)]
    return np.mean([_zoom(x, factor) for factor in factors], axis=0)


def snow(x: np.ndarray, parameters: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    loc, scale, zoom, threshold, radius, sigma, kept = parameters
    flakes = _zoom(rng.normal(loc, scale, size=(len(x), SIZE, SIZE, 1)), zoom)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = _smear(flakes, int(radius), sigma, rng.uniform(-135, -45, len(x)))
    grey = x @ np.array([0.299, 0.587, 0.114], np.float32)
    whitened = kept * x + (1 - kept) * np.maximum(x, 1.5 * grey[..., None] + 0.5)
    return whitened + flakes + flakes[:, ::-1, ::-1]


def fog(x: np.ndarray, parameters: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    amount, decay = parameters
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    return (x + amount * _plasma(len(x), decay, rng)[..., None]) * brightest / (brightest + amount)


def brightness(x: np.ndarray, amount: float, _rng: np.random.Generator) -> np.ndarray:
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    hsv = rgb_to_hsv(x)
    hsv[..., 2] = np.clip(hsv[..., 2] + amount, 0, 1)
    return hsv_to_rgb(hsv)


def contrast(x: np.ndarray, factor: float, _rng: np.random.Generator) -> np.ndarray:
    means = x.mean(axis=(1, 2), keepdims=True)
    return (x - means) * factor + means


def elastic_transform(x: np.ndarray, parameters: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """An affine map that moves three points at random, then displacements that are smooth over the image."""
    alpha, sigma, affine = parameters
    grid = np.indices((SIZE, SIZE)).reshape(2, -1)
    middle, arm = SIZE // 2, SIZE // 3
    points = np.array([[middle + arm, middle + arm], [middle + arm, middle - arm], [middle - arm, middle - arm]], float)
    moved = points + rng.uniform(-affine, affine, size=(len(x), 3, 2))
    ones = np.ones((len(x), 3, 1))
    back = np.linalg.solve(np.concatenate([moved, ones], axis=-1), np.broadcast_to(points, moved.shape))
    from_where = np.einsum("nkd,kp->ndp", back, np.concatenate([grid, np.ones_like(grid[:1])]))
    shifts = rng.uniform(-1, 1, size=(len(x), 2, SIZE, SIZE))
    shifts = alpha * ndimage.gaussian_filter(shifts, (0, 0, sigma, sigma), mode="reflect", truncate=3)
    warped = [_sample(image, at, "mirror") for image, at in zip(x, from_where, strict=True)]
    displaced = grid + shifts.reshape(len(x), 2, -1)
    return np.stack([_sample(image, at, "reflect") for image, at in zip(warped, displaced, strict=True)])


def pixelate(x: np.ndarray, factor: float, _rng: np.random.Generator) -> np.ndarray:
    small, box = int(SIZE * factor), Image.Resampling.BOX
    return _by_pillow(x, lambda image: image.resize((small, small), box).resize((SIZE, SIZE), box))


def jpeg_compression(x: np.ndarray, quality: int, _rng: np.random.Generator) -> np.ndarray:
    def compress(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _by_pillow(x, compress)


def _blur(x: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")


def _smear(x: np.ndarray, radius: int, sigma: float, degrees: np.ndarray) -> np.ndarray:
    """A one-sided Gaussian along a direction for each image, at whole pixels, the border repeated."""
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    direction = np.stack([np.sin(np.radians(degrees)), np.cos(np.radians(degrees))])
    images, out = np.arange(len(x))[:, None, None], np.zeros_like(x)
    for tap, weight in enumerate(weights / weights.sum()):
        rows, columns = np.clip(np.arange(SIZE) + np.ceil(tap * direction - 0.5).astype(int)[..., None], 0, SIZE - 1)
        out += weight * x[images, rows[:, :, None], columns[:, None, :]]
    return out


def _zoom(x: np.ndarray, factor: float) -> np.ndarray:
    """The middle of images, enlarged linearly; as a product with a matrix on either side."""
    kept = int(np.ceil(SIZE / factor))
    start = (SIZE - kept) // 2
    matrix = np.asarray(ndimage.zoom(np.eye(SIZE)[start : start + kept], (factor, 1), order=1))
    trim = (len(matrix) - SIZE) // 2
    matrix = matrix[trim : trim + SIZE].astype(x.dtype)
    return np.einsum("ai,bj,nijc->nabc", matrix, matrix, x, optimize=True)


def _plasma(count: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Cloudy maps in [0, 1] by the diamond-square algorithm on a torus."""
    heights, step, wobble = np.zeros((count, SIZE, SIZE)), SIZE, 100.0

    def settle(sums: np.ndarray) -> np.ndarray:
        return sums / 4 + wobble * rng.uniform(-wobble, wobble, sums.shape)

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        below, right = np.roll(corners, -1, axis=1), np.roll(corners, -1, axis=2)
        centres = settle(corners + below + right + np.roll(below, -1, axis=2))
        heights[:, ::step, half::step] = settle(corners + right + centres + np.roll(centres, 1, axis=1))
        heights[:, half::step, ::step] = settle(corners + below + centres + np.roll(centres, 1, axis=2))
        heights[:, half::step, half::step] = centres
        step, wobble = half, wobble / decay
    heights -= heights.min(axis=(1, 2), keepdims=True)
    return heights / heights.max(axis=(1, 2), keepdims=True)


def _sample(image: np.ndarray, at: np.ndarray, mode: str) -> np.ndarray:
    """Linear interpolation of an image at ``[row or column, pixel]``."""
    channels = [ndimage.map_coordinates(channel, at, order=1, mode=mode) for channel in np.moveaxis(image, -1, 0)]
    return np.stack(channels, axis=-1).reshape(image.shape)


def _by_pillow(x: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    pixels = np.round(x * 255).astype(np.uint8)
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in pixels]) / 255


# By name, each with its parameters at the five severities.
CORRUPTIONS: dict[str, tuple[Corruption, tuple[Any, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (glass_blur, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
    "motion_blur": (motion_blur, ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))),
    "zoom_blur": (zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        elastic_transform,
        ((0.0, 0.0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
    ),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40)),
}
