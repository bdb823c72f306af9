"""What all figures look like."""

from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
GREY = "#7F7F7F"  # What does not belong to one run alone.
MARKERS = "osD^vPX"  # One more than colours, so that cycling through both repeats no pair early.


def tidy(axes: Axes) -> None:
    """A faint grid, and no frame where there is no axis."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
