"""Save checkpoints in the background.

A thread of every rank turns a copy of the state in host memory into a checkpoint.

The threads of all ranks communicate over a process group that nothing else uses. If one of them fails, the save fails
on all ranks, and training continues.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from model.errors import UserError
from trainer.checkpoint.attempt import Attempt, FencedError
from trainer.checkpoint.catalog import Checkpoints
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.layout import (
    FROZEN,
    MOMENTS,
    PARAM,
    Shard,
    Slices,
    TensorEntry,
    entries_of,
    file_of,
    files_of,
    frozen_folder_of,
    is_frozen,
    key_of,
    merge_entries,
    sliced_elements,
    step_name,
)
from trainer.checkpoint.manifest import FileEntry, Manifest
from trainer.checkpoint.reader import MANIFEST, STATE
from trainer.checkpoint.rect import Rect
from trainer.checkpoint.signing import signing_key
from trainer.checkpoint.writer import Draft, Region, num_bytes, write_tensors, write_text
from trainer.parallel.plan import Ints
from trainer.parallel.tree import all_gather_numbers
from trainer.parallel.values import broadcast_value, gather_values

log = logging.getLogger(__name__)

_PAGE_BYTES = 1 << 12
_PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers", "safetensors")


@dataclass(frozen=True)
class Frozen:
    """The frozen tensors that have been saved, and the files that contain them.

    Later checkpoints refer to these files.
    """

    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]

    @staticmethod
    def of(manifest: Manifest) -> Frozen:
        """Return the frozen tensors and files that a checkpoint refers to."""
        files = {name: entry for name, entry in manifest.files.items() if frozen_folder_of(name)}
        return Frozen(files, {name: entry for name, entry in manifest.tensors.items() if is_frozen(entry)})


@dataclass(frozen=True)
class Content:
    """The part of a save that one rank contributes, all of it in host memory."""

    step: int
    shards: Mapping[str, Sequence[Shard]]
    """The shards to write, by family of files. Frozen shards that have been saved already are not included."""
    generators: Mapping[str, Tensor]
    """The states of the random generators by name."""
    extra: Mapping[str, Any]
    """The state of the trainer itself as JSON. Only the state of rank 0 is written."""
    frozen: Frozen
    """The frozen tensors that have been saved already."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a save, which is the same on every rank."""

    url: str
    """The URL of the checkpoint."""
    failure: str | None = None
    """The reason why the save failed; None if the checkpoint was committed."""
    fenced: bool = False
    """True if a newer attempt has started. In this case, no later save can succeed either."""
    frozen: Frozen | None = None
    """The frozen tensors that this checkpoint refers to, or None if the save failed."""


@dataclass(frozen=True)
class Written:
    """A description of the files that one rank wrote, which is sent to rank 0."""

    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]
    """The result of `trainer.checkpoint.layout.entries_of`."""
    sliced: Mapping[range, int]
    """The result of `trainer.checkpoint.layout.sliced_elements`."""


SENT_KINDS = (Outcome, Frozen, Written, FileEntry, TensorEntry, Rect, Slices)
"""The dataclasses and named tuples that ranks send each other when they save."""


@dataclass(frozen=True)
class Place:
    """The destination of the checkpoints, and what this rank needs to write its part of them."""

    checkpoints: Checkpoints
    config: CheckpointConfig
    attempt: Attempt
    group: dist.ProcessGroup
    """A process group of all ranks that only the writing threads use."""
    rank: int
    topology: Mapping[str, int]
    heartbeat: Callable[[str], None] = lambda what: None
    """A function that is called with a description of every file before it is written."""
    nodes: Ints | None = None
    """[ranks] the number of each rank's node, if the ranks of a node write to joined files; None if each rank writes
    separate files."""


