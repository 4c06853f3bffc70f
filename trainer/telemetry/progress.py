"""The progress of a run on the terminal."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

from trainer.telemetry.metrics import StepReport


class Progress:
    """A progress bar if the output is a terminal, otherwise one plain line per `every_steps` steps.

    Both show the loss, tokens per second, audio seconds per second (x real time) and the remaining time. Rates are
    moving averages over the last steps.

    Args:
        num_steps: The number of steps of the whole run.
        start_step: The number of steps done before this process began.
        every_steps: The number of steps per plain line.
        name: The name of the run, with which each line begins.
        stream: The output; None for stderr.
    """

    _SMOOTHING = 0.1

    def __init__(
        self, num_steps: int, start_step: int = 0, every_steps: int = 1, *, name: str = "", stream: TextIO | None = None
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._num_steps, self._start_step, self._every_steps = num_steps, start_step, every_steps
        self._name = name
        self._mark_sec = time.perf_counter()
        self._rates: tuple[float, float, float] | None = None  # The rates of steps, tokens and audio seconds.
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=num_steps,
                initial=start_step,
                desc=name or None,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}",
            )

    def update(self, report: StepReport) -> None:
        """Show one more step."""
        self._measure(report)
        text = self._describe(report)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(report.step - self._bar.n)
        elif report.step % self._every_steps == 0 or report.step in (self._start_step + 1, self._num_steps):
            head = f"{self._name} " if self._name else ""
            self._print(f"{head}step {report.step}/{self._num_steps}  {text}")

    def write(self, line: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            self._print(line)

    def skip_time(self) -> None:
        """Exclude the time since the last step, for example that of an evaluation, from the rates."""
        self._mark_sec = time.perf_counter()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def _measure(self, report: StepReport) -> None:
        now_sec = time.perf_counter()
        seconds = max(now_sec - self._mark_sec, 1e-9)
        self._mark_sec = now_sec
        # Amounts and times are averaged instead of rates, so that larger steps have a larger weight.
        latest = (seconds, float(report.num_tokens), report.audio_sec)
        if self._rates is None:
            self._rates = latest
        else:
            a = self._SMOOTHING
            self._rates = tuple(a * x + (1 - a) * y for x, y in zip(latest, self._rates, strict=True))  # type: ignore[assignment]

    def _describe(self, report: StepReport) -> str:
        assert self._rates is not None
        step_sec, num_tokens, audio_sec = self._rates
        left = _duration((self._num_steps - report.step) * step_sec)
        rates = f"{num_tokens / step_sec:,.0f} tok/s  {audio_sec / step_sec:.0f}x real time"
        return f"loss {report.loss:.3f}  {rates}  {left} left"


def _duration(seconds: float) -> str:
    minutes, sec = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{sec:02d}" if hours else f"{minutes}:{sec:02d}"
