"""Image data sets that fit on the device: loading, order, and exact evaluation batches."""

import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.datasets import sources
from experiments.datasets.kinds import KINDS


class Dataset(NamedTuple):
    """Images uint8[n, height, width, channels], labels int32[n]."""

    train_images: jax.Array
    train_labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array


def load(name: str, path: Path | None = None, subset: int | None = None) -> Dataset:
    """Reads a data set onto the device, in its official order; ``subset`` keeps the first rows of the training set.

    Raises:
      FileNotFoundError: saying how to get the data.
      ValueError: for a subset larger than the data set, or a file with other arrays.
    """
    if name == "digits":
        arrays = _digits()
    elif path is not None and path.suffix == ".npz":
        arrays = _from_npz(name, path)
    else:
        arrays = _from_tfds(name, path)
    train_images, train_labels, test_images, test_labels = arrays
    if subset is not None and subset > len(train_labels):
        raise ValueError(f"subset={subset} is more than the {len(train_labels)} training rows of {name}.")
    pieces = (train_images[:subset], train_labels[:subset].astype(np.int32), test_images, test_labels.astype(np.int32))
    return Dataset(*jax.device_put(pieces))


def hold_out(dataset: Dataset, rows: int) -> Dataset:
    """The data set with the last rows of its training set in place of its test set.

    Raises:
      ValueError: when nothing would be left to train on.
    """
    left = len(dataset.train_labels) - rows
    if left < 1:
        raise ValueError(f"validation={rows} leaves none of the {len(dataset.train_labels)} training rows.")
    images, labels = dataset.train_images, dataset.train_labels
    return Dataset(images[:left], labels[:left], images[left:], labels[left:])


def with_label_noise(dataset: Dataset, share: float, classes: int, seed: int) -> Dataset:
    """The data set with a share of its training labels replaced, each by one of the other classes at random."""
    labels = np.array(dataset.train_labels)
    random = np.random.default_rng([seed, zlib.crc32(b"label noise")])
    wrong = random.choice(len(labels), round(share * len(labels)), replace=False)
    labels[wrong] = (labels[wrong] + random.integers(1, classes, len(wrong))) % classes
    return dataset._replace(train_labels=jax.device_put(labels))


def epoch_order(seed: int, epoch: int, examples: int, batch_size: int) -> np.ndarray:
    """Rows of the training set, int32[steps, batch_size]; the last partial batch is dropped."""
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    steps = examples // batch_size
    return np.asarray(jax.random.permutation(key, examples)[: steps * batch_size].reshape(steps, batch_size))


def eval_batches(images: jax.Array, labels: jax.Array, size: int) -> list[tuple[jax.Array, jax.Array]]:
    """Equal batches of all rows; the padding of the last one has label -1."""
    missing = -len(labels) % size
    images = jnp.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
    labels = jnp.pad(labels, (0, missing), constant_values=-1)
    return list(zip(images.reshape(-1, size, *images.shape[1:]), labels.reshape(-1, size), strict=True))


def _digits() -> tuple[np.ndarray, ...]:
    """scikit-learn's 8x8 digits: a fixed split, stratified by class, of 1437 and 360 rows."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    return images[train], labels[train], images[test], labels[test]


def _from_npz(name: str, path: Path) -> tuple[np.ndarray, ...]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. {sources.how_to_prepare(name)}")
    fields = ("train_images", "train_labels", "test_images", "test_labels")
    try:
        with np.load(path) as stored:
            names = sorted(stored.files)
            arrays = tuple(stored[field] for field in fields if field in names)
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an .npz of plain arrays ({error}).") from error
    if missing := sorted(set(fields) - set(names)):
        raise ValueError(f"{path} lacks the arrays {missing}; it has {names}.")
    for field, images in zip(fields[::2], arrays[::2], strict=True):
        if images.shape[1:] != KINDS[name].shape or images.dtype != np.uint8:
            raise ValueError(
                f"{field} in {path} must be uint8 with shape (n, {', '.join(map(str, KINDS[name].shape))}) for {name}; "
                f"got {images.dtype} with shape {images.shape}."
            )
    for field, images, labels in zip(fields[1::2], arrays[::2], arrays[1::2], strict=True):
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
            raise ValueError(
                f"{field} in {path} must be whole numbers, one for each of its {len(images)} images, and not none; "
                f"got {labels.dtype} with shape {labels.shape}."
            )
        if labels.min() < 0 or labels.max() >= KINDS[name].classes:
            raise ValueError(
                f"{field} in {path} must lie in [0, {KINDS[name].classes}) for {name}; "
                f"got {labels.min()} to {labels.max()}."
            )
    if (there := len(np.unique(arrays[1]))) < KINDS[name].classes / 2:  # a small file may lack some
        warnings.warn(
            f"{path} has training images of only {there} of the {KINDS[name].classes} classes of {name}: is it the "
            "file of another data set?",
            stacklevel=2,
        )
    return arrays


def _from_tfds(name: str, folder: Path | None) -> tuple[np.ndarray, ...]:
    """Sorted by id, which is the official order."""
    arrays = []
    for split in ("train", "test"):
        records: Any = sources.records(name, split, folder)
        rows = sorted(records, key=lambda row: row["id"])
        arrays += [np.stack([row["image"] for row in rows]), np.array([row["label"] for row in rows])]
    return tuple(arrays)
