"""The decision to skip an update because the loss is not finite or is a spike."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from trainer.config.spike import SpikeConfig
from trainer.training.divergence import Past


class SpikeGuard:
    """A guard that compares the loss of each step with earlier losses, and decides whether to skip the update.

    All ranks see the same losses and therefore make the same decisions. Checkpoints must contain the guard's `state`.

    Args:
        config: The recipe's `spike` section.
    """

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.num_skipped_updates = 0
        """The number of updates skipped since the run began."""
        self.in_a_row = 0
        """The number of updates skipped since the last update that was applied."""
        self.history: deque[Past] = deque(maxlen=max(100, 2 * config.max_in_a_row))
        """The last steps of this process, which an error message shows."""
        self._recent: list[tuple[int, float]] = []

    def judge(self, loss: float) -> str | None:
        """Return the reason why an update with this loss must be skipped, or None if it may be applied."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if self.config.factor and len(self._recent) >= self.config.window_steps:
            usual = statistics.median(loss for _, loss in self._recent)
            if loss > self.config.factor * usual > 0:
                times = f"{loss / usual:.1f} times the median of the losses"
                return f"loss {loss:.4g} is {times} of the last {len(self._recent)} applied updates"
        return None

    def note(self, step: int, loss: float, skipped: bool, grad_norm: float = math.nan) -> None:
        """Record the loss and the gradient norm of a step, and whether its update was skipped."""
        self.history.append(Past(step, loss, grad_norm, skipped))
        if skipped:
            self.num_skipped_updates += 1
            self.in_a_row += 1
        else:
            self.in_a_row = 0
            self._recent = [*self._recent, (step, loss)][-self.config.window_steps :]

    def forget_after(self, step: int) -> None:
        """Forget the losses of all steps after `step`, because the weights of `step` have been restored."""
        self._recent = [(s, loss) for s, loss in self._recent if s <= step]

    def forget_until(self, step: int) -> None:
        """Forget the losses up to and including `step`, because a stage with a different loss begins after it."""
        self._recent = [(s, loss) for s, loss in self._recent if s > step]
        self.history = deque((past for past in self.history if past.step > step), self.history.maxlen)

    @property
    def state(self) -> dict[str, Any]:
        """The guard's state, which can be written as JSON."""
        return {"num_skipped_updates": self.num_skipped_updates, "in_a_row": self.in_a_row, "recent": self._recent}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Restore a saved `state`. If it is None, because the checkpoint does not contain it, nothing changes."""
        if state is not None:
            former = state.get("num_left_out", 0)  # Checkpoints of versions before 0.2 use this key.
            self.num_skipped_updates, self.in_a_row = state.get("num_skipped_updates", former), state["in_a_row"]
            self._recent = [(step, loss) for step, loss in state["recent"]][-self.config.window_steps :]
