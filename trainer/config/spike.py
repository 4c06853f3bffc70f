"""The recipe's `spike` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model.errors import UserError


@dataclass(frozen=True)
class SpikeConfig:
    """The recipe's `spike` section: which updates are skipped because of a spike, and how the run continues."""

    action: Literal["skip", "rewind", "stop"] = "skip"
    """The reaction to a spike: a loss or gradient norm that is not finite, or a loss above the limit of `factor`.

    `skip` skips the update and continues. `rewind` loads the weights of the newest checkpoint and continues with the
    next batch. Without a checkpoint, it acts like `skip`. `stop` saves the state before the batch and ends the run.
    """
    factor: float = 0.0
    """The multiple of the median of the last `window_steps` losses above which a loss is a spike; 0 for no limit."""
    window_steps: int = 50
    """The number of losses in the median. No finite loss is a spike before the run has done this many steps."""
    max_in_a_row: int = 10
    """The number of consecutive skipped updates after which the run ends, since it would not recover on its own."""

    def __post_init__(self) -> None:
        if self.factor != 0 and self.factor <= 1:
            raise UserError(f"spike.factor = {self.factor}: must be above 1, or 0 to disable the rule")
        if self.window_steps < 1:
            raise UserError(f"spike.window_steps = {self.window_steps}: must be at least 1")
        if self.max_in_a_row < 1:
            raise UserError(f"spike.max_in_a_row = {self.max_in_a_row}: must be at least 1")
