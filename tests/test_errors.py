"""Every error of the public API says what was expected, what came and where."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from s2sam_jax import (
    Every,
    SparseState,
    TrainState,
    apply_masks,
    check_masks,
    empirical_fisher,
    erdos_renyi,
    erdos_renyi_kernel,
    eval_params,
    get_masks,
    make_train_step,
    methods,
    msam,
    perturb,
    recalibrate_batch_stats,
    s2sam,
    s2sam_wrapper,
    sam,
    select,
    set_masks,
    sparsify,
    ssam,
    uniform,
    update_masks,
    warn_if_collapsed,
)

SGD = optax.sgd(0.1, momentum=0.9)
WHEN = Every(0, 2, 10)


def make_params():
    return {"a": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "b": {"kernel": jnp.full((4, 4), 2.0)}}


def static(inner=SGD, **options):
    return sparsify(inner, methods.static(), **{"sparsity": 0.5, **options})


def wrong_shape():
    params = make_params()
    params["a"]["kernel"] = jnp.ones((4, 5))
    return params


def missing_leaf():
    params = make_params()
    del params["b"]
    return params


def extra_leaf():
    return make_params() | {"c": {"kernel": jnp.ones((4, 4))}}


def update(tx, grads=None, params=None, **extras):
    state = tx.init(make_params())
    grads = make_params() if grads is None else grads
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
    "range": (lambda f: f(make_params(), 1.0), r"\[0, 1\); got 1\.0"),
    "unreachable": (lambda f: f(TINY, 0.9), r"sparsity=0\.9 leaves less than one weight a leaf .*maximum is 0\.8\."),
    "nothing_prunable": (lambda f: f({"bias": jnp.ones(4)}, 0.5), r"Nothing is prunable"),
    "override_matches_nothing": (
        lambda f: f(make_params(), 0.5, overrides={"*/bias": 0.1}),
        r"overrides\['\*/bias'\] matches no prunable leaf; they are \['a/kernel', 'b/kernel'\]",
    ),
    "override_range": (
        lambda f: f(make_params(), 0.5, overrides={"a/*": 1.0}), r"overrides\['a/\*'\] is the fraction of zeros"
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
    "sam_no_grad_fn": (lambda: update(sam(), params=make_params()), TypeError, r"sam needs a second .*pass grad_fn"),
    "ssam_no_grad_fn": (
        lambda: update(ssam(total_steps=9), params=make_params()), TypeError, r"ssam needs a second .*pass grad_fn"
    ),
    "sam_no_grad_fn_inside": (
        lambda: update(static(optax.chain(sam(), SGD)), params=make_params()), TypeError, r"sam needs a second gradient"
    ),
    "ssam_no_fisher_fn": (
        lambda: update(ssam(mask="fisher"), params=make_params(), grad_fn=lambda p: p), TypeError, r"needs fisher_fn"
    ),
    "grads_missing": (lambda: update(static(), missing_leaf(), make_params()), ValueError, r"b/kernel: missing in gra"),
    "grads_extra": (lambda: update(static(), extra_leaf(), make_params()), ValueError, r"c/kernel: not in the masks"),
    "grads_shape": (
        lambda: update(static(), wrong_shape(), make_params()), ValueError,
        r"a/kernel: shape \(4, 5\) in grads, \(4, 4\) in the masks",
    ),
    "params_shape": (lambda: update(static(), None, wrong_shape()), ValueError, r"a/kernel: shape \(4, 5\) in params"),
    "params_missing": (lambda: update(static(), None, missing_leaf()), ValueError, r"b/kernel: missing in params"),
    "rigl_without_end": (
        lambda: sparsify(SGD, methods.rigl(), sparsity=0.5, when=Every(0, 2)).init(make_params()), ValueError,
        r"rigl anneals .* give when=Every\(\.\.\., end=\.\.\.\)",
    ),
    "unreachable": (lambda: static(sparsity=0.99).init(make_params()), ValueError, r"the reachable maximum is 0\.9375"),
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
        static(getattr(inner, "gradient_transformation", lambda: inner)()).init(make_params())


@pytest.mark.parametrize("distribution", [uniform, erdos_renyi, erdos_renyi_kernel])
@pytest.mark.parametrize(("call", "text"), DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_distribution_error(distribution, call, text):
    with pytest.raises(ValueError, match=text):
        call(distribution)


@pytest.mark.parametrize("distribution", [uniform, erdos_renyi, erdos_renyi_kernel])
def test_the_stated_maximum_is_reachable(distribution):
    for tree in (TINY, make_params()):
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


# ---- states that are absent, foreign or doubled -------------------------------------------------------------------


def untyped(state):
    """What a checkpoint restored without a target looks like."""
    if hasattr(state, "_asdict"):
        return {key: untyped(value) for key, value in state._asdict().items()}
    if isinstance(state, tuple | list):
        return [untyped(value) for value in state]
    return state


FINDERS = {
    "perturb": (lambda state: perturb(make_params(), state), r"perturb found no S2SAMState .*restore it into the"),
    "get_masks": (get_masks, r"get_masks found no SparseState"),
    "set_masks": (
        lambda state: set_masks(state, jax.tree.map(lambda x: x > 0, make_params())), r"set_masks found no SparseState"
    ),
    "apply_masks": (lambda state: apply_masks(make_params(), state), r"apply_masks found no SparseState"),
    "check_masks": (lambda state: check_masks(make_params(), state), r"check_masks found no SparseState"),
    "warn_if_collapsed": (warn_if_collapsed, r"warn_if_collapsed found no SparseState"),
    "update_masks": (
        lambda state: update_masks(SGD, make_params(), state, make_params()), r"update_masks found no SparseState"
    ),
}  # fmt: skip


@pytest.mark.parametrize("restored", [False, True], ids=["plain_sgd", "untyped"])
@pytest.mark.parametrize(("call", "text"), FINDERS.values(), ids=FINDERS.keys())
def test_no_state(call, text, restored):
    state = untyped(static(s2sam()).init(make_params())) if restored else SGD.init(make_params())
    with pytest.raises(ValueError, match=text):
        call(state)


@pytest.mark.parametrize(
    "build", [lambda: optax.chain(s2sam(), s2sam(), SGD), lambda: static(optax.chain(s2sam(), s2sam()))]
)
def test_two_s2sam_on_one_leaf(build):
    with pytest.raises(ValueError, match=r"two S2SAMStates claim the leaf a/bias; use one s2sam\(\)"):
        perturb(make_params(), build().init(make_params()))


def test_perturb_of_another_model():
    state = s2sam().init(make_params())
    with pytest.raises(ValueError, match=r"gradient a/kernel\(4, 4\) that params lack"):
        perturb(wrong_shape(), state)
    with pytest.raises(ValueError, match=r"gradient b/kernel\(4, 4\) that params lack"):
        perturb(missing_leaf(), state)
    with pytest.raises(ValueError, match=r"that params lack"):
        perturb(make_params(), optax.flatten(s2sam()).init(make_params()))


@pytest.mark.parametrize(
    "tx",
    [optax.chain(s2sam_wrapper(SGD), s2sam_wrapper(SGD)), s2sam_wrapper(s2sam_wrapper(SGD))],
    ids=["beside", "inside"],
)
def test_two_wrappers(tx):
    state = tx.init(make_params())
    with pytest.raises(ValueError, match=r"s2sam_wrapper is in opt_state more than once"):
        eval_params(make_params(), state)


def two_sparse():
    labels = {"a": {"kernel": "x", "bias": "x"}, "b": {"kernel": "y"}}
    return optax.multi_transform({"x": static(), "y": static()}, labels).init(make_params())


def test_get_masks_of_several():
    with pytest.raises(ValueError, match=r"several SparseStates; pass params"):
        get_masks(two_sparse())
    assert jax.tree.structure(get_masks(two_sparse(), make_params())) == jax.tree.structure(make_params())


def test_set_masks_misuse():
    state, masks = static().init(make_params()), jax.tree.map(lambda x: x > 0, make_params())
    with pytest.raises(TypeError, match=r"needs bool masks; these are not: \['a/bias', 'a/kernel', 'b/kernel'\]"):
        set_masks(state, make_params())
    with pytest.raises(ValueError, match=r"b/kernel: missing in masks"):
        set_masks(state, {"a": masks["a"]})
    with pytest.raises(ValueError, match=r"a/kernel: shape \(4, 5\) in masks, \(4, 4\) in the masks in opt_state"):
        set_masks(state, jax.tree.map(lambda x: x > 0, wrong_shape()))
    with pytest.raises(ValueError, match=r"c/kernel: not in the masks in opt_state"):
        set_masks(state, jax.tree.map(lambda x: x > 0, extra_leaf()))
    with pytest.raises(ValueError, match=r"b/kernel: missing in masks"):
        set_masks(two_sparse(), {"a": masks["a"]})
    with pytest.raises(ValueError, match=r"a/kernel"):
        set_masks(two_sparse(), jax.tree.map(lambda x: x > 0, wrong_shape()))


def sparse_pair():
    state = static().init(make_params())
    return apply_masks(make_params(), state), state


def swapped(tree, leaf):
    return {**tree, "b": {"kernel": leaf}}


def flipped(masks):
    """One dead weight is declared alive."""
    mask = np.array(masks["b"]["kernel"])
    mask[tuple(np.argwhere(~mask)[0])] = True
    return swapped(masks, jnp.array(mask))


FAULTS = {
    "count": (lambda p, s: (p, s._replace(masks=flipped(s.masks))), r"b/kernel: the mask has 9 ones, 8 at the last"),
    "stray": (
        lambda p, s: (swapped(p, jnp.where(s.masks["b"]["kernel"], p["b"]["kernel"], 1e-30)), s),
        r"b/kernel: 8 pruned weights are not zero; call apply_masks",
    ),
    "nan": (lambda p, s: (swapped(p, p["b"]["kernel"] * jnp.nan), s), r"b/kernel: 16 weights are not finite"),
    "nan_behind_the_mask": (
        lambda p, s: (swapped(p, jnp.where(s.masks["b"]["kernel"], p["b"]["kernel"], jnp.nan)), s),
        r"b/kernel: 8 pruned weights are not zero",
    ),
    "infinity": (lambda p, s: (swapped(p, p["b"]["kernel"] / 0), s), r"b/kernel: .*are not finite"),
    "shape": (
        lambda p, s: (swapped(p, jnp.ones((4, 5))), s), r"b/kernel: shape \(4, 4\) in the masks, \(4, 5\) in params"
    ),
    "missing": (lambda p, s: ({"a": p["a"]}, s), r"b/kernel"),
    "mask_shape": (
        lambda p, s: (p, s._replace(masks=swapped(s.masks, jnp.ones((2, 2), bool)))), r"b/kernel: shape \(2, 2\) in the"
    ),
    "two": (
        lambda p, s: (jax.tree.map(lambda x: x + 1, p), s._replace(masks=flipped(s.masks))),
        r"(?s)a/kernel: 8 pruned weights.*b/kernel: the mask has 9.*b/kernel: 7 pruned",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("seed", "text"), FAULTS.values(), ids=FAULTS.keys())
def test_check_masks_names_the_fault(seed, text):
    params, state = sparse_pair()
    check_masks(params, state)
    params, state = seed(params, state)
    assert isinstance(state, SparseState)
    with pytest.raises(ValueError, match=text):
        check_masks(params, (optax.EmptyState(), state))


# ---- the train step -----------------------------------------------------------------------------------------------


def loss_fn(params, model_state, batch, key):
    return jnp.mean(batch @ params["a"]["kernel"] @ params["b"]["kernel"] + params["a"]["bias"]), (model_state, {})


@pytest.mark.parametrize("sharp", [sam, lambda: ssam(total_steps=9)], ids=["sam", "ssam"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_train_step_refuses_sam_inside_multi_steps(sharp, sparse):
    inner = optax.chain(sharp(), SGD)
    tx = optax.MultiSteps(static(inner) if sparse else inner, 2).gradient_transformation()
    state = TrainState.create(make_params(), tx)
    with pytest.raises(ValueError, match=r"inside optax\.MultiSteps .* use make_train_step\(\.\.\., accumulate=k\)"):
        make_train_step(loss_fn, tx)(state, jnp.ones((4, 4)))


def test_train_step_refuses_another_state():
    state = TrainState.create(make_params(), optax.adam(0.1))
    with pytest.raises(ValueError, match=r"(?s)opt_state is not a state of this tx.*expected.*got.*ScaleByAdamState"):
        make_train_step(loss_fn, SGD)(state, jnp.ones((4, 4)))
    tx = optax.chain(s2sam(), SGD)
    state = TrainState.create(make_params(), tx)
    with pytest.raises(ValueError, match="opt_state is not a state of this tx"):
        make_train_step(loss_fn, tx)(state._replace(opt_state=untyped(state.opt_state)), jnp.ones((4, 4)))


def test_train_step_refuses_a_batch_that_does_not_divide():
    state = TrainState.create(make_params(), SGD)
    with pytest.raises(ValueError, match=r"accumulate=4 does not divide a batch leaf of shape \(6, 4\)"):
        make_train_step(loss_fn, SGD, accumulate=4)(state, jnp.ones((6, 4)))


def test_recalibration_needs_a_batch():
    with pytest.raises(ValueError, match=r"at least one batch; got none"):
        recalibrate_batch_stats(loss_fn, make_params(), jnp.zeros(2), [])


def test_s2sam_around_sparsify_and_inside_the_wrapper():
    tx = optax.chain(s2sam(), sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5))
    with pytest.raises(ValueError, match=r"s2sam\(\) stands outside sparsify\(\)"):
        perturb(make_params(), tx.init(make_params()))
    for inner in (s2sam(), optax.chain(msam(), optax.sgd(0.1, momentum=0.9))):
        with pytest.raises(ValueError, match="would perturb twice"):
            s2sam_wrapper(inner).init(make_params())


def test_apply_masks_to_another_tree():
    state = static().init(make_params())
    with pytest.raises(ValueError, match="a/kernel: missing in params"):
        apply_masks({"params": make_params()}, state)


def test_update_masks_inside_multi_steps():
    tx = optax.MultiSteps(static(), 2).gradient_transformation()
    with pytest.raises(ValueError, match=r"update_masks: inside optax\.MultiSteps"):
        update_masks(tx, make_params(), tx.init(make_params()), make_params())


def test_every_counts_in_integers():
    with pytest.raises(TypeError, match="Every counts calls in integers"):
        Every(0, 2.5)
