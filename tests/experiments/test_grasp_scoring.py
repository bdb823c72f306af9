"""GraSP as its released code scores it, in a run: on as many images of each class, before the first step."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import recipes, sharding, tasks, train
from experiments.config import Config
from experiments.datasets import in_memory, kinds
from experiments.tasks import arrays
from experiments.training import grasp, loop, optimizers
from experiments.trees import by_name
from s2sam_jax import get_masks

CONFIG = Config(method="grasp", sparsity=0.8, images_per_class=3)


def task_of(config):
    return tasks.make(config, tasks.load(config))


def test_batches_have_so_many_training_images_of_each_class(toy):
    task = task_of(CONFIG)
    (_, first), (_, second) = batches = task.of_each_class(3)
    assert [images.shape for images, _ in batches] == [(15, 8, 8, 1)] * 2
    np.testing.assert_array_equal(np.sort(first), np.repeat(np.arange(5), 3))
    np.testing.assert_array_equal(np.sort(second), np.repeat(np.arange(5, 10), 3))
    (other, _), _ = task_of(dataclasses.replace(CONFIG, seed=1)).of_each_class(3)
    assert not np.array_equal(batches[0][0], other)


def test_images_are_rows_of_their_label(monkeypatch):
    """Of a data set whose pixels tell row and label."""
    labels = np.repeat(np.arange(10), 7)
    images = np.broadcast_to(np.arange(70, dtype=np.uint8)[:, None, None, None], (70, 8, 8, 1))
    monkeypatch.setitem(kinds.KINDS, "digits", kinds.KINDS["digits"]._replace(pad=0, mean=(0.0,), std=(1 / 255,)))
    task = arrays.Task(
        dataclasses.replace(CONFIG, batch_size=7),
        tasks.build(CONFIG),
        in_memory.Dataset(*map(jnp.asarray, (images, labels, images[:5], labels[:5]))),
        sharding.make_mesh(),
    )
    rows = [np.round(np.asarray(images[:, 0, 0, 0])).astype(int) for images, _ in task.of_each_class(4)]
    assert len({*rows[0], *rows[1]}) == 40
    for half, (_, targets) in zip(rows, task.of_each_class(4), strict=True):
        np.testing.assert_array_equal(labels[half], targets)
    with pytest.raises(ValueError, match=r"images_per_class=8 is more than there are to train on: 7 of class 0, 7 of"):
        task.of_each_class(8)


def test_a_run_starts_from_the_masks_of_the_paper(toy):
    """Against reverse over reverse, of the cross-entropy at temperature 200, summed over both batches."""
    task = task_of(CONFIG)
    params, statistics = task.network.params, task.network.model_state
    tx = optimizers.make(CONFIG, task.steps_per_epoch, task.network.groups)
    state = loop.initial_state(CONFIG, task.network, tx, mesh=task.mesh, scored_masks=grasp.scored_masks(CONFIG, task))
    flat, tree = jax.flatten_util.ravel_pytree(params)
    batches = task.of_each_class(3)

    def loss(w):
        total = 0.0
        for images, labels in batches:
            logits, _ = task.network.apply(tree(w), statistics, images, True, None)
            total += optax.softmax_cross_entropy_with_integer_labels(logits / 200, labels).mean()
        return total

    gradient = jax.grad(loss)(flat)
    scores = tree(flat * jax.grad(lambda w: jax.grad(loss)(w) @ gradient)(flat))
    kernels = {path: np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(scores) if leaf.ndim > 1}
    kept = np.sort(np.concatenate([leaf.ravel() for leaf in kernels.values()]))[::-1]
    count = kept.size - int(0.8 * kept.size)
    masks = {path: np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(get_masks(state.opt_state))}
    for path, leaf in kernels.items():
        clear = np.abs(leaf - kept[count]) > 1e-6 * np.abs(kept).max()
        np.testing.assert_array_equal(masks[path][clear], (leaf > kept[count])[clear])
    assert sum(int(masks[path].sum()) for path in kernels) == count
    for path, leaf in jax.tree.leaves_with_path(state.params):
        start = dict(jax.tree.leaves_with_path(params))[path]
        np.testing.assert_array_equal(leaf, np.where(masks[path], start, 0))


def start(folder, *arguments):
    options = ["--method", "grasp", "--images-per-class", "2", "--sparsity", "0.8", "--epochs", "2"]
    return train.main([*options, "--subset", "256", "--out", str(folder), *arguments])


def masks_of(folder):
    from safetensors.numpy import load_file

    return {name: mask for name, mask in load_file(folder / "weights.safetensors").items() if name.startswith("mask/")}


def test_masks_stay_and_seeds_side_by_side_have_those_of_each_alone(toy, tmp_path):
    together = start(tmp_path / "vmap", "--seeds", "0", "1", "--vmap")
    alone = start(tmp_path / "alone", "--seeds", "0", "1")
    for name, folder in alone.items():
        config = Config.from_json(json.loads((folder / "config.json").read_text()))
        task = task_of(config)
        scored = grasp.scored_masks(config, task)(task.network.params, task.network.model_state)
        expected = {f"mask/{name}": mask for name, mask in by_name(scored).items()}
        for found in (masks_of(folder), masks_of(together[name])):
            assert found.keys() == expected.keys()
            for leaf in found:
                np.testing.assert_array_equal(found[leaf], expected[leaf])
    first, second = (masks_of(folder) for folder in alone.values())
    assert any(not np.array_equal(first[leaf], second[leaf]) for leaf in first)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="images_per_class must be left out for imagenet2012; got 3"):
        dataclasses.replace(CONFIG, dataset="imagenet2012", model="resnet50")
    with pytest.raises(ValueError, match="structure must be unstructured with images_per_class; got channel"):
        dataclasses.replace(CONFIG, structure="channel")
    with pytest.raises(SystemExit, match="images_per_class=2 has no effect with method=rigl: it is for method grasp"):
        train.main(["--images-per-class", "2"])


def test_recipes_take_the_images_of_the_released_code():
    found = {(r.table, r.config.images_per_class) for r in recipes.RECIPES.values() if r.config.method == "grasp"}
    on_cifar = {(table, count) for table, count in found if table.startswith(("table1", "tableA1"))}
    assert on_cifar == {("table1", 10), ("table1-cifar100", 5), ("tableA1", 10), ("tableA1-cifar100", 10)}
    assert {count for _, count in found - on_cifar} == {None}
