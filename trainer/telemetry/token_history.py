"""The history of the FFN experts' load, `token_load.jsonl`, whose size is limited even for long runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.telemetry.jsonl import StepLog, read_lines
from trainer.telemetry.token_load import TokenLoad

HISTORY_NAME = "token_load.jsonl"
"""The name of the file in the run's folder."""
MAX_BYTES = 64 << 20
"""The size above which older lines are merged."""
MIN_LINES = 32
"""The smallest number of lines that are merged, however long they are."""
_KEPT = 8
"""The newest lines, which are one in `_KEPT` of all lines, are not merged."""


class TokenHistory:
    """The file to which the load of each logging interval is appended.

    If the file becomes too large, pairs of lines are replaced by their sums, except the newest lines. All totals stay
    the same, and older steps have a coarser resolution in time than newer ones.

    Args:
        path: The file.
        resume_step: The step from which the run resumes (see `StepLog`).
        max_bytes: The size above which lines are merged.
    """

    def __init__(self, path: Path, resume_step: int, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self.saved_step = resume_step
        """The step of the newest checkpoint. A line up to this step is never merged with a later line, because a resume
        from the checkpoint drops the later lines."""
        self._log, self._max_bytes = StepLog(path, resume_step), max_bytes

    def append(self, record: Mapping[str, Any]) -> None:
        """Append the result of `TokenLoad.to_json`.

        Raises:
            OSError: If the line could not be written. In this case, no part of it remains in the file.
        """
        if self.path.stat().st_size > self._max_bytes:
            self._merge()
        self._log.append(record)

    def close(self) -> None:
        """Close the file."""
        self._log.close()

    def _merge(self) -> None:
        lines = list(read_lines(self.path))
        if len(lines) < MIN_LINES:
            return
        old, merged = lines[: -len(lines) // _KEPT], []
        while old:
            (line, record), *rest = old[:2]
            if rest and (record["step"] <= self.saved_step) == (rest[0][1]["step"] <= self.saved_step):
                both = TokenLoad.from_json(record) + TokenLoad.from_json(rest[0][1])
                line, old = json.dumps(both.to_json(), allow_nan=False) + "\n", old[2:]
            else:
                old = old[1:]
            merged.append(line)
        self._log.rewrite([*merged, *(line for line, _ in lines[-len(lines) // _KEPT :])])


def read_history(path: Path) -> list[TokenLoad]:
    """Return the loads of a run in order. The list is empty if the file does not exist.

    Args:
        path: The file `token_load.jsonl` of the run.

    Raises:
        UserError: If a line is not such a load, or has different experts or layers from the first line.
    """
    if not path.is_file():
        return []
    loads = []
    for number, (_, record) in enumerate(read_lines(path), start=1):
        try:
            loads.append(TokenLoad.from_json(record))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} line {number}: is not a record of the load of experts ({error!r}); restore the file"
            ) from None
        if (loads[0].experts, loads[0].layers) != (loads[-1].experts, loads[-1].layers):
            raise UserError(
                f"{path} line {number}: has other experts or layers than line 1, so the file mixes two models; "
                "restore the file"
            )
    return loads
