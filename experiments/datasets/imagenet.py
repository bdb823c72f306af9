"""ImageNet-1K: decoded, cropped and resized by pillow, raw pixels out."""

import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.datasets import sources
from experiments.datasets.stream import Evaluation, Stream

NAME = "imagenet2012"  # in TFDS
Box = tuple[int, int, int, int]
SCALE, LOG_RATIO = (0.08, 1.0), (math.log(3 / 4), math.log(4 / 3))


def train_stream(batch_size: int, data_dir: Path | None, *, image_size: int) -> Stream:
    """Batches ``(uint8[n, image_size, image_size, 3], int32[n])`` of random resized crops, half of them flipped."""
    example = partial(_train_example, image_size=image_size)
    return Stream(sources.images(NAME, "train", data_dir), example, batch_size)


def evaluation(batch_size: int, data_dir: Path | None, *, image_size: int) -> Evaluation:
    """Batches as in training, of central crops; the rows that fill the last one have label -1."""
    padding = np.zeros((image_size, image_size, 3), np.uint8), np.int32(-1)
    example = partial(_eval_example, image_size=image_size)
    return Evaluation(sources.images(NAME, "validation", data_dir), example, padding, batch_size)


def decode(encoded: bytes) -> Image.Image:
    """RGB, whatever the file holds."""
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def random_resized_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    crop = image.crop(random_box(image.width, image.height, rng))
    return crop.resize((size, size), Image.Resampling.BILINEAR)


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """Left, top, right and bottom of a crop with 8 % to all of the area and an aspect ratio of 3:4 to 4:3.

    After ten draws that do not fit, the largest central crop whose ratio is in bounds.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(*LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    narrowest, widest = (math.exp(bound) for bound in LOG_RATIO)
    return central_box(width, height, min(width, round(height * widest)), min(height, round(width / narrowest)))


def central_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle of the image, with its shorter side first resized to 8/7 of the size: 256 for 224."""
    scale = round(size * 8 / 7) / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop(central_box(width, height, size, size))


def central_box(width: int, height: int, crop_width: int, crop_height: int) -> Box:
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def _train_example(record: dict[str, Any], rng: np.random.Generator, image_size: int) -> tuple[np.ndarray, np.int32]:
    pixels = np.asarray(random_resized_crop(decode(record["image"]), image_size, rng))
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels, np.int32(record["label"])


def _eval_example(record: dict[str, Any], image_size: int) -> tuple[np.ndarray, np.int32]:
    return np.asarray(central_crop(decode(record["image"]), image_size)), np.int32(record["label"])
