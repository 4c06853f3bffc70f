"""The exit codes of a rank's process. `docs/operations.md` describes how a batch script responds to each of them."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of `earshot train`. If a signal kills a rank, its exit code is 128 plus the signal's number."""

    FINISHED = 0
    FAILED = 1
    """An exception was raised; a `failed` event contains the step."""
    USER_ERROR = 2
    """The user must fix something first. One line on stderr explains the problem."""
    STOPPED = 75
    """A signal ended the run cleanly. Its state is saved, and the same command resumes it."""
    HUNG = 76
    """A rank made no progress for `train.hang_timeout_sec`; the run's folder contains the stacks of all ranks."""
    PEER_LOST = 77
    """The connection to another rank was lost."""
    FENCED = 78
    """A newer attempt of the same run has started; a `fenced` event says so. This attempt must not be run again."""
