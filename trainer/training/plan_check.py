"""The comparison of a running job with its plan: the times of a step and of its phases, and the peak memory."""

from __future__ import annotations

import logging
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from model.errors import UserError
from trainer.config.schema import Recipe
from trainer.engine.clock import DeviceClock, Moment
from trainer.plan.forecast import ENCODERS, LLM, UPDATE, Forecast, read_forecast
from trainer.plan.report import duration_text, range_text
from trainer.telemetry.events import Emit
from trainer.telemetry.metrics import PhaseTimer, StepReport
from trainer.telemetry.origin import PLAN_JSON_NAME, plan_json_name

log = logging.getLogger(__name__)

WARM_UP_STEPS = 5
"""The number of steps at the start of a process that are not compared."""
WINDOW_STEPS = 15
"""The number of steps after the warm-up over which times are compared with the plan."""
_LEAST_STEPS = 3
"""The smallest number of steps that are compared if the run ends before the window is full."""
MEMORY_TOLERANCE = 0.15
"""The largest relative difference at which the measured peak memory still counts as planned."""
_WORKLOAD_TOLERANCE = 0.1
_GIB = 2**30
LOAD, OTHER = "loading", "other"
_PARTS = {"encode": ENCODERS, "exchange": ENCODERS, "backward": ENCODERS, "llm": LLM, "update": UPDATE, "load": LOAD}
"""The part of the plan that covers each phase. Other phases, such as reports, are not planned."""
_PLACES = {ENCODERS: "the encoders", LLM: "the LLM", UPDATE: "the update", OTHER: "other phases"}
"""The names of parts in a sentence, where these differ from the parts' own names."""


class PlanCheck:
    """A comparison of the steps of this process with a plan. Only rank 0 has one.

    The times of phases are measured on the device. On GPUs, an event is recorded at the start and the end of each
    phase. The events of a step are read after the next step, because the host has waited for them by then. Therefore,
    reading them does not add a synchronization.

    Args:
        forecast: The predictions of the plan.
        timer: The timer of the phases of a step.
        clock: The clock of the device.
        emit: The function that is called for the event `plan_checked`.
        last_step: The last step of the run.
    """

    def __init__(self, forecast: Forecast, timer: PhaseTimer, clock: DeviceClock, emit: Emit, last_step: int) -> None:
        self._forecast, self._clock, self._emit, self._last_step = forecast, clock, emit, last_step
        self._marks: list[tuple[str | None, Moment]] = []
        self._unread: list[tuple[str | None, Moment]] = []
        self._steps: list[StepReport] = []
        self._parts: list[dict[str, float]] = []
        self._peak_bytes: int | None = None
        self._num_seen, self._is_done = 0, False
        timer.marker = self._mark

    def _mark(self, phase: str | None) -> None:
        self._marks.append((phase, self._clock.now()))

    def add(self, report: StepReport) -> StepReport:
        """Add a step. If a logging interval ends with it, return its report with the metrics of the comparison.

        The first `WARM_UP_STEPS` steps are ignored. After `WINDOW_STEPS` further steps, or at the end of the run, the
        event `plan_checked` reports how the run differs from the plan. Steps that do not run the LLM are not compared,
        because the plan is that of a step with all parts.
        """
        unread, self._unread, self._marks = self._unread, self._marks, []
        self._peak_bytes = int(report.ranks.get("memory/max_peak_bytes", 0)) or self._peak_bytes
        if not report.ran_llm:
            self._num_seen = 0  # The warm-up begins with the first step that runs the LLM.
            return report
        self._num_seen += 1
        if self._num_seen > WARM_UP_STEPS + 1:  # The marks belong to the previous step.
            self._parts.append(self._seconds(unread))
        if self._num_seen > WARM_UP_STEPS:
            self._steps.append(report)
        ends = len(self._steps) >= WINDOW_STEPS or report.step == self._last_step
        if not self._is_done and ends and len(self._steps) >= _LEAST_STEPS:
            self._is_done = True
            text, planned, details = compare(self._forecast, self._steps, self._parts, self._peak_bytes)
            self._emit("plan_checked", report.step, {"why": text, "as_planned": planned, "compared": details})
        if not report.ranks or not self._steps:
            return report
        metrics = metrics_of(self._forecast, self._steps, self._parts, self._peak_bytes)
        if self._is_done:
            self._steps, self._parts = [], []
        return replace(report, plan=metrics)

    def _seconds(self, marks: Sequence[tuple[str | None, Moment]]) -> dict[str, float]:
        """Return the seconds that a step with these marks spent in each part of the plan."""
        found: defaultdict[str, float] = defaultdict(float)
        for (phase, begin), (_, end) in zip(marks, marks[1:], strict=False):
            if phase is not None:
                found[_PARTS.get(phase, OTHER)] += self._clock.seconds((begin, end))
        return dict(found)


def plan_check_of(
    recipe: Recipe, run_dir: Path, timer: PhaseTimer, device: torch.device, emit: Emit
) -> PlanCheck | None:
    """Return the comparison of a run with the plan in its folder; None if the folder contains no plan of this run.

    Args:
        recipe: The recipe of the run.
        run_dir: The run's folder.
        timer: The timer of the phases of a step.
        device: The device of this rank.
        emit: The function that is called for the event `plan_checked`.
    """
    try:
        forecast = _stored(run_dir, recipe)
    except UserError as error:
        log.warning("THE RUN IS NOT COMPARED WITH ITS PLAN: %s", error)
        return None
    return None if forecast is None else PlanCheck(forecast, timer, DeviceClock(device), emit, recipe.train.steps)


