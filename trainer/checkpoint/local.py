"""The checkpoints of a run in a folder. A checkpoint is written to a draft folder, and a commit renames this folder.

`attempt.json` contains the token of the newest attempt. A new attempt first writes its token there, and then deletes
the drafts of earlier attempts. A commit first reads the token, and then renames the draft. If an earlier attempt reads
the file just before the new token is written, its draft is deleted and its rename fails.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from trainer.checkpoint.attempt import Attempt
from trainer.checkpoint.config import CheckpointConfig, kept_steps
from trainer.checkpoint.folder import LocalFolder
from trainer.checkpoint.layout import FROZEN, frozen_folder_of, joined_file, step_name, step_of
from trainer.checkpoint.manifest import FileEntry, Manifest
from trainer.checkpoint.reader import DamagedError, read_manifest
from trainer.checkpoint.writer import Hashed, Region

log = logging.getLogger(__name__)

ASIDE = ".tmp-"
"""The prefix of the names of drafts, and of folders that are being deleted."""
_ATTEMPT, _SCORES = "attempt.json", "scores.json"


class LocalDraft:
    """A draft folder, which is renamed when the checkpoint is committed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, content: Iterable[bytes | memoryview]) -> FileEntry:
        path, hashed = self.path / name, Hashed(content)
        path.parent.mkdir(exist_ok=True)
        with open(path, "xb") as file:
            for chunk in hashed:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return hashed.entry

    def sync(self) -> None:
        """Do nothing, because every file is synced when it is written."""


