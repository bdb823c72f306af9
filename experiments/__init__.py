"""Commands that train, measure and draw. They need the packages of the extra ``experiments``."""

from importlib.util import find_spec

if find_spec("tyro") is None:
    raise ModuleNotFoundError(
        "experiments needs the packages of its extra; in this checkout: uv run --extra experiments python -m "
        "experiments.train, or pip install '.[experiments]'."
    )
