"""Exchanges between ranks at each step, so that a signal or a failure on one rank stops all ranks at the same step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar, get_args

import numpy as np

from model.errors import UserError
from trainer.data.errors import Reason
from trainer.data.workers import LostWorkerError
from trainer.parallel.groups import Groups
from trainer.parallel.tree import all_gather_numbers
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
        """The time at which the first signal was received, in seconds of `time.monotonic`; 0 if there was none."""
        self.later: int | None = None
        """A SIGTERM or SIGINT that came after SIGUSR1: the run was also cancelled while it was saving."""

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
        since_sec: The time from which `grace_sec` is measured, in seconds of `time.monotonic`.
        late: A function that is called in another thread when the time is over, unless the block has ended.
    """
    timer = threading.Timer(max(0.0, since_sec + grace_sec - time.monotonic()), late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@dataclass(frozen=True)
class Agreement:
    """The totals over all ranks after a step."""

    signals: dict[str, int]
    """The number of ranks that were stopped by each signal, by the signal's name. Signals that no rank received are
    omitted."""
    skipped: dict[str, int]
    """The number of samples that all ranks together have skipped, by reason. Reasons with no samples are omitted."""
    epochs: dict[str, float]
    """The number of epochs of each dataset that all ranks together have read, by the dataset's name. It need not be
    whole."""

    @property
    def stopping(self) -> bool:
        """True if any rank received a signal to stop."""
        return bool(self.signals)


def agree(stop: StopRequest, skipped: Mapping[str, int], epochs: Mapping[str, float], groups: Groups) -> Agreement:
    """Add up the signals, skipped samples and epochs of all ranks after a step.

    Collective: every rank of the world must call it.

    Args:
        stop: This rank's request to stop.
        skipped: The number of samples that this rank has skipped, by reason.
        epochs: The fraction of each dataset that this rank has read, by the dataset's name. It exceeds 1 once the rank
            has read more samples than the dataset has. All ranks must pass the same datasets in the same order.
        groups: This rank's process groups.

    Returns:
        The totals over all ranks.
    """
    asked = [float(stop.signal == number) for number in SIGNALS]
    mine = [*asked, *(float(skipped.get(r, 0)) for r in REASONS), *epochs.values()]
    numbers = all_gather_numbers(np.array(mine, dtype=np.float64), groups.world).sum(axis=0).tolist()
    signals = {n.name: int(ranks) for n, ranks in zip(SIGNALS, numbers, strict=False) if ranks}
    numbers = numbers[len(SIGNALS) :]
    counts = {reason: int(n) for reason, n in zip(REASONS, numbers, strict=False) if n}
    return Agreement(signals, counts, dict(zip(epochs, numbers[len(REASONS) :], strict=True)))


@dataclass(frozen=True)
class Failure:
    """The reason why a rank could not load its samples."""

    text: str
    of_user: bool
    """True if the user must fix something first, False if the same command may succeed next time."""


def first_failure(mine: Failure | None, groups: Groups) -> Failure | None:
    """Return the failure on the lowest rank that failed, or None if no rank failed.

    Collective: every rank of the world must call it.

    Args:
        mine: The failure on this rank; None if this rank did not fail.
        groups: This rank's process groups.
    """
    if not all_gather_numbers(np.array([mine is not None]), groups.world).any():
        return None
    return next(found for found in all_gather_values(mine, groups.world, (Failure,)) if found is not None)


def next_together(batches: Iterator[T], groups: Groups) -> tuple[T | None, Failure | None]:
    """Load this rank's part of the next global batch, and check that every rank has loaded its own part.

    Collective: every rank of the world must call it.

    Args:
        batches: An iterator over this rank's part of each global batch.
        groups: This rank's process groups.

    Returns:
        This rank's part and None if all ranks succeeded. If any rank failed, all ranks return None and the failure of
        the lowest rank that failed.
    """
    loaded, failure = None, None
    try:
        loaded = next(batches)
    except UserError as error:
        failure = Failure(str(error), of_user=True)
    except LostWorkerError as error:
        failure = Failure(f"rank {groups.rank}: {error}", of_user=False)
    failure = first_failure(failure, groups)
    return (loaded, None) if failure is None else (None, failure)
