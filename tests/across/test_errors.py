"""Every error of the public API says what was expected, what came and where."""

import jax
import jax.numpy as jnp
import optax
import pytest
from misfits import SGD, extra_leaf, missing_leaf, static, two_kernels, wrong_shape

from s2sam_jax import (
    Every,
    empirical_fisher,
    erdos_renyi,
    erdos_renyi_kernel,
    make_train_step,
    methods,
    s2sam,
    s2sam_wrapper,
    sam,
    select,
    sparsify,
    ssam,
    uniform,
)


def update(tx, grads=None, params=None, **extras):
    state = tx.init(two_kernels())
    grads = two_kernels() if grads is None else grads
    return optax.with_extra_args_support(tx).update(grads, state, params, **extras)


def scores():
    return {"x": jnp.arange(4.0), "y": jnp.arange(6.0)}


# name: (call, exception, text)
CONSTRUCTION = {
    "s2sam_rho": (lambda: s2sam(-0.1), ValueError, r"rho must be a number >= 0 or a schedule; got -0\.1"),
    "s2sam_nan_rho": (lambda: s2sam(float("nan")), ValueError, r"rho must be .* got nan"),
    "s2sam_text": (lambda: s2sam("0.1"), TypeError, r"rho must be a number or a schedule; got '0\.1'"),
    "s2sam_eta": (lambda: s2sam(eta=-1.0), ValueError, r"eta must be .* got -1\.0"),
    "s2sam_eps": (lambda: s2sam(eps=-1.0), ValueError, r"eps must be .* got -1\.0"),
    "s2sam_compat": (lambda: s2sam(compat="code"), ValueError, r"compat must be 'paper' or 'authors'; got 'code'"),
    "sam_rho": (lambda: sam(-1), ValueError, r"rho must be .* got -1"),
    "sam_eta": (lambda: sam(eta=-1), ValueError, r"eta must be .* got -1"),
    "sam_eps": (lambda: sam(eps=-1), ValueError, r"eps must be .* got -1"),
    "wrapper_rho": (lambda: s2sam_wrapper(SGD, -1.0), ValueError, r"rho must be .* got -1\.0"),
    "wrapper_eps": (lambda: s2sam_wrapper(SGD, eps=-1.0), ValueError, r"eps must be .* got -1\.0"),
    "ssam_rho": (lambda: ssam(-1.0, total_steps=9), ValueError, r"rho must be .* got -1\.0"),
    "ssam_eps": (lambda: ssam(eps=-1.0, total_steps=9), ValueError, r"eps must be .* got -1\.0"),
    "ssam_mask": (lambda: ssam(mask="random"), ValueError, r"'fisher' or 'dynamic'; got 'random'"),
    "ssam_sparsity": (lambda: ssam(sparsity=1.0, total_steps=9), ValueError, r"ssam's sparsity .*\[0, 1\); got 1\.0"),
    "ssam_update_every": (lambda: ssam(update_every=0, total_steps=9), ValueError, r"update_every >= 1; got 0"),
    "ssam_total_steps": (lambda: ssam(mask="dynamic"), ValueError, r"give total_steps"),
    "ssam_drop_fraction": (
        lambda: ssam(drop_fraction=1.5, total_steps=9), ValueError, r"0 <= drop_fraction <= 1; got 1\.5"
    ),
    "ssam_compat": (lambda: ssam(compat="code", total_steps=9), ValueError, r"compat must be .* got 'code'"),
    "fisher_chunk": (lambda: empirical_fisher(jnp.dot, chunk_size=0), ValueError, r"chunk_size >= 1; got 0"),
    "every_start": (lambda: Every(start=-1), ValueError, r"start >= 0 and every >= 1; got start=-1, every=100"),
    "every_every": (lambda: Every(every=0), ValueError, r"got start=0, every=0"),
    "every_order": (lambda: Every(start=5, end=4), ValueError, r"end >= start; got start=5, end=4"),
    "rigl_fraction": (lambda: methods.rigl(1.5), ValueError, r"0 <= drop_fraction <= 1; got 1\.5"),
    "sparsity_one": (lambda: static(sparsity=1.0), ValueError, r"fraction of zeros and must lie in \[0, 1\); got 1\.0"),
    "sparsity_negative": (lambda: static(sparsity=-0.1), ValueError, r"sparsity is .* got -0\.1"),
    "sparsity_nan": (lambda: static(sparsity=float("nan")), ValueError, r"sparsity is .* got nan"),
    "no_method": (lambda: sparsify(SGD, "rigl", sparsity=0.5), TypeError, r"methods\.rigl\(\); got 'rigl'"),
    "method_not_called": (lambda: sparsify(SGD, methods.static, sparsity=0.5), TypeError, r"needs a SparseMethod"),
    "no_when": (lambda: sparsify(SGD, methods.rigl(), sparsity=0.5), ValueError, r"pass when=Every\("),
    "distribution": (
        lambda: static(distribution="ER-K"), ValueError, r"Unknown distribution 'ER-K'; use one of \['er', .*'erk'"
    ),
    "accumulate": (lambda: make_train_step(None, SGD, accumulate=0), ValueError, r"accumulate >= 1; got 0"),
}  # fmt: skip


