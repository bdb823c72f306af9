"""Commands that train, measure and draw, as ``python -m experiments.NAME``. They need the extra ``experiments``.

* Train: ``train`` a network; a ``table`` of a paper, or part of it; ``tune`` rho for a table.
* Look at finished runs: ``evaluate``, ``robustness``, ``surface``, ``spectrum``, ``ratio``, ``shrink``; ``draw`` them.
* Answer a question: ``flatness``, ``precision``, ``convergence``; ``bench`` and ``aot`` for time and memory.
* ``report`` makes all pages and figures anew from the committed rows.

``cli``, ``sharding``, ``solution``, ``stopping`` and ``trees`` are shared by the commands. A network (``models``) on a
data set (``datasets``) is a task (``tasks``); what a run is stands in its ``config``, and ``training`` makes one.
Papers' tables are in ``recipes``. Results are ``rows``, and ``pages`` and ``figures`` are made from them alone.
"""

from importlib.util import find_spec

if find_spec("tyro") is None:
    raise ModuleNotFoundError(
        "experiments needs the packages of its extra; in this checkout: uv run --extra experiments python -m "
        "experiments.train, or pip install '.[experiments]'."
    )
