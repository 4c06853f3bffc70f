"""The reports of steps and evaluations, their conversion to metrics, and the timer of a step's phases."""

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
from trainer.telemetry.token_load import TokenLoad, add_up, token_metrics

T = TypeVar("T")


@dataclass(frozen=True)
class StepReport:
    """The report of one step on a global batch. Its numbers are sums or means over all ranks."""

    step: int
    """The number of completed steps, including this one. It is 1 in the first report of a run."""
    loss: float
    """The loss that is minimized, a weighted sum of `losses`."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """The mean of each term of the loss, by the name of the loss."""
    task_losses: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """The sum of the token losses and the number of target tokens, by task."""
    grad_norm: float = 0.0
    """The global gradient norm of both engines, before clipping."""
    lr: float = 0.0
    """The learning rate of the parameters without their own learning rate in `optim.parts`."""
    stage: int | None = None
    """The index of the stage of training, counted from 0; None in a run without stages."""
    ran_llm: bool = True
    """Whether the stage of training runs the LLM."""
    num_samples: int = 0
    num_tokens: int = 0
    """The number of LLM positions, including audio tokens; 0 if the LLM was not run."""
    audio_sec: float = 0.0
    """The duration of all audio, in seconds."""
    phase_sec: Mapping[str, float] = field(default_factory=dict)
    """The wall time of each phase (load, plan, encode, exchange, llm, backward, update, ...), without nested phases."""
    num_skipped: Mapping[str, int] = field(default_factory=dict)
    """The number of samples skipped since the run began, by reason."""
    skip_reason: str | None = None
    """The reason why this step's update was skipped; None if it was applied."""
    num_skipped_updates: int = 0
    """The number of updates skipped since the run began."""
    load: LoadInterval | None = None
    """The load of the encoders in the logging interval that ends with this step.

    It is None if no interval ends with this step, and on ranks other than 0.
    """
    token_load: TokenLoad | None = None
    """The load of the LLM's FFN experts in the same interval; None if `load` is None or the LLM has no FFN experts."""
    ranks: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the ranks' work in the logging interval that ends with this step; empty if `load` is None."""
    plan: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the comparison with the run's plan; empty if there is no plan or no interval ends with this step."""
    epochs: Mapping[str, float] = field(default_factory=dict)
    """The number of epochs of each dataset that have been read since the run began, by the dataset's name. It may be
    fractional."""

    signals: Mapping[str, int] = field(default_factory=dict)
    """Name of a signal → the number of ranks that have received it and must stop; empty if there are none."""
    mfu: float | None = None
    """The model FLOPs utilization, from 0 to 1; None on CPUs, on unknown devices, and on ranks other than 0."""
    memory_bytes: int = 0
    """The peak memory so far of rank 0's device, or of its process on a CPU; 0 on other ranks."""

    @property
    def seconds(self) -> float:
        """The wall time of the step, which is the sum of its phases."""
        return sum(self.phase_sec.values())


@dataclass(frozen=True)
class EvalReport:
    """The report of an evaluation of one split."""

    step: int
    """The number of completed steps before the evaluation."""
    split: str
    values: Mapping[str, float]
    """Scores by their name in `trainer.scoring.scores.score_values`, for example `asr/wer` or `asr/digits/wer`."""
    num_samples: int = 0
    seconds: float = 0.0
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The bounds of the 95 % confidence intervals, for each of `values` that has one."""


def is_logged(step: int, every_steps: int) -> bool:
    """Return whether a logging interval ends with `step`. Step 1 is logged separately to show the initial loss."""
    return step % every_steps == 0 or step == 1


def flatten(reports: Sequence[StepReport]) -> dict[str, float]:
    """Return the metrics of one or several consecutive steps, by name.

    Losses, the gradient norm and times are means over the steps. The loss of a task is the mean over its tokens in all
    steps, and routing metrics are means over all clips. Rates are totals divided by the total time. The learning rate
    and the number of skipped samples and updates are taken from the last step. Steps whose update was skipped count in
    the losses and the norm only if the updates of all steps were skipped.

    Args:
        reports: The reports of the steps, at least one.
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
    token_loads = [r.token_load for r in reports if r.token_load is not None]
    if token_loads:
        metrics |= token_metrics(add_up(token_loads))
    for phase, values in _collect(r.phase_sec for r in reports).items():
        metrics[f"time/{phase}_sec"] = sum(values) / num
    seconds = sum(r.seconds for r in reports)
    metrics["time/step_sec"] = seconds / num
    if seconds > 0:
        metrics["throughput/tokens_per_sec"] = sum(r.num_tokens for r in reports) / seconds
        metrics["throughput/audio_sec_per_sec"] = sum(r.audio_sec for r in reports) / seconds
        metrics["throughput/samples_per_sec"] = sum(r.num_samples for r in reports) / seconds
    used = [r.mfu for r in reports if r.mfu is not None]
    if used:
        metrics["throughput/mfu"] = sum(used) / len(used)
    if last.memory_bytes:
        metrics["memory/rank0_peak_bytes"] = last.memory_bytes
    for report in reports:
        metrics |= {**report.ranks, **report.plan}
    for name, epochs in last.epochs.items():
        metrics[f"data/epochs/{name}"] = epochs
    for reason, count in last.num_skipped.items():
        metrics[f"data/skipped/{reason}"] = count
    if last.stage is not None:
        metrics["train/stage"] = last.stage + 1
    return metrics


