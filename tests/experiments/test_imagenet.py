"""ImageNet's crops and flips, on small TFDS folders written as TFDS writes them."""

import itertools
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from prepared import encoded

from experiments.datasets import imagenet


@pytest.mark.parametrize(("misfits", "box"), [(0, (0, 0, 10, 8)), (9, (0, 0, 10, 8)), (10, (43, 0, 56, 10))])
def test_ten_boxes_are_tried(misfits, box):
    """Of 100 by 10 pixels: all of the area at 4:3 is too high, 8 % of it fits; the last resort is 13 by 10."""
    asked = []

    class Draws:
        def uniform(self, low, high):
            asked.append((low, high))
            return low if low > 0 and len(asked) > 2 * misfits else high

        def integers(self, _):
            return 0

    assert imagenet.random_box(100, 10, Draws()) == box
    assert asked == [(0.08, 1.0), (math.log(3 / 4), math.log(4 / 3))] * min(misfits + 1, 10)


def test_the_middle_224_pixels_are_of_an_image_of_256():
    pixels = np.random.default_rng(0).integers(0, 256, (256, 300, 3), np.uint8)
    np.testing.assert_array_equal(imagenet.central_crop(Image.fromarray(pixels), 224), pixels[16:240, 38:262])


def take(batches, count):
    return list(itertools.islice(batches, count))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_random_boxes_are_in_bounds():
    rng = np.random.default_rng(0)
    areas, ratios, corners, ends = [], [], set(), set()
    for _ in range(2000):
        left, top, right, bottom = imagenet.random_box(80, 70, rng)
        assert 0 <= left < right <= 80
        assert 0 <= top < bottom <= 70
        areas.append((right - left) * (bottom - top) / 5600)
        ratios.append((right - left) / (bottom - top))
        corners.add((left, top))
        ends |= {("across", left, right)} if right - left < 80 else set()
        ends |= {("down", top, bottom)} if bottom - top < 70 else set()
    # Sides are whole pixels.
    assert 0.07 < min(areas) < 0.1
    assert 0.9 < max(areas) <= 1
    assert 0.70 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.42
    # Wide ones fit a little more often.
    assert abs(np.median(np.log(ratios))) < 0.1
    assert len(corners) > 800
    for way, length in (("across", 80), ("down", 70)):  # smaller ones reach either end
        first, last = zip(*((begin, end) for w, begin, end in ends if w == way), strict=True)
        assert (min(first), max(last)) == (0, length)


@pytest.mark.parametrize(
    ("size", "box"), [((400, 10), (193, 0, 206, 10)), ((10, 400), (0, 193, 10, 206)), ((1, 1), (0, 0, 1, 1))]
)
def test_thin_images_fall_back_to_the_middle(size, box):
    """13 is 10 · 4/3, rounded."""

    largest = SimpleNamespace(uniform=lambda low, high: high, integers=lambda high: 0)
    assert imagenet.random_box(*size, largest) == box


def test_train_images_are_a_function_of_seed_and_step(tfds_folder):
    stream = imagenet.train_stream(2, tfds_folder, image_size=24)
    assert stream.steps_per_epoch == 3
    whole = take(stream.batches(0), 9)
    images, labels = whole[0]
    assert images.shape == (2, 24, 24, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    same(take(stream.batches(0, 4), 5), whole[4:])
    by_label = {}
    for images, labels in whole:
        for image, label in zip(images, labels, strict=True):
            by_label.setdefault(int(label), []).append(image)
    assert sorted(by_label) == list(range(6))
    # Each image three times, every time another crop.
    assert all((crops[i] != crops[i - 1]).any() for crops in by_label.values() for i in range(3))


def test_a_train_example_is_its_box_resized_and_half_are_flipped(pictures):
    record, flips = {"image": encoded(pictures[0]), "label": 7}, 0
    for seed in range(40):
        pixels, label = imagenet._train_example(record, np.random.default_rng(seed), image_size=20)
        image = Image.fromarray(pictures[0])
        box = imagenet.random_box(*image.size, np.random.default_rng(seed))
        expected = np.asarray(image.crop(box).resize((20, 20), Image.Resampling.BILINEAR))
        assert np.array_equal(pixels, expected) or np.array_equal(pixels, expected[:, ::-1])
        flips += np.array_equal(pixels, expected[:, ::-1])
        assert label == 7
    assert 10 < flips < 30


def test_central_crops_against_a_computation_by_hand(tfds_folder, pictures):
    """For 21, the shorter side becomes 24; a side of twice the size is then averaged by hand."""
    wide = np.random.default_rng(0).integers(0, 256, (24, 31, 3), np.uint8)
    np.testing.assert_array_equal(imagenet.central_crop(Image.fromarray(wide), 21), wide[1:22, 5:26])
    constant = np.full((48, 62, 3), 9, np.uint8)
    constant[:, :31] = 200
    crop = np.asarray(imagenet.central_crop(Image.fromarray(constant), 21))
    # Column 31 of 62 is 15.5 of 31, less the 5 left of the crop: column 10 is a mean of both colours.
    assert (crop[:, :10] == 200).all()
    assert (crop[:, 11:] == 9).all()
    np.testing.assert_allclose(crop[:, 10], 104.5, atol=1)

    batches = list(imagenet.evaluation(4, tfds_folder, image_size=21))
    assert [images.shape for images, _ in batches] == [(4, 21, 21, 3)] * 2
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), [0, 1, 2, 3, 4, 5, -1, -1])
    np.testing.assert_array_equal(batches[0][0][0], imagenet.central_crop(Image.fromarray(pictures[0]), 21))
    grey = batches[1][0][1]
    assert (grey == grey[..., :1]).all()


def test_missing_data_says_how_to_prepare_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prepared imagenet2012 in .*tfds.data_source\('imagenet2012'"):
        imagenet.train_stream(2, tmp_path, image_size=224)
