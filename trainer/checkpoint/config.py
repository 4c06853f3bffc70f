"""When checkpoints are written and how many stay."""

from __future__ import annotations

from dataclasses import dataclass

from model.errors import UserError


@dataclass(frozen=True)
class CheckpointConfig:
    """The recipe's `checkpoint` section."""

    every_steps: int = 500
    """A checkpoint after every so many steps, and at the end; 0: only at the end."""
    keep_last: int = 2
    """Older ones are removed."""

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise UserError(f"checkpoint.every_steps = {self.every_steps}: must be 0 (only at the end) or positive")
        if self.keep_last < 1:
            raise UserError(f"checkpoint.keep_last = {self.keep_last}: must be at least 1")
