"""The checkpoints of a run in an object store.

Object stores cannot rename objects, so a numbered catalogue lists the folders that belong to checkpoints. The store
contains these objects:

    catalogue/00000007.json                          attempt, checkpoints and scores; the highest number is valid
    step-00000042-0003-1f3a55e0/audio-00000.…        files of a checkpoint, or of a save that was never committed
    frozen-00000042-0003-1f3a55e0/audio-00000.…      frozen weights that checkpoints share

To change anything, a process reads the newest catalogue and writes a catalogue with the next number, unless one exists.
If several processes try this at once, one succeeds and the others start again. A commit, a removal and the start of an
attempt therefore each consist of writing one small object, and an attempt that is not the newest cannot commit
anything. Objects in folders that the catalogue does not name are invisible to readers. The newest attempt deletes its
own leftovers and those of earlier attempts, but never those of a later attempt.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace

from model.errors import UserError
from trainer.checkpoint.attempt import Attempt
from trainer.checkpoint.bucket_folder import BucketFolder
from trainer.checkpoint.config import CheckpointConfig, kept_steps
from trainer.checkpoint.layout import STEP, frozen_folder_of, step_name
from trainer.checkpoint.manifest import FileEntry, Manifest
from trainer.checkpoint.writer import Hashed, Region
from trainer.storage.store import MissingError, Store

log = logging.getLogger(__name__)

_CATALOGUE = "catalogue/"
_NUM_KEPT_CATALOGUES = 3
_NUM_DELETERS = 8
_NUM_TRIES = 20
_FOLDER = re.compile(r"(?:step|frozen)-\d+-(\d+)-([0-9a-f]+)")


@dataclass(frozen=True)
class Catalogue:
    """The content of one object of the catalogue."""

    number: int = 0
    """The number in the object's name; 0 means that no catalogue exists yet."""
    attempt: Attempt | None = None
    """The newest attempt of the run."""
    checkpoints: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """The folders of each checkpoint by step: first the folder with its own files, then those with frozen files."""
    scores: Mapping[int, float] = field(default_factory=dict)
    """The values of `checkpoint.best_metric` by step."""

    def dumps(self) -> bytes:
        """Return the catalogue as JSON."""
        return json.dumps(
            {
                "attempt": None if self.attempt is None else asdict(self.attempt),
                "checkpoints": self.checkpoints,
                "scores": self.scores,
            }
        ).encode()

    @staticmethod
    def loads(number: int, content: bytes) -> Catalogue:
        """Parse the content that `dumps` returned.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: If `content` is not a catalogue.
        """
        tree = json.loads(content)
        checkpoints = {int(step): tuple(map(str, folders)) for step, folders in tree["checkpoints"].items()}
        if any(not folders or not all(map(_FOLDER.fullmatch, folders)) for folders in checkpoints.values()):
            raise ValueError("a checkpoint's folder is malformed")
        attempt = None if tree["attempt"] is None else Attempt.from_json(tree["attempt"])
        return Catalogue(number, attempt, checkpoints, {int(k): float(v) for k, v in tree["scores"].items()})

    @property
    def folders(self) -> set[str]:
        """The folders of all checkpoints."""
        return {folder for folders in self.checkpoints.values() for folder in folders}


