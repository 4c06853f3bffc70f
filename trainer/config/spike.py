"""The rule for updates that a step must skip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model.errors import UserError


@dataclass(frozen=True)
class SpikeConfig:
    """The recipe's `spike` section."""

    action: Literal["skip", "rewind", "stop"] = "skip"
    """`skip`: leave the update out and go on. `rewind`: go on after the batch with the weights of the newest checkpoint
    (without one: as `skip`). `stop`: save the state before the batch and end the run."""
    factor: float = 0.0
    """A loss above this many times the median of the last ones is a spike; 0: only what is not finite is one."""
    window_steps: int = 50
    """The last ones: so many. Until the run has done as many steps, no loss is a spike."""
    max_in_a_row: int = 10
    """After so many steps in a row that were left out, the run stops: it does not recover by itself."""

    def __post_init__(self) -> None:
        if self.factor != 0 and self.factor <= 1:
            raise UserError(f"spike.factor = {self.factor}: must be above 1, or 0 for none")
        if self.window_steps < 1:
            raise UserError(f"spike.window_steps = {self.window_steps}: must be at least 1")
        if self.max_in_a_row < 1:
            raise UserError(f"spike.max_in_a_row = {self.max_in_a_row}: must be at least 1")
