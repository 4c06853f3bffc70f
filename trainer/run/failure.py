"""Reports about the exception that ends a rank: the step, its samples, and whether another rank is at fault."""

from __future__ import annotations

import logging
import time
import traceback
from dataclasses import dataclass

import torch.distributed as dist

from model.batch import Batch
from trainer.run.exit_codes import ExitCode
from trainer.run.restart import fingerprint, one_line
from trainer.telemetry.events import EventLog, read_events

log = logging.getLogger(__name__)

_PEER_MESSAGES = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Timed out waiting",
)
"""Parts of the messages of gloo and NCCL that mean that the connection to another rank was lost."""
_RANK0_FIRST_SEC = 0.5
"""How long the other ranks wait, so that rank 0 reports an error that all ranks see."""


@dataclass
class Position:
    """The step and the samples this rank is working on."""

    step: int | None = None
    """The step that was begun last; None before the first one."""
    samples: tuple[str, ...] = ()
    """The keys of this rank's samples in that step."""

    def at(self, step: int, batch: Batch | None = None) -> None:
        """Note that `step` has begun or, if `batch` is given, that this rank's part of its batch is loaded."""
        self.step = step
        self.samples = () if batch is None else tuple(s.key for s in batch.samples)


def emit_failure(error: Exception, position: Position, events: EventLog) -> ExitCode:
    """Emit an event for the error, print the error, and return the exit code of the process.

    If the connection to another rank was lost, which is a consequence of that rank's own failure, only the first rank
    that notices emits an event.

    Args:
        error: The exception that ends this rank.
        position: Where this rank was.
        events: This rank's event log.
    """
    if is_peer_failure(error):
        _add(events, "peer_lost", position, once=True, error=one_line(error))
        log.error("rank %s lost the connection to another rank: %s", events.rank, one_line(error))
        return ExitCode.PEER_LOST
    _add(
        events,
        "failed",
        position,
        error=one_line(error),
        fingerprint=fingerprint(error),
        samples=list(position.samples),
    )
    traceback.print_exception(error)
    return ExitCode.FAILED


def emit_mistake(error: Exception, position: Position, events: EventLog) -> None:
    """Emit the event of a user's error, which all ranks raise but only one reports."""
    _add(events, "failed", position, once=True, error=one_line(error), user=True)


def is_peer_failure(error: Exception) -> bool:
    """Return whether the error means that another rank, or the network to it, failed."""
    if isinstance(error, dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _PEER_MESSAGES)


def _add(events: EventLog, event: str, position: Position, *, once: bool = False, **fields: object) -> None:
    if once and events.rank:
        time.sleep(_RANK0_FIRST_SEC)
    try:
        if once and any(
            e["attempt"] == events.attempt and e["event"] in ("failed", "peer_lost", "hang")
            for e in read_events(events.run_dir)
        ):
            return
        events.add(event, position.step, **fields)
    except OSError as error:  # the disk may be what failed; the caller still prints the original error
        log.error("%s: the event '%s' could not be written: %s", events.run_dir, event, error)
