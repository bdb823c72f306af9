"""Structures by name, as a command line gives them."""

from s2sam_jax import NM, Block, Channel, Unstructured

Structure = Unstructured | NM | Block | Channel
FORMS = "'unstructured', 'nm:N:M', 'block:RxC', 'nm:N:M:pad', 'block:RxC:pad', 'channel' or 'channel:AXIS'"


def parse(text: str) -> Structure:
    """The structure of that name, such as ``nm:2:4`` and ``block:4x4``; ``:pad`` is for leaves it does not divide."""
    kind, *rest = text.split(":")
    pad = kind in ("nm", "block") and rest[-1:] == ["pad"]
    rest = rest[:-1] if pad else rest
    try:
        match kind, *rest:
            case ["unstructured"]:
                return Unstructured()
            case ["nm", n, m]:
                return NM(int(n), int(m), pad=pad)
            case ["block", shape]:
                return Block(tuple(int(length) for length in shape.split("x")), pad=pad)
            case ["channel"]:
                return Channel()
            case ["channel", axis]:
                return Channel(int(axis))
    except ValueError as error:
        raise ValueError(f"Cannot read structure {text!r}: {error} Use {FORMS}.") from error
    raise ValueError(f"Unknown structure {text!r}; use {FORMS}.")
