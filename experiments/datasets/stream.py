"""Data that does not fit the device: batches read from a source by threads, each a function of its step alone."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

# Batches read at once, each by a thread of its own; a thread for every row would spend its time on waiting for others.
AHEAD = 16


@runtime_checkable
class Source(Protocol):
    """Records by their index, as of a list, a TFDS data source or a memory-mapped array; read by several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Stream:
    """Shuffled training batches.

    Their position needs no state of its own: those from step k on are a function of the seed and k, so the step in a
    checkpoint of the training is also the one to go on from here.

    Attributes:
      source: the records.
      example: ``(record, generator) -> example``, a tree of arrays. The generator is of the seed, the epoch and the
        place in its order.
      batch_size: over all processes together; each yields an equal share of every batch, in one piece.
      process_index: which share.
      process_count: how many there are.
    """

    source: Source
    example: Callable[[Any, np.random.Generator], Any]
    batch_size: int
    process_index: int = dataclasses.field(default_factory=jax.process_index)
    process_count: int = dataclasses.field(default_factory=jax.process_count)

    def __post_init__(self):
        _check(self)
        if len(self.source) < self.batch_size:
            raise ValueError(f"batch_size={self.batch_size} is more than the {len(self.source)} rows of the source.")

    @property
    def steps_per_epoch(self) -> int:
        return len(self.source) // self.batch_size

    def batches(self, seed: int, start_step: int = 0) -> Iterator[Any]:
        """This process's share of the batches from a step on, without end.

        An epoch is a permutation of the source, less its incomplete last batch.
        """
        if start_step < 0:
            raise ValueError(f"start_step must be at least 0; got {start_step}.")
        import grain

        source: Any = self.source
        share = self.batch_size // self.process_count
        examples = grain.MapDataset.source(source).seed(seed).shuffle().random_map(self.example)
        shares = examples[: self.steps_per_epoch * self.batch_size].batch(share)
        return _read(shares[self.process_index :: self.process_count].repeat()[start_step:])


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All rows of a source, each once and in order, in batches of equal size; to be iterated as often as wanted.

    Attributes:
      source: the records.
      example: ``record -> example``, a tree of arrays.
      padding: the example that fills the last batch, to be told apart by what is in it, such as a label of -1.
      batch_size: over all processes together; each yields an equal share of every batch, in one piece.
      process_index: which share.
      process_count: how many there are.
    """

    source: Source
    example: Callable[[Any], Any]
    padding: Any
    batch_size: int
    process_index: int = dataclasses.field(default_factory=jax.process_index)
    process_count: int = dataclasses.field(default_factory=jax.process_count)

    def __post_init__(self):
        _check(self)

    def __len__(self) -> int:
        """Batches."""
        return -(-len(self.source) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        import grain

        def row(index: int) -> Any:
            return self.example(self.source[index]) if index < len(self.source) else self.padding

        shares = (
            grain.MapDataset.range(len(self) * self.batch_size).map(row).batch(self.batch_size // self.process_count)
        )
        return _read(shares[self.process_index :: self.process_count])


def _read(batches: Any) -> Iterator[Any]:
    import grain

    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=AHEAD, prefetch_buffer_size=AHEAD)))


def _check(stream: Stream | Evaluation) -> None:
    if not isinstance(stream.source, Source):
        raise TypeError(f"source must have a length and rows by index; got {type(stream.source).__name__}.")
    if not 0 <= stream.process_index < stream.process_count:
        raise ValueError(f"process_index must be in [0, {stream.process_count}); got {stream.process_index}.")
    if stream.batch_size < 1 or stream.batch_size % stream.process_count:
        raise ValueError(
            f"batch_size must be a positive multiple of the {stream.process_count} processes; got {stream.batch_size}."
        )
