"""Show the state, progress, goodput, losses and recent events of a run.

    earshot status runs/demo            a few lines
    earshot status runs/demo --json     one JSON object

The command reads events.jsonl and metrics.jsonl in the run's folder. It works while the run is training.

Exit code 0: success. 2: there is no run, or its files cannot be read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.job.slurm import job_state_now
from trainer.telemetry.events import Event, num_attempts, read_events
from trainer.telemetry.jsonl import read_lines

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
"""The state of a run after each event that changes it."""
_FINAL = {"finished": ("submitted", "started"), "cancelled": ("submitted", "started")}
"""The events that change a final state. Others, such as `stopped` after `cancelled`, do not change it."""
_BARS = "▁▂▃▄▅▆▇█"
_NUM_EVENTS = 8
_NUM_BARS = 60


@dataclass(frozen=True)
class Status:
    """The status of a run."""

    name: str
    state: str
    """`running`, `waiting`, `failed`, `cancelled` or `finished`."""
    since_sec: float
    """The seconds since the event that caused this state."""
    step: int
    """The number of finished steps."""
    num_steps: int | None
    """The number of steps of the whole run; None if it is not known."""
    num_ranks: int | None
    """The number of ranks; None if it is not known."""
    left_sec: float | None
    """The expected seconds until the last step; None if the run is not running, or its speed is not known."""
    silent_sec: float | None
    """The seconds since the last event or logged step of a running attempt; None if the run is not running."""
    attempts: int
    """The number of attempts that started."""
    goodput: float | None
    """The share of the time since the first start that was spent on steps whose updates are in the weights."""
    losses: list[float]
    """The loss of each logging interval, without steps that were undone."""
    num_skipped_updates: int
    """The number of steps whose updates are not in the weights, because they were skipped or undone by a rewind."""
    num_samples_skipped: int
    """The number of samples that could not be used."""
    straggler: dict[str, Any] | None
    """The last straggler event of this attempt."""
    events: list[dict[str, Any]]
    """The last events."""


def read_status(run_dir: Path, now_sec: float) -> Status:
    """Read the status of a run from its folder.

    Args:
        run_dir: The folder of the run.
        now_sec: The current time in seconds since the epoch.

    Raises:
        UserError: If the folder contains no run, or a file is damaged.
    """
    events = read_events(run_dir)
    records = [record for _, record in read_lines(run_dir / "metrics.jsonl") if "train/loss" in record]
    if not events and not records:
        raise UserError(f"{run_dir}: contains no run; give the folder that contains events.jsonl, e.g. runs/demo")
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
    stragglers = [e for e in events if e["event"] == "straggler" and e["attempt"] == num_attempts(events)]
    return Status(
        name=last.get("name", run_dir.resolve().name),
        state=state,
        since_sec=now_sec - (state_event["time"] if state_event else now_sec),
        step=step,
        num_steps=num_steps,
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
    )


def undone_steps(events: Sequence[Event], last_step: int) -> set[int]:
    """Return the steps up to `last_step` whose updates are not in the weights.

    An attempt repeats the steps after the one it resumed from, so events of earlier attempts about them are ignored.
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
    """Return the share of the elapsed time that was spent on steps whose updates are in the weights.

    Args:
        records: The metrics of the run, by logging interval.
        undone: The steps whose updates are not in the weights.
        wall_sec: The elapsed time in seconds.

    Returns:
        A share between 0 and 1; None if the elapsed time is 0.
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
    state, cause = "waiting", None
    for event in events:
        new = _STATES.get(event["event"])
        if new is not None and event["event"] in _FINAL.get(state, (event["event"],)):
            state, cause = new, event
    if state in ("waiting", "running"):
        ended = _ended_by_slurm(events)
        state = state if ended is None else ended
    return state, cause


def _ended_by_slurm(events: Sequence[Event]) -> str | None:
    """Return the final state of a run whose job Slurm has ended without running any of its code.

    Such a job was cancelled while it was pending, or killed. The result is None if Slurm does not answer.
    """
    job = next((e.get("job") for e in reversed(events) if e["event"] == "submitted"), None)
    found = job_state_now(job) if isinstance(job, int) else None
    if found is None:
        return None
    if found.name == "CANCELLED":
        return "cancelled"
    return "failed" if found.has_ended else None


def _recent_step_sec(records: Sequence[Mapping[str, Any]]) -> float | None:
    recent = [r["time/step_sec"] for r in records[1:][-10:] or records[-1:] if "time/step_sec" in r]
    return sum(recent) / len(recent) if recent else None


def sparkline(values: Sequence[float], width: int = _NUM_BARS) -> str:
    """Draw values as bars, each of which is the mean of a part of equal length. A part without finite values is `×`."""
    num = min(width, len(values))
    if num == 0:
        return ""
    parts = [values[i * len(values) // num : (i + 1) * len(values) // num] for i in range(num)]
    finite = [[v for v in part if math.isfinite(v)] for part in parts]
    means = [sum(part) / len(part) if part else None for part in finite]
    known = [m for m in means if m is not None]
    if not known:
        return "×" * num
    low, span = min(known), (max(known) - min(known)) or 1.0
    return "".join("×" if m is None else _BARS[round((m - low) / span * (len(_BARS) - 1))] for m in means)


def describe(status: Status, now_sec: float) -> str:
    """Format a status as a few lines for the terminal."""
    of = f"/{status.num_steps}" if status.num_steps else ""
    share = f" ({status.step / status.num_steps:.0%})" if status.num_steps else ""
    lines = [f"{status.name}: {status.state} for {_duration(status.since_sec)}"]
    left = f", {_duration(status.left_sec)} left" if status.left_sec is not None else ""
    ranks = f" on {status.num_ranks} ranks" if status.num_ranks else ""
    lines.append(f"  step      {status.step}{of}{share}{left}{ranks}")
    if status.silent_sec is not None and status.silent_sec > 120:
        lines[-1] += f"; no event or logged step for {_duration(status.silent_sec)}"
    good = "unknown" if status.goodput is None else f"{status.goodput:.1%}"
    lines.append(f"  goodput   {good} over {status.attempts} attempt{'s' * (status.attempts != 1)}")
    if status.losses:
        lines.append(f"  loss      {status.losses[0]:.3f} {sparkline(status.losses)} {status.losses[-1]:.3f}")
    lines.append(f"  skipped   {status.num_skipped_updates} updates, {status.num_samples_skipped} samples")
    if status.straggler is not None:
        s = status.straggler
        where = f"rank {s['slow_rank']} on {s['slow_host']}"
        lines.append(f"  slow      {where} takes {s['times_median']} times as long as the others in {s['phase']}")
    lines += ["", *(_line(event, now_sec) for event in status.events)]
    return "\n".join(lines)


def _line(event: Event, now_sec: float) -> str:
    known = ("time", "event", "attempt", "host", "rank", "step", "fingerprint", "name", "num_ranks", "num_steps")
    rest = "  ".join(f"{key}={_short(value)}" for key, value in event.items() if key not in known)
    step = f"step {event['step']}" if event.get("step") is not None else ""
    ago = f"{_duration(now_sec - event['time'])} ago"
    return f"  {ago:>14}  #{event['attempt']:<3} {event['event']:<12} {step:<12} {rest}".rstrip()


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 70 else text[:67] + "…"


def _duration(seconds: float) -> str:
    minutes, sec = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours}:{minutes:02d}:{sec:02d}" if hours else f"{minutes}:{sec:02d}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 after printing a UserError, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="earshot status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    now_sec = time.time()
    try:
        status = read_status(options.run, now_sec)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        content = asdict(status)
        content["losses"] = [loss if math.isfinite(loss) else str(loss) for loss in status.losses]
        print(json.dumps(content, ensure_ascii=False))
    else:
        print(describe(status, now_sec))
    return 0


if __name__ == "__main__":
    sys.exit(main())
