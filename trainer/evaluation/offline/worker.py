"""A worker process, which opens the data, loads the model and answers batches of samples."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from model.errors import UserError
from trainer.data.decode import decode_audio
from trainer.data.errors import SampleError, sample_errors
from trainer.data.lanes import permutation
from trainer.data.metadata import check_metadata
from trainer.data.stored import Encoded, StoredData, open_stored
from trainer.evaluation.offline.answer import Answerer, Decoding, Question, Windows
from trainer.evaluation.offline.model import DTYPES, Origin, load_model
from trainer.evaluation.predictions import Prediction
from trainer.parallel.environment import set_environment
from trainer.plugins import inherit_plugins
from trainer.scoring.declared import inherit_tasks
from trainer.scoring.tasks import TASKS

_READERS = 4
"""The number of threads that decode the audio of the next batch while the current batch is answered."""


@dataclass(frozen=True)
class Request:
    """The request for an evaluation, with all settings that determine its predictions, and the sizes of its batches."""

    origin: Origin
    """The model."""
    data: str
    """A manifest, or a folder or bucket of shards."""
    split: str | None
    """The split to evaluate; None for all splits."""
    tasks: tuple[str, ...]
    """The tasks to evaluate; empty for all tasks."""
    max_samples: int | None
    """The largest number of samples to evaluate; None for all. Every evaluation makes the same random choice."""
    dtype: str
    """The dtype of weights and activations, as a key of `DTYPES`."""
    windows: Windows
    """The windows into which long recordings are cut."""
    decoding: Decoding
    """The settings of text generation."""


class Skipped(NamedTuple):
    """A sample that has no answer."""

    key: str
    """The sample's key."""
    reason: str
    """The kind of problem, by which skipped samples are counted."""
    detail: str
    """A readable description of the problem."""


Outcome = Prediction | Skipped


def open_wanted(request: Request) -> tuple[StoredData, list[int]]:
    """Open the data, and select the samples to evaluate.

    Returns:
        The data, and the indices of the selected samples, longest audio first.

    Raises:
        UserError: If the data cannot be opened, two selected samples have the same key, or no sample has one of the
            requested tasks.
    """
    stored = open_stored(request.data, request.split)
    # A sample without a task is kept, so that it is reported as skipped.
    indices = [i for i, item in enumerate(stored.items) if not request.tasks or item.task in (*request.tasks, "")]
    if not indices:
        known = ", ".join(sorted({item.task for item in stored.items}))
        raise UserError(f"--tasks {' '.join(request.tasks)}: {request.data} has samples only of the tasks {known}")
    if request.max_samples is not None and request.max_samples < len(indices):
        chosen = permutation(len(indices), "evaluation", request.split or "")[: request.max_samples]
        indices = [indices[i] for i in sorted(chosen.tolist())]
    keys: set[str] = set()
    for index in indices:
        if (key := stored.items[index].key) in keys:
            raise UserError(
                f"{request.data}: key '{key}' occurs twice; choose one --split, or delete shards.json and index the "
                "tars again, so that every sample has its own key"
            )
        keys.add(key)
    return stored, sorted(indices, key=lambda i: (-stored.items[i].seconds, stored.items[i].key))


def batches(request: Request, stored: StoredData, indices: Sequence[int]) -> list[list[int]]:
    """Divide samples into batches that are answered together, in the given order.

    Args:
        request: The evaluation.
        stored: The data.
        indices: The indices of the samples, longest audio first.
    """
    found: list[list[int]] = []
    for index in indices:
        longest = stored.items[found[-1][0]].seconds if found else 0.0
        full = not found or len(found[-1]) == request.decoding.batch_samples
        if full or (len(found[-1]) + 1) * longest > request.decoding.batch_sec:
            found.append([])
        found[-1].append(index)
    return found


class Worker:
    """The model and the data of one process, which answers batches of samples.

    Args:
        request: The evaluation.
        index: The index of this process among `num`, which selects its device.
        num: The number of processes that share the machine's devices.

    Raises:
        UserError: If the data or the model cannot be used.
    """

    def __init__(self, request: Request, index: int = 0, num: int = 1) -> None:
        set_environment()
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", index % torch.cuda.device_count())
        elif num > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // num))
        self._stored = open_stored(request.data, request.split)
        loaded = load_model(request.origin, DTYPES[request.dtype], device)
        self._answer = Answerer(loaded, request.windows, request.decoding)

    def answer_jobs(self, jobs: Iterable[Sequence[int]]) -> Iterator[list[Outcome]]:
        """Yield the outcomes of each batch of sample indices, while the audio of the next batch is being read."""
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(_READERS) as readers:
            waiting = None
            for job in jobs:
                arriving = ahead.submit(self._read, job, readers)
                if waiting is not None:
                    yield self._outcomes(waiting.result())
                waiting = arriving
            if waiting is not None:
                yield self._outcomes(waiting.result())

    def _read(self, job: Sequence[int], readers: ThreadPoolExecutor) -> list[Question | Skipped]:
        keys = [self._stored.items[index].key for index in job]
        return list(readers.map(_decoded, keys, self._stored.read(job)))

    def _outcomes(self, read: Sequence[Question | Skipped]) -> list[Outcome]:
        questions = [item for item in read if isinstance(item, Question)]
        outcomes: list[Outcome] = [item for item in read if isinstance(item, Skipped)]
        for question, answer in zip(questions, self._answer(questions) if questions else (), strict=True):
            if isinstance(answer, SampleError):
                outcomes.append(Skipped(question.key, answer.reason, answer.detail))
            else:
                outcomes.append(answer)
        return outcomes


def serve(connection: Connection, request: Request, index: int, num: int) -> None:
    """Run a worker process, which receives batches of sample indices and sends their outcomes back.

    The message None ends a sequence of batches. The text of a UserError is sent back as the last message.

    Args:
        connection: The connection to the process that started this one.
        request: The evaluation.
        index: The index of this process among `num`.
        num: The number of worker processes.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        inherit_plugins()
        inherit_tasks()
        worker = Worker(request, index, num)
        while True:
            for outcomes in worker.answer_jobs(iter(connection.recv, None)):
                connection.send(outcomes)
    except UserError as error:
        connection.send(str(error))
    except (EOFError, BrokenPipeError):  # The process that started this one has ended.
        sys.exit(1)


def _decoded(key: str, item: Encoded | SampleError) -> Question | Skipped:
    try:
        if isinstance(item, SampleError):
            raise item
        files, meta = item
        with sample_errors(key):
            check_metadata(meta, len(files))
            clips = tuple(decode_audio(file) for file in files)
        return Question(key, clips, meta, TASKS[meta["task"]].is_transcription)
    except SampleError as error:
        return Skipped(key, error.reason, error.detail)
