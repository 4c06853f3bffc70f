"""What happens around a step without being part of it: the terminal, the trackers, the run's summary.

Hooks live on rank 0 only and get values, never engines: a hook cannot make ranks wait for each other.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.checkpoint.layout import step_of
from trainer.scoring.scores import HEADLINES
from trainer.telemetry.events import Event, EventLog
from trainer.telemetry.jsonl import Backlog, StepLog, write_atomically
from trainer.telemetry.load_history import HISTORY_NAME
from trainer.telemetry.metrics import EvalReport, StepReport, flatten, flatten_eval, is_logged
from trainer.telemetry.progress import Progress
from trainer.telemetry.tracker import Tracker


@dataclass(frozen=True)
class RunState:
    """What a run knows of itself when its first step is about to begin."""

    name: str
    run_dir: Path
    """Folder of this run: `<train.run_dir>/<name>`."""
    num_steps: int
    num_ranks: int
    start_step: int = 0
    """Steps already done: 0, or the step of the checkpoint that the run resumes from."""


class Hook(Protocol):
    """Called by the training loop, in the order in which hooks were given; exceptions end the run."""

    def on_start(self, state: RunState) -> None:
        """Before the first step."""

    def on_step(self, report: StepReport) -> None:
        """After every optimizer step."""

    def on_eval(self, report: EvalReport) -> None:
        """After every evaluation, one call per split."""

    def on_save(self, url: str) -> None:
        """After a checkpoint is committed."""

    def on_event(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        """When one of `trainer.telemetry.events.EVENTS` happens in the loop; `step`: the last one that was begun."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Once, after the last step: also when a signal ended the run, not when an exception did.

        `summary`: what only the trainer knows, e.g. `peak_memory_bytes` (one mapping per rank), `wer_before`.
        """


class ProgressHook:
    """Progress bar or plain lines, with evaluations and checkpoints announced between them."""

    _UNTOLD = ("resumed", "finished", "stopped")
    """Events that the terminal shows in other words."""
    _HIDDEN_FIELDS = ("samples", "why", "slow_rank", "slow_host", "times_median")

    def __init__(self, every_steps: int = 1) -> None:
        self._every_steps = every_steps
        self._progress: Progress | None = None

    def on_start(self, state: RunState) -> None:
        self._progress = Progress(state.num_steps, state.start_step, self._every_steps, name=state.name)
        if state.start_step:
            self._progress.write(f"resuming at step {state.start_step}")

    def on_step(self, report: StepReport) -> None:
        assert self._progress is not None
        self._progress.update(report)

    def on_eval(self, report: EvalReport) -> None:
        assert self._progress is not None
        # Overall scores only: names of subsets have one more part.
        shown = [name for name in report.values if name.count("/") == 1 and name.split("/")[1] in HEADLINES]
        scores = "  ".join(_with_interval(name, report) for name in shown)
        self._progress.write(f"step {report.step}: {report.split} ({report.num_samples} samples)  {scores}")
        self._progress.skip_time()

    def on_save(self, url: str) -> None:
        assert self._progress is not None
        self._progress.write(f"saved {url}")
        self._progress.skip_time()

    def on_event(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        assert self._progress is not None
        if event not in self._UNTOLD:
            fields = {key: value for key, value in fields.items() if key not in self._HIDDEN_FIELDS}
            words = [str(fields["why"])] if "why" in fields else []
            words += [f"{key} {value}" for key, value in fields.items()]
            self._progress.write(f"step {step}: {event.replace('_', ' ')}: {', '.join(words)}")

    def on_end(self, summary: Mapping[str, Any]) -> None:
        assert self._progress is not None
        self._progress.close()


class TrackerHook:
    """Gives the tracker one record per `every_steps` steps (and one for the steps left over), and every evaluation."""

    def __init__(self, tracker: Tracker, every_steps: int = 1) -> None:
        self._tracker, self._every_steps = tracker, every_steps
        self._pending: list[StepReport] = []

    def on_start(self, state: RunState) -> None:
        pass

    def on_step(self, report: StepReport) -> None:
        self._pending.append(report)
        if is_logged(report.step, self._every_steps):
            self._flush()

    def on_eval(self, report: EvalReport) -> None:
        self._tracker.log(flatten_eval(report), report.step)

    def on_save(self, url: str) -> None:
        pass

    def on_event(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        pass

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._flush()
        self._tracker.close()

    def _flush(self) -> None:
        if self._pending:
            self._tracker.log(flatten(self._pending), self._pending[-1].step)
            self._pending.clear()


class LoadHook:
    """Keeps what the encoders did: one line of `expert_load.jsonl` in the run's folder per interval.

    What a full disk has not taken when the run ends raises OSError: a history with holes would be profiled as if it
    were whole.
    """

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        self._log = StepLog(run_dir / HISTORY_NAME, resume_step)
        self._intervals: Backlog[Mapping[str, Any]] = Backlog(self._log.append, self._log.path)

    def on_start(self, state: RunState) -> None:
        pass

    def on_step(self, report: StepReport) -> None:
        if report.load is not None:
            self._intervals.add(report.load.to_json())

    def on_eval(self, report: EvalReport) -> None:
        pass

    def on_save(self, url: str) -> None:
        pass

    def on_event(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        pass

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._intervals.flush()
        self._log.close()


class EventHook:
    """Leaves what happens in the run's `events.jsonl`. What a full disk has not taken at the end raises OSError."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._events: Backlog[Event] = Backlog(log.append, log.path)

    def on_start(self, state: RunState) -> None:
        if state.start_step:
            self._add("resumed", state.start_step, checkpoint=f"step-{state.start_step:08d}")

    def on_step(self, report: StepReport) -> None:
        pass

    def on_eval(self, report: EvalReport) -> None:
        pass

    def on_save(self, url: str) -> None:
        name = url.rpartition("/")[2]
        self._add("saved", step_of(name), checkpoint=name)

    def on_event(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        self._add(event, step, **fields)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._events.flush()

    def _add(self, event: str, step: int | None, **fields: Any) -> None:
        self._events.add(self._log.record(event, step, **fields))


class SummaryHook:
    """Writes `summary.json` into the run's folder at the end.

    Keys: name, num_ranks, num_steps, start_step, seconds (this process, from first step to end), loss_first (of step 1,
    kept across resumes) and loss_last, step_sec and phase_sec (means over this process's steps, the first one left out
    where there are others: it warms up), scores per split (the last evaluation's), num_records_lost; then everything
    that the trainer hands over, which wins.
    """

    def __init__(self, tracker: Tracker | None = None) -> None:
        self._tracker = tracker
        self._state: RunState | None = None
        self._start_sec = 0.0
        self._loss_first: float | None = None
        self._loss_last: float | None = None
        self._last_step = 0
        self._first_phases: dict[str, float] = {}
        self._phases: defaultdict[str, float] = defaultdict(float)
        self._num_timed = 0
        self._scores: dict[str, dict[str, float]] = {}

    def on_start(self, state: RunState) -> None:
        self._state, self._last_step = state, state.start_step
        self._start_sec = time.perf_counter()
        if state.start_step:
            self._loss_first = _first_logged_loss(state.run_dir / "metrics.jsonl")

    def on_step(self, report: StepReport) -> None:
        if self._loss_first is None and report.skip_reason is None:
            self._loss_first = report.loss
        if not self._first_phases:
            self._first_phases = dict(report.phase_sec)
        else:
            self._num_timed += 1
            for phase, seconds in report.phase_sec.items():
                self._phases[phase] += seconds
        if report.skip_reason is None:
            self._loss_last = report.loss
        self._last_step = report.step

    def on_eval(self, report: EvalReport) -> None:
        self._scores[report.split] = dict(report.values)

    def on_save(self, url: str) -> None:
        pass

    def on_event(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        pass

    def on_end(self, summary: Mapping[str, Any]) -> None:
        state = self._state
        assert state is not None, "on_end without on_start"
        means = {phase: total / self._num_timed for phase, total in self._phases.items()} or self._first_phases
        content = {
            "name": state.name,
            "num_ranks": state.num_ranks,
            "num_steps": self._last_step,
            "start_step": state.start_step,
            "seconds": round(time.perf_counter() - self._start_sec, 3),
            "loss_first": self._loss_first,
            "loss_last": self._loss_last,
            "step_sec": sum(means.values()),
            "phase_sec": means,
            "scores": self._scores,
            "num_records_lost": 0 if self._tracker is None else self._tracker.num_lost,
            **summary,
        }
        state.run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(state.run_dir / "summary.json", json.dumps(content, indent=2) + "\n")


def _with_interval(name: str, report: EvalReport) -> str:
    bounds = report.intervals.get(name)
    return f"{name} {report.values[name]:.3f}" + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")


def _first_logged_loss(metrics: Path) -> float | None:
    """`train/loss` of the file's first training record (step 1's own); None where the file does not exist."""
    if not metrics.exists():
        return None
    with metrics.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if "train/loss" in record:
                return float(record["train/loss"])
    return None
