"""``experiments.shrink``: runs with dead channels become small networks that compute the same."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prepared import encoded, image_features, write_tfds
from safetensors import safe_open

from experiments import models, shrink, tasks, train
from experiments.benchmarks import inference
from experiments.config import Config
from experiments.models import resnet, transformer
from experiments.tasks import streams
from experiments.training import checkpoint, optimizers
from s2sam_jax import TrainState, channel_masks, materialize
from s2sam_jax._sparsity.channels import group_sizes


def spelled(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaf(tree, name):
    return {spelled(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}[name]


def finish(folder, config, masks_of):
    """A run's folder, with random weights and statistics, and the masks that ``masks_of(params, groups)`` gives."""
    rng, networks = np.random.default_rng(0), []

    def create():
        networks.append(tasks.build(config))
        params, model_state = networks[0][:2]
        return TrainState.create(
            params, optimizers.make(config, 100), model_state=model_state, seed=config.key("train")
        )

    def draw(x):
        return rng.uniform(0.5, 1.5, x.shape) if x.ndim == 1 else rng.normal(size=x.shape) / np.sqrt(x[..., 0].size)

    def blank(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return config.key("train") if is_key else np.zeros(x.shape, x.dtype)

    state = jax.eval_shape(create)
    state = jax.tree.map(blank, state)
    masks = jax.tree.map(np.asarray, masks_of(state.params, networks[0].groups))
    state = state._replace(
        params=jax.tree.map(lambda p, m: np.float32(draw(p) * m), state.params, masks),
        model_state=jax.tree.map(lambda x: np.float32(draw(x)), state.model_state),
        opt_state=state.opt_state._replace(masks=masks),
    )
    folder.mkdir()
    checkpoint.save(folder / "checkpoint", state)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    return state


def halves(params, groups):
    """The second half of the channels of each group is off, and one weight of the first filter."""
    sizes = group_sizes(params, groups)
    masks = channel_masks(params, groups, {name: np.arange(size) < size // 2 for name, size in sizes.items()})
    first = groups[0].filters[0].path
    return jax.tree_util.tree_map_with_path(
        lambda path, m: m.at[(0,) * m.ndim].set(False) if spelled(path) == first else m, masks
    )


DIGITS = Config(model="resnet8", width=4, method="static", compute="bfloat16")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, finish(folder, DIGITS, halves)


def test_a_run_shrinks(run_dir, capsys):
    folder, state = run_dir
    found = shrink.main([str(folder)])
    assert found.difference <= 1e-5 * found.largest
    assert found.largest > 0.1
    assert found.masked_accuracy == found.small_accuracy
    # By hand: conv1, norm1 and conv2 of three blocks lose a half.
    blocks = ((4, 4), (4, 8), (8, 16))
    removed = sum((9 * inputs + 2 + 9 * hidden) * hidden // 2 for inputs, hidden in blocks)
    assert found.masked_parameters - found.small_parameters == removed
    printed = " ".join(capsys.readouterr().out.split())
    assert f"parameters {found.masked_parameters:,} -> {found.small_parameters:,}" in printed
    assert f"accuracy {found.masked_accuracy:.2%} -> {found.small_accuracy:.2%}" in printed

    assert sorted(path.name for path in (folder / "small").iterdir()) == [
        "checkpoint",
        "weights.safetensors",
        "widths.json",
    ]
    network = shrink.load_small(folder)
    kernels = [named_leaf(params, "blocks/1/conv1/kernel") for params in (network.params, state.params)]
    np.testing.assert_array_equal(kernels[0], kernels[1][..., :4])
    assert named_leaf(network.params, "blocks/0/conv1/kernel")[0, 0, 0, 0] == 0, "sparse inside"
    variances = [named_leaf(s, "blocks/2/norm1/var") for s in (network.model_state, state.model_state)]
    np.testing.assert_array_equal(variances[0], variances[1][:8])
    with safe_open(folder / "small" / "weights.safetensors", "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("blocks/1/conv1/kernel"), kernels[0])
        np.testing.assert_array_equal(file.get_tensor("model_state/blocks/2/norm1/var"), variances[0])
        assert len(file.keys()) == len(jax.tree.leaves(network[:2]))
        metadata = file.metadata()
    assert (metadata["model"], metadata["width"], json.loads(metadata["widths"])["blocks/0/conv1"]) == (
        "resnet8",
        "4",
        2,
    )
    # Three blocks' convolutions on 8x8, 4x4 and 2x2 pixels lose a half of what they read or put out.
    saved = sum(
        2 * 9 * (inputs + hidden) * hidden // 2 * side**2
        for (inputs, hidden), side in zip(blocks, (8, 4, 2), strict=True)
    )
    assert found.masked_flops - found.small_flops == saved
    assert f"FLOPs {found.masked_flops:.3g} -> {found.small_flops:.3g}" in printed

    images = jnp.zeros((2, 8, 8, 1))
    logits, after = jax.eval_shape(lambda *weights: network.apply(*weights, images, True), *network[:2])
    assert logits.shape == (2, 10)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, network.model_state)


def test_a_run_with_validation_is_compared_on_what_it_was_evaluated_on(tmp_path, monkeypatch):
    """On the last 37 training images; their labels are wrong, those of the test set right."""
    whole = tasks.load(DIGITS)
    wrong = whole._replace(train_labels=(whole.train_labels + 1) % 10)
    monkeypatch.setattr(tasks, "load", lambda config: wrong)
    config = dataclasses.replace(DIGITS, validation=37, compute="float32")
    state = finish(tmp_path / "run", config, halves)
    found, task = shrink.main([str(tmp_path / "run")]), tasks.make(config, wrong)
    accuracy = task.evaluate(state.params, state.model_state)["test_accuracy"]
    assert found.masked_accuracy == found.small_accuracy == pytest.approx(accuracy, rel=1e-6)
    assert sum(int(counted.sum()) for _, _, counted in task.examples()) == 37


def test_a_run_of_chex_shrinks(tmp_path):
    """Trained by the command line: half of the 4 + 8 + 16 hidden channels are left."""
    words = f"--method chex --sparsity 0.5 --subset 64 --epochs 2 --width 4 --out {tmp_path}"
    folder = train.main(words.split())["s2sam"]
    found = shrink.main([str(folder)])
    assert found.difference <= 1e-5 * found.largest
    widths = json.loads((folder / "small" / "widths.json").read_text())
    assert sum(widths.values()) == 14
    assert min(widths.values()) >= 1


def test_a_small_network_that_computes_something_else_is_not_written(run_dir, monkeypatch):
    folder, _ = run_dir
    files = sorted((folder / "small").rglob("*"))

    def broken(*arguments):
        left = materialize(*arguments)
        return left._replace(params=jax.tree.map(np.negative, left.params))

    monkeypatch.setattr(shrink, "materialize", broken)
    with pytest.raises(SystemExit, match=r"error: The small network of .* does not compute what the masked one does"):
        shrink.main([str(folder)])
    assert sorted((folder / "small").rglob("*")) == files


def test_a_run_without_dead_channels_says_so(tmp_path):
    finish(
        tmp_path / "run", DIGITS, lambda params, groups: jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
    )
    with pytest.raises(SystemExit, match=r"error: .*run has no channel that can be removed.*of method=static"):
        shrink.main([str(tmp_path / "run")])
    dense = dataclasses.replace(DIGITS, method="dense")
    (tmp_path / "run" / "config.json").write_text(json.dumps(dense.to_json()))
    with pytest.raises(SystemExit, match="run is a dense run: it has no masks"):
        shrink.main([str(tmp_path / "run")])
    with pytest.raises(SystemExit, match=r"error: .*is not the folder of a finished run"):
        shrink.main([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"small/widths\.json; write it by python -m experiments\.shrink"):
        shrink.load_small(tmp_path / "run")


def test_a_run_on_text_shrinks(tmp_path, monkeypatch):
    make = partial(transformer.Transformer, 1, 0.1)
    monkeypatch.setitem(models.MODELS, "transformer-base", models.MODELS["transformer-base"]._replace(make=make))
    for split, count in (("train", 24), ("validation", 6)):
        for language, words in (("en", "one two three four"), ("de", "eins zwei drei vier")):
            lines = [" ".join(words.split()[: 1 + index % 4]) + "\n" for index in range(count)]
            (tmp_path / f"{split}.{language}").write_text("".join(lines))
    options = {"vocabulary": 280, "max_length": 12, "batch_size": 8, "method": "static", "width": 16}
    config = Config(dataset="wmt14", data=tmp_path, model="transformer-base", **options)
    finish(tmp_path / "run", config, halves)
    found = shrink.main([str(tmp_path / "run")])
    assert found.difference <= 1e-5 * found.largest
    assert found.masked_parameters - found.small_parameters == 2 * (32 * 16 + 32 + 32 * 16)


def test_a_run_on_a_stream_of_images_shrinks(tmp_path, monkeypatch):
    make = partial(resnet.ResNet, resnet.Block, (1, 1), small_images=False)
    monkeypatch.setattr(streams, "EVAL_BATCH", 8)
    monkeypatch.setitem(models.MODELS, "resnet34", models.MODELS["resnet34"]._replace(make=make))
    rng = np.random.default_rng(0)
    rows = [{"image": encoded(rng.integers(0, 256, (40, 50, 3), np.uint8)), "label": i % 10} for i in range(20)]
    write_tfds(tmp_path / "imagenet2012/5.1.0", image_features(), {"train": rows, "validation": rows[:10]})
    options = {"image_size": 32, "batch_size": 8, "method": "static", "width": 4}
    finish(tmp_path / "run", Config(dataset="imagenet2012", data=tmp_path, model="resnet34", **options), halves)
    found = shrink.main([str(tmp_path / "run")])
    assert found.difference <= 1e-5 * found.largest
    assert found.masked_accuracy == found.small_accuracy


def test_inference_is_measured_on_equal_outputs():
    rows = list(inference.forward_passes("resnet8", width=4, size=8, batch=2, rounds=1))
    names = [row.what for row in rows]
    assert names == [
        "inference, dense / masked, resnet8",
        "inference, dense / materialized, resnet8",
        "outputs, masked - materialized, resnet8",
    ]
    assert rows[2].value < 1e-5
    assert "images/s" in rows[1].detail
