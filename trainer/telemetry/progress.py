"""The progress of a run on the terminal."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from tqdm import tqdm

from model.errors import printable
from trainer.telemetry.announce import duration, time_of_day
from trainer.telemetry.metrics import StepReport

_BAR_COLUMNS = 12
"""The smallest width of the progress bar in characters, including its frame and the percentage."""
_MIN_COLUMNS = 80


class Progress:
    """A display of a run's progress. It is a bar on a terminal, and otherwise a plain line per `every_steps` steps.

    The bar and the lines show the remaining time, the loss, the learning rate, the gradient norm, tokens per second,
    the MFU or audio seconds per second (x real time), and the peak memory of rank 0. On a narrow terminal, the last of
    these values are omitted. Rates are moving averages over the last steps. The first step of this process and of each
    stage takes longer than others, so it does not count once there is a second one.

    The steps of different stages may take very different times. The remaining time is therefore that of the current
    stage, with its name.

    Args:
        num_steps: The number of steps of the whole run.
        start_step: The number of steps completed before this process began.
        every_steps: The number of steps per plain line.
        name: The name of the run, with which each line begins.
        stream: The output; None for stderr.
        stage_ends: The name and the last step of every stage; empty for a run without stages.
    """

    _SMOOTHING = 0.1

    def __init__(
        self,
        num_steps: int,
        start_step: int = 0,
        every_steps: int = 1,
        *,
        name: str = "",
        stream: TextIO | None = None,
        stage_ends: Sequence[tuple[str, int]] = (),
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._num_steps, self._start_step, self._every_steps = num_steps, start_step, every_steps
        self._name = name
        self._mark_sec = time.perf_counter()
        self._stage_ends = stage_ends or [("", num_steps)]
        self._stage: tuple[str, int] | None = None  # The stage of the last step.
        self._num_measured = 0  # The number of steps of this stage that have been measured.
        self._rates: tuple[float, float, float] = (0.0, 0.0, 0.0)  # The averages of time, tokens and audio seconds.
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=num_steps, initial=start_step, file=self._stream, dynamic_ncols=True, bar_format=self._format("")
            )

    def update(self, report: StepReport) -> None:
        """Show one more step."""
        self._measure(report)
        words = self._words(report)
        if self._bar is not None:
            self._bar.bar_format = self._format(fitting(words, self._columns_left()))
            self._bar.update(report.step - self._bar.n)
        elif report.step % self._every_steps == 0 or report.step in (self._start_step + 1, self._num_steps):
            head = f"{self._name} " if self._name else ""
            self.write(f"{head}step {report.step}/{self._num_steps}  {'  '.join(words)}")

    def write(self, line: str) -> None:
        """Print a line with the time of day, without breaking the bar."""
        text = f"{time_of_day()} {line}"
        if self._bar is not None:
            self._bar.write(printable(text), file=self._stream)
        else:
            print(printable(text), file=self._stream, flush=True)

    def skip_time(self) -> None:
        """Exclude the time since the last step, for example the time of an evaluation, from the rates."""
        self._mark_sec = time.perf_counter()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _format(self, text: str) -> str:
        """Return the format of tqdm's bar.

        The text is part of the format, because tqdm's postfix would begin with a comma.
        """
        name, shown = (
            (f"{part} " if part else "").replace("{", "{{").replace("}", "}}") for part in (self._name, text)
        )
        return name + "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} " + shown

    def _columns_left(self) -> int:
        """Return the number of columns that remain next to the shortest bar."""
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):  # not a real terminal
            columns = _MIN_COLUMNS
        return columns - len(self._name) - 1 - _BAR_COLUMNS - 2 * len(str(self._num_steps)) - 4

    def _measure(self, report: StepReport) -> None:
        now_sec = time.perf_counter()
        seconds = max(now_sec - self._mark_sec, 1e-9)
        self._mark_sec = now_sec
        stage = next((entry for entry in self._stage_ends if report.step <= entry[1]), self._stage_ends[-1])
        if stage != self._stage:
            self._stage, self._num_measured = stage, 0
        self._num_measured += 1
        # Amounts and times are averaged instead of rates, so that longer steps have a larger weight.
        latest = (seconds, float(report.num_tokens), report.audio_sec)
        weight = max(self._SMOOTHING, 1 / max(1, self._num_measured - 1))
        mean = [weight * new + (1 - weight) * old for new, old in zip(latest, self._rates, strict=True)]
        self._rates = (mean[0], mean[1], mean[2])

    def _words(self, report: StepReport) -> list[str]:
        """Return the values to show for a step as text, the most important first."""
        assert self._stage is not None
        step_sec, num_tokens, audio_sec = self._rates
        stage, last_step = self._stage
        use = f"{audio_sec / step_sec:.0f}x real time" if report.mfu is None else f"MFU {report.mfu:.1%}"
        return [
            f"{duration((last_step - report.step) * step_sec)} left{f' in {stage}' if stage else ''}",
            f"loss {number(report.loss)}",
            f"lr {report.lr:.2g}",
            f"grad {number(report.grad_norm)}",
            f"{num_tokens / step_sec:,.0f} tok/s",
            use,
            *([f"{report.memory_bytes / 2**30:.1f} GiB"] if report.memory_bytes else []),
        ]


def fitting(words: Sequence[str], columns: int) -> str:
    """Join as many of the first `words` as fit into a number of columns. The first word is always included."""
    text = words[0]
    for word in words[1:]:
        if len(text) + 2 + len(word) > columns:
            break
        text += f"  {word}"
    return text


def number(value: float) -> str:
    """Format a loss or norm in few characters, such as `3.214`, `41.2`, `1.2e+07` or `nan`."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e4 or 0 < size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3f}" if size < 10 else f"{value:.1f}"
