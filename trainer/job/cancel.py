"""Decide whether a person has cancelled a Slurm job, which must then not run again.

Slurm does not report this directly. While the processes of a cancelled job still run, its state is COMPLETING, as it is
after a time limit. `scancel --signal` does not change the state at all. This module therefore combines the state of the
job with the signals that its processes received.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

from trainer.job.slurm import JobState
from trainer.run.restart import current_attempt
from trainer.telemetry.events import Event

_BY_A_PERSON = (signal.SIGTERM, signal.SIGINT)
"""The signals by which a person cancels a job. Slurm itself sends them only when it ends the job."""


class CancelledError(Exception):
    """Raised when SIGTERM or SIGINT has ended a job step."""


def cancelled_by(state: JobState, batch_signals: Sequence[int], events: Sequence[Event], exit_code: int) -> str | None:
    """Return how a person cancelled the job; None if nobody did.

    Args:
        state: The state of the job after its ranks have ended.
        batch_signals: The signals that the batch script received.
        events: All events of the run.
        exit_code: The exit code of the ranks.
    """
    if state.is_ending:
        return "scancel" if state.is_cancelled else None
    if state.is_preempted:  # Slurm sends SIGTERM before it takes the nodes.
        return None
    sent = [n for n in _BY_A_PERSON if n in batch_signals or ended_by(exit_code, n)]
    attempt = current_attempt(events)
    if any(e["event"] in ("failed", "hang", "peer_lost") for e in attempt):
        sent = [n for n in _BY_A_PERSON if n in batch_signals]
    recorded = {name for e in attempt if e["event"] == "signal" for name in str(e.get("name")).split("+")}
    names = [n.name for n in _BY_A_PERSON if n in sent or n.name in recorded]
    return f"scancel --signal={names[0].removeprefix('SIG')}" if names else None


def ended_by(exit_code: int, number: int) -> bool:
    """Return whether `exit_code` means that signal `number` killed a process."""
    return exit_code == 128 + number


def raise_if_cancelled(exit_code: int) -> None:
    """Raise an error if SIGTERM or SIGINT has ended a job step.

    Raises:
        CancelledError: If `exit_code` is 128 plus the number of one of these signals.
    """
    for number in _BY_A_PERSON:
        if ended_by(exit_code, number):
            raise CancelledError(f"a step was ended by {number.name}")
