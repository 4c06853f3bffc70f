"""The recipe's `profile` section."""

from __future__ import annotations

import re
from dataclasses import dataclass

from model.errors import UserError


@dataclass(frozen=True)
class ProfileConfig:
    """The recipe's `profile` section, which selects the steps that are traced."""

    steps: str = ""
    """The steps to trace, as `first:end`, counted from 1 and excluding `end`; empty for none.

    Traces are written to `<run>/trace/`. Traced steps are slower, since all ranks synchronize before each phase.
    """

    def __post_init__(self) -> None:
        if self.steps and not (re.fullmatch(r"[1-9]\d*:\d+", self.steps) and len(self.range)):
            raise UserError(
                f"profile.steps = {self.steps!r}: must be first:end with 1 <= first < end, for example 10:12"
            )

    @property
    def range(self) -> range:
        """The steps to trace, counted from 1."""
        first, _, end = self.steps.partition(":")
        return range(int(first), int(end)) if self.steps else range(0)