ORDER = {
    "sparsify_multi_steps": (lambda: optax.MultiSteps(SGD, 2), r"put optax\.MultiSteps outside"),
    "sparsify_apply_if_finite": (lambda: optax.apply_if_finite(SGD, 3), r"put optax\.apply_if_finite outside"),
    "sparsify_s2sam_wrapper": (lambda: s2sam_wrapper(SGD), r"put s2sam_wrapper outside"),
    "deep_inside": (
        lambda: optax.chain(s2sam(), optax.masked(optax.apply_if_finite(SGD, 3), True)), r"apply_if_finite outside"
    ),
    "sparsify_twice": (static, r"sparsify\(sparsify"),
}  # fmt: skip


TINY = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 3))}


DISTRIBUTIONS = {
    "range": (lambda f: f(two_kernels(), 1.0), r"\[0, 1\); got 1\.0"),
    "unreachable": (lambda f: f(TINY, 0.9), r"sparsity=0\.9 leaves less than one weight a leaf .*maximum is 0\.8\."),
    "nothing_prunable": (lambda f: f({"bias": jnp.ones(4)}, 0.5), r"Nothing is prunable"),
    "override_matches_nothing": (
        lambda f: f(two_kernels(), 0.5, overrides={"*/bias": 0.1}),
        r"overrides\['\*/bias'\] matches no prunable leaf; they are \['a/kernel', 'b/kernel'\]",
    ),
    "override_range": (
        lambda f: f(two_kernels(), 0.5, overrides={"a/*": 1.0}), r"overrides\['a/\*'\] is the fraction of zeros"
    ),
}  # fmt: skip


UPDATES = {
    "sparsify_no_params": (lambda: update(static()), ValueError, r"sparsify needs params: call tx\.update"),
    "sam_no_params": (lambda: update(sam(), grad_fn=jnp.sin), ValueError, r"sam needs params"),
    "ssam_no_params": (lambda: update(ssam(total_steps=9), grad_fn=jnp.sin), ValueError, r"ssam needs params"),
    "wrapper_no_params": (lambda: update(s2sam_wrapper(SGD)), ValueError, r"s2sam_wrapper needs params"),
    "cubic_no_params": (
        lambda: update(s2sam(adaptive=True, compat="authors")), ValueError, r"adaptive=True, compat='authors'\) needs"
    ),
    "sam_no_grad_fn": (lambda: update(sam(), params=two_kernels()), TypeError, r"sam needs a second .*pass grad_fn"),
    "ssam_no_grad_fn": (
        lambda: update(ssam(total_steps=9), params=two_kernels()), TypeError, r"ssam needs a second .*pass grad_fn"
    ),
    "sam_no_grad_fn_inside": (
        lambda: update(static(optax.chain(sam(), SGD)), params=two_kernels()), TypeError, r"sam needs a second gradient"
    ),
    "ssam_no_fisher_fn": (
        lambda: update(ssam(mask="fisher"), params=two_kernels(), grad_fn=lambda p: p), TypeError, r"needs fisher_fn"
    ),
    "grads_missing": (lambda: update(static(), missing_leaf(), two_kernels()), ValueError, r"b/kernel: missing in gra"),
    "grads_extra": (lambda: update(static(), extra_leaf(), two_kernels()), ValueError, r"c/kernel: not in the masks"),
    "grads_shape": (
        lambda: update(static(), wrong_shape(), two_kernels()), ValueError,
        r"a/kernel: shape \(4, 5\) in grads, \(4, 4\) in the masks",
    ),
    "params_shape": (lambda: update(static(), None, wrong_shape()), ValueError, r"a/kernel: shape \(4, 5\) in params"),
    "params_missing": (lambda: update(static(), None, missing_leaf()), ValueError, r"b/kernel: missing in params"),
    "rigl_without_end": (
        lambda: sparsify(SGD, methods.rigl(), sparsity=0.5, when=Every(0, 2)).init(two_kernels()), ValueError,
        r"rigl anneals .* give when=Every\(\.\.\., end=\.\.\.\)",
    ),
    "unreachable": (lambda: static(sparsity=0.99).init(two_kernels()), ValueError, r"the reachable maximum is 0\.9375"),
}  # fmt: skip


