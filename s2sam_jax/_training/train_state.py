"""Everything that changes during training, as one pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from s2sam_jax._base.masks import SparseState
from s2sam_jax._base.optax_wrappers import Optimizer
from s2sam_jax._base.tree import check_real, find_states, own_key
from s2sam_jax._base.types import Masks, Params
from s2sam_jax._sparsity.mask_changes import apply_masks, set_masks
from s2sam_jax._training.gradient import ModelState


class TrainState(NamedTuple):
    """Everything that changes during training, as one pytree of arrays.

    Attributes:
      step: int32[], calls of the train step.
      params: parameters; exactly zero where pruned.
      model_state: what the model keeps besides parameters, such as BatchNorm statistics.
      opt_state: state of the optimizer, with masks, last gradient and keys inside.
      key: typed PRNG key; a step uses ``fold_in(key, step)``.
      first_bad_step: int32[], the first step whose loss or update was not finite, or -1. From that step on the
        parameters are frozen, except with ``make_train_step(freeze=False)``.
    """

    step: jax.Array
    params: Params
    model_state: ModelState
    opt_state: Any
    key: jax.Array
    first_bad_step: jax.Array

    @classmethod
    def create(
        cls,
        params: Params,
        tx: Optimizer,
        *,
        model_state: ModelState = (),
        seed: int | jax.Array = 0,
        masks: Masks | None = None,
    ) -> "TrainState":
        """Initialises the optimizer and, if it has masks, applies them to the parameters.

        Args:
          params: initial parameters; copied, so that the state can be donated.
          tx: the optimizer.
          model_state: initial model state; copied.
          seed: integer or PRNG key for dropout and the like.
          masks: initial masks, in place of the method's own, as by :func:`set_masks`.

        Returns:
          The state to start from.

        Raises:
          TypeError: for complex parameters, or masks that are not bool.
          ValueError: for masks that do not fit, or if ``tx`` is not sparse.

        Example:
          >>> import jax.numpy as jnp, optax
          >>> from s2sam_jax import TrainState, methods, sparsify
          >>> tx = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.75)
          >>> print(TrainState.create({"kernel": jnp.ones((2, 2))}, tx).params["kernel"].sum())
          1.0
        """
        check_real(params, "TrainState.create")
        # Copies, with types that are not weak, as steps return them; otherwise the second step would be traced again.
        params, model_state = jax.tree.map(lambda x: jnp.array(x, jnp.asarray(x).dtype), (params, model_state))
        # Copies, too: some optimizers keep the parameters themselves, or arrays of yours, and a buffer is donated once.
        # One by one, so that there are never two full copies.
        leaves, treedef = jax.tree.flatten(tx.init(params))
        opt_state = treedef.unflatten([jnp.array(leaves.pop(0)) for _ in range(len(leaves))])
        if masks is not None:
            opt_state = set_masks(opt_state, masks)
        if find_states(opt_state, SparseState):
            params = apply_masks(params, opt_state)
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, params, model_state, opt_state, own_key(seed, "train"), jnp.full((), -1, jnp.int32))
