"""Models without weights: their shapes, programs and densities."""

import functools

import jax
import jax.numpy as jnp

from experiments import models
from s2sam_jax import erdos_renyi_kernel


def shapes(name, classes=None, width=None, dtype=jnp.float32):
    """A model without its numbers: shapes of parameters and state, and ``apply``."""
    return _shapes(name, classes or models.MODELS[name].classes, width, dtype)


@functools.cache
def _shapes(name, classes, width, dtype):
    return abstract(name, width=width, classes=classes, dtype=dtype)


def abstract(name, **options):
    networks = []

    def build():
        networks.append(models.build(name, channels=None if models.MODELS[name].text else 3, seed=0, **options))
        return networks[0][:2]

    return models.Network(*jax.eval_shape(build), *networks[0][2:])


def inputs_of(name, size=None):
    spec = models.MODELS[name]
    if spec.text:
        return tuple(jax.ShapeDtypeStruct((2, length), jnp.int32) for length in (9, 7))
    size = size or spec.image_size
    return jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)


def forward(network, inputs):
    """The program of a training step's forward pass, and the shapes of logits and state."""

    def call(params, state, inputs):
        return network.apply(params, state, inputs, True, jax.random.key(0))

    closed, results = jax.make_jaxpr(call, return_shape=True)(*network[:2], inputs)
    return closed.jaxpr, *results


@functools.cache
def full_size(name, dtype=jnp.float32):
    return forward(shapes(name, dtype=dtype), inputs_of(name))


def equations(jaxpr):
    """Convolutions and matrix products, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("conv_general_dilated", "dot_general"):
            yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def flops(name):
    """Twice the multiply-adds of each kernel, for one example of a batch of two."""
    jaxpr = full_size(name)[0]
    names = dict(zip(jaxpr.invars, named_shapes(shapes(name).params), strict=False))
    return {
        names[eqn.invars[1]]: eqn.outvars[0].aval.size * eqn.invars[1].aval.size // eqn.invars[1].aval.shape[-1]
        for eqn in equations(jaxpr)
    }


def named_shapes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


# One name for each class and form of block.
NARROW = {
    "resnet8": 4,
    "wrn28x10": 4,
    "resnet18-cifar": 2,
    "resnet50": 2,
    "vgg19": 4,
    "mobilenet-v2-cifar": 4,
    "efficientnet-b0": 4,
    "vit-small-cifar": 8,
    "transformer-base": 8,
}


def densities(name, classes, sparsity):
    plan = named_shapes(erdos_renyi_kernel(shapes(name, classes).params, sparsity))
    leaves = named_shapes(shapes(name, classes).params)
    return {path: 1 - plan[path] for path, leaf in leaves.items() if leaf.ndim >= 2}
