"""The PNG plots of a scorecard."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trainer.page.figure import SIZE_INCHES, dress, plain, save
from trainer.scoring.fields import ALL

_MAX_NUMBERED = 12
"""The largest number of classes for which a confusion matrix shows counts in its cells."""


def draw(tree: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the main scores, the scores by duration and the confusion matrices.

    Args:
        tree: The result of `make_card`.
        folder: The folder to write the PNG files into.

    Returns:
        The paths to the files.
    """
    drawn = []
    if tree["headlines"]:
        drawn.append(_headlines(tree, folder / "scores.png"))
    for task in tree["headlines"]:
        bands = headline_scores(tree, task, "duration")
        if len(bands) > 1:
            drawn.append(_by_duration(tree, task, bands, folder / f"{task}-by-duration.png"))
    for task, matrices in tree["confusions"].items():
        for subset, matrix in matrices.items():
            name = re.sub(r"[^A-Za-z0-9_.-]", "_", subset)[:80]
            drawn.append(_confusion(f"{task}: {subset}", matrix, folder / f"confusion-{task}-{name}.png"))
    return drawn


def headline_scores(tree: dict[str, Any], task: str, dimension: str) -> list[dict[str, Any]]:
    """Return the scores of a task's main metric for the groups of one dimension."""
    wanted = (task, dimension, tree["headlines"][task])
    return [s for s in tree["scores"] if (s["task"], s["dimension"], s["metric"]) == wanted]


def _headlines(tree: dict[str, Any], path: Path) -> Path:
    rows = []
    for task in tree["headlines"]:
        (whole,) = headline_scores(tree, task, "")
        rows.append((f"{task} {whole['metric']}", whole))
        subsets = headline_scores(tree, task, "subset")
        rows += [(f"  {s['group']}", s) for s in subsets if len(subsets) > 1]
    figure = Figure(figsize=(SIZE_INCHES[0], 0.8 + 0.3 * len(rows)))
    axes = figure.subplots()
    positions = np.arange(len(rows))
    values = [s["value"] for _, s in rows]
    colours = ["C0" if s["group"] == ALL else "lightsteelblue" for _, s in rows]
    axes.barh(positions, values, xerr=_bounds([s for _, s in rows]), color=colours, ecolor="black", capsize=2)
    axes.set_yticks(positions, [plain(f"{name} ({s['num_samples']:,})") for name, s in rows])
    axes.invert_yaxis()
    axes.set_title(plain(f"{tree['title']}: main metric of each task, with 95 % intervals"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return save(figure, path)


def _by_duration(tree: dict[str, Any], task: str, bands: Sequence[dict[str, Any]], path: Path) -> Path:
    figure = Figure(figsize=SIZE_INCHES)
    axes = dress(figure.subplots())
    positions = np.arange(len(bands))
    axes.bar(positions, [s["value"] for s in bands], yerr=_bounds(bands), color="C0", ecolor="black", capsize=3)
    axes.set_xticks(positions, [plain(f"{s['group']}\n{s['num_samples']:,} samples") for s in bands])
    axes.set_ylabel(bands[0]["metric"])
    axes.set_title(plain(f"{tree['title']}: {task} by duration, with 95 % intervals"))
    return save(figure, path)


def _confusion(title: str, matrix: dict[str, dict[str, int]], path: Path) -> Path:
    rows = list(matrix)
    answers = sorted({answer for row in matrix.values() for answer in row} | set(rows), key=lambda a: (a == "", a))
    counts = np.array([[matrix[row].get(answer, 0) for answer in answers] for row in rows])
    shares = counts / counts.sum(1, keepdims=True)
    figure = Figure(figsize=(1.8 + 0.7 * len(answers), 1.4 + 0.45 * len(rows)))
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if len(answers) <= _MAX_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.6 else "black"
                axes.text(column, row, f"{count}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(answers)), [plain(a) or "(none)" for a in answers], rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), [plain(row) for row in rows])
    axes.set_xlabel("answer")
    axes.set_ylabel("reference")
    axes.set_title(plain(title))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return save(figure, path)


def _bounds(scores: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return the distances `[2, N]` from each value to the lower and to the upper bound of its interval."""
    return np.array([[s["value"] - s["low"] for s in scores], [s["high"] - s["value"] for s in scores]]).clip(min=0)