class Save:
    """A save that runs in the background. `outcome` is None until the save has ended.

    Collective: every rank of the world must create this object.
    """

    def __init__(self, place: Place, content: Content) -> None:
        self.place, self.content = place, content
        self.url = f"{place.checkpoints.url}/{step_name(content.step)}"
        self.outcome: Outcome | None = None
        self._thread = threading.Thread(target=self._run, name=f"save-{content.step}", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """True until the save has ended on this rank."""
        return self._thread.is_alive()

    def wait(self) -> Outcome:
        """Wait until the save has ended, and return its outcome."""
        self._thread.join()
        assert self.outcome is not None
        return self.outcome

    def _run(self) -> None:
        try:
            self.outcome = self._write_together()
        except Exception as error:
            # Usually another rank died. The training loop detects this, but the failed save must be logged here.
            self.outcome = Outcome(self.url, _text(error))
        if self.outcome.failure is not None and self.place.rank == 0:
            log.error("CHECKPOINT NOT SAVED: %s: %s", self.url, self.outcome.failure)

    def _write_together(self) -> Outcome:
        """Write this rank's files, and return the outcome of the save, which is the same on all ranks.

        Collective: every rank of `Place.group` must call it.
        """
        place, draft = self.place, None
        failure, written = None, None
        files = self._files()
        region = None if place.nodes is None else self._region(files, place.nodes)
        try:
            draft = place.checkpoints.draft(place.attempt, self.content.step, region)
            written = self._write(draft, files)
        except Exception as error:  # All exceptions are caught, because the other ranks wait for this rank's result.
            failure = f"rank {place.rank}: {_text(error)}"
        if place.nodes is not None:
            failure = self._sync(draft, failure, place.nodes)
        outcome = Outcome(self.url)
        parts = gather_values((failure, written), place.group, SENT_KINDS)
        if parts is not None:
            failures = [text for text, _ in parts if text is not None]
            outcome = Outcome(self.url, failures[0] if failures else None)
            if not failures:
                assert draft is not None
                outcome = self._commit(draft, [part for _, part in parts if part is not None])
            if outcome.failure is not None:
                # The draft is deleted before other ranks learn of the failure and write to a new draft.
                place.checkpoints.discard(place.attempt, self.content.step)
        return broadcast_value(outcome, place.group, SENT_KINDS)

    def _parts(self) -> Iterator[tuple[str, list[Shard]]]:
        """Yield this rank's shards by family of files. The name of a family of frozen files includes their folder."""
        frozen = self.place.attempt.folder(FROZEN, self.content.step)
        for family, shards in self.content.shards.items():
            for name, part in (
                (family, [s for s in shards if not s.frozen]),
                (f"{frozen}/{family}", [s for s in shards if s.frozen]),
            ):
                if part:
                    yield name, part

    def _files(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the tensors of each file that this rank writes, by the file's name."""
        rank, files = self.place.rank, dict[str, Mapping[str, Tensor]]()
        for family, part in self._parts():
            files[file_of(family, rank)] = {key_of(s.name, PARAM, s.rect): s.values[PARAM] for s in part}
        moments = {
            key_of(s.name, kind, s.rect): value
            for shards in self.content.shards.values()
            for s in shards
            for kind, value in s.values.items()
            if kind != PARAM
        }
        if moments:
            files[file_of(MOMENTS, rank)] = moments
        files[file_of("rng", rank)] = self.content.generators
        return files

    def _region(self, files: Mapping[str, Mapping[str, Tensor]], nodes: Ints) -> Region:
        """Return the part of the joined files that this rank writes.

        This part follows the parts of the node's lower ranks.

        Collective: every rank of `Place.group` must call it.
        """
        sizes = [sum(num_bytes(t) for name, t in files.items() if ("/" in name) == frozen) for frozen in (False, True)]
        everyone = all_gather_numbers(np.array(sizes, dtype=np.int64), self.place.group)
        mine = nodes[self.place.rank]
        before = everyone[: self.place.rank][nodes[: self.place.rank] == mine]
        # Every part begins on a new page, so that each page is written by only one rank.
        own, frozen = (-(-before // _PAGE_BYTES) * _PAGE_BYTES).sum(axis=0).tolist()
        return Region(int(mine), own, frozen)

    def _sync(self, draft: Draft | None, failure: str | None, nodes: Ints) -> str | None:
        """Sync the joined files on the first rank of each node, after all ranks have written their parts.

        Collective: every rank of `Place.group` must call it.

        Returns:
            The reason why the save failed on this rank; None if it did not fail.
        """
        rank = self.place.rank
        written = all_gather_numbers(np.array([failure is None]), self.place.group).all()
        if written and draft is not None and rank == int((nodes == nodes[rank]).argmax()):
            self.place.heartbeat("syncing the files of the node")
            try:
                draft.sync()
            except OSError as error:
                return f"rank {rank}: {_text(error)}"
        return failure

    def _write(self, draft: Draft, files: Mapping[str, Mapping[str, Tensor]]) -> Written:
        """Write this rank's files, and return the manifest's entries for the files and for the tensors in them."""
        entries: dict[str, FileEntry] = {}
        for name, content in files.items():
            self.place.heartbeat(f"writing {name}")
            entries[name] = write_tensors(draft, name, content)
        tensors: dict[str, TensorEntry] = {}
        for family, part in self._parts():
            tensors |= entries_of(part, family, self.place.rank)
        return Written(entries, tensors, sliced_elements([s for part in self.content.shards.values() for s in part]))

    def _commit(self, draft: Draft, parts: Sequence[Written]) -> Outcome:
        """Commit the checkpoint. Only rank 0 calls this method, after all ranks have written their files.

        Args:
            draft: The draft that all ranks have written to.
            parts: The results of `_write` on all ranks.
        """
        place, content = self.place, self.content
        try:
            files = {name: entry for part in parts for name, entry in part.files.items()}
            tensors = merge_entries([part.tensors for part in parts], [part.sliced for part in parts])
            manifest = self._manifest(draft, files, tensors)
            write_text(draft, MANIFEST, manifest.dumps(signing_key()))
            place.checkpoints.commit(place.attempt, manifest)
        except FencedError as error:
            return Outcome(self.url, str(error), fenced=True)
        except Exception as error:  # All exceptions are caught, because the other ranks wait for the outcome.
            return Outcome(self.url, _text(error))
        try:
            place.checkpoints.clean_up(place.config, content.step, place.attempt)
            place.checkpoints.sweep(place.attempt)
        except (OSError, UserError, FencedError) as error:
            log.warning("old checkpoints in %s could not be removed: %s", place.checkpoints.url, error)
        return Outcome(self.url, frozen=Frozen.of(manifest))

    def _manifest(self, draft: Draft, files: dict[str, FileEntry], tensors: dict[str, TensorEntry]) -> Manifest:
        content = self.content
        state = {
            "step": content.step,
            "attempt": self.place.attempt.number,
            "versions": {p: version(p) for p in _PACKAGES},
            "extra": content.extra,
        }
        files[STATE] = write_text(draft, STATE, json.dumps(state, indent=1))
        files |= {name: content.frozen.files[name] for name in files_of(content.frozen.tensors.values())}
        tensors |= content.frozen.tensors
        return Manifest(content.step, self.place.topology, dict(sorted(files.items())), dict(sorted(tensors.items())))


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, OSError | UserError) else f"{type(error).__name__}: {error}"
