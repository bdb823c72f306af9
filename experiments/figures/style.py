"""What all figures look like."""

from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
GREY = "#7F7F7F"  # What does not belong to one run alone.
OF_OPTIMIZER: dict[str, str] = dict(zip(("sgd", "s2sam", "sam", "ssam-f", "ssam-d", "asam"), COLOURS, strict=True))
MARKERS = "osD^vPX"  # One more than colours, so that cycling through both repeats no pair early.


def colour_of(optimizer: str) -> str:
    """The same in every figure of several optimizers; grey for those that have none of their own."""
    return OF_OPTIMIZER.get(optimizer, GREY)


def tidy(axes: Axes) -> None:
    """A faint grid, and no frame where there is no axis."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
