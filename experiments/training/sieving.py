"""MEST's data sieving: after some epochs, leave out the examples that the network never forgets."""

from typing import NamedTuple

import numpy as np


class Forgetting(NamedTuple):
    """What is known of each training example.

    Attributes:
      correct: bool[n], whether it was classified correctly when last seen.
      learned: bool[n], whether it ever was.
      forgotten: int[n], how often it went from correct to wrong.
    """

    correct: np.ndarray
    learned: np.ndarray
    forgotten: np.ndarray


def start(examples: int) -> Forgetting:
    return Forgetting(np.zeros(examples, bool), np.zeros(examples, bool), np.zeros(examples, np.int64))


def record(state: Forgetting, rows: np.ndarray, correct: np.ndarray) -> Forgetting:
    """After an epoch: ``correct[i]`` says whether training row ``rows[i]`` was classified correctly."""
    now = state.correct.copy()
    now[rows] = correct
    return Forgetting(now, state.learned | now, state.forgotten + (state.correct & ~now))


def keep(state: Forgetting, remove: int) -> np.ndarray:
    """The rows to go on with, ascending: without the ``remove`` least forgotten, the lower row first among equals.

    An example that was never learned counts as forgotten most of all.

    Raises:
      ValueError: when nothing would be left.
    """
    examples = len(state.correct)
    if not 0 <= remove < examples:
        raise ValueError(f"remove must lie in [0, {examples}) for {examples} examples; got {remove}.")
    rank = np.where(state.learned, state.forgotten, np.iinfo(np.int64).max)
    return np.sort(np.argsort(rank, kind="stable")[remove:])
