"""What has to be known about optax: whose a state is, and which wrappers hold gradients back or hide leaves."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import optax

from s2sam_jax._base.tree import find_states

Optimizer = optax.GradientTransformation | optax.MultiSteps  # which is none, but has its init and update

# Wrappers that hold gradients back, which s2sam must not remember.
HOLDING_BACK = ((optax.MultiStepsState, "optax.MultiSteps"), (optax.ApplyIfFiniteState, "optax.apply_if_finite"))
# Wrappers of transformations for some leaves only.
PARTIAL = (optax.MaskedState, optax.transforms.PartitionState)
# Transformations that change no gradient.
OBSERVING = (optax.SnapshotState, optax.MonitorState)
# Wrappers inside of which calls and updates differ.
SKIPPING = (
    *(kind for kind, _ in HOLDING_BACK),
    optax.transforms.ConditionallyTransformState,
    optax.transforms.ConditionallyMaskState,
)


def with_extra_args(tx: Optimizer) -> optax.GradientTransformationExtraArgs:
    """``optax.with_extra_args_support``, except that a bare ``optax.MultiSteps`` gets its extra arguments too.

    Its update takes them, but optax would drop them, as it is no ``GradientTransformationExtraArgs``.
    """
    if isinstance(tx, optax.MultiSteps):
        update: Any = tx.update  # which is typed for its own states alone
        return optax.GradientTransformationExtraArgs(tx.init, update)
    return optax.with_extra_args_support(tx)


def check_none_inside(inner_state: Any, kinds: Iterable[tuple[type, str]], caller: str) -> None:
    """Raises a ``ValueError`` where ``caller`` is around a wrapper that belongs outside of it."""
    for kind, name in kinds:
        if find_states(inner_state, kind):
            raise ValueError(
                f"{caller}({name}(...)) is the wrong way round: put {name} outside, {name}({caller}(...))."
            )


def chains(tree: Any) -> Iterator[tuple[Any, ...]]:
    """The states of every ``optax.chain``, which are plain tuples in its order."""
    if type(tree) is tuple:
        yield tree
    for node in jax.tree.leaves(tree, is_leaf=lambda x: x is not tree and type(x) is tuple):
        if type(node) is tuple:
            yield from chains(node)


def comes_last(opt_state: Any, kind: type) -> bool:
    """Whether nothing stands behind a state in its chain, but for what is there for other leaves."""
    for chain in chains(opt_state):
        first = next((place for place, part in enumerate(chain) if find_states(part, kind)), len(chain))
        behind = [part for part in chain[first + 1 :] if not isinstance(part, PARTIAL)]
        if behind and is_chain(chain):
            return False
    return True


def is_chain(states: tuple[Any, ...]) -> bool:
    """Whether a tuple may be the state of a chain; else it is a loop's own, or that of somebody's wrapper."""
    return all(isinstance(part, tuple) for part in states)


def hides_leaves(tree: Any) -> bool:
    """Whether ``optax.masked`` or ``multi_transform`` has left out some leaves of a tree."""
    return bool(find_states(tree, optax.MaskedNode))


def check_nothing_hidden(params: Any, caller: str, advice: str) -> None:
    """Raises a ``TypeError`` where ``optax.masked`` and the like hide leaves from one that needs all of them."""
    if hides_leaves(params):
        raise TypeError(
            f"{caller} takes a gradient at all parameters, and optax.masked or multi_transform hides some from it; "
            f"take it out. {advice}"
        )


def check_state_of_tx(state: Any, expected: Any, like: str) -> None:
    """Raises a ``ValueError`` if an optimizer state's structure is not that of a fresh one, which ``like`` names."""
    want, have = jax.tree.structure(expected), jax.tree.structure(state)
    if want != have:
        raise ValueError(
            f"opt_state is not a state of this tx; restore checkpoints into the structure of {like}:\n"
            f"  expected {want}\n  got      {have}"
        )
