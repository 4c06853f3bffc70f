"""A profile as files: JSON, CSV, plots and a page."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from trainer.expert_usage.analysis import Profile
from trainer.expert_usage.plots import draw
from trainer.page.render import render
from trainer.telemetry.jsonl import write_atomically

TEMPLATE = Path(__file__).with_name("report.html")


def write_files(profile: Profile, folder: Path) -> list[Path]:
    """Write profile.json, cells.csv, report.html and the PNG plots; returns their paths. Older ones are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = profile.to_json()
    write_atomically(folder / "profile.json", json.dumps(tree, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "report.html", render(TEMPLATE, tree["run"], tree))
    write_cells(profile, folder / "cells.csv")
    for old in folder.glob("*.png"):
        old.unlink()
    plots = draw(tree, folder)
    return [folder / "profile.json", folder / "cells.csv", folder / "report.html", *plots]


def write_cells(profile: Profile, path: Path) -> None:
    """One line per encoder and group of clips: task, language, source, duration band.

    `group_clips` and `group_audio_sec` are of the whole group, `clips` and `audio_sec` what the encoder ran of it; the
    weight of each gate is the mean mixing weight over the group's clips, empty for the primary.
    """
    load = profile.load
    head = ["encoder", "task", "language", "source", "band", "group_clips", "group_audio_sec"]
    head += ["clips", "audio_sec", "clip_share", "audio_share", *(f"weight_{gate}" for gate in load.gates)]
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(head)
        for group, cell in sorted(load.cells.items()):
            whole = [*group, cell.num_clips, round(cell.audio_sec, 6)]
            if profile.primary is not None:
                out.writerow([profile.primary, *whole, *whole[-2:], 1.0, 1.0, *("" for _ in load.gates)])
            for k, name in enumerate(load.experts):
                ran = [int(cell.routed_clips[k]), round(float(cell.routed_sec[k]), 6)]
                shares = [round(float(cell.clip_share[k]), 6), round(float(cell.audio_share[k]), 6)]
                out.writerow([name, *whole, *ran, *shares, *cell.mean_weight[:, k].round(6).tolist()])
