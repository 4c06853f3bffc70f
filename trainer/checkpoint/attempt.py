"""One attempt at a run: a launch of its ranks. Only the newest attempt may commit checkpoints.

A rank of an earlier attempt can live on (its node was cut off, a requeue was faster) and can be in the middle of a
save. So each attempt puts its token into `attempt.json` before it looks for checkpoints, and then takes away what
others were writing; a commit reads the token and renames its own folder. Whichever comes first, the other one sees it:
an old attempt that still read its own token has a folder that is then gone, and its rename fails.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.checkpoint.writer import sync_folder, write_text

ASIDE = ".tmp-"
"""Begins the names of folders that are no checkpoints yet, or no longer."""
_FILE = "attempt.json"


class FencedError(Exception):
    """A newer attempt at the same run has begun."""


@dataclass(frozen=True)
class Attempt:
    """Who writes."""

    number: int
    token: str

    def aside(self, checkpoints: Path, name: str) -> Path:
        """Where this attempt writes what will be `name`."""
        return checkpoints / f"{ASIDE}{self.number:04d}-{self.token}-{name}"

    def check(self, checkpoints: Path) -> None:
        """Raise FencedError unless this is still the newest attempt."""
        newest = _read(checkpoints)
        if newest != self:
            number = "another" if newest is None else newest.number
            raise FencedError(f"{checkpoints}: attempt {number} of this run has begun; attempt {self.number} stops")

    def sweep(self, checkpoints: Path) -> None:
        """Take away what is not a checkpoint and is not this attempt's."""
        for folder in checkpoints.glob(f"{ASIDE}*"):
            if self.token not in folder.name:
                remove_folder(folder)


def begin_attempt(checkpoints: Path) -> Attempt:
    """Become the newest attempt; earlier ones can commit nothing after this returns."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    before = _read(checkpoints)
    mine = Attempt(1 if before is None else before.number + 1, secrets.token_hex(4))
    part = checkpoints / f"{_FILE}.{mine.token}"
    write_text(part, json.dumps(asdict(mine)))
    os.replace(part, checkpoints / _FILE)
    sync_folder(checkpoints)
    mine.sweep(checkpoints)
    return mine


def remove_folder(folder: Path) -> None:
    """Rename, then delete: a removal cut short leaves no half of a checkpoint, and who still writes there fails.

    A folder that is not there is as good as removed.
    """
    doomed = folder.parent / f"{ASIDE}old-{secrets.token_hex(4)}"
    try:
        folder.rename(doomed)
    except FileNotFoundError:
        return
    sync_folder(folder.parent)
    shutil.rmtree(doomed)


def _read(checkpoints: Path) -> Attempt | None:
    try:
        tree = json.loads((checkpoints / _FILE).read_text(encoding="utf-8"))
        return Attempt(int(tree["number"]), str(tree["token"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return None  # torn by a power cut: whoever begins next writes it anew
