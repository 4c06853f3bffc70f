"""The error message for a run that diverged: its losses, the likely causes, and the steps to recover."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.engine.optim import OptimConfig

_NUM_SHOWN = 8
_GROWN = 2.0
"""A loss has grown if it is more than this many times the usual loss."""


@dataclass(frozen=True)
class Past:
    """The loss and the gradient norm of one step."""

    step: int
    loss: float
    grad_norm: float
    skipped: bool
    """Whether the update of the step was skipped."""


@dataclass(frozen=True)
class Divergence:
    """The analysis of a run in which several updates in a row were skipped."""

    history: Sequence[Past]
    """The most recent steps, in order. They end with the steps whose updates were skipped."""
    optim: OptimConfig
    samples: Sequence[str]
    """The keys of the samples in the last step."""

    @property
    def onset(self) -> int:
        """The step at which the loss began to grow, or the first skipped step if the loss did not grow before it."""
        applied = [p for p in self.history if not p.skipped]
        bad = [p.step for p in self.history if p.skipped]
        first = bad[0] if bad else self.history[-1].step + 1
        if not applied:
            return first
        usual = statistics.median(p.loss for p in applied[: max(1, len(applied) // 2)])
        for past in reversed(applied):
            if past.loss <= _GROWN * usual:
                break
            first = past.step
        return first

    def causes(self) -> list[str]:
        """Return the likely causes with their remedies, the most likely one first."""
        lr = self.optim.lr
        found = [f"optim.lr = {lr:g} is too high (try {lr / 3:.2g})"]
        if not self.optim.clip_norm:
            found.append("gradients are not clipped (optim.clip_norm = 0; try 1)")
        if not self.optim.warmup_steps:
            found.append("there is no warm-up (optim.warmup_steps = 0)")
        found.append(f"a sample is damaged (step {self.history[-1].step}: {', '.join(self.samples[:4])})")
        return found

    def good_checkpoint(self, steps: Sequence[int]) -> int | None:
        """Return the newest of `steps` that is before the onset; None if there is none.

        Args:
            steps: The steps of the run's checkpoints.
        """
        return max((step for step in steps if step < self.onset), default=None)

    def shown(self) -> list[Past]:
        """Return at most `_NUM_SHOWN` consecutive steps around the one at which the loss began to grow."""
        around = next((i for i, p in enumerate(self.history) if p.step >= self.onset), len(self.history) - 1)
        start = max(0, min(around - _NUM_SHOWN // 2, len(self.history) - _NUM_SHOWN))
        return list(self.history[start : start + _NUM_SHOWN])

    def message(self, steps: Sequence[int], run_url: str) -> str:
        """Return the error message, as one line.

        Args:
            steps: The steps of the run's checkpoints.
            run_url: The location of the run.
        """
        skipped = [p.step for p in self.history if p.skipped]
        curve = ", ".join(f"{p.step}: {number(p.loss)} ({number(p.grad_norm)})" for p in self.shown())
        causes = "; ".join(f"{i}. {cause}" for i, cause in enumerate(self.causes(), start=1))
        good, again = self.good_checkpoint(steps), f"rerun with optim.lr={self.optim.lr / 3:.2g}"
        if good is None:
            back = f"there is no checkpoint from before step {self.onset}: {again} name=NEW_NAME to start again"
        elif good == max(steps):
            back = f"the last good checkpoint is step {good}, the newest: {again} to resume from it"
        else:
            command = f"earshot checkpoints {run_url} rollback {good}"
            back = f"the last good checkpoint is step {good}: `{command}`, then {again}"
        return (
            f"the run diverged: updates of {len(skipped)} steps in a row were skipped, the last at step {skipped[-1]} "
            f"(spike.max_in_a_row); loss (gradient norm) by step: {curve}; likely causes: {causes}; {back}"
        )

    def fields(self, steps: Sequence[int]) -> dict[str, Any]:
        """Return the fields of the event `diverged`.

        Args:
            steps: The steps of the run's checkpoints.
        """
        shown = [[p.step, number(p.loss), number(p.grad_norm)] for p in self.shown()]
        return {"onset": self.onset, "good_checkpoint": self.good_checkpoint(steps), "history": shown}


def number(value: float) -> str:
    """Return a loss or norm as a short text, for example `3.21`, `1.5e+12` or `nan`."""
    return f"{value:.3g}" if math.isfinite(value) else str(value)
