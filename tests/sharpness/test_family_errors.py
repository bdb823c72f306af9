"""What Momentum-SAM, LookSAM, GSAM and ESAM refuse, and what they say."""

import jax.numpy as jnp
import optax
import pytest

from s2sam_jax import (
    esam,
    gsam,
    looksam,
    methods,
    msam,
    perturb,
    rho_from_learning_rate,
    s2sam,
    sam,
    sharpest_examples,
    sparsify,
)

pytestmark = pytest.mark.usefixtures("float64")
GRADS = {"a": jnp.ones((2, 1)), "b": jnp.ones(1)}


def climb(build, params=GRADS, **extras):
    return build().update(GRADS, build().init(GRADS), params, **extras)


def momentum(**labels):
    groups = {"x": optax.chain(msam(), optax.sgd(0.1)), "y": optax.sgd(0.1, momentum=0.9)}
    return perturb(GRADS, optax.multi_transform(groups, labels).init(GRADS))


def perturb_with(*parts):
    return perturb(GRADS, optax.chain(*parts).init(GRADS))


ERRORS = {
    "optimizer_as_rho": (lambda: sam(optax.sgd(0.1)), TypeError, r"rho must be .* optimizer: chain the two"),
    "msam_rho": (lambda: msam(-1.0), ValueError, r"rho must be .* got -1\.0"),
    "msam_eps": (lambda: msam(eps=-1.0), ValueError, r"eps must be .* got -1\.0"),
    "looksam_rho": (lambda: looksam(-1.0), ValueError, r"rho must be .* got -1\.0"),
    "looksam_every": (lambda: looksam(every=0), ValueError, r"looksam needs every >= 1; got 0"),
    "rate_is_no_schedule": (
        lambda: rho_from_learning_rate(0.1, rho_max=0.1, rho_min=0.0, lr_max=0.1), TypeError, r"a schedule .* got 0\.1"
    ),
    "looksam_alpha": (lambda: looksam(alpha=-1.0), ValueError, r"alpha must be .* got -1\.0"),
    "gsam_rho": (lambda: gsam(-1.0), ValueError, r"rho must be .* got -1\.0"),
    "gsam_alpha": (lambda: gsam(alpha=-0.5), ValueError, r"alpha must be .* got -0\.5"),
    "gsam_schedule": (
        lambda: rho_from_learning_rate(jnp.sin, rho_max=0.1, rho_min=0.2, lr_max=0.1), ValueError,
        r"0 <= rho_min <= rho_max and .* got rho_min=0\.2, rho_max=0\.1, lr_min=0\.0, lr_max=0\.1",
    ),
    "esam_rho": (lambda: esam(-1.0), ValueError, r"rho must be .* got -1\.0"),
    "esam_beta": (lambda: esam(beta=0.0), ValueError, r"esam's beta .* must lie in \(0, 1\]; got 0\.0"),
    "sharpest_fraction": (
        lambda: sharpest_examples(jnp.ones(3), jnp.ones(3), 1.5), ValueError, r"lie in \(0, 1\]; got 1\.5"
    ),
    "sharpest_shape": (
        lambda: sharpest_examples(jnp.ones(3), jnp.ones(2), 0.5),
        ValueError, r"one loss for each .* shapes \(3,\) and \(2,\)",
    ),
    "sharpest_mean": (
        lambda: sharpest_examples(jnp.ones(()), jnp.ones(()), 0.5), ValueError, r"got shapes \(\) and \(\)"
    ),
    **{
        f"{build.__name__}_no_params": (
            lambda b=build: climb(b, None, grad_fn=jnp.sin), ValueError, f"{build.__name__} needs params"
        )
        for build in (looksam, gsam, esam)
    },
    **{
        f"{build.__name__}_no_grad_fn": (
            lambda b=build: climb(b), TypeError, f"{build.__name__} needs a second gradient: pass grad_fn"
        )
        for build in (looksam, gsam, esam)
    },
    "msam_no_momentum": (lambda: perturb_with(msam(), optax.sgd(0.1)), ValueError, r"msam\(\) found no momentum; comb"),
    "msam_momentum_elsewhere": (lambda: momentum(a="x", b="y"), ValueError, r"put it beside that optimizer"),
    "msam_momentum_of_some": (
        lambda: perturb_with(msam(), optax.masked(optax.trace(0.9), {"a": True, "b": False})), ValueError,
        r"found no momentum for \['b'\]",
    ),
    "msam_two_momenta": (
        lambda: perturb_with(msam(), optax.trace(0.9), optax.adam(0.1)), ValueError, r"two momentum buffers claim .* a;"
    ),
    "msam_of_another_model": (
        lambda: perturb({"a": jnp.ones((2, 1))}, optax.chain(msam(), optax.trace(0.9)).init(GRADS)), ValueError,
        r"momentum for \['b'\], which params lack",
    ),
    "msam_of_another_shape": (
        lambda: perturb({"a": jnp.ones(2), "b": jnp.ones(1)}, optax.chain(msam(), optax.trace(0.9)).init(GRADS)),
        ValueError, r"MSAMState has a gradient a\(2, 1\) that params lack",
    ),
    "two_msam": (lambda: perturb_with(msam(), msam(), optax.trace(0.9)), ValueError, r"two MSAMStates claim the leaf"),
    "s2sam_and_msam": (
        lambda: perturb_with(s2sam(), msam(), optax.trace(0.9)), ValueError, r"S2SAMState and MSAMState claim the leaf"
    ),
    "msam_around_sparsify": (
        lambda: perturb_with(
            msam(), sparsify(optax.trace(0.9), methods.static(), sparsity=0.5, prunable=lambda path, leaf: path == "a")
        ), ValueError, r"msam\(\) stands outside sparsify\(\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_error(call, kind, text):
    with pytest.raises(kind, match=text):
        call()
