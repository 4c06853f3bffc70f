"""The PNG plots of a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trainer.page.figure import SIZE_INCHES, plain, save, with_legend


def draw(tree: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the plots for which a profile has data, and return their paths.

    The plots show the encoder experts' shares of clips, their change over the steps, and the encoders' time per rank.

    Args:
        tree: The profile as returned by `Profile.to_json`.
        folder: The folder to which the plots are written.
    """
    drawn = []
    if tree["tasks"] and tree["experts"]:
        drawn.append(_shares(tree, folder / "shares.png"))
        if len(tree["windows"]) > 1:
            drawn.append(_drift(tree, folder / "drift.png"))
    if tree["time"] is not None:
        drawn.append(_ranks(tree, folder / "ranks.png"))
    return drawn


def _shares(tree: dict[str, Any], path: Path) -> Path:
    tasks, experts = list(tree["tasks"]), tree["experts"]
    shares = np.array([[tree["tasks"][t]["encoders"][e]["clip_share"] for t in tasks] for e in experts])
    figure = Figure(figsize=(1.5 + 1.1 * len(tasks), 1.6 + 0.55 * len(experts)))
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        colour = "white" if share > 0.6 else "black"
        axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(tasks)), [plain(f"{t}\n{tree['tasks'][t]['num_clips']:,} clips") for t in tasks])
    axes.set_yticks(range(len(experts)), [plain(name) for name in experts])
    axes.set_title(plain(f"{tree['run']}: share of clips that ran each encoder expert"))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return save(figure, path)


def _drift(tree: dict[str, Any], path: Path) -> Path:
    figure = Figure(figsize=SIZE_INCHES)
    axes = figure.subplots()
    windows = [w for w in tree["windows"] if "all" in w["tasks"]]
    steps = [w["last_step"] for w in windows]
    for k, name in enumerate(tree["experts"]):
        totals = [w["tasks"]["all"] for w in windows]
        axes.plot(steps, [t["routed_clips"][k] / t["num_clips"] for t in totals], label=plain(name), marker=".")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("step")
    axes.set_title(plain(f"{tree['run']}: share of clips that ran each encoder expert, all tasks"))
    return save(with_legend(figure, axes), path)


def _ranks(tree: dict[str, Any], path: Path) -> Path:
    time = tree["time"]
    figure = Figure(figsize=SIZE_INCHES)
    axes = figure.subplots()
    ranks = np.arange(time["num_ranks"])
    filled = np.zeros(len(ranks))
    for name, seconds in time["compute_sec_by_rank"].items():
        # The colors of the experts are those of the drift plot.
        colour = "grey" if name == tree["primary"] else f"C{tree['experts'].index(name)}"
        axes.bar(ranks, seconds, bottom=filled, label=plain(name), width=0.8, color=colour)
        filled += np.array(seconds)
    waits = np.array(time["wait_sec_by_rank"])
    if waits.any():
        axes.bar(ranks, waits, bottom=filled, label="waiting", width=0.8, color="lightgrey", hatch="//")
    axes.axhline(time["mean_sec"], color="black", linewidth=1, linestyle="--", label="mean computing time")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("rank")
    axes.set_ylabel("seconds per step")
    axes.set_title(f"encoder time by rank: slowest / mean = {time['imbalance']:.2f}")
    return save(with_legend(figure, axes), path)
