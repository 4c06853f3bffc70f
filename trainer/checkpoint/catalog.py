"""The checkpoints of a run, wherever they lie: what is there, what is whole, which is the newest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from model.errors import UserError
from trainer.checkpoint.attempt import Attempt
from trainer.checkpoint.bucket import BucketCheckpoints
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.folder import Folder, read_text
from trainer.checkpoint.layout import Manifest, step_of
from trainer.checkpoint.local import LocalCheckpoints
from trainer.checkpoint.reader import STATE, DamagedError, check_files, read_manifest
from trainer.checkpoint.writer import Draft
from trainer.storage.open import join_url, open_store, scheme_of

SUBFOLDER = "checkpoints"
"""Of a run, where they lie."""
TOKENIZER = "tokenizer.model"
"""In a run, where its tokenizer is a SentencePiece model."""


class Checkpoints(Protocol):
    """All checkpoints of one run. Every rank has an object of its own; only rank 0 changes anything, but for drafts."""

    @property
    def url(self) -> str:
        """Where they lie, for messages."""
        ...

    def steps(self) -> list[int]:
        """Of all committed checkpoints, ascending, damaged ones included."""
        ...

    def folder(self, step: int) -> Folder:
        """The checkpoint after `step` steps; whether there is one, its manifest tells."""
        ...

    def begin_attempt(self) -> Attempt:
        """Become the newest attempt; earlier ones can commit nothing after this returns."""
        ...

    def draft(self, attempt: Attempt, step: int) -> Draft:
        """Where a rank writes its part; the same place for all ranks."""
        ...

    def commit(self, attempt: Attempt, manifest: Manifest) -> None:
        """Make a draft the checkpoint of its step, at once; what was there under that name is gone.

        Raises:
            FencedError: a newer attempt has begun.
            OSError, UserError: a file of another rank is not there.
        """
        ...

    def discard(self, attempt: Attempt, step: int) -> None:
        """Take a draft away that will not be committed."""
        ...

    def clean_up(self, config: CheckpointConfig, newest: int, attempt: Attempt | None = None) -> list[str]:
        """Remove what need not stay: older checkpoints, ones of a future that the run went back from, frozen files
        that nobody refers to. Returns what was removed.

        Raises:
            FencedError: a newer attempt than `attempt` has begun.
        """
        ...

    def sweep(self, attempt: Attempt) -> None:
        """Take away what earlier attempts left unfinished."""
        ...

    def scores(self) -> dict[int, float]:
        """`checkpoint.best_metric` by step."""
        ...

    def note_score(self, step: int, value: float) -> None:
        """Remember `checkpoint.best_metric` of a step."""
        ...


def open_checkpoints(url: str, retry_sec: float | None = None) -> Checkpoints:
    """Those at `url`, a folder or `s3://…`; there need not be any yet.

    Raises:
        UserError: see `trainer.storage.open.open_store`.
    """
    return BucketCheckpoints(open_store(url, retry_sec)) if scheme_of(url) else LocalCheckpoints(Path(url))


def checkpoints_of(url: str) -> Checkpoints:
    """Those that `url` (a run, or its folder of checkpoints) means.

    Raises:
        UserError: there are none.
    """
    for place in (join_url(url, SUBFOLDER), url):
        found = open_checkpoints(place)
        if found.steps():
            return found
    raise UserError(f"{url}: holds no checkpoint; give a run's folder or one of its checkpoints")


def find_checkpoint(url: str) -> Folder:
    """`url` itself if it is a checkpoint, else the newest of the run.

    Raises:
        UserError: there is none.
    """
    above, _, name = url.rstrip("/").rpartition("/")
    step = step_of(name)
    if step is not None:
        return open_checkpoints(above or ("/" if url.startswith("/") else ".")).folder(step)
    found = checkpoints_of(url)
    return found.folder(found.steps()[-1])


def damage_of(folder: Folder) -> str | None:
    """What is wrong with a checkpoint: every file is read and compared; None: nothing."""
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest, manifest.files)
    except DamagedError as error:
        return str(error)
    return None


def read_extra(folder: Folder) -> dict[str, Any]:
    """What the trainer handed over when it saved (see `CheckpointManager.save`)."""
    extra: dict[str, Any] = json.loads(read_text(folder, STATE))["extra"]
    return extra
