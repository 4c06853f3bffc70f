"""The status of runs, read from the files in their folders or from their checkpoints in a bucket."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.job.slurm import job_state_now
from trainer.telemetry.events import EVENTS_NAME, Event, num_attempts, read_events
from trainer.telemetry.jsonl import read_metrics

_STATES = {
    "submitted": "waiting",
    "started": "running",
    "resumed": "running",
    "stopped": "waiting",
    "requeued": "waiting",
    "refused": "failed",
    "cancelled": "cancelled",
    "peer_lost": "failed",
    "hang": "failed",
    "failed": "failed",
    "diverged": "failed",
    "finished": "finished",
}
"""The state of a run after each event that changes the state."""
STATES = (*dict.fromkeys(_STATES.values()), "stored")
"""All states of a run."""
_FINAL = {"finished": ("submitted", "started"), "cancelled": ("submitted", "started", "finished")}
"""The events that change a final state. Other events, such as `stopped` after `cancelled`, do not change it."""
_NUM_EVENTS = 8
_METRICS_NAME = "metrics.jsonl"
_DEPTH = 3
"""The number of levels of subfolders that are searched for runs."""


@dataclass(frozen=True)
class Status:
    """The status of a run."""

    name: str
    state: str
    """`running`, `waiting`, `failed`, `cancelled` or `finished`; `stored` if only its checkpoints are known."""
    since_sec: float
    """The seconds since the event that caused this state."""
    step: int
    """The number of finished steps."""
    num_steps: int | None
    """The number of steps of the whole run; None if the number is not known."""
    stage: str | None
    """The latest stage of training, such as `adapters (2 of 3)`; None in a run without stages."""
    num_ranks: int | None
    """The number of ranks; None if the number is not known."""
    left_sec: float | None
    """The expected seconds until the last step; None if the run is not running, or its speed is not known."""
    silent_sec: float | None
    """The seconds since the last event or logged step of a running attempt; None if the run is not running."""
    attempts: int
    """The number of attempts that started."""
    goodput: float | None
    """The fraction of the time since the first start that was spent on steps whose updates are in the weights; None if
    it is not known."""
    losses: list[float]
    """The mean loss of each logging interval, without steps that a restart repeated."""
    num_skipped_updates: int
    """The number of steps whose updates are not in the weights, because they were skipped or undone by a rewind."""
    num_samples_skipped: int
    """The number of samples that could not be used."""
    straggler: dict[str, Any] | None
    """The last straggler event of the latest attempt; None if there is none."""
    events: list[dict[str, Any]]
    """The last events."""
    plan: dict[str, Any] | None = None
    """The last comparison of the latest attempt with the run's plan (`trainer.training.plan_check.compare`); None if
    there is none."""
    scores: dict[str, float] = field(default_factory=dict)
    """The main scores of the last evaluation of each split, by `SPLIT/TASK/METRIC`."""
    host: str | None = None
    """The host of rank 0; None if the host is not known."""
    event_counts: dict[str, int] = field(default_factory=dict)
    """The number of events of each kind."""
    latest: dict[str, float] = field(default_factory=dict)
    """The latest values of `lr`, `grad_norm`, `tokens_per_sec`, `audio_sec_per_sec`, `mfu` and `peak_bytes`. Values
    that are not logged are missing."""


_LATEST = {
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens_per_sec": "throughput/tokens_per_sec",
    "audio_sec_per_sec": "throughput/audio_sec_per_sec",
    "mfu": "throughput/mfu",
    "peak_bytes": "memory/rank0_peak_bytes",
}


def is_run(folder: Path) -> bool:
    """Return whether a folder is the folder of a run."""
    return (folder / EVENTS_NAME).is_file() or (folder / _METRICS_NAME).is_file()


def find_runs(folder: Path) -> list[Path]:
    """Return the folders of all runs below `folder`, in alphabetical order.

    Raises:
        UserError: If there is none.
    """
    found = []
    for place, folders, files in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        if EVENTS_NAME in files or _METRICS_NAME in files:
            found.append(Path(place))
            folders.clear()
        elif depth >= _DEPTH:
            folders.clear()
    if not found:
        raise UserError(f"{folder}: contains no run; use the folder of a run or a folder of runs, e.g. runs")
    return sorted(found)


def read_status(run_dir: Path, now_sec: float) -> Status:
    """Read the status of a run from its folder.

    Args:
        run_dir: The run folder.
        now_sec: The current time in seconds since the epoch.

    Raises:
        UserError: If the folder contains no run, or a file is damaged.
    """
    events = read_events(run_dir)
    everything = list(read_metrics(run_dir / _METRICS_NAME))
    records = [record for record in everything if "train/loss" in record]
    if not events and not records:
        raise UserError(f"{run_dir}: contains no run; use the folder that contains events.jsonl, e.g. runs/demo")
    started = [e for e in events if e["event"] == "started"]
    state, state_event = _state(events)
    step = records[-1]["step"] if records else 0
    last = started[-1] if started else {}
    num_steps = last.get("num_steps")
    undone = undone_steps(events, step)
    end_sec = now_sec if state == "running" else max([e["time"] for e in events], default=now_sec)
    step_sec = _recent_step_sec(records)
    signs = [e["time"] for e in events] + [r["time"] for r in records[-1:] if isinstance(r.get("time"), int | float)]
    left_sec = (num_steps - step) * step_sec if state == "running" and num_steps and step_sec else None
    of_attempt = [e for e in events if e["attempt"] == num_attempts(events)]
    stragglers = [e for e in of_attempt if e["event"] == "straggler"]
    compared = [e for e in of_attempt if e["event"] == "plan_checked"]
    return Status(
        name=last.get("name", run_dir.resolve().name),
        state=state,
        since_sec=now_sec - (state_event["time"] if state_event else now_sec),
        step=step,
        num_steps=num_steps,
        stage=_stage(events),
        num_ranks=last.get("num_ranks"),
        left_sec=left_sec,
        silent_sec=now_sec - max(signs) if state == "running" else None,
        attempts=len(started),
        goodput=goodput(records, undone, end_sec - started[0]["time"]) if started else None,
        losses=[float(r["train/loss"]) for r in records],
        num_skipped_updates=len(undone),
        num_samples_skipped=int(sum(v for k, v in records[-1].items() if k.startswith("data/skipped/")))
        if records
        else 0,
        straggler=dict(stragglers[-1]) if stragglers else None,
        events=events[-_NUM_EVENTS:],
        plan=dict(compared[-1]) if compared else None,
        scores=main_scores(everything),
        host=last.get("host"),
        event_counts=dict(Counter(e["event"] for e in events)),
        latest={key: float(records[-1][name]) for key, name in _LATEST.items() if records and name in records[-1]},
    )


def read_stored(url: str, now_sec: float) -> list[Status]:
    """Return the status of all runs whose checkpoints are below a bucket's prefix.

    Fields that checkpoints do not contain have default values.

    Raises:
        UserError: If there are no checkpoints, or the bucket cannot be read.
    """
    from trainer.checkpoint.catalog import SUBFOLDER, open_checkpoints, read_extra
    from trainer.storage.open import join_url, open_store

    part = f"/{SUBFOLDER}/"
    names = sorted({name.partition(part)[0] for name in open_store(url).list() if part in f"/{name}"})
    found = []
    for name in ("" if n.startswith(f"{SUBFOLDER}/") else n for n in names):
        checkpoints = open_checkpoints(join_url(join_url(url, name) if name else url, SUBFOLDER))
        steps = checkpoints.steps()
        if not steps:
            continue
        extra = read_extra(checkpoints.folder(steps[-1]))
        num_steps = _steps_of(extra.get("recipe", ""))
        noted = [value for step, value in sorted(checkpoints.scores().items()) if step <= steps[-1]]
        found.append(
            Status(
                name=name or url.rstrip("/").rpartition("/")[2],
                state="finished" if steps[-1] == num_steps else "stored",
                since_sec=0.0,
                step=steps[-1],
                num_steps=num_steps,
                stage=None,
                num_ranks=None,
                left_sec=None,
                silent_sec=None,
                attempts=0,
                goodput=None,
                losses=[],
                num_skipped_updates=int((extra.get("guard") or {}).get("num_skipped_updates", 0)),
                num_samples_skipped=0,
                straggler=None,
                events=[],
                scores={"best_metric": noted[-1]} if noted else {},
            )
        )
    if not found:
        raise UserError(f"{url}: contains no checkpoints of a run; use the value of checkpoint.root")
    return found


def _steps_of(recipe: str) -> int | None:
    """Return `train.steps` of a recipe in YAML; None if the key is missing."""
    import yaml

    steps = (yaml.safe_load(recipe) or {}).get("train", {}).get("steps")
    return steps if isinstance(steps, int) else None


def main_scores(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the main scores of the last evaluation of each split, by `SPLIT/TASK/METRIC`."""
    last: dict[str, Mapping[str, Any]] = {}
    for record in records:
        split = next((key.split("/")[1] for key in record if key.startswith("eval/")), None)
        if split is not None:
            last[split] = record
    if not last:
        return {}
    from trainer.scoring.tasks import TASKS

    mains = {(task.name, metric) for task in TASKS.values() for metric in task.headlines}
    return {
        "/".join(parts[1:]): float(value)
        for record in last.values()
        for key, value in record.items()
        if len(parts := key.split("/")) == 4 and parts[0] == "eval" and (parts[2], parts[3]) in mains
    }


