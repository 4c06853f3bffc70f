"""Report the exception that ends a rank, with the step and its samples, and whether another rank failed."""

from __future__ import annotations

import errno
import logging
import sys
import time
import traceback
from dataclasses import dataclass

import torch.distributed as dist

from model.batch import Batch
from trainer.parallel.environment import raise_descriptor_limit
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
"""Fragments of gloo and NCCL error messages that indicate a lost connection to another rank."""
_RANK0_FIRST_SEC = 0.5
"""The seconds that other ranks wait before they report an error that all ranks raise, so that rank 0 is the first."""


class FaultError(RuntimeError):
    """Raised on all ranks if one of them failed for an external reason, after the state has been saved."""


@dataclass
class Position:
    """The step and the samples that this rank is working on."""

    step: int | None = None
    """The most recently started step; None before the first step."""
    samples: tuple[str, ...] = ()
    """The keys of this rank's samples in that step."""

    def at(self, step: int, batch: Batch | None = None) -> None:
        """Record that `step` has started. If `batch` is given, record its samples as well."""
        self.step = step
        self.samples = () if batch is None else tuple(s.key for s in batch.samples)


def emit_failure(error: Exception, position: Position, events: EventLog) -> ExitCode:
    """Emit an event for the error, print the error, and return the exit code of the process.

    A lost connection to another rank is a consequence of that rank's own failure. In this case, only the first rank to
    notice it emits an event.

    Args:
        error: The exception that ends this rank.
        position: The step and the samples that this rank was working on.
        events: This rank's event log.
    """
    described = one_line(error) + _remedy(error)
    if is_peer_failure(error):
        _add(events, "peer_lost", position, once=True, error=one_line(error))
        log.error("rank %s lost the connection to another rank: %s", events.rank, one_line(error))
        return ExitCode.PEER_LOST
    if isinstance(error, FaultError):
        _add(events, "failed", position, once=True, error=one_line(error))
        log.error("%s", one_line(error))
        return ExitCode.FAILED
    _add(
        events,
        "failed",
        position,
        error=described,
        fingerprint=fingerprint(error),
        samples=list(position.samples),
    )
    traceback.print_exception(error)
    log.error("rank %s: %s", events.rank, described)
    return ExitCode.FAILED


def _remedy(error: Exception) -> str:
    """Return the remedy for an error that is caused by a machine limit, or an empty string for other errors."""
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in str(error):
        return f"; a process may open only {raise_descriptor_limit()} files here; raise the hard limit (docs/scale.md)"
    return ""


def emit_mistake(error: Exception, position: Position, events: EventLog) -> None:
    """Emit the event for a user's error. All ranks raise this error, but only one reports it."""
    _add(events, "failed", position, once=True, error=one_line(error), user=True)


def emit_fenced(error: Exception, position: Position, events: EventLog) -> ExitCode:
    """Emit the event for an attempt that a newer one has replaced, print the reason, and return the exit code."""
    if not events.rank:
        _add(events, "fenced", position, error=one_line(error))
        print(f"error: {error}", file=sys.stderr, flush=True)
    return ExitCode.FENCED


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
    except OSError as error:  # The disk may have caused the original error, which the caller prints in any case.
        log.error("%s: the event '%s' could not be written: %s", events.run_dir, event, error)
