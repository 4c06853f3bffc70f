"""Tests that cancelled jobs are detected from Slurm's output and signals. tests/cluster uses a real Slurm."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from trainer.job import slurm
from trainer.job.cancel import CancelledError, cancelled_by, raise_if_cancelled
from trainer.job.slurm import JobState

RUNNING, ENDING = JobState("RUNNING", 0), JobState("COMPLETING", 0)
SUBMITTED = {"event": "submitted"}
LATE = JobState("COMPLETING", 0, "TimeLimit")
PREEMPTED = JobState("RUNNING", 0, is_preempted=True)


def signal_event(name: str) -> list[dict[str, Any]]:
    return [{"event": "signal", "name": "SIGTERM"}, SUBMITTED, {"event": "signal", "name": name}]


@pytest.mark.parametrize(
    ("state", "batch", "events", "code", "how"),
    [
        (ENDING, [signal.SIGTERM], [SUBMITTED], 75, "scancel"),
        (ENDING, [signal.SIGUSR1, signal.SIGTERM], signal_event("SIGUSR1"), 75, "scancel"),
        (LATE, [signal.SIGTERM], signal_event("SIGTERM"), 75, None),
        (RUNNING, [signal.SIGUSR1], signal_event("SIGUSR1"), 75, None),
        (RUNNING, [], signal_event("SIGTERM"), 75, "scancel --signal=TERM"),
        (RUNNING, [], signal_event("SIGINT"), 75, "scancel --signal=INT"),
        (RUNNING, [], [SUBMITTED], 143, "scancel --signal=TERM"),  # the ranks did not handle signals yet
        (RUNNING, [], [SUBMITTED, {"event": "failed"}], 143, None),  # other ranks were ended after a failure
        (RUNNING, [signal.SIGTERM], [SUBMITTED], 138, "scancel --signal=TERM"),
        (RUNNING, [], [SUBMITTED], 137, None),  # for example, the memory was exhausted
        (PREEMPTED, [signal.SIGTERM], signal_event("SIGTERM"), 75, None),
    ],
)
def test_who_ended_a_job(
    state: JobState, batch: list[int], events: list[dict[str, Any]], code: int, how: str | None
) -> None:
    assert cancelled_by(state, batch, events, code) == how


def test_state_of_a_job_is_read_from_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "JobId=7 JobName=x JobState=RUNNING Reason=None Restarts=2 PreemptTime=2026-01-01T10:11:05 TimeLimit=05:00\n"
    monkeypatch.setattr(slurm, "_ask", lambda command: line)
    assert slurm.job_state_now(7) == JobState("RUNNING", 2, "None", True)
    monkeypatch.setattr(slurm, "_ask", lambda command: "slurm_load_jobs error: Invalid job id specified\n")
    assert slurm.job_state_now(7) is None


def test_a_step_that_a_person_ends_is_no_fault_of_its_nodes() -> None:
    raise_if_cancelled(137)
    with pytest.raises(CancelledError, match="SIGTERM"):
        raise_if_cancelled(143)
