"""Plots of a sweep: time to finish, MFU, memory and cost, as a PNG file or as an HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.page.render import render
from trainer.telemetry.jsonl import write_atomically

TEMPLATE = Path(__file__).with_name("sweep.html")
_INVALID = "invalid"


def check_plot(path: Path) -> None:
    """Check that a plot can be written to `path`, before time is spent on plans.

    Raises:
        UserError: If the name ends neither with .png nor with .html, or the folder does not exist.
    """
    if path.suffix not in (".png", ".html"):
        raise UserError(f"--plot {path}: the name must end with .png or .html")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--plot {path}: no such folder: {path.absolute().parent}; make it first")


def plot(tree: dict[str, Any], path: Path) -> None:
    """Draw a sweep.

    The values of the first key are on the horizontal axis. Each combination of the other keys' values is a series.

    Args:
        tree: The sweep, as `trainer.plan.sweep.as_tree` returns it.
        path: The file to write, which `check_plot` accepts.

    Raises:
        UserError: If the file cannot be written.
    """
    try:
        if path.suffix == ".html":
            write_atomically(path, render(TEMPLATE, f"{tree['recipe']} on {tree['accelerator']}", tree))
        else:
            _draw(tree, path)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written: {error.strerror}") from None


def _draw(tree: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure  # The import is slow and only needed here.
    from matplotlib.ticker import FuncFormatter

    from trainer.page.figure import dress, plain, save

    figure = Figure(figsize=(11.0, 7.5), layout="constrained")
    panels = figure.subplots(2, 2, squeeze=True)
    values = list(dict.fromkeys(row["values"][0] for row in tree["rows"]))
    others = list(dict.fromkeys(tuple(row["values"][1:]) for row in tree["rows"]))
    days = max((row["hours"][1] for row in tree["rows"] if "hours" in row), default=0.0) > 48
    price = tree["price"]
    usable = next((row["usable_gib"] for row in tree["rows"] if "usable_gib" in row), None)
    measures = (
        ("days to finish" if days else "hours to finish", "hours", 1 / 24 if days else 1.0),
        ("MFU in %", "mfu", 100.0),
        ("GiB on the fullest rank" + (f" (usable: {usable:.1f}, dashed)" if usable else ""), "peak_gib", 1.0),
        (f"cost at {price:g} per accelerator-hour" if price else "accelerator-hours", "gpu_hours", price or 1.0),
    )
    for axes, (title, key, factor) in zip(panels.flat, measures, strict=True):
        dress(axes).set_title(title, fontsize=11)
        axes.set_xticks(range(len(values)), [plain(v) for v in values])
        axes.set_xlim(-0.4, len(values) - 0.6)
        axes.set_xlabel(plain(tree["keys"][0]))
        for i, other in enumerate(others):
            shift = 0.12 * (i - (len(others) - 1) / 2) / max(1, len(others) - 1)
            mine = [r for r in tree["rows"] if tuple(r["values"][1:]) == other and key in r]
            at = [values.index(row["values"][0]) + shift for row in mine]
            bounds = [row[key] if isinstance(row[key], list) else [row[key]] * 2 for row in mine]
            middle = [factor * (low + high) / 2 for low, high in bounds]
            reach = [factor * (high - low) / 2 for low, high in bounds]
            names = [f"{k}={v}" for k, v in zip(tree["labels"][1:], other, strict=True)]
            label = plain(" ".join(names)) if names else None
            bars = axes.errorbar(at, middle, yerr=reach, color=f"C{i}", label=label, capsize=3, marker="")
            for x, y, row in zip(at, middle, mine, strict=True):
                face = bars.lines[0].get_color() if row["fits"] else "white"
                axes.plot([x], [y], marker="o", color=bars.lines[0].get_color(), markerfacecolor=face)
        if key == "peak_gib" and usable is not None:
            axes.axhline(usable, color="firebrick", linestyle="--", linewidth=1)
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        for x, value in enumerate(values):
            if all(row["reason"] for row in tree["rows"] if row["values"][0] == value):
                axes.annotate(_INVALID, (x, 0.02), xycoords=("data", "axes fraction"), ha="center", color="grey")
    if len(others) > 1:
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(others)), frameon=False)
    hollow = any(row.get("fits") is False for row in tree["rows"])
    note = "  (hollow points do not fit into memory)" if hollow else ""
    figure.suptitle(plain(f"{tree['recipe']} on {tree['accelerator']}") + note)
    save(figure, path)
