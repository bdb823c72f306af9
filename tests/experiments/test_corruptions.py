"""CIFAR-10-C's corruptions against their published definitions (Hendrycks & Dietterich, 2019), with the same draws."""

import colorsys
import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from experiments.datasets import cifar_c

# As they are printed in the code of the benchmark, except that zooms have the ends of their ranges alone.
PUBLISHED = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)),  # all reach one pixel
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),
    "snow": ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
             (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic_transform": [(32 * a, 32 * b, 32 * c) for a, b, c in (
        (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))],
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": (80, 65, 58, 50, 40),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_severities_are_those_of_the_benchmark(name):
    np.testing.assert_allclose(cifar_c.CORRUPTIONS[name][1], PUBLISHED[name], rtol=1e-12)


@pytest.fixture(scope="module")
def clean():
    """Smooth images of low contrast, so that nothing is clipped but what corruptions themselves clip."""
    small = np.random.default_rng(0).integers(60, 190, (3, 6, 6, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC)) for x in small])


def clipped_zoom(image, factor):
    kept = int(np.ceil(32 / factor))
    top = (32 - kept) // 2
    image = ndimage.zoom(image[top : top + kept, top : top + kept], (factor, factor, 1), order=1)
    trim = (len(image) - 32) // 2
    return image[trim : trim + 32, trim : trim + 32]


def brightness(image, amount):
    hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3)]
    return np.reshape([colorsys.hsv_to_rgb(h, s, min(v + amount, 1)) for h, s, v in hsv], (32, 32, 3))


def contrast(image, factor):
    means = [image[..., channel].mean() for channel in range(3)]
    return (image - means) * factor + means


def defocus_blur(image, parameters):
    radius, sigma = parameters
    disk = np.array([[float(i**2 + j**2 <= radius**2) for j in range(-8, 9)] for i in range(-8, 9)])
    bell = np.exp(-(np.array([-1.0, 0, 1]) ** 2) / (2 * sigma**2))
    kernel = ndimage.correlate(disk / disk.sum(), np.outer(bell, bell) / bell.sum() ** 2, mode="constant")
    wide = np.pad(image, ((8, 8), (8, 8), (0, 0)), mode="reflect")
    return sum(kernel[i, j] * wide[i : i + 32, j : j + 32] for i in range(17) for j in range(17))


def zoom_blur(image, end):
    factors = np.arange(1, end, 0.01)
    return (image + sum(clipped_zoom(image, factor) for factor in factors)) / (len(factors) + 1)


@pytest.mark.parametrize("corruption", [brightness, contrast, defocus_blur, zoom_blur])
def test_corruptions_without_draws(corruption, clean):
    """Cut to whole numbers, not rounded."""
    for severity in range(1, 6):
        got = cifar_c.corrupt(corruption.__name__, severity, clean[:1])[0].astype(float)
        expected = corruption(clean[0] / 255, PUBLISHED[corruption.__name__][severity - 1]).clip(0, 1) * 255
        assert (expected - got).min() > -1e-3
        assert (expected - got).max() < 1 + 1e-3


def pixelate(image, share):
    small = image.resize((int(32 * share), int(32 * share)), Image.Resampling.BOX)
    return small.resize((32, 32), Image.Resampling.BOX)


