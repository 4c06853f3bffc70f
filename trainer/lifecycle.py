"""Stopping in order: a signal on any rank makes all ranks stop after the same step."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import get_args

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


def agree(stop: StopRequest, skipped: Mapping[str, int], groups: Groups) -> tuple[bool, dict[str, int]]:
    """(whether any rank was asked to stop, skipped samples of all ranks by reason). Collective, after every step."""
    mine = torch.tensor([int(stop.signal is not None), *(skipped.get(r, 0) for r in REASONS)])
    dist.all_reduce(mine, group=groups.world)
    flag, *counts = mine.tolist()
    return flag > 0, {reason: n for reason, n in zip(REASONS, counts, strict=True) if n}
