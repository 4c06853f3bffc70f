"""The files of a scorecard: JSON, CSV, plots and a page."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from trainer.evaluation.scorecard.plots import draw
from trainer.page.render import render
from trainer.page.spreadsheet import as_cell
from trainer.telemetry.jsonl import write_atomically

TEMPLATE = Path(__file__).with_name("report.html")


def write_files(tree: dict[str, Any], folder: Path) -> list[Path]:
    """Write scores.json, scores.csv, report.html and the PNG plots, replacing older ones.

    Args:
        tree: The result of `make_card`.
        folder: The folder to write into, which is created if it does not exist.

    Returns:
        The paths to the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {key: value for key, value in tree.items() if key not in ("samples", "audio")}
    write_atomically(folder / "scores.json", json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / "report.html", render(TEMPLATE, tree["title"], tree))
    with (folder / "scores.csv").open("w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, list(tree["scores"][0]) if tree["scores"] else ["task"])
        out.writeheader()
        out.writerows({key: as_cell(value) for key, value in score.items()} for score in tree["scores"])
    for old in folder.glob("*.png"):
        old.unlink()
    return [folder / "scores.json", folder / "scores.csv", folder / "report.html", *draw(tree, folder)]
