"""Classification of images: the loss, and accuracy with every row counted once."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import models
from experiments.config import Config
from experiments.datasets import kinds, transforms
from experiments.datasets.kinds import Kind
from experiments.models import Network
from experiments.tasks.base import Losses


def side(config: Config) -> int:
    """Pixels on a side of the images that the network sees; those of ImageNet are cropped to the model's size."""
    if config.dataset == "imagenet2012":
        return config.image_size or models.MODELS[config.model].image_size or 224
    return kinds.KINDS[config.dataset].shape[0]


def losses(config: Config, network: Network, *, augment: bool) -> Losses:
    return Losses(
        loss_function(config, network, augment=augment),
        plain_loss_function(config, network),
        example_loss_function(config, network, augment=augment),
    )


def loss_function(config: Config, network: Network, *, augment: bool = True) -> Callable[..., Any]:
    """The library's loss: augmentation, normalisation, network and cross-entropy on a batch of raw images."""
    examples = _examples(config, network, augment)

    def loss_fn(params, model_state, batch, key):
        losses, new_state, right = examples(params, model_state, batch, key)
        return jnp.mean(losses), (new_state, {"train_accuracy": jnp.mean(right)})

    return loss_fn


def example_loss_function(config: Config, network: Network, *, augment: bool = True) -> Callable[..., Any]:
    """The same loss, example by example."""
    examples = _examples(config, network, augment)
    return lambda params, model_state, batch, key: examples(params, model_state, batch, key)[0]


def numbered(batch: tuple[Any, Any]) -> tuple[Any, Any, Any]:
    """With the place of each image, so that it keeps its augmentation in a smaller batch cut out of this one."""
    images, labels = batch
    return images, labels, np.broadcast_to(np.arange(labels.shape[-1]), labels.shape)


def _examples(config: Config, network: Network, augment: bool) -> Callable[..., Any]:
    """A function of a batch: the losses of its examples, the model state, and which are classified correctly."""
    kind = kinds.KINDS[config.dataset]

    def prepare(images, key):
        images = transforms.augment(key, images, kind) if augment else images
        images = transforms.normalise(images, kind)
        # Not 1: split, by which the augmentation takes the key apart, folds in 0 and 1.
        return transforms.cutout(jax.random.fold_in(key, 3), images, config.cutout) if config.cutout else images

    def prepare_in_place(images, key, places):
        """As part of the whole batch, whose noise goes by places; the other images are left black."""
        whole = jnp.zeros((config.batch_size, *images.shape[1:]), images.dtype)
        return prepare(whole.at[places].set(images), key)[places]

    def examples(params, model_state, batch, key):
        images, labels, *places = batch
        images = prepare_in_place(images, key, *places) if places else prepare(images, key)
        logits, new_state = network.apply(params, model_state, images, True, jax.random.fold_in(key, 2))
        targets = optax.smooth_labels(jax.nn.one_hot(labels, kind.classes), config.label_smoothing)
        return optax.softmax_cross_entropy(logits, targets), new_state, jnp.argmax(logits, axis=-1) == labels

    return examples


def plain_loss_function(config: Config, network: Network) -> Callable[..., Any]:
    """Neither augmented nor with statistics of the batch: for single examples."""
    kind = kinds.KINDS[config.dataset]

    def loss_fn(params, model_state, batch, key):
        del key
        images, labels = batch
        logits, new_state = network.apply(params, model_state, transforms.normalise(images, kind), False)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, kind.classes), config.label_smoothing)
        return jnp.mean(optax.softmax_cross_entropy(logits, targets)), (new_state, {})

    return loss_fn


def predictor(network: Network, kind: Kind) -> Callable[[Any, Any, Any], jax.Array]:
    """``(params, model_state, raw images) -> classes``, compiled."""

    @jax.jit
    def predict(params, model_state, images):
        logits, _ = network.apply(params, model_state, transforms.normalise(images, kind), False)
        return jnp.argmax(logits, axis=-1)

    return predict


def examples(batches: Iterable[Any], kind: Kind) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
    """Raw batches as inputs of the network, labels, and which labels count: all but negative ones."""
    for images, labels in batches:
        yield transforms.normalise(jnp.asarray(images), kind), labels, labels >= 0


def accuracy(predict: Callable[[Any], jax.Array], batches: Iterable[Any]) -> float:
    """The accuracy over rows whose label is not negative."""
    counts = [((predict(images) == labels).sum(), (labels >= 0).sum()) for images, labels in batches]
    counts = jax.device_get(counts)
    return float(sum(right for right, _ in counts) / sum(rows for _, rows in counts))