class BucketDraft:
    """The objects of a save that no catalogue names yet. The parts of a large object are uploaded in parallel."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._folder = store, folder

    def write(self, name: str, content: Iterable[bytes | memoryview]) -> FileEntry:
        hashed = Hashed(content)
        self._store.put(name if "/" in name else f"{self._folder}/{name}", hashed)
        return hashed.entry

    def sync(self) -> None:
        """Do nothing, because an object is durable when it has been written."""


class BucketCheckpoints:
    """The checkpoints of a run in an object store; implements `trainer.checkpoint.catalog.Checkpoints`.

    Args:
        store: The store, which contains nothing but this run's checkpoints.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._unsaved_scores: dict[int, float] = {}

    @property
    def url(self) -> str:
        return self._store.url

    def steps(self) -> list[int]:
        return sorted(self._newest().checkpoints)

    def folder(self, step: int) -> BucketFolder:
        folders = self._newest().checkpoints.get(step)
        return BucketFolder(self._store, f"{self.url}/{step_name(step)}", folders[0] if folders else step_name(step))

    # ---- writing

    def begin_attempt(self) -> Attempt:
        begun = self._change(lambda now: replace(now, attempt=Attempt.after(now.attempt)))
        assert begun.attempt is not None
        self.sweep(begun.attempt)
        return begun.attempt

    def draft(self, attempt: Attempt, step: int, region: Region | None = None) -> BucketDraft:
        assert region is None, "an object cannot be written by several ranks"
        return BucketDraft(self._store, attempt.folder(STEP, step))

    def commit(self, attempt: Attempt, manifest: Manifest) -> None:
        step, own = manifest.step, attempt.folder(STEP, manifest.step)
        present = self._store.list(f"{own}/")
        for name in attempt.written(manifest):
            place = name if "/" in name else f"{own}/{name}"
            if place not in present and not self._store.exists(place):  # A listing may be out of date.
                raise UserError(
                    f"{self.url}/{place}, written by another rank, is missing: all ranks must use this bucket"
                )

        frozen = sorted({folder for name in manifest.files if (folder := frozen_folder_of(name)) is not None})

        def added(now: Catalogue) -> Catalogue:
            attempt.check(now.attempt, self.url)
            return replace(now, checkpoints={**now.checkpoints, step: (own, *frozen)})

        self._change(added)

    def discard(self, attempt: Attempt, step: int) -> None:
        """Do nothing, because the commit may have succeeded even if its response was lost.

        `sweep` deletes the draft if the commit did not succeed.
        """

    def clean_up(self, config: CheckpointConfig, newest: int, attempt: Attempt | None = None) -> list[str]:
        before = Catalogue()

        def kept(now: Catalogue) -> Catalogue:
            nonlocal before
            before = now
            if attempt is not None:
                attempt.check(now.attempt, self.url)
            stay = kept_steps(config, sorted(step for step in now.checkpoints if step <= newest), now.scores)
            return replace(now, checkpoints={step: f for step, f in now.checkpoints.items() if step in stay})

        after = self._change(kept)
        removed = sorted(set(before.checkpoints) - set(after.checkpoints))
        for step in removed:
            if step > newest:
                log.warning("checkpoint %s is removed: the run returned to an earlier one", step_name(step))
        self._delete(before.folders - after.folders)
        return [f"{self.url}/{step_name(step)}" for step in removed]

    def sweep(self, attempt: Attempt) -> None:
        named = self._newest().folders
        found = {name.partition("/")[0] for name in self._store.list()} - named
        # A later attempt may have started in the meantime. Its files must not be deleted.
        self._delete({f for f in found if (m := _FOLDER.fullmatch(f)) and int(m[1]) <= attempt.number})

    # ---- scores

    def scores(self) -> dict[int, float]:
        return {**self._newest().scores, **self._unsaved_scores}

    def note_score(self, step: int, value: float) -> None:
        with self._lock:  # The next commit stores the score, so that training does not wait for the bucket.
            self._unsaved_scores[step] = value

    # ---- the catalogue

    def _newest(self) -> Catalogue:
        for _ in range(_NUM_TRIES):
            number = self._numbers()[-1]
            if number == 0:
                return Catalogue()
            try:
                content = self._store.get(_catalogue_name(number))
            except MissingError:
                continue  # This catalogue has just been replaced and removed.
            try:
                return Catalogue.loads(number, content)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                where = f"{self.url}/{_catalogue_name(number)}"
                raise UserError(f"{where}: cannot be read ({error}); delete it to use the previous one") from None
        raise UserError(
            f"{self.url}/{_CATALOGUE}: changes faster than it can be read; stop the other programs that write there"
        )

    def _numbers(self) -> list[int]:
        """Return the numbers of all catalogues in ascending order, or [0] if there are none."""
        names = self._store.list(_CATALOGUE)
        numbers = sorted(int(name[len(_CATALOGUE) :].partition(".")[0]) for name in names) or [0]
        while self._store.exists(_catalogue_name(numbers[-1] + 1)):  # A listing may be out of date.
            numbers.append(numbers[-1] + 1)
        return numbers

    def _change(self, change: Callable[[Catalogue], Catalogue]) -> Catalogue:
        """Apply `change` to the newest catalogue, and return the result.

        If another process changes the catalogue at the same time, `change` is applied to that newer catalogue instead.
        """
        while True:
            now = self._newest()
            with self._lock:
                scores = dict(self._unsaved_scores)
            wanted = change(replace(now, scores={**now.scores, **scores}))
            if now.number and wanted == now:
                return now
            wanted = replace(wanted, number=now.number + 1)
            if not self._store.put_if_absent(_catalogue_name(wanted.number), wanted.dumps()):
                continue
            numbers = self._numbers()
            # The write is checked, because a slow process may reuse a number whose catalogue has been deleted. Some
            # servers (Swift) also accept two simultaneous writes, and keep the later one.
            if numbers[-1] == wanted.number and self._newest() == wanted:
                break
        with self._lock:
            for step, value in scores.items():
                if self._unsaved_scores.get(step) == value:
                    del self._unsaved_scores[step]
        for number in numbers:
            if number <= wanted.number - _NUM_KEPT_CATALOGUES:
                self._store.delete(_catalogue_name(number))
        return wanted

    def _delete(self, folders: Iterable[str]) -> None:
        doomed = [name for folder in folders for name in self._store.list(f"{folder}/")]
        with ThreadPoolExecutor(_NUM_DELETERS) as pool:
            list(pool.map(self._store.delete, doomed))


def _catalogue_name(number: int) -> str:
    return f"{_CATALOGUE}{number:08d}.json"
