"""One save, from a copy in host memory to a committed checkpoint, in a thread of its own on every rank.

The threads of all ranks talk over a process group that nobody else uses. Whatever goes wrong on one of them becomes the
outcome on all; training does not notice.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint.attempt import Attempt, FencedError, remove_folder
from trainer.checkpoint.catalog import committed_steps, folder_of
from trainer.checkpoint.config import CheckpointConfig, kept_steps
from trainer.checkpoint.layout import (
    MOMENTS,
    PARAM,
    FileEntry,
    Manifest,
    Shard,
    TensorEntry,
    entries_of,
    file_of,
    frozen_folder_of,
    key_of,
    merge_entries,
)
from trainer.checkpoint.reader import MANIFEST, STATE, DamagedError, read_manifest
from trainer.checkpoint.writer import commit, sync_folder, write_tensors, write_text

log = logging.getLogger(__name__)

SCORES = "scores.json"
_FROZEN = "frozen-"
_PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers", "safetensors")


@dataclass(frozen=True)
class Frozen:
    """Tensors that no checkpoint writes again, and the files that hold them."""

    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]

    @staticmethod
    def of(manifest: Manifest) -> Frozen:
        """Those that a checkpoint refers to."""
        files = {name: entry for name, entry in manifest.files.items() if frozen_folder_of(name)}
        tensors = {
            name: entry for name, entry in manifest.tensors.items() if all(file in files for file, _ in entry.pieces)
        }
        return Frozen(files, tensors)


@dataclass(frozen=True)
class Content:
    """What one rank brings to a save; all of it in host memory."""

    step: int
    shards: Mapping[str, Sequence[Shard]]
    """By file family; what is frozen and saved already is not among them."""
    generators: Mapping[str, Tensor]
    extra: Mapping[str, Any]
    frozen: Frozen
    """Saved already."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on every rank."""

    path: Path
    failure: str | None = None
    """None: it is committed."""
    fenced: bool = False
    """A newer attempt has begun: no later save can succeed either."""
    frozen: Frozen | None = None
    """As of this checkpoint."""


@dataclass(frozen=True)
class Place:
    """Where a rank writes, and with whom."""

    checkpoints: Path
    config: CheckpointConfig
    attempt: Attempt
    group: dist.ProcessGroup
    """Of the writing threads."""
    rank: int
    topology: Mapping[str, int]
    beat: Callable[[str], None] = lambda what: None
    """Is called with every file."""


