"""How a rank's process ends, as a batch script sees it. `docs/operations.md` has the table."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Every code that `python -m trainer` returns by itself; a rank that a signal killed gives 128 + its number."""

    FINISHED = 0
    FAILED = 1
    """An exception; a `failed` event names the step."""
    USER_ERROR = 2
    """Something the user must mend first; one line on stderr says what."""
    STOPPED = 75
    """A signal ended the run in order: its state is saved, the same command goes on."""
    HUNG = 76
    """No rank made progress for `train.hang_timeout_sec`; stacks lie in the run's folder."""
    PEER_LOST = 77
    """Another rank, or the network to it, went away."""
