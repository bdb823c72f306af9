"""From a config to one optax transformation."""

import inspect

import optax

from experiments.config import Config
from s2sam_jax import Every, SparseMethod, methods, s2sam, sam, sparsify, ssam


def make(config: Config, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """``sparsify(chain(sharpness, weight decay, SGD), method)``; its clocks are in epochs of so many steps."""
    total_steps = config.epochs * steps_per_epoch
    decay_steps = _steps(config.decay_epochs or config.epochs, steps_per_epoch)
    schedule = optax.cosine_decay_schedule(config.learning_rate, decay_steps)
    optimizer = optax.chain(
        _sharpness(config, steps_per_epoch, total_steps),
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule, momentum=config.momentum),
    )
    if config.method == "dense":
        return optimizer
    every = _steps(config.update_every, steps_per_epoch)
    # The end is a call that fires, and comes, so that gradual pruning gets where it should.
    last = min(int(config.update_end * total_steps), total_steps - 1)
    when = Every(0, every, last // every * every)
    return sparsify(
        optimizer,
        _method(config),
        sparsity=config.sparsity,
        distribution=config.distribution,
        when=when,
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
                update_every=_steps(config.ssam_update_every, steps_per_epoch),
                total_steps=total_steps,
                seed=config.key("ssam"),
            )


def _method(config: Config) -> SparseMethod:
    """The method of that name, with the drop fraction if one is given."""
    factory = getattr(methods, config.method)
    if config.drop_fraction is None:
        return factory()
    if "drop_fraction" not in inspect.signature(factory).parameters:
        raise ValueError(f"drop_fraction={config.drop_fraction} is given, but {config.method} has none; leave it out.")
    return factory(drop_fraction=config.drop_fraction)


def _steps(epochs: float, steps_per_epoch: int) -> int:
    return max(1, round(epochs * steps_per_epoch))