class Save:
    """A save on its way; `outcome` is there once `wait` has returned."""

    def __init__(self, place: Place, content: Content) -> None:
        self.place, self.content = place, content
        self.final = folder_of(place.checkpoints, content.step)
        self.outcome: Outcome | None = None
        self._thread = threading.Thread(target=self._run, name=f"save-{content.step}", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> Outcome:
        """Until it has ended."""
        self._thread.join()
        assert self.outcome is not None
        return self.outcome

    def _run(self) -> None:
        try:
            self.outcome = self._write_together()
        except (
            Exception
        ) as error:  # a lost peer, mostly: the run's own exchange will tell; the thread must not die mute
            self.outcome = Outcome(self.final, _text(error))
        if self.outcome.failure is not None and self.place.rank == 0:
            log.error("CHECKPOINT NOT SAVED: %s: %s", self.final, self.outcome.failure)

    def _write_together(self) -> Outcome:
        place = self.place
        aside = place.attempt.aside(place.checkpoints, self.final.name)
        failure, written = None, None
        try:
            written = self._write(aside)
        except Exception as error:  # whatever it is, the other ranks' threads wait to hear of it
            failure = f"rank {place.rank}: {_text(error)}"
        found: list[Any] = [None] * dist.get_world_size(place.group)
        dist.all_gather_object(found, (failure, written), group=place.group)
        failures = [text for text, _ in found if text is not None]
        outcome = Outcome(self.final, failures[0] if failures else None)
        if place.rank == 0 and outcome.failure is None:
            outcome = self._commit(aside, [part for _, part in found])
        box = [outcome]
        dist.broadcast_object_list(box, src=0, group=place.group)
        if box[0].failure is not None and place.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)  # the save's own failure is what counts
        return box[0]

    def _frozen_folder(self) -> str:
        return f"{_FROZEN}{self.content.step:08d}-{self.place.attempt.token}"

    def _write(self, aside: Path) -> tuple[dict[str, FileEntry], dict[str, TensorEntry]]:
        """This rank's files."""
        rank = self.place.rank
        aside.mkdir(parents=True, exist_ok=True)
        files: dict[str, FileEntry] = {}
        tensors: dict[str, TensorEntry] = {}
        moments: dict[str, Tensor] = {}
        for family, shards in self.content.shards.items():
            file = file_of(family, rank)
            for name, part in (
                (file, [s for s in shards if not s.frozen]),
                (f"{self._frozen_folder()}/{file}", [s for s in shards if s.frozen]),
            ):
                if part:
                    self.place.beat(f"writing {name}")
                    (aside / name).parent.mkdir(exist_ok=True)
                    weights = {key_of(s.name, PARAM, s.rect): s.values[PARAM] for s in part}
                    files[name] = write_tensors(aside / name, weights)
                    tensors |= entries_of(part, name)
            moments |= {
                key_of(s.name, kind, s.rect): value for s in shards for kind, value in s.values.items() if kind != PARAM
            }
        if moments:
            self.place.beat(f"writing {file_of(MOMENTS, rank)}")
            files[file_of(MOMENTS, rank)] = write_tensors(aside / file_of(MOMENTS, rank), moments)
        file = file_of("rng", rank)
        files[file] = write_tensors(aside / file, self.content.generators)
        return files, tensors

    def _commit(self, aside: Path, parts: Sequence[Any]) -> Outcome:
        """By rank 0, when all have written."""
        place, content = self.place, self.content
        try:
            files = {name: entry for own, _ in parts for name, entry in own.items()}
            for name in files:
                if not (aside / name).exists():
                    missing = f"{name}, written by another rank, is not there: all ranks must share {place.checkpoints}"
                    return Outcome(self.final, missing)
            manifest = self._manifest(aside, files, merge_entries([entries for _, entries in parts]))
            write_text(aside / MANIFEST, manifest.dumps())
            place.attempt.check(place.checkpoints)
            if (aside / self._frozen_folder()).exists():
                commit(aside / self._frozen_folder(), place.checkpoints / self._frozen_folder())
            if self.final.exists():  # damaged, or of a future that the run went back from
                remove_folder(self.final)
            commit(aside, self.final)
        except FencedError as error:
            return Outcome(self.final, str(error), fenced=True)
        except Exception as error:  # see above
            return Outcome(self.final, _text(error))
        try:
            clean_up(place.checkpoints, place.config, content.step)
            place.attempt.sweep(place.checkpoints)
        except OSError as error:
            log.warning("old checkpoints in %s could not be removed: %s", place.checkpoints, error)
        return Outcome(self.final, frozen=Frozen.of(manifest))

    def _manifest(self, aside: Path, files: dict[str, FileEntry], tensors: dict[str, TensorEntry]) -> Manifest:
        content = self.content
        state = {
            "step": content.step,
            "attempt": self.place.attempt.number,
            "versions": {p: version(p) for p in _PACKAGES},
            "extra": content.extra,
        }
        files[STATE] = write_text(aside / STATE, json.dumps(state, indent=1))
        used = {file for entry in content.frozen.tensors.values() for file, _ in entry.pieces}
        files |= {name: content.frozen.files[name] for name in used}
        tensors |= content.frozen.tensors
        return Manifest(content.step, self.place.topology, dict(sorted(files.items())), dict(sorted(tensors.items())))


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def clean_up(checkpoints: Path, config: CheckpointConfig, newest: int) -> list[Path]:
    """Remove what need not stay: older checkpoints, ones of a future that the run went back from, frozen files that
    nobody refers to. Returns what was removed."""
    committed = committed_steps(checkpoints)
    past = [step for step in committed if step <= newest]
    kept = kept_steps(config, past, read_scores(checkpoints))
    removed = []
    for step in committed:
        if step not in kept:
            if step > newest:
                log.warning("checkpoint step-%08d is removed: the run went back behind it", step)
            remove_folder(folder_of(checkpoints, step))
            removed.append(folder_of(checkpoints, step))
    try:
        manifests = [read_manifest(folder_of(checkpoints, step)) for step in committed_steps(checkpoints)]
    except DamagedError:
        return removed  # what it refers to is not known
    used = {frozen_folder_of(name) for manifest in manifests for name in manifest.files}
    for folder in checkpoints.glob(f"{_FROZEN}*"):
        if folder.name not in used:
            remove_folder(folder)
            removed.append(folder)
    sync_folder(checkpoints)
    return removed


def read_scores(checkpoints: Path) -> dict[int, float]:
    """`checkpoint.best_metric` by step."""
    path = checkpoints / SCORES
    return {int(k): float(v) for k, v in json.loads(path.read_text()).items()} if path.is_file() else {}


def write_score(checkpoints: Path, step: int, value: float) -> None:
    """Note `checkpoint.best_metric` of a step."""
    scores = {**read_scores(checkpoints), step: value}
    part = checkpoints / f"{SCORES}.part"
    part.unlink(missing_ok=True)
    write_text(part, json.dumps(scores))
    part.replace(checkpoints / SCORES)
