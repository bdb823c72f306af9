"""Robustness to the common corruptions of CIFAR-10-C and ImageNet-C: their images, and accuracy on them.

Computed images lack frost, so that a mean over them is one over the other fourteen corruptions. Wherever cells are
made, ``names`` keeps only these corruptions; default: all there are.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.datasets import cifar_c, imagenet, sources
from experiments.datasets.stream import Evaluation
from experiments.rows.jsonl import Row

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
SEVERITIES = range(1, 6)

_TFDS_SPLITS = {"cifar10_corrupted": "test", "imagenet2012_corrupted": "validation"}
_TFDS_NAMES = {"cifar10_corrupted": {"glass_blur": "frosted_glass_blur", "elastic_transform": "elastic"}}


class Cell(NamedTuple):
    """One corruption at one severity.

    Attributes:
      corruption: its name, in :data:`CORRUPTIONS`.
      severity: 1 to 5.
      batches: pairs of raw images and labels, where rows that fill the last batch have label -1; whole in each process.
    """

    corruption: str
    severity: int
    batches: Iterable[tuple[np.ndarray, np.ndarray]]


def from_tfds(
    name: str, batch_size: int, data_dir: Path, *, image_size: int, names: Collection[str] = ()
) -> Iterator[Cell]:
    """The cells of "cifar10_corrupted" (image_size 32) or "imagenet2012_corrupted" (224), as prepared by TFDS.

    Raises:
      FileNotFoundError: before any cell is read, if one is not prepared.
    """
    renamed, folder = _TFDS_NAMES.get(name, {}), sources.tfds_folder(data_dir)
    paths = {(c, s): f"{name}/{renamed.get(c, c)}_{s}" for c in _chosen(names, CORRUPTIONS) for s in SEVERITIES}
    if missing := [path for path in paths.values() if not sources.versions(path, folder)]:
        raise FileNotFoundError(
            f"Of the {len(paths)} corruptions in {name}, {len(missing)} are not prepared in {folder}, such as "
            f"{missing[0]}. {sources.how_to_prepare(missing[0])}"
        )
    open_images = partial(sources.images, split=_TFDS_SPLITS[name], data_dir=folder)
    example = partial(_decoded, image_size=image_size)
    return (Cell(*cell, _batches(open_images(path), example, batch_size, image_size)) for cell, path in paths.items())


def from_npy(folder: Path, batch_size: int, *, names: Collection[str] = ()) -> Iterator[Cell]:
    """The cells of CIFAR-10-C as released: a folder with labels.npy and a file per corruption, severities in turn.

    Raises:
      FileNotFoundError: naming the files that are missing.
    """
    chosen = _chosen(names, CORRUPTIONS)
    files = {name: folder / f"{name}.npy" for name in ("labels", *chosen)}
    if missing := [file.name for file in files.values() if not file.is_file()]:
        raise FileNotFoundError(f"{folder} is not CIFAR-10-C as released: it lacks {', '.join(missing)}.")
    labels = np.load(files["labels"])
    rows = len(labels) // len(SEVERITIES)

    def cell(corruption: str, severity: int) -> Cell:
        part = slice((severity - 1) * rows, severity * rows)
        images = np.load(files[corruption], mmap_mode="r")[part]
        return Cell(corruption, severity, _array_batches(images, labels[part], batch_size))

    return (cell(corruption, severity) for corruption in chosen for severity in SEVERITIES)


def computed(images: np.ndarray, labels: np.ndarray, batch_size: int, *, names: Collection[str] = ()) -> Iterator[Cell]:
    """Cells made from the test images of CIFAR-10, without frost; see :mod:`experiments.datasets.cifar_c`."""
    return (
        Cell(name, severity, _array_batches(cifar_c.corrupt(name, severity, images), labels, batch_size))
        for name in _chosen(names, cifar_c.CORRUPTIONS)
        for severity in SEVERITIES
    )


def accuracy_row(cell: Cell, predict: Callable[[np.ndarray], Any]) -> Row:
    """``{"corruption", "severity", "accuracy", "examples"}`` of a cell; ``predict`` maps images to labels."""
    correct = examples = 0
    for images, labels in cell.batches:
        correct += int(np.sum(np.asarray(predict(images)) == labels))
        examples += int(np.sum(labels >= 0))
    return {
        "corruption": cell.corruption,
        "severity": cell.severity,
        "accuracy": correct / examples,
        "examples": examples,
    }


def summary(rows: Iterable[Row], clean_accuracy: float) -> Row:
    """Mean accuracy over the cells there are, not weighted by another network's errors; alone, and relative to clean.

    "missing" names the corruptions without a cell, which are not in the mean: frost, where images are computed.
    """
    rows = list(rows)
    mean = _mean(rows)
    return {
        "mean_corruption_accuracy": mean,
        "clean_accuracy": clean_accuracy,
        "relative_accuracy": mean / clean_accuracy,
        "by_corruption": {name: _mean(rows, corruption=name) for name in dict.fromkeys(r["corruption"] for r in rows)},
        "by_severity": {str(s): _mean(rows, severity=s) for s in sorted({r["severity"] for r in rows})},
        "missing": [name for name in CORRUPTIONS if name not in {r["corruption"] for r in rows}],
    }


def _chosen(names: Collection[str], known: Collection[str]) -> list[str]:
    """In the order of the benchmark."""
    if foreign := [name for name in names if name not in known]:
        raise ValueError(f"There are no corruptions {foreign} here; there are {', '.join(known)}.")
    return [name for name in known if not names or name in names]


def _mean(rows: list[Row], **where: Any) -> float:
    return float(np.mean([row["accuracy"] for row in rows if where.items() <= row.items()]))


def _batches(source: Any, example: Callable[[Any], Any], batch_size: int, image_size: int) -> Evaluation:
    padding = np.zeros((image_size, image_size, 3), np.uint8), np.int32(-1)
    return Evaluation(source, example, padding, batch_size, process_index=0, process_count=1)


def _array_batches(images: np.ndarray, labels: np.ndarray, batch_size: int) -> Evaluation:
    def example(row: int) -> tuple[np.ndarray, np.int32]:
        return images[row], np.int32(labels[row])

    return _batches(range(len(labels)), example, batch_size, images.shape[1])


def _decoded(record: dict[str, Any], image_size: int) -> tuple[np.ndarray, np.int32]:
    """ImageNet-C's images are crops already, so they are not resized."""
    image = imagenet.decode(record["image"])
    box = imagenet.central_box(image.width, image.height, image_size, image_size)
    return np.asarray(image.crop(box)), np.int32(record["label"])
