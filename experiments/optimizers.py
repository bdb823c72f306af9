"""From a config to one optax transformation."""

import optax

from experiments import sparse_methods
from experiments.config import Config
from s2sam_jax import s2sam, sam, sparsify, ssam


def make(config: Config, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """``sparsify(chain(sharpness, weight decay, SGD), method)``; its clocks are in epochs of so many steps."""
    total_steps = config.epochs * steps_per_epoch
    schedule = optax.cosine_decay_schedule(config.learning_rate, sparse_methods.round_steps(config, steps_per_epoch))
    optimizer = optax.chain(
        _sharpness(config, steps_per_epoch, total_steps),
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule, momentum=config.momentum),
    )
    if config.method == "dense":
        return optimizer
    return sparsify(
        optimizer,
        sparse_methods.make(config),
        sparsity=config.sparsity,
        distribution=config.distribution,
        when=sparse_methods.clock(config, steps_per_epoch),
        seed=config.key("masks"),
    )


def _sharpness(config: Config, steps_per_epoch: int, total_steps: int) -> optax.GradientTransformation:
    """What the optimizer's name stands for; SGD is shared by all."""
    match config.optimizer:
        case "sgd":
            return optax.identity()
        case "sam":
            return sam(config.rho)
        case "asam":
            return sam(config.rho, adaptive=True, eta=config.eta)
        case "s2sam":
            return s2sam(config.rho)
        case "ssam-f" | "ssam-d":
            return ssam(
                config.rho,
                mask="fisher" if config.optimizer == "ssam-f" else "dynamic",
                sparsity=config.ssam_sparsity,
                update_every=sparse_methods.steps(config.ssam_update_every, steps_per_epoch),
                total_steps=total_steps,
                seed=config.key("ssam"),
            )
