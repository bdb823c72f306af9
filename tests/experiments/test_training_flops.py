"""FLOPs and memory of networks and of training, beside published figures."""

import dataclasses
import functools
import io

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

from experiments import tasks
from experiments.config import Config
from experiments.training import flops, sparse_methods
from s2sam_jax import ChannelAxis, ChannelGroup, apply_masks, sparsify
from s2sam_jax.analysis import training_flops


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


def cubic(start, end, steps):
    """Gradual pruning at each step, as if masks changed at all of them."""
    return 1 - (1 - np.clip((np.arange(steps) - start) / (end - start), 0, 1)) ** 3


PHASES = {"s2sam": (100, 130), "mest": (90, 120)}


def soft_bound(phases):
    """Densities of the 160 epochs of EM&S at 90 %."""
    return np.select([np.arange(160) < phases[0], np.arange(160) < phases[1]], [0.15, 0.125], 0.1)


def test_training_formulas_give_the_published_figures():
    def ratio(sparse, **options):
        return training_flops(1.0, sparse, **options) / training_flops(1.0, 1.0)

    assert training_flops(8.2e9, 8.2e9) == 3 * 8.2e9
    assert f"{training_flops(8.2e9, 8.2e9) * 32_000 * 4096:.1e}" == "3.2e+18"
    assert ratio(0.23) == pytest.approx(0.23)
    assert round(ratio(0.23, dense_gradient_every=100), 4) == 0.2325
    assert round(ratio(0.42, dense_gradient_every=100), 4) == 0.4219
    assert round(ratio(0.42, dense_gradient_every=0), 3) == 0.613  # SNFS
    assert ratio(0.23, gradients=2) == pytest.approx(0.46)
    of_sam = ratio(0.42, gradients=2, dense_gradient_every=0)
    assert of_sam == pytest.approx(0.613 + 0.42, abs=1e-3)  # its second gradient is sparse
    assert round(ratio(soft_bound(PHASES["s2sam"])), 4) == 0.1359
    assert round(ratio(soft_bound(PHASES["mest"])), 4) == 0.1328
    chase = 0.1 + 0.05 * (1 + np.cos(np.pi * np.linspace(0, 1, 5))) / 2
    np.testing.assert_allclose(chase, [0.15, 0.1427, 0.125, 0.1073, 0.1], atol=5e-5)
    assert ratio(chase) == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1.0, 2.0), {}, "sparse <= dense"),
        ((1.0, []), {}, "sparse <= dense"),
        ((1.0, [0.5, np.nan]), {}, "sparse <= dense"),
        ((1.0, -0.1), {}, "sparse <= dense"),
        ((1.0, 0.5), {"gradients": 0}, "gradients > 0"),
        ((1.0, 0.5), {"dense_gradient_every": -1}, "dense_gradient_every >= 0"),
    ],
)
def test_training_flops_refuses(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        training_flops(*arguments, **options)


@functools.cache
def network_of(config):
    networks = []

    def build():
        networks.append(tasks.build(config))
        return networks[0][:2]

    params, model_state = jax.eval_shape(build)
    return networks[0]._replace(params=params, model_state=model_state)


def by_name(config, steps=100, **options):
    network = network_of(dataclasses.replace(config, optimizer="sgd", method="dense"))
    return {entry.name: entry for entry in flops.ledger(config, network, steps, **options)}


RESNET50 = Config(
    dataset="imagenet2012", model="resnet50", optimizer="sgd", batch_size=4096, epochs=100, update_every=100 / 320
)


@pytest.mark.parametrize(("sparsity", "erk"), [(0.8, 0.414), (0.9, 0.242), (0.95, 0.122)])
def test_resnet50(sparsity, erk):
    got = by_name(dataclasses.replace(RESNET50, sparsity=sparsity), steps=320)
    forward = got[flops.FORWARD]
    assert f"{forward.dense:.1e}" == "8.2e+09"
    assert round(forward.sparse / forward.dense, 3) == erk
    run = got[flops.RUN]
    assert f"{run.dense:.1e}" == "3.2e+18"
    expected = (3 * forward.sparse * 100 + 2 * forward.sparse + forward.dense) / 101
    assert run.sparse / run.dense == pytest.approx(expected / (3 * forward.dense))


@pytest.mark.parametrize(("model", "mega"), [("resnet32", 551), ("vgg19", 796)])
def test_networks_for_cifar(model, mega):
    got = by_name(Config(dataset="cifar10", model=model, sparsity=0.9))
    assert round(got[flops.FORWARD].dense / 1e6) == mega
    if model == "resnet32":
        assert round(got[flops.FORWARD].sparse / got[flops.FORWARD].dense, 3) == 0.175


def test_gmp_of_resnet50_takes_0_56_of_the_dense_training():
    """In RigL's comparison the first layer stays dense."""
    got = by_name(dataclasses.replace(RESNET50, method="dense"))
    total, stem = got[flops.FORWARD].dense, got["stem/kernel"].dense
    trace = cubic(10_000, 25_000, 32_000)
    ratio = training_flops(total, stem + (total - stem) * (1 - 0.8 * trace)) / (3 * total)
    assert round(ratio, 2) == 0.56


DIGITS = Config(width=4, epochs=10, batch_size=50, optimizer="sgd")


@pytest.mark.parametrize(
    ("optimizer", "ssam_sparsity", "relative"),
    [("sgd", 0.5, 1.0), ("s2sam", 0.5, 1.0), ("msam", 0.5, 1.0), ("sam", 0.5, 2.0), ("asam", 0.5, 2.0)]
    + [("gsam", 0.5, 2.0), ("looksam", 0.5, 1.2), ("esam", 0.5, 2.17)]
    + [("ssam-f", s, r) for s, r in zip((0.5, 0.8, 0.9, 0.95, 0.98, 0.99), (1.65, 1.44, 1.36, 1.33, 1.31, 1.30),
                                        strict=True)]
    + [("ssam-d", 0.5, 1.65)],
)  # fmt: skip
def test_relative_cost_of_the_optimizers(optimizer, ssam_sparsity, relative):
    config = dataclasses.replace(DIGITS, optimizer=optimizer, ssam_sparsity=ssam_sparsity)
    assert round(flops.gradient_evaluations(config), 2) == relative


def test_optimizer_and_method_multiply():
    def cost(**changes):
        return by_name(dataclasses.replace(DIGITS, **changes))[flops.TRAINING].sparse

    dense = cost(method="dense")
    assert dense == by_name(DIGITS)[flops.TRAINING].dense
    assert cost(method="static") < cost(method="rigl") < 1.05 * cost(method="static")
    assert cost(method="mest-em") == cost(method="set") == cost(method="static")
    second = cost(method="rigl", optimizer="sam") - cost(method="rigl", optimizer="s2sam")
    assert second == pytest.approx(cost(method="static"))  # RigL grows by the first gradient, the only dense one
    assert cost(method="dense", optimizer="sam") == 2 * dense
    assert cost(method="static", optimizer="s2sam-released") == dense  # it perturbs pruned weights


@pytest.mark.parametrize("method", ["gmp", "mest-ems", "lottery"])
def test_planned_zeros_are_those_of_the_masks(method):
    config = Config(method=method, sparsity=0.8, epochs=20, update_every=1, rewind_epochs=0.5 * (method == "lottery"))
    steps = 8
    clock = sparse_methods.clock(config, steps)
    tx = sparsify(optax.sgd(0.01), sparse_methods.make(config), sparsity=0.8, distribution="uniform", when=clock)
    params = {"kernel": jax.random.normal(jax.random.key(0), (20, 50))}
    state = tx.init(params)
    update = jax.jit(lambda p, s: tx.update(p, s, p, refresh_masks=None))
    params, zeros = apply_masks(params, state), []
    for _ in range(config.epochs * steps):
        updates, state = update(params, state)
        params = optax.apply_updates(params, updates)
        zeros.append(1 - int(state.nnz.sum()) / 1000)
    share = flops.pruned_share(config, steps)
    np.testing.assert_allclose(share, np.asarray(zeros) / 0.8, atol=5e-3)  # counts are whole
    assert share[-1] == 1.0


def test_a_density_that_nobody_planned_must_be_recorded():
    group, config = (
        ChannelGroup("hidden", filters=(ChannelAxis("kernel", -1),)),
        dataclasses.replace(DIGITS, method="chase"),
    )
    assert flops.pruned_share(config, 10, [group]) is None
    with pytest.raises(ValueError, match=r"chase needs a sparsity an epoch, 10; got 3"):
        flops.pruned_share(config, 10, [group], [0.0, 0.3, 0.6])
    unknown = by_name(dataclasses.replace(DIGITS, method="chex", sparsity=0.6))
    assert np.isnan([unknown[flops.TRAINING].sparse, unknown[flops.RUN].sparse]).all()
    assert unknown[flops.FORWARD].sparse > 0
    assert "unknown" in [str(cell) for cell in flops.table(list(unknown.values())).columns[2].cells]


def test_recorded_sparsities_and_masks():
    config = dataclasses.replace(DIGITS, method="chex", sparsity=0.6)
    network = network_of(dataclasses.replace(config, method="dense"))
    masks = jax.tree.map(lambda p: np.arange(np.prod(p.shape)).reshape(p.shape) % 4 == 0, network.params)
    got = {
        e.name: e for e in flops.ledger(config, network, 28, masks=masks, sparsities=[0.0] * 4 + [0.3] * 3 + [0.6] * 3)
    }
    dense, sparse = got[flops.FORWARD].dense, got[flops.FORWARD].sparse
    assert sparse == dense / 4
    assert got[flops.TRAINING].sparse == pytest.approx(3 * (0.4 * dense + 0.3 * (dense + sparse) / 2 + 0.3 * sparse))
    assert got[flops.RUN].sparse == pytest.approx(got[flops.TRAINING].sparse * 10 * 28 * 50)
    planned = dataclasses.replace(config, method="gmp")  # how often a run looks changes nothing there
    ledgers = [flops.ledger(planned, network, 28, masks=masks, sparsities=s) for s in (None, [0.6])]
    assert ledgers[0] == ledgers[1]


def test_memory_in_copies_of_the_parameters():
    def copies(**changes):
        return by_name(dataclasses.replace(DIGITS, **changes))[flops.STATE].sparse

    sgd = copies(method="dense")
    assert sgd == pytest.approx(1, abs=0.01)  # the momentum
    assert copies(method="dense", optimizer="s2sam") - sgd == pytest.approx(1, abs=0.01)
    assert copies(method="dense", optimizer="sam") - sgd == pytest.approx(0, abs=0.01)
    assert copies(method="dense", optimizer="ssam-d") - sgd == pytest.approx(0.25, abs=0.01)
    assert copies(method="rigl") - sgd == pytest.approx(0.25, abs=0.02)  # masks, and nothing of its own
    assert copies(method="lottery", sparsity=0.5) - sgd == pytest.approx(2.25, abs=0.03)  # weights and momentum
    assert copies(method="rigl", optimizer="s2sam") - sgd == pytest.approx(1.25, abs=0.02)


def test_text():
    config = Config(
        dataset="wmt14", model="transformer-base", width=64, vocabulary=50, max_length=7, optimizer="sgd",
        method="gmp", sparsity=0.8, epochs=10,
    )  # fmt: skip
    got = by_name(config)
    assert got["(activations)"].dense == got["(activations)"].sparse == 18 * 2 * (2 * 7 * 7 * 64)
    assert got["embedding"].dense == 2 * 7 * 64 * 50  # as the last layer alone
    assert got["encoder/0/feed_forward/inner/kernel"].dense == 2 * 7 * 64 * 256
    matrices = 6 * (4 + 8) + 6 * (8 + 8)  # of width by width
    assert got[flops.FORWARD].dense == 2 * 7 * (64 * 64 * matrices + 64 * 50) + got["(activations)"].dense
    assert got[flops.TRAINING].sparse > 3 * got[flops.FORWARD].sparse


def test_table():
    config = dataclasses.replace(DIGITS, width=8)
    entries = flops.ledger(config, network_of(config), 28)
    assert (entries[0].name, entries[0].dense) == ("stem/kernel", 2 * 64 * 9 * 8)

    def printed(*args, **options):
        console = Console(width=120, file=io.StringIO())
        console.print(flops.table(*args, **options))
        return console.file.getvalue()

    short, long = printed(entries), printed(entries, layers=True)
    assert "stem/kernel" not in short
    assert "stem/kernel" in long
    assert "9.22 kFLOP" in long
    for name in (flops.FORWARD, flops.TRAINING, flops.RUN, flops.STATE):
        assert name in short
