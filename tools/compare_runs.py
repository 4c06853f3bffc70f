"""Compare the recipes, losses, scores and throughput of runs, as text and as an HTML page."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from model.errors import UserError
from tools.run_status import main_scores, read_status
from tools.status import sparkline
from trainer.page.render import render
from trainer.plugins import load_plugins
from trainer.scoring.table import format_table
from trainer.telemetry.jsonl import read_lines, write_atomically
from trainer.telemetry.trackers.base import flatten_params

TEMPLATE = Path(__file__).with_name("compare_runs.html")
_NUM_POINTS = 300
_MAX_CHARACTERS = 40
_SPEEDS: dict[str, tuple[str, Callable[[float], str]]] = {
    "lr": ("learning rate", lambda v: f"{v:.4g}"),
    "grad_norm": ("gradient norm", lambda v: f"{v:.4g}"),
    "tokens_per_sec": ("tokens/s", lambda v: f"{v:,.0f}"),
    "audio_sec_per_sec": ("audio s/s", lambda v: f"{v:,.1f}"),
    "mfu": ("MFU", lambda v: f"{v:.1%}"),
    "peak_bytes": ("peak memory", lambda v: f"{v / 2**30:.1f} GiB"),
    "goodput": ("goodput", lambda v: f"{v:.0%}"),
}
"""The title and the number format of each row of the throughput table, by the name of the metric."""
_IGNORED = ("name", "train.run_dir")
"""Recipe keys that are not compared, since they always differ between runs."""


def load_plugins_of(folders: Sequence[Path]) -> None:
    """Load the plug-ins of runs, because their tasks may have scores.

    For each plug-in that cannot be loaded, a note is printed on stderr.

    Raises:
        UserError: If the recipe of a run cannot be read.
    """
    names = [name for folder in folders for name in _read_recipe(folder).get("plugins") or ()]
    for name in dict.fromkeys(names):
        try:
            load_plugins([name])
        except UserError as error:
            print(f"note: {error}; the scores of its tasks are not compared", file=sys.stderr)


def compare_runs(folders: Sequence[Path], now_sec: float) -> dict[str, Any]:
    """Return the comparison as a JSON-compatible tree. The runs are in the order of `folders`.

    Args:
        folders: The folders of the runs.
        now_sec: The current time in seconds since the epoch.

    Raises:
        UserError: If a folder contains no run, or a file in it cannot be read.
    """
    statuses = [read_status(folder, now_sec) for folder in folders]
    records = [[record for _, record in read_lines(folder / "metrics.jsonl")] for folder in folders]
    recipes = [_recipe(folder) for folder in folders]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in _IGNORED)
    names = [folder.resolve().name for folder in folders]
    scores = [_scores(own) for own in records]
    return {
        "runs": names if len(set(names)) == len(names) else [str(folder) for folder in folders],
        "states": [f"{s.state}, step {s.step}" + (f" of {s.num_steps}" if s.num_steps else "") for s in statuses],
        "recipe": [
            {"key": key, "values": values}
            for key in keys
            if len(set(values := [recipe.get(key) for recipe in recipes])) > 1
        ],
        "losses": [_curve(own) for own in records],
        "scores": [
            {"name": name, "values": [own.get(name) for own in scores]}
            for name in dict.fromkeys(name for own in scores for name in own)
        ],
        "throughput": [
            {"name": name, "values": [s.latest.get(name) for s in statuses]}
            for name in dict.fromkeys(name for s in statuses for name in s.latest)
        ]
        + [{"name": "goodput", "values": [s.goodput for s in statuses]}],
    }


def _recipe(folder: Path) -> dict[str, str]:
    """Return the values of a run's recipe as text by dotted key. The result is empty if there is no recipe."""
    return flatten_params(_read_recipe(folder))


def _read_recipe(folder: Path) -> Mapping[str, Any]:
    """Return the recipe of a run. The result is empty if there is no recipe."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())}); restore it") from None
    return tree if isinstance(tree, Mapping) else {}


def _curve(records: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Return at most `_NUM_POINTS` + 1 pairs (step, loss), including the first and the last finite loss."""
    points = [[float(r["step"]), float(r["train/loss"])] for r in records if "train/loss" in r]
    points = [p for p in points if math.isfinite(p[1])]
    every = max(1, -(-len(points) // _NUM_POINTS))
    kept = points[::-1][::every][::-1]
    return kept if kept[:1] == points[:1] else [points[0], *kept]  # The last point is always kept.


def _scores(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the main scores of each split's last evaluation, with the bounds of their confidence intervals."""
    merged: dict[str, Any] = {}
    for record in records:
        merged.update({key: value for key, value in record.items() if key.startswith("eval/")})
    found = {}
    for name, value in main_scores(records).items():
        bounds = {b: float(merged[key]) for b in ("low", "high") if (key := f"eval/{name}/{b}") in merged}
        found[name] = {"value": value, **bounds}
    return found


def describe(tree: Mapping[str, Any]) -> str:
    """Format a comparison as tables for the terminal."""
    runs = tree["runs"]
    blocks = [format_table([{"run": run, "state": state} for run, state in zip(runs, tree["states"], strict=True)])]

    def rows(part: str, key: str, cell: Any) -> list[dict[str, object]]:
        return [
            {part: row[key], **{run: cell(v) for run, v in zip(runs, row["values"], strict=True)}}
            for row in tree["recipe" if part == "recipe" else part]
        ]

    differing = rows("recipe", "key", lambda v: "-" if v is None else _cut(v))
    blocks.append(format_table(differing) if differing else "recipe: no difference")
    width = max(map(len, runs))
    curves = [
        f"{run:{width}}  {curve[0][1]:.3f} {sparkline([y for _, y in curve])} {curve[-1][1]:.3f}"
        for run, curve in zip(runs, tree["losses"], strict=True)
        if curve
    ]
    blocks.append("\n".join(["loss", *curves]))
    if tree["scores"]:
        blocks.append(format_table(rows("scores", "name", _interval)))
    if tree["throughput"]:
        speeds = _speeds(tree["throughput"])
        blocks.append(
            format_table(
                [{"speed": r["name"], **dict(zip(runs, map(_or_dash, r["values"]), strict=True))} for r in speeds]
            )
        )
    return "\n\n".join(blocks)


def _speeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the throughput table with titles and with numbers formatted as text. None remains None."""
    found = []
    for row in rows:
        title, form = _SPEEDS.get(row["name"], (row["name"], lambda v: f"{v:,.4g}"))
        found.append({"name": title, "values": [None if v is None else form(v) for v in row["values"]]})
    return found


def _or_dash(text: str | None) -> str:
    return "-" if text is None else text


def _interval(score: Mapping[str, float] | None) -> str:
    if score is None:
        return "-"
    bounds = f" [{score['low']:.3f}, {score['high']:.3f}]" if "low" in score and "high" in score else ""
    return f"{score['value']:.3f}{bounds}"


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 1]}…"


def write_page(tree: Mapping[str, Any], path: Path) -> None:
    """Write the comparison as one HTML page.

    Raises:
        UserError: If the file cannot be written.
    """
    try:
        write_atomically(
            path, render(TEMPLATE, " and ".join(tree["runs"]), {**tree, "throughput": _speeds(tree["throughput"])})
        )
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror}); choose another file") from None