def jpeg_compression(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


@pytest.mark.parametrize("corruption", [pixelate, jpeg_compression])
def test_corruptions_of_whole_numbers_lose_none(corruption, clean):
    for severity in range(1, 6):
        parameter = PUBLISHED[corruption.__name__][severity - 1]
        expected = [np.asarray(corruption(Image.fromarray(image), parameter)) for image in clean]
        np.testing.assert_array_equal(cifar_c.corrupt(corruption.__name__, severity, clean), expected)


def test_noise_is_another_one_for_every_value_severity_and_name(monkeypatch):
    grey = np.full((4, 32, 32, 3), 128, np.uint8)
    monkeypatch.setitem(cifar_c.CORRUPTIONS, "another", cifar_c.CORRUPTIONS["gaussian_noise"])
    cells = [("gaussian_noise", 1), ("gaussian_noise", 2), ("another", 1), ("impulse_noise", 5)]
    moved = [cifar_c.corrupt(*cell, grey).astype(float) - 128 for cell in cells]
    first = moved[0]
    others = [*moved[1:], *(np.roll(first, 1, axis) for axis in (0, 3)), first[:, ::-1]]
    assert all(abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.05 for other in others)
    salt = moved[3][..., 0] != 0
    assert (salt & (moved[3][..., 1] != 0)).mean() < 0.5 * salt.mean()


def test_glass_takes_the_colour_of_a_neighbour_that_has_not_been_moved_yet():
    """At the least deviation, which blurs nothing: of the four pixels towards the first corner, a quarter each."""
    places = np.stack(np.meshgrid(np.arange(32), np.arange(32), [0], indexing="ij"), axis=-1)[:, :, 0]
    images = np.uint8(np.broadcast_to(places, (20, 32, 32, 3)))
    once = cifar_c.corrupt("glass_blur", 1, images).astype(int) - images
    np.testing.assert_array_equal(once[:, :2], 0)
    np.testing.assert_array_equal(once[:, :, :2], 0)
    shares = [(once[:, 2:, 2:, :2] == (-i, -j)).all(axis=-1).mean() for i in (0, 1) for j in (0, 1)]
    np.testing.assert_allclose(shares, 0.25, atol=0.02)
    assert (once[0] != once[1]).any()
    twice = cifar_c.glass_blur(images / 255, (0.05, 2), np.random.default_rng(0)) * 255 - images
    assert {tuple(d) for d in np.round(twice[..., :2]).astype(int).reshape(-1, 2)} == {
        (-i, -j) for i in range(3) for j in range(3)
    }


def test_glass_is_blurred_before_and_after():
    edge, bell = np.where(np.arange(32) < 16, 0.2, 0.8), np.exp(-(np.arange(-8, 9) ** 2) / 8)
    got = cifar_c.glass_blur(np.repeat(edge, 32).reshape(1, 32, 32, 1), (2.0, 0), np.random.default_rng(0))
    for _ in range(2):
        edge = np.convolve(np.pad(edge, 8, mode="edge"), bell / bell.sum(), "valid")
    np.testing.assert_allclose(got[0, :, 5, 0], edge, atol=1e-6)


class Draws:
    """A generator whose draws are given, and which remembers the bounds that it is asked for."""

    def __init__(self, *draws):
        self.draws, self.asked = iter(draws), []

    def uniform(self, low, high, size):
        self.asked.append((low, high))
        return np.broadcast_to(next(self.draws), size)

    normal = uniform


@pytest.mark.parametrize(("degrees", "rows", "columns"), [(90, 1, 0), (45, 0.7071, 0.7071), (-45, -0.7071, 0.7071)])
def test_streaks_lie_along_their_angle(degrees, rows, columns):
    """Of ImageMagick's blur: tap k of 2r + 1 lies k pixels along, at the nearest one, and weighs exp(-k^2 / 2s^2)."""
    image = np.random.default_rng(1).random((1, 32, 32, 3))
    draws = Draws(np.array([degrees]))
    got = cifar_c.motion_blur(image, (4, 1.5), draws)[0]
    assert draws.asked == [(-45, 45)]
    weights = np.exp(-(np.arange(9.0) ** 2) / (2 * 1.5**2))
    expected = np.zeros((32, 32, 3))
    for tap, weight in enumerate(weights / weights.sum()):
        down, right = int(np.ceil(tap * rows - 0.5)), int(np.ceil(tap * columns - 0.5))
        for i in range(32):
            for j in range(32):
                expected[i, j] += weight * image[0, np.clip(i + down, 0, 31), np.clip(j + right, 0, 31)]
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_snow_is_zoomed_cut_smeared_and_turned(clean):
    x, parameters = clean / 255, (0.55, 0.3, 2.5, 0.5, 12, 4, 0.7)
    random = np.random.default_rng(2)
    layer, degrees = random.normal(0.55, 0.3, (3, 32, 32, 1)), random.uniform(-135, -45, 3)
    draws = Draws(layer, degrees)
    got = cifar_c.snow(x, parameters, draws)
    assert draws.asked == [(0.55, 0.3), (-135, -45)]
    for image, flakes, angle, found in zip(x, layer, degrees, got, strict=True):
        flakes = clipped_zoom(flakes, 2.5)
        flakes[flakes < 0.5] = 0
        flakes = cifar_c._smear(flakes.clip(0, 1)[None], 12, 4, np.array([angle]))[0]
        grey = 0.299 * image[..., :1] + 0.587 * image[..., 1:2] + 0.114 * image[..., 2:]
        whitened = 0.7 * image + 0.3 * np.maximum(image, 1.5 * grey + 0.5)
        np.testing.assert_allclose(found, whitened + flakes + np.rot90(flakes, 2), atol=1e-5)


def plasma(decay, random):
    """Diamond-square on a torus, point by point: what wobbles falls with the square of what the decay leaves."""
    heights, step, wobble = np.zeros((32, 32)), 32, 100.0

    def settle(rows, columns, around):
        noise = random.uniform(-wobble, wobble, (len(rows), len(columns)))
        for i, noises in zip(rows, noise, strict=True):
            for j, u in zip(columns, noises, strict=True):
                heights[i, j] = sum(heights[(i + a) % 32, (j + b) % 32] for a, b in around) / 4 + wobble * u

    while step >= 2:
        half = step // 2
        corners, centres = range(0, 32, step), range(half, 32, step)
        settle(centres, centres, [(a, b) for a in (-half, half) for b in (-half, half)])
        beside = [(0, -half), (0, half), (-half, 0), (half, 0)]
        settle(corners, centres, beside)
        settle(centres, corners, beside)
        step, wobble = half, wobble / decay
    heights -= heights.min()
    return heights / heights.max()


@pytest.mark.parametrize(("amount", "decay"), [(0.2, 3), (1.5, 1.75)])
def test_fog_is_a_plasma_as_bright_as_the_brightest_pixel(amount, decay, clean):
    x = clean[:1] / 255
    got = cifar_c.fog(x, (amount, decay), np.random.default_rng(3))
    cloud = plasma(decay, np.random.default_rng(3))[..., None]
    np.testing.assert_allclose(got[0], (x[0] + amount * cloud) * x.max() / (x.max() + amount), rtol=1e-9)
    dim = np.concatenate([x, 0.5 * x])
    foggy = cifar_c.fog(dim, (amount, decay), np.random.default_rng(3))
    brightest = dim.max(axis=(1, 2, 3), keepdims=True)
    one, other = (foggy * (brightest + amount) / brightest - dim)[..., 0] / amount
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.9  # a cloud of its own


def test_elastic_points_pull_the_image_along_and_displacements_are_read_from():
    """All three points move by one vector, so the image does; displacements of one value stay that under a blur."""
    x = np.random.default_rng(4).random((2, 32, 32, 3))
    nothing = np.zeros((2, 1, 1))
    draws = Draws(nothing, nothing[..., None])
    np.testing.assert_allclose(cifar_c.elastic_transform(x, (3.2, 0.96, 0.96), draws), x, atol=1e-9)
    assert draws.asked == [(-0.96, 0.96), (-1, 1)]
    moved = np.array([[[2.0, 0.0]], [[0.0, -3.0]]])
    got = cifar_c.elastic_transform(x, (3.2, 0.96, 4), Draws(moved, nothing[..., None]))
    np.testing.assert_allclose(got[0, 2:], x[0, :-2], atol=1e-9)
    np.testing.assert_allclose(got[1, :, :-3], x[1, :, 3:], atol=1e-9)
    shifts = np.zeros((2, 2, 1, 1))
    shifts[0, 0], shifts[1, 1] = 1, -1
    got = cifar_c.elastic_transform(x, (3.0, 2.0, 0.96), Draws(nothing, shifts))
    np.testing.assert_allclose(got[0, :-3], x[0, 3:], atol=1e-9)
    np.testing.assert_allclose(got[1, :, 3:], x[1, :, :-3], atol=1e-9)
    # Three points, in turn: the last one alone turns and stretches.
    corner = np.zeros((2, 3, 2))
    corner[:, 2] = 1.6, -0.8
    got = cifar_c.elastic_transform(x, (0, 0, 2), Draws(corner, nothing[..., None]))
    forward = np.linalg.solve([[26, 26, 1], [26, 6, 1], [6, 6, 1]], [[26, 26], [26, 6], [7.6, 5.2]])
    for i, j in ((10, 12), (20, 25)):
        row, column = (np.array([i, j]) - forward[2]) @ np.linalg.inv(forward[:2])
        expected = ndimage.map_coordinates(x[0, ..., 1], [[row], [column]], order=1)
        np.testing.assert_allclose(got[0, i, j, 1], expected[0], atol=1e-9)
