"""What a rank leaves behind when an exception ends it: where the run was, with which samples, and who is to blame."""

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

_OF_A_PEER = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Timed out waiting",
)
"""Parts of the messages by which gloo and NCCL tell that another rank went away."""
_MOMENT_SEC = 0.5


@dataclass
class Position:
    """Where this rank is in the run."""

    step: int | None = None
    """That was begun last; None: none yet."""
    samples: tuple[str, ...] = ()
    """Keys of this rank's part of its batch."""

    def at(self, step: int, batch: Batch | None = None) -> None:
        """A step begins, or its batch is there."""
        self.step = step
        self.samples = () if batch is None else tuple(s.key for s in batch.samples)


def emit_failure(error: Exception, position: Position, events: EventLog) -> ExitCode:
    """Leave an event and show the error; returns how the process must end.

    A lost peer is told by the first that sees it only: it is a consequence.
    """
    if is_of_a_peer(error):
        _add(events, "peer_lost", position, once=True, error=one_line(error))
        log.error("a peer of rank %s was lost: %s", events.rank, one_line(error))
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
    """Leave the event of a user's error, which all ranks raise alike."""
    _add(events, "failed", position, once=True, error=one_line(error), user=True)


def is_of_a_peer(error: Exception) -> bool:
    """Whether another rank, or the network to it, is to blame."""
    if isinstance(error, dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OF_A_PEER)


def _add(events: EventLog, event: str, position: Position, *, once: bool = False, **fields: object) -> None:
    if once and events.rank:
        time.sleep(_MOMENT_SEC)  # rank 0 tells, if it sees the same
    try:
        if once and any(
            e["attempt"] == events.attempt and e["event"] in ("failed", "peer_lost", "hang")
            for e in read_events(events.run_dir)
        ):
            return
        events.add(event, position.step, **fields)
    except OSError as error:  # the disk may be what failed; the error itself is still shown
        log.error("%s: the event %s is lost: %s", events.run_dir, event, error)
