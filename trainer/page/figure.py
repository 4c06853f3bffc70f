"""Shared style for the PNG plots in reports."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model.errors import printable_lines

SIZE_INCHES = (8.0, 4.0)
_DPI = 120


def plain(text: str) -> str:
    """Escape text so that matplotlib shows it verbatim. Text between two `$` would otherwise be parsed as a formula."""
    return printable_lines(text).replace("$", r"\$")


def dress(axes: Axes) -> Axes:
    """Draw horizontal grid lines behind the data, and hide the top and right spines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return axes


def with_legend(figure: Figure, axes: Axes) -> Figure:
    """Apply the common style, and put a legend next to the data."""
    dress(axes).legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG file, and return its path."""
    figure.savefig(path, dpi=_DPI, bbox_inches="tight")
    return path
