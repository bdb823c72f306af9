"""Layers stacked in one leaf, as ``lax.scan`` takes them: pruned as the same layers in leaves of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import named
from jax.experimental import checkify
from jax.tree_util import Partial

from s2sam_jax import (
    NM,
    Block,
    Channel,
    Every,
    TrainState,
    Unstructured,
    apply_masks,
    check_masks,
    get_masks,
    make_train_step,
    methods,
    perturb,
    s2sam,
    select,
    set_masks,
    sparsify,
    warn_if_collapsed,
)

LAYERS = 2
AXES = {"blocks/query/kernel": 1, "blocks/*": 0}


def normal(seed):
    keys = iter(jax.random.split(jax.random.key(seed), 9))

    def draw(*shape):
        return jax.random.normal(next(keys), shape)

    return {
        "embed": draw(16, 8),
        "blocks": {
            "query": {"kernel": draw(8, LAYERS, 8)},
            "mlp": {
                "kernel": draw(LAYERS, 8, 20) * jnp.arange(1.0, LAYERS + 1)[:, None, None],
                "bias": draw(LAYERS, 20),
            },
            "norm": {"weight": draw(LAYERS, 8)},  # two dimensions, and no kernel
        },
    }


def apart(tree):
    """Leaves of their own, by plain indexing."""
    blocks = tree["blocks"]
    layers = {
        f"layer{i}": {
            "query": blocks["query"]["kernel"][:, i],
            "mlp": blocks["mlp"]["kernel"][i],
            "mlp_bias": blocks["mlp"]["bias"][i],
            "norm": blocks["norm"]["weight"][i],
        }
        for i in range(LAYERS)
    }
    return {"embed": tree["embed"], **layers}


def assert_same(stacked, single):
    for (path, one), other in zip(named(apart(stacked)).items(), named(single).values(), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=path)


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_stacked_layers_are_pruned_as_single_ones(distribution):
    options = {"sparsity": 0.7, "distribution": distribution}
    params = normal(0)
    masks = get_masks(sparsify(optax.sgd(0.1), methods.magnitude(), stacked=AXES, **options).init(params))
    assert_same(masks, get_masks(sparsify(optax.sgd(0.1), methods.magnitude(), **options).init(apart(params))))


@pytest.mark.parametrize("structure", [NM(2, 4), Block((2, 4)), Channel()], ids=["nm", "block", "channel"])
def test_structures_lie_within_layers(structure):
    options = {"sparsity": 0.5, "distribution": "uniform", "structure": structure}
    params = normal(0)
    masks = get_masks(sparsify(optax.sgd(0.1), methods.magnitude(), stacked=AXES, **options).init(params))
    assert_same(masks, get_masks(sparsify(optax.sgd(0.1), methods.magnitude(), **options).init(apart(params))))


@pytest.mark.parametrize(
    ("method", "structure"),
    [
        (methods.rigl(0.5), Unstructured()), (methods.rigl(0.5), Channel()), (methods.gmp("global"), Unstructured()),
        (methods.snip(keep_at_least=2), Unstructured()), (methods.grasp(), Unstructured()),
    ],
    ids=["rigl", "rigl-channel", "gmp-global", "snip", "grasp"],
)  # fmt: skip
def test_methods_change_each_layer_by_itself(method, structure):
    """From the same masks, with the same gradients; the checks of what methods promise are on."""
    options = {"sparsity": 0.5, "structure": structure, "when": Every(0, 1, 3), "seed": 1}
    params, inner = normal(0), optax.adam(0.1)

    def losses(tree, x):
        return sum(jnp.sum(jnp.sin(3 * w) * w * x) for w in jax.tree.leaves(tree))

    gradient = jax.grad(losses)

    def trained(tree, tx, first):
        update = jax.jit(checkify.checkify(tx.update))
        state = tx.init(tree) if first is None else set_masks(tx.init(tree), first)
        tree = apply_masks(tree, state)
        for x in (1.0, 2.0):
            grad_fn = Partial(gradient, x=x)
            error, (updates, state) = update(grad_fn(tree), state, tree, grad_fn=grad_fn)
            error.throw()
            tree = optax.apply_updates(tree, updates)
        check_masks(tree, state)
        return tree, get_masks(state)

    stacked = sparsify(inner, method, stacked=AXES, **options)
    first = get_masks(stacked.init(params))
    weights, masks = trained(params, stacked, first)
    others, other_masks = trained(apart(params), sparsify(inner, method, **options), apart(first))
    assert_same(masks, other_masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), apart(weights), others)
    assert not all(mask.all() for mask in jax.tree.leaves(masks))


def test_random_masks_have_their_count_in_every_layer():
    tx = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.75, distribution="uniform", stacked=AXES)
    masks = apart(get_masks(tx.init(normal(0))))
    counts = {path: int(mask.sum()) for path, mask in named(masks).items()}
    assert counts["embed"] == 32
    for i in range(LAYERS):
        assert counts[f"layer{i}/query"] == 16
        assert counts[f"layer{i}/mlp"] == 40
        assert (counts[f"layer{i}/mlp_bias"], counts[f"layer{i}/norm"]) == (20, 8)
    assert (masks["layer0"]["mlp"] != masks["layer1"]["mlp"]).any()


def test_one_layer_may_be_left_dense():
    tx = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5, stacked=AXES, overrides={"blocks/*/0/kernel": 0.0})
    masks = apart(get_masks(tx.init(normal(0))))
    assert [bool(masks[f"layer{i}"]["mlp"].all()) for i in range(LAYERS)] == [True, False]


def test_a_scanned_network_trains():
    def loss_fn(params, model_state, batch, key):
        def layer(x, w):
            return x + jnp.tanh(x @ w["query"]["kernel"]) * w["norm"]["weight"], None

        blocks = params["blocks"] | {"query": {"kernel": jnp.moveaxis(params["blocks"]["query"]["kernel"], 1, 0)}}
        x, _ = jax.lax.scan(layer, params["embed"][batch], blocks)
        return jnp.mean((x - 1) ** 2), (model_state, {})

    inner = optax.chain(s2sam(0.05), optax.adamw(0.01))
    tx = sparsify(inner, methods.rigl(), sparsity=0.5, when=Every(1, 2, 9), stacked=AXES)
    step, state = make_train_step(loss_fn, tx), TrainState.create(normal(0), tx)
    before = jax.tree.map(np.array, get_masks(state.opt_state))
    losses = []
    for _ in range(10):
        state, metrics = step(state, jnp.arange(16))
        losses.append(metrics["loss"])
    assert losses[-1] < losses[0]
    check_masks(state.params, state.opt_state)
    assert float(optax.tree.norm(optax.tree.sub(perturb(state.params, state.opt_state), state.params))) > 0
    now = get_masks(state.opt_state)
    for i in range(LAYERS):
        one, other = (apart(masks)[f"layer{i}"]["query"] for masks in (before, now))
        assert one.sum() == other.sum()
        assert (one != other).any()


def test_a_layer_that_lost_all_its_weights_is_named():
    params = normal(0)
    masks = jax.tree.map(lambda w: jnp.ones_like(w, bool), params)
    masks["blocks"]["query"]["kernel"] = masks["blocks"]["query"]["kernel"].at[:, 1].set(False)
    state = set_masks(sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5).init(params), masks)
    warn_if_collapsed(state)  # quiet: of the leaf something is left
    with pytest.warns(UserWarning, match=r"No weight is left in \['blocks/query/1/kernel'\]"):
        warn_if_collapsed(state, stacked=AXES)


@pytest.mark.parametrize(
    "method", [methods.rigl(), methods.itop(), methods.lottery(0.2)], ids=["rigl", "itop", "lottery"]
)
def test_the_state_is_mapped_over_by_optax(method):
    """Records and copies that a method keeps of the parameters are stacked as they are."""
    tx = sparsify(optax.adam(0.1), method, sparsity=0.5, when=Every(0, 1, 20), stacked=AXES, distribution="uniform")
    params = normal(0)
    names, state = jax.tree.map(lambda x: str(x.shape), params), tx.init(params)
    mapped = optax.tree.map_params(tx, lambda _, name: name, state, names, transform_non_params=lambda _: None)
    assert mapped.masks == names
    assert mapped.inner_state[0].mu == names
    of_method = jax.tree.leaves(state.method_state)
    trees = sum(leaf.ndim > 0 for leaf in of_method) // len(jax.tree.leaves(params))
    assert jax.tree.leaves(mapped.method_state) == trees * jax.tree.leaves(names)


def test_lottery_tickets_of_stacked_layers_are_those_of_single_ones():
    """It goes back to earlier weights and momentum, which are stacked in its state."""
    options = {"sparsity": 0.75, "when": Every(1, 2, 9), "distribution": "uniform"}

    def trained(params, **more):
        tx = sparsify(optax.sgd(0.1, momentum=0.9), methods.lottery(0.5), **options, **more)
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(7):
            updates, state = update(jax.tree.map(jnp.cos, params), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params, state = trained(normal(0), stacked=AXES)
    single, single_state = trained(apart(normal(0)))
    assert_same(get_masks(state), get_masks(single_state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), apart(params), single)
    assert not get_masks(state)["blocks"]["mlp"]["kernel"].all()


@pytest.mark.parametrize(
    ("stacked", "message"),
    [
        ({"layers/*": 0}, r"stacked\['layers/\*'\] matches no leaf; they are \['blocks/mlp/bias'"),
        ({"blocks/*": 2}, r"layers on axis 2, which these leaves lack: {'blocks/mlp/bias': \(2, 20\)"),
        ({"blocks/mlp/*": (0, 2)}, r"layers on axes \(0, 2\), which these leaves lack: {'blocks/mlp/bias': \(2, 20\)}"),
        ({"blocks/mlp/bias": (0, -2)}, r"layers on axes \(0, -2\), which these leaves lack: {'blocks/mlp/bias'"),
    ],
)
def test_patterns_that_do_not_fit_are_named(stacked, message):
    with pytest.raises(ValueError, match=message):
        sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5, stacked=stacked).init(normal(0))


@pytest.mark.parametrize(
    ("params", "name"),
    [({"layers": {"w": 3, "0": {"w": 2}}}, "layers/0/w"), ([3, (2, 2)], "1/0")],
    ids=["number", "list"],
)
def test_layers_called_as_another_leaf_are_named(params, name):
    params = jax.tree.map(lambda size: jnp.ones((size, 4, 4)), params)
    stacked = {"layers/w": 0} if isinstance(params, dict) else {"0": 0}
    with pytest.raises(ValueError, match=rf"Layers of the stacked leaf .* are called \['{name}'\], and so are other"):
        sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5, stacked=stacked).init(params)


def test_a_stack_without_layers_is_left_as_it_is():
    params = {"layers": {"kernel": jnp.zeros((0, 4, 4))}, "kernel": jnp.ones((4, 4))}
    tx = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5, stacked={"layers/*": 0})
    masks = get_masks(tx.init(params))
    assert masks["layers"]["kernel"].shape == (0, 4, 4)
    assert masks["kernel"].sum() == 8


def test_layers_of_a_bare_array_are_called_by_their_numbers():
    tx = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5, stacked={"*": 0}, overrides={"1": 0.0})
    assert get_masks(tx.init(jnp.ones((3, 4, 4)))).sum((1, 2)).tolist() == [8, 16, 8]


def test_experts_of_stacked_layers_are_layers_too():
    kernel = jax.random.normal(jax.random.key(0), (3, 2, 8, 4))  # experts, layers, inputs, outputs
    params, stacked = {"moe": {"kernel": kernel}}, {"moe/*": (1, 0)}
    single = {(layer, expert): kernel[expert, layer] for layer in range(2) for expert in range(3)}

    def together(masks):
        return jnp.stack([jnp.stack([masks[layer, expert] for layer in range(2)]) for expert in range(3)])

    def moved(params, first, **more):
        options = {"sparsity": 0.5, "distribution": "uniform", "when": Every(0, 1, 9)}
        tx = sparsify(optax.sgd(0.1), methods.rigl(0.5), **options, **more)
        _, state = tx.update(jax.tree.map(jnp.cos, params), set_masks(tx.init(params), first), params)
        return get_masks(state)

    first = select(jax.tree.map(jnp.abs, single), sparsity=0.5)
    masks = moved(params, {"moe": {"kernel": together(first)}}, stacked=stacked)
    np.testing.assert_array_equal(masks["moe"]["kernel"], together(moved(single, first)))
    overrides = {"moe/1/2/kernel": 0.0}
    tx = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5, stacked=stacked, overrides=overrides)
    dense = get_masks(tx.init(params))["moe"]["kernel"].all((2, 3))
    assert [tuple(index) for index in np.argwhere(dense).tolist()] == [(2, 1)]


def test_methods_learn_of_hidden_leaves():
    """A gradient at a part of the parameters means nothing."""
    params = normal(0)
    tx = sparsify(optax.sgd(0.1), methods.grasp(), sparsity=0.5, stacked=AXES)
    tx = optax.masked(tx, {"embed": False, "blocks": True})
    with pytest.raises(TypeError, match=r"grasp takes a gradient at all parameters, and optax.masked"):
        tx.update(params, tx.init(params), params, grad_fn=lambda p: p)


@pytest.mark.parametrize("stacked", ["layers/*", *({"layers/*": axes} for axes in (None, True, (), [0, 1])), {0: 0}])
def test_stacks_of_another_type_are_refused(stacked):
    with pytest.raises(TypeError, match=r"stacked maps path patterns to the axis of the layers, as .*; got "):
        sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5, stacked=stacked)