def flatten_eval(report: EvalReport) -> dict[str, float]:
    """Return the metrics of an evaluation by name.

    The bounds of the interval of `eval/test/asr/wer` are `eval/test/asr/wer/low` and `eval/test/asr/wer/high`.
    """
    metrics = {f"eval/{report.split}/{name}": value for name, value in report.values.items()}
    for name, (low, high) in report.intervals.items():
        metrics |= {f"eval/{report.split}/{name}/low": low, f"eval/{report.split}/{name}/high": high}
    metrics[f"eval/{report.split}/num_samples"] = report.num_samples
    metrics[f"eval/{report.split}/seconds"] = report.seconds
    return metrics


class PhaseListener(Protocol):
    """The interface of observers of the phases that a `PhaseTimer` measures."""

    def on_phase_begin(self, phase: str, outermost: bool) -> None:
        """Handle the beginning of a phase, before its time starts to count.

        Args:
            phase: The name of the phase.
            outermost: Whether no other phase is open.
        """

    def on_phase_end(self, phase: str, start_sec: float, end_sec: float) -> None:
        """Handle the end of a phase.

        Args:
            phase: The name of the phase.
            start_sec: The time at which the phase began, in seconds of `time.perf_counter`.
            end_sec: The time at which the phase ended. The time in between includes nested phases.
        """


class PhaseTimer:
    """A timer that divides a step's wall time into phases.

    A nested phase pauses the outer one, so that no time counts twice.

    Example:
        with timer("encode"):
            ...

    Args:
        synchronise: A function that waits for the device. While there is a listener, it is called at the start and the
            end of each phase, so that the time of asynchronous work is assigned to the phase that launched it. The work
            then no longer overlaps with other phases. Without a listener, its time is assigned to the phase in which
            the host next waits for the device. If it is None, only time on the host is measured.
    """

    def __init__(self, synchronise: Callable[[], None] | None = None) -> None:
        self.listener: PhaseListener | None = None
        self.marker: Callable[[str | None], None] | None = None
        """A function that is called when the innermost open phase changes, with its name or None. It must not wait."""
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
        self._mark(phase)
        start_sec = self._mark_sec
        try:
            yield
        finally:
            self._lap()
            self._open.pop()
            self._mark(self.current)
            if self.listener is not None:
                self.listener.on_phase_end(phase, start_sec, self._mark_sec)

    @property
    def current(self) -> str | None:
        """The innermost open phase; None if there is none. Other threads may read it."""
        opened = self._open[-1:]
        return opened[0] if opened else None

    def take(self) -> dict[str, float]:
        """Return the seconds spent in each phase since the last call, and reset them. No phase may be open."""
        assert not self._open, f"phase {self._open[-1]} is still open"
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    def _mark(self, phase: str | None) -> None:
        if self.marker is not None:
            self.marker(phase)

    def _lap(self) -> None:
        if self._synchronise is not None and self.listener is not None:
            self._synchronise()
        now_sec = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now_sec - self._mark_sec
        self._mark_sec = now_sec


def peak_memory_bytes() -> dict[str, int]:
    """Return this process's peak memory: `host` (resident) and, if CUDA is in use, `device` (allocated by torch)."""
    peak = {"host": _peak_host_bytes()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["device"] = torch.cuda.max_memory_allocated()
    return peak


def _peak_host_bytes() -> int:
    # getrusage is not used, because its maximum is inherited from the parent process.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM line: Linux is required")


def _collect(mappings: Iterable[Mapping[str, T]]) -> dict[str, list[T]]:
    """Return the values of each key in all mappings that have it. Keys are in order of appearance."""
    collected: dict[str, list[T]] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            collected.setdefault(key, []).append(value)
    return collected