def undone_steps(events: Sequence[Event], last_step: int) -> set[int]:
    """Return the steps up to `last_step` whose updates are not in the weights.

    An attempt repeats the steps after its checkpoint, so earlier events about these steps are ignored.
    """
    undone: set[int] = set()
    for event in events:
        if event["event"] == "started":
            resumed = next((e["step"] for e in events if e["event"] == "resumed" and _same(e, event)), 0)
            undone = {step for step in undone if step <= resumed}
        elif event["event"] == "skip":
            undone.add(event["step"])
        elif event["event"] == "rewind":
            undone |= set(range(event["to_step"] + 1, event["step"] + 1))
    return {step for step in undone if step <= last_step}


def goodput(records: Sequence[Mapping[str, Any]], undone: set[int], wall_sec: float) -> float | None:
    """Return the fraction of the elapsed time that was spent on steps whose updates are in the weights.

    Args:
        records: The metrics of the run, by logging interval.
        undone: The steps whose updates are not in the weights.
        wall_sec: The elapsed time in seconds.

    Returns:
        A fraction between 0 and 1; None if the elapsed time is 0.
    """
    useful_sec, before = 0.0, 0
    for record in records:
        num = sum(step not in undone for step in range(before + 1, record["step"] + 1))
        useful_sec += num * record.get("time/step_sec", 0.0)
        before = record["step"]
    return min(1.0, useful_sec / wall_sec) if wall_sec > 0 else None


