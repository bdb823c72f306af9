"""Corrupted images: in order of severity, constant where they must be, computed, released, or prepared by TFDS."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image
from prepared import encoded, image_features, write_tfds

from experiments.datasets import cifar_c, corruptions


@pytest.fixture(scope="module")
def clean():
    """Smooth 32x32 images."""
    small = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC)) for x in small])


@pytest.mark.parametrize("name", cifar_c.CORRUPTIONS)
def test_corruptions_are_deterministic_and_grow(name, clean):
    corrupted = [cifar_c.corrupt(name, severity, clean) for severity in range(1, 6)]
    assert all(x.dtype == np.uint8 and x.shape == clean.shape for x in corrupted)
    np.testing.assert_array_equal(corrupted[2], cifar_c.corrupt(name, 3, clean))
    change = [np.abs(x.astype(float) - clean).mean() for x in corrupted]
    assert change[0] > 0.2
    # The elastic transform becomes finer rather than larger.
    assert name == "elastic_transform" or change[4] > 1.2 * change[0]
    deterministic = np.array_equal(corrupted[2], cifar_c.corrupt(name, 3, clean, seed=1))
    blurs = ("defocus_blur", "zoom_blur")
    assert deterministic == (name in (*blurs, "brightness", "contrast", "pixelate", "jpeg_compression"))


@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "contrast", "pixelate"])
def test_blurs_leave_constant_images_alone(name):
    grey = np.full((2, 32, 32, 3), 100, np.uint8)
    # Pixels are cut to whole numbers, as in the benchmark.
    assert np.abs(cifar_c.corrupt(name, 5, grey).astype(int) - 100).max() <= 1


def test_corruptions_with_known_values():
    grey = np.full((50, 32, 32, 3), 0.5, np.float32)
    rng = np.random.default_rng(0)
    assert abs(cifar_c.gaussian_noise(grey, 0.08, rng).std() - 0.08) < 5e-4
    assert abs(cifar_c.shot_noise(grey, 100, rng).std() - (0.5 / 100) ** 0.5) < 5e-4
    flipped = cifar_c.impulse_noise(grey, 0.05, rng)
    assert abs((flipped == 0).mean() - 0.025) < 2e-3
    assert abs((flipped == 1).mean() - 0.025) < 2e-3
    np.testing.assert_allclose(cifar_c.contrast(np.float32([[[[0.2]], [[0.6]]]]), 0.5, rng).ravel(), [0.3, 0.5])
    np.testing.assert_allclose(cifar_c.brightness(grey, 0.2, rng), 0.7, rtol=1e-6)
    # A point of light becomes weights that fall off to one side along the row.
    point = np.zeros((1, 32, 32, 1))
    point[0, 16, 16] = 1
    weights = np.exp(-(np.arange(13) ** 2) / 8) / np.exp(-(np.arange(13) ** 2) / 8).sum()
    smeared = cifar_c._smear(point, 6, 2.0, np.zeros(1))[0, :, :, 0]
    np.testing.assert_allclose(smeared[16, 4:17], weights[::-1])
    np.testing.assert_allclose(smeared.sum(), 1)


def test_corruption_names_and_arguments_are_checked(clean):
    assert [name for name in corruptions.CORRUPTIONS if name not in cifar_c.CORRUPTIONS] == ["frost"]
    assert list(cifar_c.CORRUPTIONS) == [name for name in corruptions.CORRUPTIONS if name != "frost"]
    with pytest.raises(ValueError, match="Unknown corruption 'frost'; there are gaussian_noise"):
        cifar_c.corrupt("frost", 1, clean)
    with pytest.raises(ValueError, match="severity must be 1 to 5; got 0"):
        cifar_c.corrupt("fog", 0, clean)
    with pytest.raises(ValueError, match=r"must be uint8\[n, 32, 32, 3\]; got float64"):
        cifar_c.corrupt("fog", 1, clean / 255)


def test_released_files_give_rows_and_their_means(tmp_path):
    """Four images, whose first pixel is the prediction, right as often as the file says."""
    labels = np.tile([1, 2, 3, 4], 5)
    np.save(tmp_path / "labels.npy", labels)
    for i, name in enumerate(corruptions.CORRUPTIONS):
        images = np.zeros((20, 32, 32, 3), np.uint8)
        images[:, 0, 0, 0] = labels
        images[19 - i :, 0, 0, 0] = 9  # Wrong from the last row of severity 5 on.
        np.save(tmp_path / f"{name}.npy", images)
    cells = corruptions.from_npy(tmp_path, batch_size=3)
    rows = [corruptions.accuracy_row(cell, lambda images: images[:, 0, 0, 0]) for cell in cells]
    assert [(row["corruption"], row["severity"]) for row in rows] == list(
        itertools.product(corruptions.CORRUPTIONS, range(1, 6))
    )
    assert {row["examples"] for row in rows} == {4}
    assert [row["accuracy"] for row in rows[5:10]] == [1, 1, 1, 1, 0.5]
    summary = corruptions.summary(rows, clean_accuracy=0.8)
    assert summary["by_corruption"]["frost"] == (20 - 9) / 20
    assert summary["mean_corruption_accuracy"] == pytest.approx(1 - 8 / 20)
    assert summary["by_severity"]["5"] == pytest.approx((3 + 2 + 1) / 60)
    assert summary["relative_accuracy"] == pytest.approx(0.6 / 0.8)
    assert summary["missing"] == []
    json.dumps([rows, summary])
    (tmp_path / "fog.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"is not CIFAR-10-C as released: it lacks fog.npy\."):
        corruptions.from_npy(tmp_path, batch_size=3)


def test_computed_cells_lack_frost(clean, monkeypatch):
    kept = ("gaussian_noise", "contrast")
    monkeypatch.setattr(cifar_c, "CORRUPTIONS", {name: cifar_c.CORRUPTIONS[name] for name in kept})
    labels = np.arange(12) % 10
    cells = corruptions.computed(clean, labels, 5)
    rows = [corruptions.accuracy_row(cell, lambda images: np.zeros(len(images))) for cell in cells]
    assert [row["accuracy"] for row in rows] == [2 / 12] * 10
    summary = corruptions.summary(rows, 0.5)
    assert list(summary["by_corruption"]) == list(kept)
    assert "frost" in summary["missing"]
    assert len(summary["missing"]) == 13


@pytest.mark.parametrize(
    ("name", "side", "glass"),
    [("cifar10_corrupted", 32, "frosted_glass_blur"), ("imagenet2012_corrupted", 40, "glass_blur")],
)
def test_corruptions_prepared_by_tfds(name, side, glass, tmp_path, monkeypatch):
    monkeypatch.setattr(corruptions, "CORRUPTIONS", ("glass_blur", "fog"))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, side, 3), np.uint8)
    rows = [{"image": encoded(x), "label": i} for i, x in enumerate(pixels)]
    split = "test" if side == 32 else "validation"
    missing = f"{name}/{glass}_5"
    for config in [f"{glass}_{s}" for s in range(1, 5)] + [f"fog_{s}" for s in range(1, 6)]:
        write_tfds(tmp_path / name / config / "1.0.0", image_features(), {split: rows})
    with pytest.raises(FileNotFoundError, match=rf"Of the 10 .*, 1 are not prepared .*tfds.data_source\('{missing}'"):
        corruptions.from_tfds(name, 4, tmp_path, image_size=32)
    write_tfds(tmp_path / missing / "1.0.0", image_features(), {split: rows})
    cells = list(corruptions.from_tfds(name, 4, tmp_path, image_size=32))
    assert [cell[:2] for cell in cells] == list(itertools.product(("glass_blur", "fog"), range(1, 6)))
    ((images, labels),) = cells[3].batches
    np.testing.assert_array_equal(labels, [0, 1, -1, -1])
    offset = (side - 32) // 2
    np.testing.assert_array_equal(images[:2], pixels[:, 4:36, offset : offset + 32])
