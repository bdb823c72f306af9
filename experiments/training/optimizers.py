"""From a config to one optax transformation."""

from collections.abc import Sequence

import jax.numpy as jnp
import optax

from experiments.config import Config, structures
from experiments.training import sparse_methods
from s2sam_jax import (
    ChannelGroup,
    esam,
    gsam,
    looksam,
    msam,
    rho_from_learning_rate,
    s2sam,
    sam,
    sparsify,
    ssam,
)


def make(
    config: Config, steps_per_epoch: int, groups: Sequence[ChannelGroup] = ()
) -> optax.GradientTransformationExtraArgs:
    """``sparsify(chain(sharpness, weight decay, SGD), method)``; its clocks are in epochs of so many steps.

    ``groups`` are the network's channels, for the methods that remove them.
    """
    total_steps = config.epochs * steps_per_epoch
    optimizer = optax.chain(_sharpness(config, steps_per_epoch, total_steps), *_base(config, steps_per_epoch))
    if config.method == "dense":
        return optimizer
    return sparsify(
        optimizer,
        sparse_methods.make(config, groups),
        sparsity=config.sparsity,
        distribution=config.distribution,
        when=sparse_methods.clock(config, steps_per_epoch),
        structure=structures.parse(config.structure),
        # The released code masks neither the gradient nor the momentum; the weights are masked all the same.
        mask_grads=config.mask_grads and config.optimizer != "s2sam-released",
        seed=config.key("masks"),
    )


def _base(config: Config, steps_per_epoch: int) -> tuple[optax.GradientTransformation, ...]:
    rate = learning_rate(config, steps_per_epoch)
    if config.base == "adamw":
        return (optax.adamw(rate, b1=config.momentum, weight_decay=config.weight_decay),)
    sgd = optax.sgd(rate, momentum=config.momentum, nesterov=config.nesterov)
    return optax.add_decayed_weights(config.weight_decay), sgd


def learning_rate(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """A linear rise, then a cosine or two steps down; over one round where there are several."""
    total, warmup = sparse_methods.round_steps(config, steps_per_epoch), round(config.warmup_epochs * steps_per_epoch)
    if warmup >= total:
        raise ValueError(f"warmup_epochs={config.warmup_epochs} must be fewer than the epochs of a round.")
    if config.schedule == "steps":
        drops = {round(share * total) - warmup: 0.1 for share in (0.5, 0.75)}
        falling = optax.piecewise_constant_schedule(config.learning_rate, drops)
    else:
        lowest = config.final_learning_rate / config.learning_rate if config.learning_rate else 0.0
        falling = optax.cosine_decay_schedule(config.learning_rate, total - warmup, lowest)
    if not warmup:
        return falling
    rising = optax.linear_schedule(0.0, config.learning_rate, warmup)
    return optax.join_schedules([rising, falling], [warmup])


def radius(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """Rho: constant, rising over a third, or in proportion to the learning rate; anew in each round of a lottery."""
    total = sparse_methods.round_steps(config, steps_per_epoch)
    match config.rho_schedule:
        case "constant":
            return optax.constant_schedule(config.rho)
        case "warmup":
            return optax.linear_schedule(0.0, config.rho, max(1, total // 3))
        case "learning-rate":
            rate = learning_rate(config, steps_per_epoch)
            return rho_from_learning_rate(rate, rho_max=config.rho, rho_min=0.0, lr_max=config.learning_rate)


def _sharpness(config: Config, steps_per_epoch: int, total_steps: int) -> optax.GradientTransformation:
    """What the optimizer's name stands for; SGD is shared by all."""
    alpha = {} if config.alpha is None else {"alpha": config.alpha}
    rho = radius(config, steps_per_epoch)
    match config.optimizer:
        case "sgd":
            return optax.identity()
        case "sam":
            return sam(rho)
        case "asam":
            return sam(rho, adaptive=True, eta=config.eta)
        case "s2sam":
            return s2sam(rho)
        case "s2sam-adaptive":
            return s2sam(rho, adaptive=True, eta=config.eta)
        case "s2sam-released":
            return s2sam(rho, adaptive=True, compat="authors", perturb_pruned=True)
        case "s2sam-opposite":  # downhill, for comparison: no paper has it
            return s2sam(lambda step: -jnp.asarray(rho(step)))
        case "msam":
            return msam(rho)
        case "looksam":
            return looksam(rho, every=config.looksam_every, **alpha)
        case "gsam":
            return gsam(rho, **alpha)
        case "esam":
            return esam(rho, beta=config.esam_beta, seed=config.key("esam"))
        case "ssam-f" | "ssam-d":
            return ssam(
                rho,
                mask="fisher" if config.optimizer == "ssam-f" else "dynamic",
                sparsity=config.ssam_sparsity,
                update_every=sparse_methods.steps(config.ssam_update_every, steps_per_epoch),
                total_steps=total_steps,
                seed=config.key("ssam"),
            )
