"""Floating-point operations of every layer, of a masked network, and of its training."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from s2sam_jax._base.tree import by_name
from s2sam_jax._base.types import Masks, Params

ACTIVATIONS = "(activations)"

# What a value is computed from: constants alone (None), constants and the parameter of that path, or inputs.
Origin = str | None
Shape = tuple[int, ...]
Sizes = dict[Origin, float]  # of parameters; constants lie below, activations above them all


def layer_flops(fn: Callable[..., Any], params: Params, *inputs: Any) -> dict[str, int]:
    r"""Forward FLOPs of every parameter that is the weight of a convolution or a matrix product.

    .. math:: f_l = 2 \cdot \text{multiply-adds}

    ``fn`` is traced, never run, and its products are found at any depth: under ``jit``, ``checkpoint`` and custom
    derivatives, in ``scan`` (times its length), ``cond`` (the costliest branch) and ``shard_map`` (all devices
    together). A product belongs to the parameter that one of its operands is computed from without any input, as by a
    cast, a mask, a reshape or a slice; if several go into it, to the largest. A parameter used twice is counted twice.
    Taps on padding count like the others; zeros that a transposed convolution puts between its inputs do not: every
    input meets every tap once. Everything else (norms, activation functions, biases, look-ups in an embedding) is left
    out, as is usual.

    Args:
      fn: ``(params, *inputs) -> anything``. Pass masks, flags and keys by closure.
      params: any pytree of arrays, or of shapes (``jax.ShapeDtypeStruct``).
      inputs: arrays or shapes. FLOPs are those of the whole batch; for FLOPs per sample, use a batch of one.

    Returns:
      FLOPs by path, such as ``"conv1/kernel"``, in the order of computation. Products without a parameter, such as
      those of attention, are summed under ``"(activations)"``.

    Raises:
      ValueError: for products in a loop of unknown length, or inside a primitive of unknown cost.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from s2sam_jax.analysis import layer_flops
      >>> def net(params, x):
      ...     hidden = jax.nn.relu(x @ params["one"] + params["bias"])
      ...     return hidden @ params["two"]
      >>> params = {"one": jnp.ones((3, 8)), "bias": jnp.ones(8), "two": jnp.ones((8, 2))}
      >>> layer_flops(net, params, jax.ShapeDtypeStruct((1, 3), jnp.float32))
      {'one': 48, 'two': 32}
    """
    jaxpr = jax.make_jaxpr(fn)(params, *inputs).jaxpr
    paths = list(by_name(params))
    parameters = {path: variable.aval.size for path, variable in zip(paths, jaxpr.invars, strict=False)}
    sizes: Sizes = {None: -1, **parameters, ACTIVATIONS: math.inf}
    flops, _ = _walk(jaxpr, [*paths, *[ACTIVATIONS] * (len(jaxpr.invars) - len(paths))], sizes)
    return dict(flops)


def masked_flops(layers: Mapping[str, float], masks: Masks) -> dict[str, float]:
    r"""FLOPs of every layer if zeros cost nothing.

    .. math:: f_l \cdot \|m_l\|_0 / N_l

    Their sum is the :math:`f_S` of :func:`training_flops`.

    Args:
      layers: dense FLOPs by path, from :func:`layer_flops`.
      masks: bool tree like the parameters, as from ``get_masks``.

    Returns:
      FLOPs by path; products without a parameter stay as they are.

    Raises:
      ValueError: for a layer without a mask.
      TypeError: for a mask that is not bool.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax.analysis import masked_flops
      >>> masked_flops({"one": 48, "(activations)": 10}, {"one": jnp.arange(24).reshape(3, 8) < 6})
      {'one': 12.0, '(activations)': 10}
    """
    named = {name: np.asarray(mask) for name, mask in by_name(masks).items()}
    if missing := sorted(layers.keys() - named.keys() - {ACTIVATIONS}):
        raise ValueError(f"masked_flops needs masks like the parameters; there is none for {missing}.")
    if wrong := [path for path, mask in named.items() if mask.dtype != np.bool_]:
        raise TypeError(f"masked_flops needs bool masks; these are not: {wrong}.")
    return {
        path: flops if path == ACTIVATIONS else flops * int(np.count_nonzero(named[path])) / named[path].size
        for path, flops in layers.items()
    }


def training_flops(
    dense: float,
    sparse: float | Sequence[float] | np.ndarray,
    *,
    gradients: float = 1.0,
    dense_gradient_every: int | None = None,
) -> float:
    r"""Training FLOPs per sample, averaged over a run, as papers on sparse training count them.

    .. math:: 3 k \bar f_S + \frac{f_D - \bar f_S}{\Delta T + 1}

    for methods that need the dense gradient now and then, and :math:`3 k \bar f_S` for all others: a backward pass
    costs two forward ones, one of them for the gradient of the weights, and the update itself nothing. Every
    :math:`\Delta T + 1` steps one gradient of the weights is dense: the first, where a step takes several, as methods
    grow by that one. RigL's paper, for :math:`k = 1`, writes the same as
    :math:`(3 f_S\, \Delta T + 2 f_S + f_D) / (\Delta T + 1)`. Dense training has :math:`f_S = f_D`. This is what
    training would cost if zeros were free; simulated masks save nothing.

    Args:
      dense: :math:`f_D`, forward FLOPs of the dense network on one sample.
      sparse: :math:`f_S`, those of the sparse network; if the density changes, those at evenly spaced times of
        training, whose mean is taken.
      gradients: k, gradient evaluations per step: 1 for SGD and S2-SAM, 2 for SAM.
      dense_gradient_every: :math:`\Delta T`, steps between two that need the dense gradient (RigL: the interval of its
        mask updates); 0 if every step does, None if none.

    Returns:
      FLOPs per sample; multiply by samples and epochs for the whole run.

    Raises:
      ValueError: if FLOPs are negative or sparse FLOPs exceed dense ones, or other arguments are out of range.

    Reference:
      Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, appendix on FLOPs.

    Example:
      >>> from s2sam_jax.analysis import training_flops
      >>> training_flops(8.0, 2.0, gradients=2)
      12.0
      >>> print(round(training_flops(1.0, 0.23, dense_gradient_every=100) / training_flops(1.0, 1.0), 4))
      0.2325
    """
    trace = np.asarray(sparse, np.float64)
    if trace.size == 0 or not (np.all(trace >= 0) and np.all(trace <= dense * (1 + 1e-9))):
        raise ValueError(f"training_flops needs 0 <= sparse <= dense at all times; got {sparse} and dense={dense}.")
    if gradients <= 0:
        raise ValueError(f"training_flops needs gradients > 0; got {gradients}.")
    mean = float(trace.mean())
    if dense_gradient_every is None:
        return 3 * gradients * mean
    if dense_gradient_every < 0:
        raise ValueError(f"training_flops needs dense_gradient_every >= 0; got {dense_gradient_every}.")
    return 3 * gradients * mean + (dense - mean) / (dense_gradient_every + 1)


def _walk(jaxpr: core.Jaxpr, origins: Sequence[Origin], sizes: Sizes) -> tuple[Counter[str], list[Origin]]:
    """FLOPs by parameter, and where the results come from, given where the arguments do."""
    known = dict(zip(jaxpr.invars, origins, strict=True))
    flops: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        counted, results = _equation(eqn, _look_up(known, eqn.invars), sizes)
        flops.update(counted)
        known.update(zip(eqn.outvars, results, strict=True))
    return flops, _look_up(known, jaxpr.outvars)


def _look_up(known: dict[Any, Origin], variables: Sequence[Any]) -> list[Origin]:
    return [None if isinstance(variable, core.Literal) else known.get(variable) for variable in variables]


def _equation(eqn: core.JaxprEqn, operands: list[Origin], sizes: Sizes) -> tuple[Counter[str], list[Origin]]:
    inner = [getattr(leaf, "jaxpr", leaf) for leaf in jax.tree.leaves(eqn.params)]
    inner = [jaxpr for jaxpr in inner if isinstance(jaxpr, core.Jaxpr)]
    name = eqn.primitive.name
    if name == "scan":
        return _scan(eqn, inner[0], operands, sizes)
    if name == "cond":
        flops, results = zip(*[_walk(branch, operands[1:], sizes) for branch in inner], strict=True)
        return max(flops, key=Counter.total), [_join(column, sizes) for column in zip(*results, strict=True)]
    if len(inner) == 1 and len(inner[0].invars) == len(operands):
        flops, results = _walk(inner[0], operands, sizes)
        return _times(flops, _devices(eqn) if name == "shard_map" else 1), results
    if any(_walk(jaxpr, [None] * len(jaxpr.invars), sizes)[0] for jaxpr in inner):
        advice = "Use lax.scan, or lax.fori_loop between Python integers." if name == "while" else "Leave it out of fn."
        raise ValueError(f"layer_flops met products inside {name!r} and cannot know how often they run. {advice}")
    sources = operands[1:] if name == "select_n" else operands  # which one is taken does not matter: a mask
    return _product(eqn, operands, sizes), [_join(sources, sizes)] * len(eqn.outvars)


def _product(eqn: core.JaxprEqn, operands: list[Origin], sizes: Sizes) -> Counter[str]:
    """A convolution or a matrix product; nothing for anything else."""
    shapes: list[Shape] = [getattr(variable.aval, "shape", ()) for variable in (*eqn.invars, *eqn.outvars)]
    if eqn.primitive.name == "dot_general":
        products = _matrix_product(shapes[0], shapes[1], eqn.params["dimension_numbers"])
    elif eqn.primitive.name == "ragged_dot_general":  # of a mixture of experts: each row meets one group
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        groups = numbers.rhs_group_dimensions
        products = _matrix_product(shapes[0], shapes[1], numbers.dot_dimension_numbers, groups)
    elif eqn.primitive.name == "conv_general_dilated":
        products = _convolution(eqn.params, *shapes)
    else:
        return Counter()
    parameters = [origin for origin in operands if origin is not None and origin != ACTIVATIONS]
    owner = max(parameters, key=sizes.__getitem__, default=ACTIVATIONS)
    return Counter({owner: 2 * products})


def _matrix_product(left: Shape, right: Shape, numbers: Any, groups: Sequence[int] = ()) -> int:
    """Every entry on the left meets all on the right along the axes that are the right one's own."""
    (_, contracted), (_, batch) = numbers
    shared = {*contracted, *batch, *groups}
    return math.prod(left) * math.prod(size for axis, size in enumerate(right) if axis not in shared)


