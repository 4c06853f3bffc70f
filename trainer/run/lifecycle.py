"""Let ranks communicate at each step, so that a signal or failure on one rank stops all of them at the same step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar, get_args

from model.errors import UserError
from trainer.data.errors import Reason
from trainer.data.workers import LostWorkerError
from trainer.parallel.balance import Floats
from trainer.parallel.groups import Groups
from trainer.parallel.values import all_gather_values

T = TypeVar("T")
REASONS: tuple[str, ...] = get_args(Reason)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """A request to stop the run, made by SIGTERM, SIGINT or SIGUSR1 (which Slurm sends before a job's time limit).

    Only the first signal counts. Later signals are ignored, with one exception: if the first signal was SIGINT, another
    SIGINT raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The first signal received; None if there was none."""
        self.time_sec = 0.0
        """The value of `time.monotonic` when the first signal was received; 0 if there was none."""
        self.later: int | None = None
        """The SIGTERM or SIGINT that cancelled the run after SIGUSR1, while it was saving; None if there was none."""

    @property
    def votes(self) -> list[float]:
        """One number for each of `SIGNALS`: 1 for the signal received, and 0 for all others."""
        return [float(self.signal == number) for number in SIGNALS]

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Return a context manager that records signals in this request, and restores the previous handlers on exit."""
        previous = {n: signal.signal(n, self._note) for n in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self.time_sec = number, time.monotonic()
        elif self.signal == signal.SIGUSR1 and number != signal.SIGUSR1:
            self.later = number


@contextmanager
def deadline(grace_sec: float, since_sec: float, late: Callable[[], None]) -> Iterator[None]:
    """Return a context manager that calls `late` if its block does not end in time.

    Args:
        grace_sec: The time allowed, in seconds.
        since_sec: The value of `time.monotonic` from which `grace_sec` is measured.
        late: A function that is called in another thread when the time is up, unless the block has ended.
    """
    timer = threading.Timer(max(0.0, since_sec + grace_sec - time.monotonic()), late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def signal_counts(votes: Sequence[float]) -> dict[str, int]:
    """Return the number of ranks that received each signal, by its name. Signals that no rank received are omitted.

    Args:
        votes: The sum of `StopRequest.votes` over the ranks.
    """
    return {number.name: int(ranks) for number, ranks in zip(SIGNALS, votes, strict=True) if ranks}


@dataclass(frozen=True)
class Failure:
    """The reason why a rank could not load its samples."""

    text: str
    of_user: bool
    """True if the user must fix something first, False if the same command may succeed next time."""


@dataclass(frozen=True)
class Totals:
    """The number of skipped samples and the number of epochs, summed over all ranks."""

    skipped: dict[str, int]
    """The number of samples that were skipped, by reason. Reasons without samples are omitted."""
    epochs: dict[str, float]
    """The number of epochs that were read, by the dataset's name. It need not be whole."""


def notes_of(failure: Failure | None, skipped: Mapping[str, int], epochs: Mapping[str, float]) -> list[float]:
    """Return the numbers that a rank shares with all others after it has loaded its part of a global batch.

    Args:
        failure: The reason why the rank could not load its part; None if it could.
        skipped: The number of samples that the rank has skipped, by reason.
        epochs: The fraction of each dataset that the rank has read, by the dataset's name. It exceeds 1 once the rank
            has read more samples than the dataset has. All ranks must pass the same datasets in the same order.
    """
    return [float(failure is not None), *(float(skipped.get(r, 0)) for r in REASONS), *epochs.values()]


def totals_of(notes: Floats, datasets: Iterable[str]) -> Totals:
    """Return the totals over all ranks.

    Args:
        notes: The result of `notes_of` on each rank, [world, number of notes].
        datasets: The names of the datasets, in the order of `notes_of`.
    """
    _, *numbers = notes.sum(axis=0).tolist()
    skipped = {reason: int(n) for reason, n in zip(REASONS, numbers, strict=False) if n}
    return Totals(skipped, dict(zip(datasets, numbers[len(REASONS) :], strict=True)))


def first_failure(mine: Failure | None, notes: Floats, groups: Groups) -> Failure | None:
    """Return the failure on the lowest rank that failed, or None if no rank failed.

    Collective: every rank of the world must call it. Ranks communicate only if one failed.

    Args:
        mine: The failure on this rank; None if this rank did not fail.
        notes: The result of `notes_of` on each rank, [world, number of notes].
        groups: This rank's process groups.
    """
    if not notes[:, 0].any():
        return None
    return next(found for found in all_gather_values(mine, groups.world, (Failure,)) if found is not None)


def load_next(batches: Iterator[T], rank: int) -> tuple[T | None, Failure | None]:
    """Load this rank's part of the next global batch.

    Args:
        batches: An iterator over this rank's part of each global batch.
        rank: This rank.

    Returns:
        The part and None, or None and the reason why the part could not be loaded.
    """
    try:
        return next(batches), None
    except UserError as error:
        return None, Failure(str(error), of_user=True)
    except LostWorkerError as error:
        return None, Failure(f"rank {rank}: {error}", of_user=False)
