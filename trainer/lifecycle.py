"""Stopping in order: a signal on any rank makes all ranks stop after the same step."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, get_args

import torch
import torch.distributed as dist

from trainer.data.decode import Reason
from trainer.parallel.groups import Groups

REASONS: tuple[str, ...] = get_args(Reason)


class StopRequest:
    """Set by SIGTERM, SIGINT or SIGUSR1 (Slurm's warning); a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals for as long as the context lasts."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        previous = {n: signal.signal(n, self._note) for n in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after a step."""

    stopping: bool
    """A rank was asked to stop."""
    skipped: dict[str, int]
    """Samples of all ranks, by reason."""
    epochs: dict[str, float]
    """How often each set was read, by all ranks together."""


def agree(stop: StopRequest, skipped: Mapping[str, int], epochs: Mapping[str, float], groups: Groups) -> Agreement:
    """Sum over ranks of what each saw. Collective, after every step."""
    mine = [float(stop.signal is not None), *(float(skipped.get(r, 0)) for r in REASONS), *epochs.values()]
    total = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(total, group=groups.world)
    flag, *numbers = total.tolist()
    counts = {reason: int(n) for reason, n in zip(REASONS, numbers, strict=False) if n}
    return Agreement(flag > 0, counts, dict(zip(epochs, numbers[len(REASONS) :], strict=True)))


def first_failure(mine: str | None, groups: Groups) -> str | None:
    """What went wrong on the first rank where something did; None if nothing. Collective."""
    flag = torch.tensor([int(mine is not None)])
    dist.all_reduce(flag, group=groups.world)
    if int(flag) == 0:
        return None
    found: list[Any] = [None] * groups.topology.world
    dist.all_gather_object(found, mine, group=groups.world)
    return next(text for text in found if text is not None)
