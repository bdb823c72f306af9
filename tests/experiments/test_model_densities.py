"""Layer densities of the models against published ones."""

import numpy as np
import pytest
from abstract import densities, flops, named_shapes, shapes


def epsilon(name, classes, sparsity):
    """What multiplies (sum of the dimensions) / (product of the dimensions); the same in every layer that is sparse."""
    leaves = named_shapes(shapes(name, classes).params)
    found = [
        density * leaves[path].size / sum(leaves[path].shape)
        for path, density in densities(name, classes, sparsity).items()
        if density < 1
    ]
    np.testing.assert_allclose(found, found[0], rtol=1e-9)
    return found[0]


def dense(name, classes, sparsity):
    return {path for path, density in densities(name, classes, sparsity).items() if density == 1}


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("resnet32", 10, (38.1215, 18.6876, 7.3754)),
        ("resnet32", 100, (36.8660, 18.2183, 7.2907)),
        ("vgg19", 10, (189.656, 94.503, 37.411)),
    ],
)
def test_erk_scale(name, classes, expected):
    got = [epsilon(name, classes, sparsity) for sparsity in (0.9, 0.95, 0.98)]
    np.testing.assert_allclose(got, expected, rtol=1.5e-5)  # their last digit


def test_erk_of_resnet32():
    plan = densities("resnet32", 10, 0.9)
    assert len(plan) == 34
    assert dense("resnet32", 10, 0.9) == {"stem/kernel", "blocks/5/shortcut/kernel", "head/kernel"}
    assert dense("resnet32", 10, 0.95) == {"head/kernel"}
    assert not dense("resnet32", 10, 0.98)
    paths = ["blocks/0/conv1", "blocks/6/conv1", "blocks/12/conv2", "blocks/5/conv1", "blocks/10/conv1"]
    got = [plan[f"{path}/kernel"] for path in [*paths, "blocks/10/shortcut"]]
    np.testing.assert_allclose(got, [0.28955, 0.13857, 0.06773, 0.21096, 0.10238, 0.90278], atol=5e-6)
    work = flops("resnet32")
    assert round(sum(work.values()) / 1e6) == 551
    assert round(sum(plan[path] * work[path] for path in work) / sum(work.values()), 3) == 0.175


def test_erk_of_vgg19():
    for sparsity in (0.9, 0.95, 0.98):
        assert dense("vgg19", 10, sparsity) == {"stages/0/0/conv1/kernel", "head/kernel"}
    work = flops("vgg19")
    assert round(sum(work.values()) / 1e6) == 796


def test_erk_of_resnet50():
    first = {f"blocks/{block}/{conv}/kernel" for block in range(3) for conv in ("conv1", "conv3")}
    assert dense("resnet50", 1000, 0.8) == first | {"blocks/0/shortcut/kernel", "blocks/3/conv1/kernel"}
    assert dense("resnet50", 1000, 0.9) == {"blocks/0/conv1/kernel"}
    work = flops("resnet50")
    assert round(sum(work.values()) / 1e9, 1) == 8.2
    for sparsity, erk, uniform in ((0.8, 0.414, 0.223), (0.9, 0.242, 0.126), (0.95, 0.122, 0.077)):
        plan = densities("resnet50", 1000, sparsity)
        ratio = sum(plan[path] * work[path] for path in work) / sum(work.values())
        assert round(ratio, 3) == erk
        rest = 1 - work["stem/kernel"] / sum(work.values())
        assert abs(1 - rest * sparsity - uniform) < 1e-3  # of a dense first layer
