"""SAF and MESA: sharpness-aware training without a perturbation, by a loss on how outputs move along training."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from s2sam_jax._base.tree import at_least_f32


def trajectory_loss(
    logits: jax.Array, past_logits: jax.Array, *, temperature: float = 5.0, weight: jax.typing.ArrayLike = 0.3
) -> jax.Array:
    r"""The term that SAF and MESA add to the loss: it keeps outputs close to past ones.

    .. math:: \lambda\, \tau^2\, \frac{1}{b} \sum_i
              \mathrm{KL}\big(\mathrm{softmax}(z_i^{past} / \tau) \,\|\, \mathrm{softmax}(z_i / \tau)\big)

    For **SAF** the past outputs are those of the same example some epochs ago (:class:`TrajectoryBuffer`). For **MESA**
    they come from a moving average of the weights, and nothing else is needed: let ``optax.incremental_update(params,
    average, 0.0002)`` move the average after each step, and give the loss its outputs on the same batch (with
    ``weight=0.8`` in its authors' code, from the sixth epoch on).

    Args:
      logits: ``[batch, classes]``.
      past_logits: past logits of the same examples; no gradient flows through them.
      temperature: :math:`\tau`.
      weight: :math:`\lambda`, a number or one per example, zero where past logits are unknown.

    Returns:
      float[], the mean over all examples, in float32 or wider.

    Raises:
      ValueError: for logits of different shapes, or a weight that does not broadcast to ``[batch]``.

    Reference:
      Du et al., "Sharpness-Aware Training for Free", NeurIPS 2022.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from s2sam_jax import trajectory_loss
      >>> print(trajectory_loss(jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0, 0.0]])).round(4))
      0.1419

      MESA, with the moving average as a tree beside the parameters:

      >>> def loss_fn(params, average, x, y):
      ...     loss = optax.softmax_cross_entropy_with_integer_labels(x @ params, y).mean()
      ...     return loss + trajectory_loss(x @ params, x @ average, weight=0.8)
      >>> params, x, y = jnp.eye(2), jnp.ones((4, 2)), jnp.zeros(4, int)
      >>> average = jnp.copy(params)
      >>> params -= 0.1 * jax.grad(loss_fn)(params, average, x, y)
      >>> average = optax.incremental_update(params, average, 0.0002)
    """
    if logits.shape != past_logits.shape:
        raise ValueError(f"trajectory_loss needs logits of one shape; got {logits.shape} and {past_logits.shape}.")
    past = jax.nn.softmax(at_least_f32(jax.lax.stop_gradient(past_logits)) / temperature)
    now = jax.nn.log_softmax(at_least_f32(logits) / temperature)
    now = jnp.where(past > 0, now, 0)  # what neither believes possible adds nothing
    divergence = optax.losses.kl_divergence(now, past)
    return temperature**2 * jnp.mean(jnp.broadcast_to(weight, divergence.shape) * divergence)


class TrajectoryBuffer(NamedTuple):
    """Outputs of past epochs, for SAF: a ring buffer of ``delay + 1`` epochs, kept in the model state of a train step.

    It takes ``(delay + 1) * n * classes`` numbers: 15.4 GB for ImageNet in float32 with a delay of two epochs.
    Micro-batches (``accumulate``) record one after another; ``sharpness_parts``, which averages the model state over
    the parts, is refused with a buffer.

    Attributes:
      logits: ``[delay + 1, n, classes]``.
      epochs: int32 ``[delay + 1, n]``, the epoch of each entry, -1 for none.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import TrajectoryBuffer, trajectory_loss
      >>> buffer, rows = TrajectoryBuffer.init(n=4, classes=3, delay=2), jnp.array([3, 1])
      >>> for epoch in range(6):
      ...     logits = jnp.full((2, 3), float(epoch))
      ...     past, known = buffer.recall(rows, epoch)
      ...     loss = trajectory_loss(logits, past, weight=0.3 * known * (epoch > 2))  # it may set in later
      ...     buffer = buffer.record(rows, logits, epoch)
      >>> print(past[:, 0], known)  # epoch 5 saw epoch 3
      [3. 3.] [ True  True]
    """

    logits: jax.Array
    epochs: jax.Array

    @classmethod
    def init(
        cls, n: int, classes: int, delay: int = 2, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> "TrajectoryBuffer":
        """An empty buffer.

        Args:
          n: examples of the training set.
          classes: outputs per example.
          delay: age of recalled outputs, in epochs.
          dtype: type to store them in.

        Raises:
          ValueError: for a ``delay`` below 1: an epoch would recall what it records itself.
        """
        if delay < 1:
            raise ValueError(f"TrajectoryBuffer needs delay >= 1; got {delay}.")
        return cls(jnp.zeros((delay + 1, n, classes), dtype), jnp.full((delay + 1, n), -1, jnp.int32))

    def record(self, indices: jax.Array, logits: jax.Array, epoch: jax.typing.ArrayLike) -> "TrajectoryBuffer":
        """The buffer with a batch's outputs of this epoch added.

        Args:
          indices: int ``[batch]``, rows of the training set, each once; others, such as padding of -1 or ``n``, are
            skipped.
          logits: ``[batch, classes]``; no gradient flows into the buffer.
          epoch: counted from 0; int[], or one per example (for batches that are cut into micro-batches).
        """
        epoch = jnp.asarray(epoch, jnp.int32)
        slot = epoch % len(self.epochs)
        logits = jax.lax.stop_gradient(logits).astype(self.logits.dtype)
        options: Any = {"mode": "drop", "wrap_negative_indices": False}
        return TrajectoryBuffer(
            self.logits.at[slot, indices].set(logits, **options), self.epochs.at[slot, indices].set(epoch, **options)
        )

    def recall(self, indices: jax.Array, epoch: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
        """The outputs of exactly ``delay`` epochs ago.

        Args:
          indices: int ``[batch]``, as in :meth:`record`.
          epoch: the current epoch.

        Returns:
          Logits ``[batch, classes]``, and bool ``[batch]``: whether they are known. They are unknown in the first
          ``delay`` epochs, and for examples that the past epoch left out, such as those of an incomplete batch.
        """
        then = jnp.asarray(epoch, jnp.int32) - (len(self.epochs) - 1)
        slot = then % len(self.epochs)
        options: Any = {"mode": "fill", "wrap_negative_indices": False}
        known = self.epochs.at[slot, indices].get(**options, fill_value=-1) == then
        past = self.logits.at[slot, indices].get(**options, fill_value=0)
        return past, known & (then >= 0)
