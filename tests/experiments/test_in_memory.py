"""Data sets in memory: their split, order, augmentation and sources."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prepared import encoded, image_features, write_tfds

from experiments import models, sharding, tasks, train
from experiments.config import Config
from experiments.datasets import in_memory, kinds, transforms
from experiments.tasks import arrays, images
from experiments.training import sieving


@pytest.fixture(scope="module")
def digits():
    return in_memory.load("digits")


@pytest.fixture
def cifar_arrays():
    rng = np.random.default_rng(0)
    arrays = {}
    for split, size in (("train", 24), ("test", 10)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (size, 32, 32, 3), np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 10, size)
    return arrays


def test_digits_are_split_completely_and_by_class(digits):
    from sklearn.datasets import load_digits

    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.train_images.dtype == jnp.uint8
    assert digits.test_images.shape == (360, 8, 8, 1)
    images, labels = load_digits(return_X_y=True)
    rows = [np.concatenate(x) for x in ((digits.train_images, digits.test_images), digits[1::2])]
    ours = sorted((row.tobytes(), int(label)) for row, label in zip(*rows, strict=True))
    assert ours == sorted(
        (np.round(row * 255 / 16).astype(np.uint8).tobytes(), int(y)) for row, y in zip(images, labels, strict=True)
    )
    assert np.bincount(digits.test_labels).min() >= 35
    pixels = np.asarray(digits.train_images) / 255
    kind = kinds.KINDS["digits"]
    np.testing.assert_allclose([pixels.mean(), pixels.std()], [kind.mean[0], kind.std[0]], atol=5e-5)


def test_subset_is_the_first_rows(digits):
    np.testing.assert_array_equal(in_memory.load("digits", subset=100).train_images, digits.train_images[:100])
    with pytest.raises(ValueError, match="subset=2000 is more than the 1437 training rows"):
        in_memory.load("digits", subset=2000)


def test_epoch_order_is_a_permutation_of_its_seed_and_epoch():
    order = in_memory.epoch_order(0, 1, examples=103, batch_size=10)
    assert order.shape == (10, 10)
    assert len(np.unique(order)) == 100
    np.testing.assert_array_equal(order, in_memory.epoch_order(0, 1, examples=103, batch_size=10))
    assert (order != in_memory.epoch_order(0, 2, examples=103, batch_size=10)).any()
    assert (order != in_memory.epoch_order(1, 1, examples=103, batch_size=10)).any()


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_augmented_images_are_crops(name):
    kind = kinds.KINDS[name]
    images = np.random.default_rng(0).integers(1, 256, (64, *kind.shape), np.uint8)
    got = np.asarray(jax.jit(lambda key, x: transforms.augment(key, x, kind))(jax.random.key(0), images))
    assert got.shape == images.shape
    assert got.dtype == np.uint8
    height, width, _ = kind.shape
    pad = kind.pad
    seen = set()
    for image, crop in zip(images, got, strict=True):
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        places = [(y, x) for y in range(2 * pad + 1) for x in range(2 * pad + 1)]
        fits = [
            (y, x, flip)
            for y, x in places
            for flip in ((False, True) if kind.flip else (False,))
            if np.array_equal(crop[:, ::-1] if flip else crop, padded[y : y + height, x : x + width])
        ]
        assert len(fits) == 1
        seen |= set(fits)
    assert len(seen) > (8 if pad == 1 else 40)
    assert {flip for _, _, flip in seen} == ({False, True} if kind.flip else {False})


def test_every_test_row_is_counted_once(digits):
    def apply(params, model_state, images, train):
        return jax.nn.one_hot(jnp.zeros(len(images), jnp.int32), 10), model_state

    task = arrays.Task(Config(), models.Network((), (), apply), digits, sharding.make_mesh())
    accuracy = task.evaluate((), ())["test_accuracy"]
    assert accuracy == np.mean(np.asarray(digits.test_labels) == 0)
    labels = np.concatenate([y for _, y in in_memory.eval_batches(digits.test_images, digits.test_labels, 100)])
    np.testing.assert_array_equal(labels[:360], digits.test_labels)
    np.testing.assert_array_equal(labels[360:], np.full(40, -1))


def test_tfds_and_npz_give_the_same_batches_and_losses(cifar_arrays, tmp_path):
    import tensorflow_datasets as tfds

    def shuffled(split):
        images, labels = cifar_arrays[f"{split}_images"], cifar_arrays[f"{split}_labels"]
        order = np.random.default_rng(1).permutation(len(labels))
        return [{"id": f"{split}_{i:05d}".encode(), "image": encoded(images[i]), "label": labels[i]} for i in order]

    features = {"id": tfds.features.Text(), **image_features()}
    splits = {split: shuffled(split) for split in ("train", "test")}
    write_tfds(tmp_path / "cifar10" / "3.0.2", features, splits)
    np.savez(tmp_path / "cifar.npz", **cifar_arrays)
    sets = [in_memory.load("cifar10", path) for path in (tmp_path, tmp_path / "cifar.npz")]

    config = Config(dataset="cifar10", width=2)
    network = tasks.build(config)
    loss_fn = jax.jit(images.loss_function(config, network))
    rows = in_memory.epoch_order(0, 0, examples=24, batch_size=8)[1]
    losses = []
    for dataset in sets:
        batch = (dataset.train_images[rows], dataset.train_labels[rows])
        np.testing.assert_array_equal(batch[0], cifar_arrays["train_images"][rows])
        np.testing.assert_array_equal(dataset.test_images, cifar_arrays["test_images"])
        losses.append(float(loss_fn(network.params, network.model_state, batch, jax.random.key(0))[0]))
    assert losses[0] == losses[1]


def test_missing_data_says_how_to_get_it_in_one_line(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "cifar10.npz"):
        with pytest.raises(SystemExit) as stop:
            train.main(["--dataset", "cifar10", "--data", str(path), "--out", str(tmp_path / "runs")])
        assert "tfds.data_source('cifar10'" in str(stop.value)
        assert str(stop.value).count("npz with the arrays") == 1
        assert str(stop.value).index("--data FILE.npz") < str(stop.value).index("tfds.data_source")
        assert "\n" not in str(stop.value)
    assert not (tmp_path / "runs").exists()


def test_npz_with_other_arrays_is_refused(cifar_arrays, tmp_path):
    file = tmp_path / "x.npz"
    np.savez(file, train_images=cifar_arrays["train_images"])
    with pytest.raises(ValueError, match=r"lacks the arrays \['test_images', 'test_labels', 'train_labels'\]"):
        in_memory.load("cifar10", file)
    np.savez(file, **(cifar_arrays | {"test_images": cifar_arrays["test_images"] / 255}))
    with pytest.raises(ValueError, match=r"test_images .* must be uint8 .* got float64"):
        in_memory.load("cifar10", file)
    np.savez(file, **(cifar_arrays | {"train_labels": cifar_arrays["train_labels"] + 5}))
    with pytest.raises(ValueError, match=r"train_labels .* must lie in \[0, 10\)"):
        in_memory.load("cifar10", file)


def test_an_npy_in_place_of_an_npz_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"x\.npz cannot be read as an \.npz of plain arrays"):
        in_memory.load("cifar10", tmp_path / "x.npz")


def test_a_file_that_lacks_classes_may_be_of_another_data_set(cifar_arrays, tmp_path):
    there = len(np.unique(cifar_arrays["train_labels"]))
    np.savez(tmp_path / "x.npz", **cifar_arrays)
    with pytest.warns(UserWarning, match=rf"images of only {there} of the 100 classes of cifar100: is it the file of"):
        in_memory.load("cifar100", tmp_path / "x.npz")


def test_batch_larger_than_the_data_is_refused(digits):
    with pytest.raises(ValueError, match="batch_size=2000 is more than the 1437 training rows"):
        tasks.make(Config(batch_size=2000), digits)


def test_sieving_leaves_out_what_is_never_forgotten():
    """Four examples over four epochs: always right, forgotten twice, never right, right from the second on."""
    history = np.array([[1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 1], [1, 0, 0, 1]], bool)
    state = sieving.start(4)
    for correct in history:
        rows = np.array([3, 1, 0, 2])  # in the order an epoch has them
        state = sieving.record(state, rows, correct[rows])
    np.testing.assert_array_equal(state.forgotten, [0, 2, 0, 0])
    np.testing.assert_array_equal(sieving.keep(state, 0), [0, 1, 2, 3])
    np.testing.assert_array_equal(sieving.keep(state, 1), [1, 2, 3])
    np.testing.assert_array_equal(sieving.keep(state, 2), [1, 2])
    np.testing.assert_array_equal(sieving.keep(state, 3), [2])
    with pytest.raises(ValueError, match=r"remove must lie in \[0, 4\)"):
        sieving.keep(state, 4)