def _same(event: Event, started: Event) -> bool:
    return bool(event["attempt"] == started["attempt"])


def _state(events: Sequence[Event]) -> tuple[str, Event | None]:
    state, cause, attempt = "waiting", None, 0
    for event in events:
        attempt = max(attempt, event["attempt"])
        if event["attempt"] < attempt and "rank" in event:
            continue  # The event is from a rank of an earlier attempt that is still running.
        new = _STATES.get(event["event"])
        if new is not None and event["event"] in _FINAL.get(state, (event["event"],)):
            state, cause = new, event
    if state in ("waiting", "running"):
        ended = _ended_by_slurm(events)
        state = state if ended is None else ended
    return state, cause


def _ended_by_slurm(events: Sequence[Event]) -> str | None:
    """Return the final state of a run whose Slurm job ended without writing an event; None if the job may still run.

    This happens if the job was cancelled while it was pending, or was killed. The result is also None if Slurm does not
    answer.
    """
    job = next((e.get("job") for e in reversed(events) if e["event"] == "submitted"), None)
    found = job_state_now(job) if isinstance(job, int) else None
    if found is None:
        return None
    if found.name == "CANCELLED":
        return "cancelled"
    return "failed" if found.has_ended else None


def _stage(events: Sequence[Event]) -> str | None:
    begun = [e for e in events if e["event"] == "stage_started"]
    return f"{begun[-1]['stage']} ({begun[-1]['number']})" if begun else None


def _recent_step_sec(records: Sequence[Mapping[str, Any]]) -> float | None:
    recent = [r["time/step_sec"] for r in records[1:][-10:] or records[-1:] if "time/step_sec" in r]
    recent = [sec for sec in recent if math.isfinite(sec)]
    return sum(recent) / len(recent) if recent else None