def _stored(run_dir: Path, recipe: Recipe) -> Forecast | None:
    """Return the forecast of the run's plan or, after a restart with fewer ranks, of the plan for that number."""
    try:
        return read_forecast(run_dir / PLAN_JSON_NAME, recipe)
    except UserError:
        fewer = run_dir / plan_json_name(recipe.parallel.num_ranks)
        if not fewer.exists():
            raise
        return read_forecast(fewer, recipe)


def medians(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median time of each part over steps, in seconds."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: statistics.median(part.get(name, 0.0) for part in parts) for name in names}


def compare(
    forecast: Forecast, steps: Sequence[StepReport], parts: Sequence[Mapping[str, float]], peak_bytes: int | None
) -> tuple[str, bool, dict[str, object]]:
    """Compare steps with the plan.

    Args:
        forecast: The plan.
        steps: The reports of the steps.
        parts: The seconds of each part of the plan in these steps.
        peak_bytes: The peak memory of the fullest rank; None if it cannot be compared, as on a CPU.

    Returns:
        A sentence, whether time and memory are as planned, and the numbers by name.
    """
    step_sec, seconds = statistics.median(r.seconds for r in steps), medians(parts)
    planned = range_text(forecast.low_sec, forecast.high_sec)
    on_time = forecast.low_sec <= step_sec <= forecast.high_sec
    text = f"a step takes {duration_text(step_sec)}, "
    if on_time:
        text += f"as planned ({planned})"
    else:
        bound = forecast.high_sec if step_sec > forecast.high_sec else forecast.low_sec
        side = "longer" if step_sec > forecast.high_sec else "shorter"
        text += f"which is {abs(step_sec / bound - 1):.0%} {side} than the plan's range of {planned}"
        if seconds:
            # Name the part that contributes most to the difference of the whole step.
            sign = 1 if side == "longer" else -1
            name = max(seconds, key=lambda n: sign * (seconds[n] - forecast.parts_sec.get(n, 0.0)))
            other = forecast.parts_sec.get(name, 0.0)
            text += f"; the largest difference is in {_PLACES.get(name, name)}: {duration_text(seconds[name])}, "
            text += f"planned {duration_text(other)}"
    as_planned = on_time
    if peak_bytes is not None:
        ratio = peak_bytes / forecast.peak_bytes
        as_planned &= abs(ratio - 1) <= MEMORY_TOLERANCE
        text += f"; peak memory {peak_bytes / _GIB:.1f} GiB, planned {forecast.peak_bytes / _GIB:.1f} GiB"
    tokens, audio_sec = _workload_ratios(forecast, steps)
    if max(abs(tokens - 1), abs(audio_sec - 1)) > _WORKLOAD_TOLERANCE:
        text += f"; a step has {tokens:.2f} times the planned tokens and {audio_sec:.2f} times the planned audio"
    details: dict[str, object] = {
        "step_sec": round(step_sec, 6),
        "planned_sec": [round(forecast.low_sec, 6), round(forecast.high_sec, 6)],
        "parts_sec": {n: [round(s, 6), round(forecast.parts_sec.get(n, 0.0), 6)] for n, s in seconds.items()},
        "peak_bytes": peak_bytes,
        "planned_peak_bytes": forecast.peak_bytes,
        "tokens_times_planned": round(tokens, 4),
        "audio_times_planned": round(audio_sec, 4),
    }
    return text, as_planned, details


def metrics_of(
    forecast: Forecast, steps: Sequence[StepReport], parts: Sequence[Mapping[str, float]], peak_bytes: int | None
) -> dict[str, float]:
    """Return the metrics `plan/...` of the given steps. Ratios are measured values divided by planned ones."""
    step_sec = statistics.median(r.seconds for r in steps)
    tokens, audio_sec = _workload_ratios(forecast, steps)
    metrics = {
        "plan/step_sec_low": forecast.low_sec,
        "plan/step_sec_high": forecast.high_sec,
        "plan/step_times_planned": step_sec / forecast.step_sec,
        "plan/tokens_times_planned": tokens,
        "plan/audio_times_planned": audio_sec,
    }
    for name, seconds in medians(parts).items():
        planned = forecast.parts_sec.get(name, 0.0)
        if planned > 0:
            metrics[f"plan/{name.lower()}_times_planned"] = seconds / planned
    if peak_bytes is not None:
        metrics["plan/peak_memory_times_planned"] = peak_bytes / forecast.peak_bytes
    return metrics


def _workload_ratios(forecast: Forecast, steps: Sequence[StepReport]) -> tuple[float, float]:
    """Return the mean number of tokens and of seconds of audio per step, each divided by the planned number."""
    tokens = sum(r.num_tokens for r in steps) / len(steps) / max(1, forecast.tokens)
    return tokens, sum(r.audio_sec for r in steps) / len(steps) / max(1e-9, forecast.audio_sec)
