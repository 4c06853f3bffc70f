"""What all PNG plots of reports share."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

SIZE_INCHES = (8.0, 4.0)
_DPI = 120


def dress(axes: Axes) -> Axes:
    """Horizontal rules behind the data, no frame."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return axes


def with_legend(figure: Figure, axes: Axes) -> Figure:
    """A legend beside the data."""
    dress(axes).legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write it as PNG."""
    figure.savefig(path, dpi=_DPI, bbox_inches="tight")
    return path
