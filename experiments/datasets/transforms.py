"""Images on their way into a network: augmentation, normalisation, cutout."""

import jax
import jax.numpy as jnp

from experiments.datasets.kinds import Kind


def augment(key: jax.Array, images: jax.Array, kind: Kind) -> jax.Array:
    """A random crop of each zero-padded image and, where the data set allows it, a random flip; uint8 to uint8."""
    crop_key, flip_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (kind.pad, kind.pad), (kind.pad, kind.pad), (0, 0)))
    corners = jax.random.randint(crop_key, (len(images), 2), 0, 2 * kind.pad + 1)
    crop = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:]))
    cropped = crop(padded, corners)
    if not kind.flip:
        return cropped
    flipped = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    return jnp.where(flipped, cropped[:, :, ::-1], cropped)


def normalise(images: jax.Array, kind: Kind) -> jax.Array:
    """uint8 to float32 of mean 0 and deviation 1."""
    return (images.astype(jnp.float32) / 255 - jnp.array(kind.mean)) / jnp.array(kind.std)


def cutout(key: jax.Array, images: jax.Array, side: int) -> jax.Array:
    """Half of the images lose a square of ``side`` pixels, clipped at the border, around a random pixel."""
    place_key, chance_key = jax.random.split(key)
    count, height, width, _ = images.shape
    centres = jax.random.randint(place_key, (count, 2), 0, jnp.array([height, width]))

    def inside(size, centre):
        distance = jnp.arange(size) - (centre[:, None] - side // 2)
        return (distance >= 0) & (distance < side)

    square = inside(height, centres[:, 0])[:, :, None] & inside(width, centres[:, 1])[:, None, :]
    square &= jax.random.bernoulli(chance_key, shape=(count, 1, 1))
    return jnp.where(square[..., None], jnp.zeros((), images.dtype), images)
