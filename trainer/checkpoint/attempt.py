"""Attempts of a run. An attempt is one start of a run's processes. Only the newest attempt may commit checkpoints."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.errors import UserError
from trainer.checkpoint.layout import FROZEN, frozen_folder_of
from trainer.checkpoint.manifest import Manifest


class FencedError(Exception):
    """Raised when a newer attempt of the same run has started."""


class FencedRunError(UserError):
    """Raised on all ranks of an attempt that must end because a newer attempt of the same run has started."""


@dataclass(frozen=True)
class Attempt:
    """The identity of one attempt."""

    number: int
    """The number of the attempt in the run, counted from 1."""
    token: str
    """A random hexadecimal string, which distinguishes attempts that started at the same time."""

    @staticmethod
    def after(before: Attempt | None) -> Attempt:
        """Return a new attempt that follows `before`; None means that the run has no attempt yet."""
        return Attempt(1 if before is None else before.number + 1, secrets.token_hex(4))

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Attempt:
        """Return the attempt that `dataclasses.asdict` converted to `tree`.

        Raises:
            KeyError, TypeError, ValueError: If `tree` is not the JSON of an attempt.
        """
        return Attempt(int(tree["number"]), str(tree["token"]))

    def folder(self, kind: str, step: int) -> str:
        """Return a name for a folder that no other attempt uses.

        Args:
            kind: `layout.STEP` for the files of a checkpoint or `layout.FROZEN` for frozen weights.
            step: The step of the checkpoint.
        """
        return f"{kind}-{step:08d}-{self.number:04d}-{self.token}"

    def written(self, manifest: Manifest) -> list[str]:
        """Return the names of a checkpoint's files, except frozen files that earlier saves wrote."""
        own = self.folder(FROZEN, manifest.step)
        return [name for name in manifest.files if frozen_folder_of(name) in (None, own)]

    def check(self, newest: Attempt | None, where: str) -> None:
        """Check that this is still the newest attempt.

        Args:
            newest: The newest attempt, or None if its record cannot be read.
            where: The URL of the checkpoints, for the message.

        Raises:
            FencedError: If a newer attempt has started.
        """
        if newest != self:
            number = "another" if newest is None else newest.number
            raise FencedError(f"{where}: attempt {number} of this run has started, so attempt {self.number} stops")
