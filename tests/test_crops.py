"""Crops of ImageNet where the numbers of their definition decide: what is drawn, how often, and the ratio 8:7."""

import math

import numpy as np
import pytest
from PIL import Image

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
