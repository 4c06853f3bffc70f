"""What one step and one evaluation report, and the metric names they are logged under."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from trainer.telemetry.load_history import LoadInterval, interval_metrics

T = TypeVar("T")


@dataclass(frozen=True)
class StepReport:
    """One optimizer step over the whole global batch: every number is already summed or averaged over ranks."""

    step: int
    """Steps done, this one included: the first report of a run has 1."""
    loss: float
    """What was minimised: the weighted sum of `losses`."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Its terms by name: next_token, routing, ctc."""
    task_losses: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Per task: sum of the token losses, number of target tokens."""
    grad_norm: float = 0.0
    """Global norm over both engines, before clipping."""
    lr: float = 0.0
    num_samples: int = 0
    num_tokens: int = 0
    """LLM positions, audio slots included."""
    audio_sec: float = 0.0
    phase_sec: Mapping[str, float] = field(default_factory=dict)
    """Wall time by phase (load, plan, encode, exchange, llm, backward, update …), each exclusive of the others."""
    num_skipped: Mapping[str, int] = field(default_factory=dict)
    """Samples left out since the run began, by reason."""
    skip_reason: str | None = None
    """Why this step changed no weights; None: it did."""
    num_skipped_updates: int = 0
    """Steps that changed no weights since the run began."""
    load: LoadInterval | None = None
    """Where this step ends an interval: what the encoders did in it, on rank 0."""
    ranks: Mapping[str, float] = field(default_factory=dict)
    """Where this step ends an interval: how the ranks' work in it differed, by metric name, on rank 0."""
    epochs: Mapping[str, float] = field(default_factory=dict)
    """Per set: how often it has been read since the run began."""

    @property
    def seconds(self) -> float:
        """Wall time of the step: the sum of its phases."""
        return sum(self.phase_sec.values())


@dataclass(frozen=True)
class EvalReport:
    """One evaluation of one split."""

    step: int
    split: str
    values: Mapping[str, float]
    """By name without the split, as `trainer.scoring.scores.score_values` gives them: `asr/wer`, `asr/digits/wer` …"""
    num_samples: int = 0
    seconds: float = 0.0
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Bounds of the 95 % interval of those of `values` that have one."""


def is_logged(step: int, every_steps: int) -> bool:
    """Whether a record ends with `step`. The first step is one: its loss says whether the weights are sane."""
    return step % every_steps == 0 or step == 1


def flatten(reports: Sequence[StepReport]) -> dict[str, float]:
    """Metrics of one or several consecutive steps, by name.

    Losses, gradient norm and times are means over the steps; the loss of a task is over all of its tokens in them, the
    routing over all of their clips; rates are totals over the time that passed; learning rate and skips are the last
    step's. Losses and norms of steps that were left out count only where there are no others.
    """
    assert reports, "nothing to log"
    last, num = reports[-1], len(reports)
    done = [r for r in reports if r.skip_reason is None] or reports
    metrics = {"train/loss": sum(r.loss for r in done) / len(done)}
    for name, values in _collect(r.losses for r in done).items():
        metrics[f"train/loss_{name}"] = sum(values) / len(values)
    for task, pairs in _collect(r.task_losses for r in done).items():
        num_targets = sum(count for _, count in pairs)
        if num_targets:
            metrics[f"train/loss/{task}"] = sum(total for total, _ in pairs) / num_targets
    metrics["train/grad_norm"] = sum(r.grad_norm for r in done) / len(done)
    metrics["train/lr"] = last.lr
    if last.num_skipped_updates:
        metrics["train/skipped_updates"] = last.num_skipped_updates
    intervals = [r.load for r in reports if r.load is not None]
    if intervals:
        metrics |= interval_metrics(sum(intervals[1:], intervals[0]))
    for phase, values in _collect(r.phase_sec for r in reports).items():
        metrics[f"time/{phase}_sec"] = sum(values) / num
    seconds = sum(r.seconds for r in reports)
    metrics["time/step_sec"] = seconds / num
    if seconds > 0:
        metrics["throughput/tokens_per_sec"] = sum(r.num_tokens for r in reports) / seconds
        metrics["throughput/audio_sec_per_sec"] = sum(r.audio_sec for r in reports) / seconds
        metrics["throughput/samples_per_sec"] = sum(r.num_samples for r in reports) / seconds
    for report in reports:
        metrics |= report.ranks
    for name, epochs in last.epochs.items():
        metrics[f"data/epochs/{name}"] = epochs
    for reason, count in last.num_skipped.items():
        metrics[f"data/skipped/{reason}"] = count
    return metrics


def flatten_eval(report: EvalReport) -> dict[str, float]:
    """Metrics of an evaluation, by name: `eval/test/asr/wer`, its interval `eval/test/asr/wer/low` and `/high` …"""
    metrics = {f"eval/{report.split}/{name}": value for name, value in report.values.items()}
    for name, (low, high) in report.intervals.items():
        metrics |= {f"eval/{report.split}/{name}/low": low, f"eval/{report.split}/{name}/high": high}
    metrics[f"eval/{report.split}/num_samples"] = report.num_samples
    metrics[f"eval/{report.split}/seconds"] = report.seconds
    return metrics


class PhaseListener(Protocol):
    """Is told of every phase that a `PhaseTimer` times."""

    def on_phase_begin(self, phase: str, outermost: bool) -> None:
        """Before its time begins; `outermost`: no other phase is open."""

    def on_phase_end(self, phase: str, start_sec: float, end_sec: float) -> None:
        """After it, with its times by `time.perf_counter`, phases inside it included."""


class PhaseTimer:
    """Splits a step's wall time by phase: `with timer("encode"): …`.

    A phase inside another pauses the outer one, so the phases never count a moment twice. While there is a listener,
    `synchronise` is called at each border and makes asynchronous device work count for the phase that launched it. That
    costs overlap: otherwise the work counts for the phase in which the host next waits for the device.
    """

    def __init__(self, synchronise: Callable[[], None] | None = None) -> None:
        self.listener: PhaseListener | None = None
        self._synchronise = synchronise
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._mark_sec = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self.listener is not None:
            self.listener.on_phase_begin(phase, outermost=not self._open)
        self._lap()
        self._open.append(phase)
        start_sec = self._mark_sec
        try:
            yield
        finally:
            self._lap()
            self._open.pop()
            if self.listener is not None:
                self.listener.on_phase_end(phase, start_sec, self._mark_sec)

    @property
    def current(self) -> str | None:
        """The innermost open phase; another thread may ask."""
        opened = self._open[-1:]
        return opened[0] if opened else None

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; starts again from zero. Call it between phases."""
        assert not self._open, f"phase {self._open[-1]} is still open"
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    def _lap(self) -> None:
        if self._synchronise is not None and self.listener is not None:
            self._synchronise()
        now_sec = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now_sec - self._mark_sec
        self._mark_sec = now_sec


def peak_memory_bytes() -> dict[str, int]:
    """Peak of this process so far: `host` (resident) and, with CUDA in use, `device` (allocated by torch)."""
    peak = {"host": _peak_host_bytes()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["device"] = torch.cuda.max_memory_allocated()
    return peak


def _peak_host_bytes() -> int:
    # Not getrusage: its maximum is inherited from the process that started this one.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM line: Linux is required")


def _collect(mappings: Iterable[Mapping[str, T]]) -> dict[str, list[T]]:
    """Values by key over all mappings that have it, keys in order of appearance."""
    collected: dict[str, list[T]] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            collected.setdefault(key, []).append(value)
    return collected
