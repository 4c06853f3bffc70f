"""One process that answers: it opens the data and the model by itself and works through lists of places."""

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
from trainer.data.decode import SampleError, check_metadata, decode_audio
from trainer.data.lanes import permutation
from trainer.data.stored import Encoded, StoredData, open_stored
from trainer.evaluation.offline.answer import Answerer, Decoding, Question, Windows
from trainer.evaluation.offline.model import DTYPES, Origin, load_model
from trainer.evaluation.predictions import Prediction
from trainer.parallel.environment import set_environment

_READERS = 4
"""Threads that decode audio of the next batch while this one is answered."""


@dataclass(frozen=True)
class Request:
    """Everything that decides the predictions, and how many are made at a time."""

    origin: Origin
    data: str
    split: str | None
    tasks: tuple[str, ...]
    """Only these; empty: all."""
    max_samples: int | None
    """A random choice, the same every time; None: all."""
    dtype: str
    windows: Windows
    decoding: Decoding


class Skipped(NamedTuple):
    """A sample without an answer."""

    key: str
    reason: str
    detail: str


Outcome = Prediction | Skipped


def open_wanted(request: Request) -> tuple[StoredData, list[int]]:
    """The data, and the places in it that are asked for, longest audio first.

    Raises:
        UserError: no such data, or nothing of what is asked for is in it.
    """
    stored = open_stored(request.data, request.split)
    # A line without a task is kept, so that it is reported.
    places = [i for i, item in enumerate(stored.items) if not request.tasks or item.task in (*request.tasks, "")]
    if not places:
        known = ", ".join(sorted({item.task for item in stored.items}))
        raise UserError(f"--tasks {' '.join(request.tasks)}: {request.data} has none of them; it has: {known}")
    if request.max_samples is not None and request.max_samples < len(places):
        chosen = permutation(len(places), "evaluation", request.split or "")[: request.max_samples]
        places = [places[i] for i in sorted(chosen.tolist())]
    keys: set[str] = set()
    for place in places:
        if (key := stored.items[place].key) in keys:
            raise UserError(f"{request.data}: key '{key}' comes twice; evaluate one --split at a time")
        keys.add(key)
    return stored, sorted(places, key=lambda i: (-stored.items[i].seconds, stored.items[i].key))


def batches(request: Request, stored: StoredData, places: Sequence[int]) -> list[list[int]]:
    """`places` in order, cut into what is answered together."""
    found: list[list[int]] = []
    for place in places:
        longest = stored.items[found[-1][0]].seconds if found else 0.0
        full = not found or len(found[-1]) == request.decoding.batch_samples
        if full or (len(found[-1]) + 1) * longest > request.decoding.batch_sec:
            found.append([])
        found[-1].append(place)
    return found


class Worker:
    """The model, loaded, and the data.

    Args:
        request: what is asked.
        place: of this process among `num`; they share the machine's devices.

    Raises:
        UserError: see `open_stored` and `load_model`.
    """

    def __init__(self, request: Request, place: int = 0, num: int = 1) -> None:
        set_environment()
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", place % torch.cuda.device_count())
        elif num > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // num))
        self._stored = open_stored(request.data, request.split)
        loaded = load_model(request.origin, DTYPES[request.dtype], device)
        self._answer = Answerer(loaded, request.windows, request.decoding)

    def answer_jobs(self, jobs: Iterable[Sequence[int]]) -> Iterator[list[Outcome]]:
        """Outcomes of each job; the next one's audio is read meanwhile."""
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
        keys = [self._stored.items[place].key for place in job]
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


def serve(connection: Connection, request: Request, place: int, num: int) -> None:
    """The main function of a worker process: jobs come over the connection, None after the last ones; outcomes go back.

    What goes back is a list of outcomes, or the text of a UserError as the last thing.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        worker = Worker(request, place, num)
        while True:
            for outcomes in worker.answer_jobs(iter(connection.recv, None)):
                connection.send(outcomes)
    except UserError as error:
        connection.send(str(error))
    except (EOFError, BrokenPipeError):  # whoever asked is gone
        sys.exit(1)


def _decoded(key: str, item: Encoded | SampleError) -> Question | Skipped:
    try:
        if isinstance(item, SampleError):
            raise item
        files, meta = item
        check_metadata(meta)
        return Question(key, tuple(decode_audio(file) for file in files), meta)
    except SampleError as error:
        return Skipped(key, error.reason, error.detail)
