"""Stopping in order: a signal on any rank makes all ranks stop after the same step."""

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
    """Set by SIGTERM, SIGINT or SIGUSR1 (Slurm's warning). Repeated ones change nothing, but for SIGINT: the second one
    of these interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.time_sec = 0.0
        """When it came, by `time.monotonic`."""

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals for as long as the context lasts."""
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
    """Call `late`, from another thread, if the context still lasts `grace_sec` after `since_sec` (`time.monotonic`)."""
    timer = threading.Timer(max(0.0, since_sec + grace_sec - time.monotonic()), late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after a step."""

    signals: dict[str, int]
    """Ranks that were asked to stop, by the signal that did it."""
    skipped: dict[str, int]
    """Samples of all ranks, by reason."""
    epochs: dict[str, float]
    """How often each set was read, by all ranks together."""

    @property
    def stopping(self) -> bool:
        """A rank was asked to stop."""
        return bool(self.signals)


def agree(stop: StopRequest, skipped: Mapping[str, int], epochs: Mapping[str, float], groups: Groups) -> Agreement:
    """Sum over ranks of what each saw. Collective, after every step."""
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
    """What went wrong on the first rank where something did; None if nothing. Collective."""
    flag = torch.tensor([int(mine is not None)])
    dist.all_reduce(flag, group=groups.world)
    if int(flag) == 0:
        return None
    found: list[Any] = [None] * groups.topology.world
    dist.all_gather_object(found, mine, group=groups.world)
    return next(text for text in found if text is not None)


def next_together(batches: Iterator[T], groups: Groups) -> tuple[T | None, str | None]:
    """This rank's part of the next global batch; or, on all ranks, None and why one of them has none. Collective."""
    loaded, failure = None, None
    try:
        loaded = next(batches)
    except UserError as error:
        failure = str(error)
    failure = first_failure(failure, groups)
    return (loaded, None) if failure is None else (None, failure)