class JoinedDraft(LocalDraft):
    """A draft folder in which all ranks of a node write their tensors to one file.

    Each rank writes a separate part of the file.

    Args:
        path: The folder.
        region: This rank's part.
    """

    def __init__(self, path: Path, region: Region) -> None:
        super().__init__(path)
        self._node = region.node
        self._starts = {False: region.own_start, True: region.frozen_start}

    def write(self, name: str, content: Iterable[bytes | memoryview]) -> FileEntry:
        if not name.endswith(".safetensors"):
            return super().write(name, content)
        folder = frozen_folder_of(name)
        file, start = joined_file(folder, self._node), self._starts[folder is not None]
        path, hashed, at = self.path / file, Hashed(content), start
        path.parent.mkdir(exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            for chunk in hashed:
                done = 0
                while done < len(chunk):
                    done += os.pwrite(handle, chunk[done:], at + done)
                at += done
        finally:
            os.close(handle)
        self._starts[folder is not None] = at
        return replace(hashed.entry, stored_in=file, offset=start)

    def sync(self) -> None:
        for path in (*self.path.glob(joined_file(None, self._node)), *self.path.glob(joined_file("*", self._node))):
            _sync(path)


class LocalCheckpoints:
    """The checkpoints of a run in a folder that all ranks share.

    This class implements `trainer.checkpoint.catalog.Checkpoints`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._frozen: dict[int, set[str]] = {}
        """Step of a checkpoint → the folders of frozen weights that it refers to. The names are cached, so that a save
        need not read manifests."""

    @property
    def url(self) -> str:
        return str(self.path)

    def steps(self) -> list[int]:
        if not self.path.is_dir():
            return []
        return sorted(step for entry in self.path.iterdir() if (step := step_of(entry.name)) is not None)

    def folder(self, step: int) -> LocalFolder:
        return LocalFolder(self.path / step_name(step))

    # ---- writing

    def begin_attempt(self) -> Attempt:
        self.path.mkdir(parents=True, exist_ok=True)
        mine = Attempt.after(self._attempt())
        self._replace(_ATTEMPT, json.dumps(asdict(mine)), mine.token)
        self.sweep(mine)
        return mine

    def draft(self, attempt: Attempt, step: int, region: Region | None = None) -> LocalDraft:
        aside = self._aside(attempt, step)
        aside.mkdir(parents=True, exist_ok=True)
        return LocalDraft(aside) if region is None else JoinedDraft(aside, region)

    def commit(self, attempt: Attempt, manifest: Manifest) -> None:
        step = manifest.step
        aside, final = self._aside(attempt, step), self.path / step_name(step)
        needed: dict[str, int] = {}
        for file in attempt.written(manifest):
            entry = manifest.files[file]
            name = entry.stored_in or file
            needed[name] = max(needed.get(name, 0), entry.offset + entry.size_bytes)
        for name, size in needed.items():
            if not (aside / name).exists():
                raise OSError(f"{name}, written by another rank, is missing: all ranks must share {self.path}")
            if (aside / name).stat().st_size < size:
                raise OSError(f"{name} lacks the bytes that another rank wrote: all ranks must share {self.path}")
        attempt.check(self._attempt(), self.url)
        own = attempt.folder(FROZEN, step)
        if (aside / own).exists():
            _rename(aside / own, self.path / own)
        if final.exists():  # The existing checkpoint is damaged, or the run returned to an earlier one.
            _remove_folder(final)
        _rename(aside, final)
        self._frozen[step] = _frozen_folders(manifest)

    def discard(self, attempt: Attempt, step: int) -> None:
        shutil.rmtree(self._aside(attempt, step), ignore_errors=True)  # Only the failure of the save is reported.

    def clean_up(self, config: CheckpointConfig, newest: int, attempt: Attempt | None = None) -> list[str]:
        if attempt is not None:
            attempt.check(self._attempt(), self.url)
        committed = self.steps()
        kept = kept_steps(config, [step for step in committed if step <= newest], self.scores())
        removed = []
        for step in committed:
            if step not in kept:
                if step > newest:
                    log.warning("checkpoint %s is removed: the run returned to an earlier one", step_name(step))
                _remove_folder(self.path / step_name(step))
                removed.append(str(self.path / step_name(step)))
        for step in self.steps():
            if step not in self._frozen:
                try:
                    self._frozen[step] = _frozen_folders(read_manifest(self.folder(step)))
                except DamagedError:
                    return removed  # The damaged checkpoint may refer to any frozen file, so none can be deleted.
        used = {folder for step in self.steps() for folder in self._frozen[step]}
        for folder in self.path.glob(f"{FROZEN}-*"):
            if folder.name not in used:
                _remove_folder(folder)
                removed.append(str(folder))
        _sync(self.path)
        return removed

    def sweep(self, attempt: Attempt) -> None:
        for folder in self.path.glob(f"{ASIDE}*"):
            if attempt.token not in folder.name:
                _remove_folder(folder)

    # ---- scores

    def scores(self) -> dict[int, float]:
        path = self.path / _SCORES
        return {int(k): float(v) for k, v in json.loads(path.read_text()).items()} if path.is_file() else {}

    def note_score(self, step: int, value: float) -> None:
        self._replace(_SCORES, json.dumps({**self.scores(), step: value}), "part")

    # ---- names

    def _aside(self, attempt: Attempt, step: int) -> Path:
        return self.path / f"{ASIDE}{attempt.number:04d}-{attempt.token}-{step_name(step)}"

    def _attempt(self) -> Attempt | None:
        try:
            return Attempt.from_json(json.loads((self.path / _ATTEMPT).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None  # A power failure may have damaged the file. The next attempt writes it again.

    def _replace(self, name: str, text: str, suffix: str) -> None:
        part = self.path / f"{name}.{suffix}"
        part.unlink(missing_ok=True)
        LocalDraft(self.path).write(part.name, [text.encode()])
        part.replace(self.path / name)
        _sync(self.path)


def _frozen_folders(manifest: Manifest) -> set[str]:
    return {folder for name in manifest.files if (folder := frozen_folder_of(name)) is not None}


def _rename(part: Path, final: Path) -> None:
    """Rename a folder within its parent folder, durably."""
    _sync(part)
    os.rename(part, final)
    _sync(final.parent)


def _remove_folder(folder: Path) -> None:
    """Delete a folder if it exists.

    The folder is renamed first, so that an interrupted deletion leaves no partial checkpoint and concurrent writers
    fail.
    """
    doomed = folder.parent / f"{ASIDE}old-{secrets.token_hex(4)}"
    try:
        folder.rename(doomed)
    except FileNotFoundError:
        return
    _sync(folder.parent)
    shutil.rmtree(doomed)


def _sync(folder: Path) -> None:
    """Sync a file, or the names of the files in a folder, so that they survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
