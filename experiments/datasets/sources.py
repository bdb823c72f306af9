"""Data sets that TFDS has prepared, as records by index; reading them needs no TensorFlow."""

import os
from pathlib import Path
from typing import Any

from experiments.datasets.stream import Source


def records(name: str, split: str, data_dir: Path | None) -> Source:
    """A split of a prepared data set, ``name`` or ``name/config``, in TFDS's folder if no other is given.

    Raises:
      FileNotFoundError: saying how to prepare it.
    """
    return _builder(name, data_dir).as_data_source(split)


def images(name: str, split: str, data_dir: Path | None) -> Source:
    """As :func:`records`, for image classification: ``{"image": bytes of the file, "label": int, ...}``."""
    import tensorflow_datasets as tfds

    return _builder(name, data_dir).as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


def tfds_folder(data_dir: Path | None) -> Path:
    return (data_dir or Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))).expanduser()


def versions(name: str, folder: Path) -> list[Path]:
    """The folders of a data set's versions that have been prepared."""
    return [file.parent for file in (folder / name).glob("*/dataset_info.json")]


def how_to_prepare(name: str) -> str:
    """What to do where a data set is missing, the easiest first."""
    archives = ", and the archives in DIR/downloads/manual," if name == "imagenet2012" else ""
    prepared = (
        f"With tensorflow installed{archives} TFDS prepares it once: python -c "
        f"\"import tensorflow_datasets as tfds; tfds.data_source('{name}', data_dir='DIR')\"; then pass --data DIR."
    )
    if name not in ("cifar10", "cifar100"):
        return prepared
    return (
        "Pass --data FILE.npz with the arrays train_images, train_labels, test_images and test_labels. "
        f"{prepared} Digits need nothing (--dataset digits, table --scale digits)."
    )


def _builder(name: str, data_dir: Path | None) -> Any:
    """TFDS's builder of the newest version there is, whichever one its code would prepare now."""
    folder = tfds_folder(data_dir)
    if not (found := versions(name, folder)):
        raise FileNotFoundError(f"There is no prepared {name} in {folder}. {how_to_prepare(name)}")
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(max(found, key=lambda path: tfds.core.Version(path.name)))
