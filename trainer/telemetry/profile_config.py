"""Which steps are traced."""

from __future__ import annotations

import re
from dataclasses import dataclass

from model.errors import UserError


@dataclass(frozen=True)
class ProfileConfig:
    """The recipe's `profile` section."""

    steps: str = ""
    """`first:end`, counted from 1, `end` left out: trace these steps into `<run>/trace/`. Empty: none."""

    def __post_init__(self) -> None:
        if self.steps and not (re.fullmatch(r"[1-9]\d*:\d+", self.steps) and len(self.range)):
            raise UserError(f"profile.steps = {self.steps!r}: give first:end with 1 <= first < end, e.g. 10:12")

    @property
    def range(self) -> range:
        """The traced steps."""
        first, _, end = self.steps.partition(":")
        return range(int(first), int(end)) if self.steps else range(0)
