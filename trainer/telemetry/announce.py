"""Printing of status lines with the time of day, and the formats of times."""

from __future__ import annotations

import math
import sys
from datetime import datetime
from typing import TextIO


def time_of_day() -> str:
    """Return the time of day with tenths of a second, such as `09:41:07.3`."""
    now = datetime.now()
    return f"{now:%H:%M:%S}.{now.microsecond // 100_000}"


def print_timed(text: str, stream: TextIO | None = None) -> None:
    """Print a line with the time of day.

    Args:
        text: The line.
        stream: The output; None for stdout, which is a job's log.
    """
    print(f"{time_of_day()} {text}", file=sys.stdout if stream is None else stream, flush=True)


def duration(seconds: float) -> str:
    """Return a duration as `M:SS`, `H:MM:SS` or `D d H h`."""
    if not math.isfinite(seconds):
        return "unknown time"
    minutes, sec = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours}:{minutes:02d}:{sec:02d}" if hours else f"{minutes}:{sec:02d}"
