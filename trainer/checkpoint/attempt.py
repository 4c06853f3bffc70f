"""One attempt at a run: a launch of its ranks. Only the newest attempt may commit checkpoints."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.checkpoint.layout import FROZEN, Manifest, frozen_folder_of


class FencedError(Exception):
    """A newer attempt at the same run has begun."""


@dataclass(frozen=True)
class Attempt:
    """Who writes."""

    number: int
    token: str

    @staticmethod
    def after(before: Attempt | None) -> Attempt:
        """The next one."""
        return Attempt(1 if before is None else before.number + 1, secrets.token_hex(4))

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Attempt:
        """Inverse of `dataclasses.asdict`. Raises KeyError, TypeError, ValueError."""
        return Attempt(int(tree["number"]), str(tree["token"]))

    def folder(self, kind: str, step: int) -> str:
        """Name that no other attempt gives to a folder: `step` or `frozen` files of a step."""
        return f"{kind}-{step:08d}-{self.number:04d}-{self.token}"

    def written(self, manifest: Manifest) -> list[str]:
        """Files of a checkpoint that this attempt has just written; others are frozen ones of an earlier save."""
        own = self.folder(FROZEN, manifest.step)
        return [name for name in manifest.files if frozen_folder_of(name) in (None, own)]

    def check(self, newest: Attempt | None, where: str) -> None:
        """Raise FencedError unless this is still the newest attempt."""
        if newest != self:
            number = "another" if newest is None else newest.number
            raise FencedError(f"{where}: attempt {number} of this run has begun; attempt {self.number} stops")
