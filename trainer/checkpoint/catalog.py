"""The checkpoints of a run as they lie on disk, for one process: what is there, what is whole, which is the newest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.checkpoint.reader import MANIFEST, STATE, DamagedError, check_files, read_manifest

_COMMITTED = re.compile(r"step-(\d{8,})")


def folder_of(checkpoints: Path, step: int) -> Path:
    """Of the checkpoint after `step` steps."""
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step that a checkpoint's name tells; None: it is no checkpoint's name."""
    found = _COMMITTED.fullmatch(folder.name)
    return int(found[1]) if found else None


def committed_steps(checkpoints: Path) -> list[int]:
    """Steps of all committed checkpoints, ascending, damaged ones included."""
    if not checkpoints.is_dir():
        return []
    return sorted(step for entry in checkpoints.iterdir() if (step := step_of(entry)) is not None)


def checkpoints_of(path: Path) -> Path:
    """The folder of checkpoints that `path` (a run, or that folder) means.

    Raises:
        UserError: there are none.
    """
    for folder in (path, path / "checkpoints"):
        if committed_steps(folder):
            return folder
    raise UserError(f"{path}: holds no checkpoint; give a run's folder or one of its checkpoints")


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint: every file is read and compared; None: nothing."""
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest, manifest.files)
    except DamagedError as error:
        return str(error)
    return None


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest of the run.

    Raises:
        UserError: there is none.
    """
    if (path / MANIFEST).is_file() or step_of(path) is not None:
        return path
    folder = checkpoints_of(path)
    return folder_of(folder, committed_steps(folder)[-1])


def read_extra(folder: Path) -> dict[str, Any]:
    """What the trainer handed over when it saved (see `CheckpointManager.save`)."""
    extra: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))["extra"]
    return extra