def _convolution(params: Mapping[str, Any], image: Shape, kernel: Shape, output: Shape) -> int:
    """Products by taps at every output, or where it is transposed, at every input: zeros between those cost nothing."""
    images, (_, *taps), outputs = params["dimension_numbers"]  # the input channels of a kernel are those of one group
    positions = [
        output[to] if spread == 1 else math.ceil(image[of] / stride)
        for of, to, spread, stride in zip(
            images[2:], outputs[2:], params["lhs_dilation"], params["window_strides"], strict=True
        )
    ]
    return math.prod(output[axis] for axis in outputs[:2]) * math.prod(positions + [kernel[axis] for axis in taps])


def _scan(
    eqn: core.JaxprEqn, body: core.Jaxpr, operands: list[Origin], sizes: Sizes
) -> tuple[Counter[str], list[Origin]]:
    # Rows have an axis more outside than in the body; the names of scan's parameters differ between versions of jax.
    rows_in, rows_out = _longer(eqn.invars, body.invars), _longer(eqn.outvars, body.outvars)
    end = len(operands) - rows_in
    begin = end - (len(eqn.outvars) - rows_out)
    carry = operands[begin:end]
    while True:  # what the carry comes from may change from one turn to the next, but only upwards
        flops, results = _walk(body, [*operands[:begin], *carry, *operands[end:]], sizes)
        merged = [_join(pair, sizes) for pair in zip(carry, results, strict=False)]
        if merged == carry:
            return _times(flops, eqn.params["length"]), results
        carry = merged


def _longer(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many variables have more axes outside of a body than in it."""
    return sum(len(a.aval.shape) > len(b.aval.shape) for a, b in zip(outside, inside, strict=True))


def _join(origins: Sequence[Origin], sizes: Sizes) -> Origin:
    return max(origins, key=sizes.__getitem__, default=None)


def _times(flops: Counter[str], number: int) -> Counter[str]:
    return Counter({path: number * count for path, count in flops.items()})


def _devices(eqn: core.JaxprEqn) -> int:
    axes = eqn.params.get("newly_manual_axes") or eqn.params["manual_axes"]  # the older name
    return math.prod(eqn.params["mesh"].shape[axis] for axis in axes)
