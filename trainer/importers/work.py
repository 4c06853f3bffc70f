"""The part of an import that runs in several processes. It prepares the audio of samples."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.data.errors import SampleError, sample_errors
from trainer.importers.audio import Made, Recordings
from trainer.importers.fields import Sample
from trainer.importers.row import RowError

AUDIO_FOLDER = "audio"
_FOLDER_ROWS = 1000
"""The number of rows whose audio is stored in one folder below `AUDIO_FOLDER`."""


@dataclass(frozen=True)
class Item:
    """A row of the source, with its sample if it could be converted."""

    where: str
    """The place of the row in the source, for messages."""
    sample: Sample | None
    error: RowError | None
    """The reason why there is no sample; None if there is one."""
    digest: str
    """A hash of this and all earlier rows."""
    number: int
    """The number of rows before this row."""


@dataclass(frozen=True)
class Outcome:
    """The result of preparing the audio of an item."""

    item: Item
    error: RowError | None
    """The reason why the row is skipped; None if it is imported."""
    audio: tuple[str, ...] = ()
    """The paths of the clips for a manifest."""
    clips: tuple[tuple[str, bytes], ...] = ()
    """The (type, content) of the clips for a shard."""
    seconds: float = 0.0

    @property
    def metadata(self) -> dict[str, Any]:
        """The fields of the sample in a manifest or a shard."""
        assert self.item.sample is not None
        fields = {"id": self.item.sample.key, "audio": None, **self.item.sample.fields}
        if self.item.sample.clips:
            fields["duration"] = round(self.seconds, 4)
        if self.audio:
            fields["audio"] = self.audio[0] if len(self.audio) == 1 else list(self.audio)
        return fields


@dataclass(frozen=True)
class Target:
    """The destination of the audio."""

    folder: Path | None = None
    """The folder of the manifest, to which audio is written; None to write nothing."""
    with_data: bool = False
    """Whether the content of the clips is returned, for shards."""


def outcomes(chunks: Iterable[Sequence[Item]], target: Target, jobs: int) -> Iterator[list[Outcome]]:
    """Compute the outcomes of each chunk in several processes, and yield them in order.

    Args:
        chunks: The items. At most two chunks per process are read ahead.
        target: The destination of the audio.
        jobs: The number of processes; 1 to use only this process.

    Raises:
        UserError: If a file cannot be read or written, a package is missing, or a process was killed.
    """
    work: Callable[[Sequence[Item]], list[Outcome]] = partial(_outcomes, target=target)
    if jobs == 1:
        yield from map(work, chunks)
        return
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _end_with_parent)
    waiting: deque[Future[list[Outcome]]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(work, chunk))
            if len(waiting) >= 2 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a process of the import was killed; rerun the same command with fewer --jobs to resume"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Make this process end if its parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _outcomes(chunk: Sequence[Item], target: Target) -> list[Outcome]:
    with Recordings() as recordings:
        return [_outcome(item, recordings, target) for item in chunk]


def _outcome(item: Item, recordings: Recordings, target: Target) -> Outcome:
    if item.sample is None:
        return Outcome(item, item.error)
    sample = item.sample
    try:
        with sample_errors(sample.key):
            try:
                made = [recordings.make(clip, target.with_data) for clip in sample.clips]
            except RowError as error:
                return Outcome(_without_data(item), error)
    except SampleError as error:
        return Outcome(_without_data(item), RowError(error.reason, error.detail))
    except OSError as error:  # No row may be skipped because of a problem with the disk.
        problem = f"{error.filename or 'its audio'}: {error.strerror or error}"
        raise UserError(f"{item.where}: {problem}; rerun the same command to resume") from None
    seconds = sum(m.seconds for m in made)
    clips = tuple((m.kind, m.data or b"") for m in made) if target.with_data else ()
    audio: tuple[str, ...] = ()
    if target.folder is not None:
        # Keys contain no dots, so the clips of two samples never have the same file name.
        number = [f".{i}" if len(made) > 1 else "" for i in range(len(made))]
        audio = tuple(
            _stored(m, target.folder, item.number // _FOLDER_ROWS, sample.key + n)
            for m, n in zip(made, number, strict=True)
        )
    return Outcome(_without_data(item), None, audio, clips, seconds)


def _without_data(item: Item) -> Item:
    """Return the item without the content of its clips, which need not be sent back to the main process."""
    assert item.sample is not None
    if all(clip.data is None for clip in item.sample.clips):
        return item
    clips = tuple(replace(clip, data=b"" if clip.data is not None else None) for clip in item.sample.clips)
    return replace(item, sample=replace(item.sample, clips=clips))


def _stored(made: Made, folder: Path, part: int, name: str) -> str:
    """Return the path of a clip.

    Unless the original file can be used, the clip is written to a subfolder of `folder`.
    """
    if made.data is None:
        return made.path
    place = f"{AUDIO_FOLDER}/{part:05d}/{name}.{made.kind}"
    path = folder / place
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, flags, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(made.data)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); rerun the same command to resume") from None
    return place
