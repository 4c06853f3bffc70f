"""The error that causes a sample to be skipped, and its possible reasons."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from model.errors import UserError

log = logging.getLogger(__name__)

Reason = Literal[
    "altered",
    "ambiguous",
    "bad_messages",
    "broken",
    "empty",
    "empty_answer",
    "nan",
    "no_audio",
    "out_of_range",
    "placeholder_in_text",
    "special_token_in_text",
    "too_long",
    "too_many_clips",
    "too_many_tokens",
    "unexpected",
    "unknown_task",
    "wrong_type",
]


class SampleError(Exception):
    """Raised when a sample cannot be used. The sample is skipped, counted by `reason` and listed with `detail`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail


@contextmanager
def sample_errors(key: str) -> Iterator[None]:
    """Turn unexpected errors while a sample is processed into SampleError, so that one sample cannot end a run.

    The traceback is logged. OSError and UserError are raised unchanged, because they are caused by files or the store,
    not by the sample.

    Args:
        key: The key of the sample.

    Raises:
        SampleError: If the body of the `with` statement raises any other exception (`unexpected`).
    """
    try:
        yield
    except (SampleError, UserError, OSError):
        raise
    except Exception as error:
        log.warning("sample %s: unexpected error", key, exc_info=True)
        lines = str(error).splitlines() or [""]
        raise SampleError("unexpected", f"{type(error).__name__}: {lines[0][:200]}") from error
