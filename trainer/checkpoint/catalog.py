"""The interface to the checkpoints of a run in a folder or a bucket, and functions that find and verify checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from model.errors import UserError
from trainer.checkpoint.attempt import Attempt
from trainer.checkpoint.bucket import BucketCheckpoints
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.folder import Folder, read_text
from trainer.checkpoint.layout import step_of
from trainer.checkpoint.local import LocalCheckpoints
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import MANIFEST, STATE, DamagedError, check_files, hash_file, read_manifest
from trainer.checkpoint.writer import Draft, Region
from trainer.storage.open import join_url, open_store, scheme_of

SUBFOLDER = "checkpoints"
"""The name of the folder in a run's folder that contains its checkpoints."""
TOKENIZER = "tokenizer.model"
"""The name of the file in a run's folder that contains the run's tokenizer, if it is a SentencePiece model."""


class Checkpoints(Protocol):
    """All checkpoints of one run.

    Every rank has its own object. All ranks write to drafts, but only rank 0 may call the other methods that change
    anything.
    """

    @property
    def url(self) -> str:
        """The location of the checkpoints, for messages."""
        ...

    def steps(self) -> list[int]:
        """Return the steps of all committed checkpoints in ascending order, including damaged ones."""
        ...

    def folder(self, step: int) -> Folder:
        """Return the files of the checkpoint after `step` steps.

        If the checkpoint does not exist, reading its manifest fails.
        """
        ...

    def begin_attempt(self) -> Attempt:
        """Start a new attempt. From then on, earlier attempts cannot commit anything."""
        ...

    def draft(self, attempt: Attempt, step: int, region: Region | None = None) -> Draft:
        """Return the draft of a checkpoint. All ranks write their files to the same draft.

        Args:
            attempt: The attempt that writes.
            step: The number of steps completed.
            region: The part of its node's joined files that this rank writes; None if the rank writes separate files.
        """
        ...

    def commit(self, attempt: Attempt, manifest: Manifest) -> None:
        """Atomically turn a draft into a checkpoint. An existing checkpoint of the same step is replaced.

        Raises:
            FencedError: If a newer attempt has started.
            OSError, UserError: If a file of another rank is missing.
        """
        ...

    def discard(self, attempt: Attempt, step: int) -> None:
        """Delete a draft that will not be committed."""
        ...

    def clean_up(self, config: CheckpointConfig, newest: int, attempt: Attempt | None = None) -> list[str]:
        """Delete checkpoints that need not be kept, and frozen files that no checkpoint refers to.

        Args:
            config: The rules that determine which checkpoints are kept.
            newest: The run's current step. Later checkpoints are deleted, since the run returned to an earlier one.
            attempt: The attempt that deletes, or None to skip the check that it is the newest.

        Returns:
            The URLs of the checkpoints and folders that were deleted.

        Raises:
            FencedError: If a newer attempt than `attempt` has started.
        """
        ...

    def sweep(self, attempt: Attempt) -> None:
        """Delete the unfinished drafts of earlier attempts."""
        ...

    def scores(self) -> dict[int, float]:
        """Return the values of `checkpoint.best_metric` by step."""
        ...

    def note_score(self, step: int, value: float) -> None:
        """Store the value of `checkpoint.best_metric` at a step."""
        ...


def open_checkpoints(url: str, retry_sec: float | None = None) -> Checkpoints:
    """Return the checkpoints at `url`. The location may contain no checkpoint yet.

    Args:
        url: The location of the checkpoints: a folder or `s3://…`.
        retry_sec: The time for which an unreachable bucket is retried, in seconds; None selects the store's default.

    Raises:
        UserError: If the URL is malformed or the bucket cannot be opened.
    """
    return BucketCheckpoints(open_store(url, retry_sec)) if scheme_of(url) else LocalCheckpoints(Path(url))


def checkpoints_of(url: str) -> Checkpoints:
    """Return the checkpoints of a run.

    Args:
        url: The run's folder, or the folder of its checkpoints.

    Raises:
        UserError: If there are no checkpoints at `url`.
    """
    for place in (join_url(url, SUBFOLDER), url):
        found = open_checkpoints(place)
        if found.steps():
            return found
    raise UserError(f"{url}: holds no checkpoint; use a run's folder or one of its checkpoints")


def find_checkpoint(url: str) -> Folder:
    """Return the checkpoint at `url`, or the newest checkpoint if `url` is a run.

    Raises:
        UserError: If there is no checkpoint at `url`.
    """
    above, _, name = url.rstrip("/").rpartition("/")
    step = step_of(name)
    if step is not None:
        return open_checkpoints(above or ("/" if url.startswith("/") else ".")).folder(step)
    found = checkpoints_of(url)
    return found.folder(found.steps()[-1])


def damage_of(folder: Folder) -> str | None:
    """Verify every file of a checkpoint. Return a description of the damage, or None if the checkpoint is undamaged."""
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest, manifest.files)
    except DamagedError as error:
        return str(error)
    return None


def sign_checkpoint(folder: Folder, key: bytes) -> bool:
    """Verify a checkpoint by its checksums, add the SHA-256 of every file to its manifest, and sign the manifest.

    Returns:
        True if the manifest has been signed; False if it had a valid signature with this key before.

    Raises:
        DamagedError: If the checkpoint is damaged.
        UserError: If the manifest has a different format version.
    """
    text = read_text(folder, MANIFEST)
    try:
        Manifest.loads(text, key)
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        pass  # The manifest is read again below. Any error except a missing signature is then raised again.
    else:
        return False
    manifest = read_manifest(folder, check_signature=False)
    check_files(folder, manifest, manifest.files)
    files = {name: hash_file(folder, name, True, entry) for name, entry in manifest.files.items()}
    folder.replace(MANIFEST, replace(manifest, files=files).dumps(key))
    return True


def read_extra(folder: Folder) -> dict[str, Any]:
    """Return the `extra` values that were passed to `CheckpointManager.save`.

    Raises:
        UserError: If the file was not written by `CheckpointManager.save`.
        OSError, EOFError: If the file cannot be read.
    """
    where = f"{folder.url}/{STATE}"
    try:
        extra = json.loads(read_text(folder, STATE))["extra"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read ({type(error).__name__}: {error}); use another checkpoint") from None
    texts = ("recipe", "tokenizer", "tokenizer_digest")
    if not isinstance(extra, dict) or not all(isinstance(extra.get(key), str | None) for key in texts):
        raise UserError(f"{where}: cannot be read (a value has the wrong type); use another checkpoint")
    return extra
