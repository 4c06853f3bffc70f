"""Agreement between ranks after each step, so that a signal on any rank stops all of them after the same step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar, get_args

import torch
import torch.distributed as dist

from model.errors import UserError
from trainer.data.decode import Reason
from trainer.parallel.groups import Groups

T = TypeVar("T")
REASONS: tuple[str, ...] = get_args(Reason)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """A request to stop the run, made by SIGTERM, SIGINT or SIGUSR1 (Slurm's warning before a time limit).

    Further signals change nothing, except that a second SIGINT raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The first signal received; None if there was none."""
        self.time_sec = 0.0
        """The time at which it was received, by `time.monotonic`."""

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Return a context in which the signals set this request."""
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


@contextmanager
def deadline(grace_sec: float, since_sec: float, late: Callable[[], None]) -> Iterator[None]:
    """Return a context that calls a function if it lasts too long.

    Args:
        grace_sec: The time that the context may take.
        since_sec: The time from which `grace_sec` counts, by `time.monotonic`.
        late: Called from another thread if the context has not ended by then.
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
    """What all ranks know about each other after a step."""

    signals: dict[str, int]
    """The number of ranks that received a signal, by the signal's name."""
    skipped: dict[str, int]
    """The number of samples skipped on all ranks, by reason."""
    epochs: dict[str, float]
    """The number of times each dataset was read by all ranks together, by the dataset's name."""

    @property
    def stopping(self) -> bool:
        """True if any rank was asked to stop."""
        return bool(self.signals)


def agree(stop: StopRequest, skipped: Mapping[str, int], epochs: Mapping[str, float], groups: Groups) -> Agreement:
    """Exchange what each rank knows after a step.

    Collective: every rank of the world must call it.

    Args:
        stop: This rank's request to stop.
        skipped: The number of samples this rank skipped, by reason.
        epochs: The number of times this rank read each dataset, by the dataset's name.
        groups: This rank's process groups.

    Returns:
        The sums over all ranks.
    """
    asked = [float(stop.signal == number) for number in SIGNALS]
    mine = [*asked, *(float(skipped.get(r, 0)) for r in REASONS), *epochs.values()]
    total = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(total, group=groups.world)
    numbers = total.tolist()
    signals = {n.name: int(ranks) for n, ranks in zip(SIGNALS, numbers, strict=False) if ranks}
    numbers = numbers[len(SIGNALS) :]
    counts = {reason: int(n) for reason, n in zip(REASONS, numbers, strict=False) if n}
    return Agreement(signals, counts, dict(zip(epochs, numbers[len(REASONS) :], strict=True)))


def first_failure(mine: str | None, groups: Groups) -> str | None:
    """Return the failure of the lowest rank that has one; None if no rank has one.

    Collective: every rank of the world must call it.

    Args:
        mine: A description of this rank's failure; None if it has none.
        groups: This rank's process groups.
    """
    flag = torch.tensor([int(mine is not None)])
    dist.all_reduce(flag, group=groups.world)
    if int(flag) == 0:
        return None
    found: list[Any] = [None] * groups.topology.world
    dist.all_gather_object(found, mine, group=groups.world)
    return next(text for text in found if text is not None)


def next_together(batches: Iterator[T], groups: Groups) -> tuple[T | None, str | None]:
    """Load this rank's part of the next global batch, and check that all ranks loaded theirs.

    Collective: every rank of the world must call it.

    Args:
        batches: This rank's parts of the global batches.
        groups: This rank's process groups.

    Returns:
        This rank's part and None; or, on all ranks if any of them failed, None and a description of the failure.
    """
    loaded, failure = None, None
    try:
        loaded = next(batches)
    except UserError as error:
        failure = str(error)
    failure = first_failure(failure, groups)
    return (loaded, None) if failure is None else (None, failure)
