"""The files of a profile: JSON, CSV, plots and an HTML page."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from trainer.expert_usage.analysis import Profile
from trainer.expert_usage.plots import draw
from trainer.page.render import render
from trainer.page.spreadsheet import as_cell
from trainer.scoring.tasks import TASKS
from trainer.telemetry.jsonl import write_atomically

TEMPLATE = Path(__file__).with_name("report.html")


def write_files(profile: Profile, folder: Path) -> list[Path]:
    """Write profile.json, cells.csv, report.html and the PNG plots into `folder`, and return their paths.

    Files of an earlier profile in the folder, including its plots, are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tree = profile.to_json()
    titles = {name: task.title for name, task in TASKS.items()}
    write_atomically(folder / "profile.json", json.dumps(tree, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "report.html", render(TEMPLATE, tree["run"], {**tree, "titles": titles}))
    write_cells(profile, folder / "cells.csv")
    for old in folder.glob("*.png"):
        old.unlink()
    plots = draw(tree, folder)
    return [folder / "profile.json", folder / "cells.csv", folder / "report.html", *plots]


def write_cells(profile: Profile, path: Path) -> None:
    """Write a CSV file with one line per encoder and group of clips.

    A group is a combination of task, language, source and duration band. The columns `group_clips` and
    `group_audio_sec` describe the whole group. `clips` and `audio_sec` describe the clips of the group on which the
    encoder ran. The columns `weight_…` contain the mean mixing weight of each gate over the group's clips. They are
    empty for the primary encoder.
    """
    load = profile.load
    head = ["encoder", "task", "language", "source", "band", "group_clips", "group_audio_sec"]
    head += ["clips", "audio_sec", "clip_share", "audio_share", *(f"weight_{gate}" for gate in load.gates)]
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(head)
        for group, cell in sorted(load.cells.items()):
            whole = [*map(as_cell, group), cell.num_clips, round(cell.audio_sec, 6)]
            if profile.primary is not None:
                out.writerow([as_cell(profile.primary), *whole, *whole[-2:], 1.0, 1.0, *("" for _ in load.gates)])
            for k, name in enumerate(load.experts):
                ran = [int(cell.routed_clips[k]), round(float(cell.routed_sec[k]), 6)]
                shares = [round(float(cell.clip_share[k]), 6), round(float(cell.audio_share[k]), 6)]
                out.writerow([as_cell(name), *whole, *ran, *shares, *cell.mean_weight[:, k].round(6).tolist()])