SELECT = {
    "neither": (lambda: select(scores()), ValueError, r"exactly one of count and sparsity"),
    "both": (lambda: select(scores(), count=1, sparsity=0.5), ValueError, r"exactly one of count and sparsity"),
    "scope": (lambda: select(scores(), count=1, scope="all"), ValueError, r"'leaf' or 'global'; got 'all'"),
    "too_many": (lambda: select(scores(), count=5), ValueError, r"0 <= count <= 4 \(leaf 'x', 4 scores\); got 5"),
    "negative": (lambda: select(scores(), count={"x": 0, "y": -1}), ValueError, r"leaf 'y', 6 scores\); got -1"),
    "too_many_global": (lambda: select(scores(), count=11, scope="global"), ValueError, r"0 <= count <= 10 .*got 11"),
    "sparsity": (lambda: select(scores(), sparsity=1.5), ValueError, r"0 <= sparsity <= 1 .*got 1\.5"),
    "by_column": (lambda: jax.jit(lambda n: select(scores(), count=n))(jnp.ones(3)), ValueError, "make the columns le"),
    "integers": (lambda: select({"x": jnp.arange(3)}, count=1), TypeError, r"floating scores; leaf 'x' has dtype int"),
    "tree_global": (
        lambda: select(scores(), count={"x": 1, "y": 1}, scope="global"), ValueError, r"needs one count or sparsity"
    ),
    "tree": (lambda: select(scores(), count={"x": 1}), ValueError, r"y: missing in count"),
    "among": (lambda: select(scores(), count=1, among={"x": jnp.ones(4, bool)}), ValueError, r"y: missing in among"),
    "among_shape": (
        lambda: select({"x": jnp.ones(4)}, count=1, among={"x": jnp.ones(3, bool)}), ValueError,
        r"x: shape \(3,\) in among, \(4,\) in scores",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [*CONSTRUCTION.values(), *UPDATES.values(), *SELECT.values()],
    ids=[*CONSTRUCTION, *UPDATES, *("select_" + name for name in SELECT)],
)
def test_error(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


@pytest.mark.parametrize(("inner", "text"), ORDER.values(), ids=ORDER.keys())
def test_wrong_wrapping_order(inner, text):
    inner = inner()
    with pytest.raises(ValueError, match=text):
        static(getattr(inner, "gradient_transformation", lambda: inner)()).init(two_kernels())


@pytest.mark.parametrize("distribution", [uniform, erdos_renyi, erdos_renyi_kernel])
@pytest.mark.parametrize(("call", "text"), DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_distribution_error(distribution, call, text):
    with pytest.raises(ValueError, match=text):
        call(distribution)


@pytest.mark.parametrize("distribution", [uniform, erdos_renyi, erdos_renyi_kernel])
def test_the_stated_maximum_is_reachable(distribution):
    for tree in (TINY, two_kernels()):
        sizes = [x.size for x in jax.tree.leaves(tree) if x.ndim > 1]
        maximum = 1 - len(sizes) / sum(sizes)
        assert max(jax.tree.leaves(distribution(tree, maximum))) > 0
        with pytest.raises(ValueError, match="reachable maximum"):
            distribution(tree, maximum + 0.01)


def test_array_sparsity_is_no_count():
    """A traced or array fraction must give the same mask as the number, or an error: never an empty mask."""
    try:
        mask = select(jnp.arange(4.0), sparsity=jnp.float32(0.5))
    except (TypeError, ValueError):
        return
    assert int(mask.sum()) == 2
