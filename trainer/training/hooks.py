"""The hooks that every training run has: for the terminal, the trackers, the histories, the events and the summary."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoint.layout import step_of
from trainer.scoring.tasks import TASKS
from trainer.telemetry.events import Event, EventLog
from trainer.telemetry.hook import Hook, RunState
from trainer.telemetry.jsonl import Backlog, StepLog, undamaged_records, write_atomically
from trainer.telemetry.load_history import HISTORY_NAME
from trainer.telemetry.metrics import EvalReport, StepReport, flatten, flatten_eval, is_logged
from trainer.telemetry.progress import Progress
from trainer.telemetry.token_history import HISTORY_NAME as TOKEN_HISTORY_NAME
from trainer.telemetry.token_history import TokenHistory
from trainer.telemetry.trackers.base import Tracker


class ProgressHook(Hook):
    """A hook that shows progress on the terminal, with a line for each evaluation, checkpoint and event."""

    _SHOWN_OTHERWISE = ("resumed", "finished", "stopped")
    """Events that are not printed, because other lines on the terminal already report them."""
    _HIDDEN_FIELDS = ("samples", "why", "slow_rank", "slow_host", "times_median", "history", "as_planned", "compared")

    def __init__(self, every_steps: int = 1) -> None:
        self._every_steps = every_steps
        self._progress: Progress | None = None

    def on_start(self, state: RunState) -> None:
        self._progress = Progress(
            state.num_steps, state.start_step, self._every_steps, name=state.name, stage_ends=state.stage_ends
        )
        if state.start_step:
            self._progress.write(f"resuming at step {state.start_step}")

    def on_step(self, report: StepReport) -> None:
        assert self._progress is not None
        self._progress.update(report)

    def on_eval(self, report: EvalReport) -> None:
        assert self._progress is not None
        headlines = {f"{task.name}/{metric}" for task in TASKS.values() for metric in task.headlines}
        shown = [name for name in report.values if name in headlines]
        scores = "  ".join(_with_interval(name, report) for name in shown)
        self._progress.write(f"step {report.step}: {report.split} ({report.num_samples} samples)  {scores}")
        self._progress.skip_time()

    def on_save(self, url: str) -> None:
        assert self._progress is not None
        self._progress.write(f"saved {url}")
        self._progress.skip_time()

    def on_event(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        assert self._progress is not None
        if event not in self._SHOWN_OTHERWISE:
            words = [str(fields["why"])] if "why" in fields else []
            words += [f"{key} {value}" for key, value in fields.items() if key not in self._HIDDEN_FIELDS]
            text = f"step {step}: {event.replace('_', ' ')}"
            self._progress.write(f"{text}: {', '.join(words)}" if words else text)
            for past, loss, norm in fields.get("history", ()):
                self._progress.write(f"  step {past:<8} loss {loss:<10} grad norm {norm}")

    def on_end(self, summary: Mapping[str, Any]) -> None:
        assert self._progress is not None
        self._progress.close()


class TrackerHook(Hook):
    """A hook that logs a record to a tracker every `every_steps` steps, at the end of the run, and per evaluation."""

    def __init__(self, tracker: Tracker, every_steps: int = 1) -> None:
        self._tracker, self._every_steps = tracker, every_steps
        self._pending: list[StepReport] = []

    def on_step(self, report: StepReport) -> None:
        self._pending.append(report)
        if is_logged(report.step, self._every_steps):
            self._flush()

    def on_eval(self, report: EvalReport) -> None:
        self._tracker.log(flatten_eval(report), report.step)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._flush()
        self._tracker.close()

    def _flush(self) -> None:
        if self._pending:
            self._tracker.log(flatten(self._pending), self._pending[-1].step)
            self._pending.clear()


class LoadHook(Hook):
    """A hook that writes the load of the encoders to `expert_load.jsonl`, one line per logging interval.

    If the LLM has FFN experts, their load is written to `token_load.jsonl`.

    `on_end` raises OSError if lines could not be written, for example because the disk is full. Otherwise, `earshot
    profile` would treat a history with missing lines as complete.
    """

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        self._log = StepLog(run_dir / HISTORY_NAME, resume_step)
        self._intervals: Backlog[Mapping[str, Any]] = Backlog(self._log.append, self._log.path)
        self._token_path, self._resume_step = run_dir / TOKEN_HISTORY_NAME, resume_step
        self._token_log: TokenHistory | None = None
        self._token_loads: Backlog[Mapping[str, Any]] | None = None

    def on_step(self, report: StepReport) -> None:
        if report.load is not None:
            self._intervals.add(report.load.to_json())
        if report.token_load is not None:
            if self._token_loads is None:
                self._token_log = TokenHistory(self._token_path, self._resume_step)
                self._token_loads = Backlog(self._token_log.append, self._token_path)
            self._token_loads.add(report.token_load.to_json())

    def on_save(self, url: str) -> None:
        if self._token_log is not None:
            self._token_log.saved_step = step_of(url.rpartition("/")[2]) or 0

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._intervals.flush()
        self._log.close()
        if self._token_loads is not None and self._token_log is not None:
            self._token_loads.flush()
            self._token_log.close()


class EventHook(Hook):
    """A hook that writes the run's events to `events.jsonl`.

    `on_end` raises OSError if events could not be written, for example because the disk is full.
    """

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._events: Backlog[Event] = Backlog(log.append, log.path)

    def on_start(self, state: RunState) -> None:
        if state.start_step:
            self._add("resumed", state.start_step, checkpoint=f"step-{state.start_step:08d}")

    def on_save(self, url: str) -> None:
        name = url.rpartition("/")[2]
        self._add("saved", step_of(name), checkpoint=name)

    def on_event(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        self._add(event, step, **fields)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._events.flush()

    def _add(self, event: str, step: int | None, **fields: Any) -> None:
        self._events.add(self._log.record(event, step, **fields))


class SummaryHook(Hook):
    """A hook that writes `summary.json` to the run's folder when the run ends.

    In addition to everything in the summary that is passed to `on_end`, the file contains these keys:
        name, num_ranks, start_step: The fields of `RunState` with these names.
        num_steps: The number of steps done, including those of earlier processes.
        seconds: The time from the first step of this process to its end.
        loss_first, loss_last: The losses of the first and the last step of the whole run, including the steps before a
            resume. Steps whose update was skipped do not count.
        step_sec, phase_sec: The mean times of a step and of each phase of a step in this process. The first step counts
            only if there is no other, because it includes warm-up.
        scores: The scores of the last evaluation of each split.
        num_records_lost: The number of records that the tracker could not store.
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
    """Return `train/loss` from the first training record in the file, or None if the file contains no such record."""
    losses = (record.get("train/loss") for record in undamaged_records(metrics))
    return next((float(loss) for loss in losses if isinstance(loss, int | float)), None)
