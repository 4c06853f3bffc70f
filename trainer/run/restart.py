"""Decide whether a batch script should run its job again after the ranks have ended.

    python -m trainer.restart runs/mowe_70b --exit-code 137

The command prints one line and exits with 0 if the job should be requeued and with 1 if not. It appends the event
`requeued` or `refused` to the run's `events.jsonl`; the number of restarts is the number of `requeued` events there.
Importing this module does not import torch.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from model.errors import UserError
from trainer.run.exit_codes import ExitCode
from trainer.run.hardware import suspect_nodes
from trainer.telemetry.alerts import Alerts
from trainer.telemetry.events import Event, EventLog, read_events

_PROJECT = Path(__file__).parents[2]
_BOUNDARIES = ("submitted", "started", "requeued", "refused", "cancelled")
"""The events that separate attempts. Events after the last of them belong to the attempt that is running or has just
ended, except late events from ranks of an earlier attempt (see `_split`)."""
_CLOCK_SEC = 60.0
"""The maximum tolerated difference between the clocks of two machines, in seconds. Restarts that are further in the
future are not counted, because the clock of the machine that recorded them was wrong."""


@dataclass(frozen=True)
class RestartConfig:
    """The recipe's `restart` section: how often a job that ended early is restarted."""

    max_restarts: int = 10
    """The maximum number of restarts within `window_sec`; 0 for none. Once it is reached, the job is not restarted."""
    window_sec: float = 86400.0
    """The length of the time window in which restarts are counted, in seconds. Earlier restarts are ignored."""
    min_nodes: int | None = None
    """The minimum number of nodes on which a restarted Slurm job may run; null to require all nodes of the recipe.

    With fewer nodes, there are fewer data-parallel replicas, but the global batch and the order of samples stay the
    same.
    """

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise UserError(f"restart.max_restarts = {self.max_restarts}: must be positive, or 0 for none")
        if self.window_sec <= 0:
            raise UserError(f"restart.window_sec = {self.window_sec}: must be positive")
        if self.min_nodes is not None and self.min_nodes < 1:
            raise UserError(f"restart.min_nodes = {self.min_nodes}: must be at least 1, or null for all nodes")


@dataclass(frozen=True)
class Decision:
    """The decision whether to run a job again."""

    again: bool
    """Whether to run the job again."""
    why: str
    """The reason, as one line."""


def decide(events: Sequence[Event], exit_code: int, config: RestartConfig, now_sec: float) -> Decision:
    """Decide from a run's events and the exit code of its last attempt whether to run the job again.

    Args:
        events: All events of the run.
        exit_code: The exit code of the attempt; see `ExitCode`.
        config: The recipe's `restart` section.
        now_sec: The current Unix time.
    """
    if exit_code == ExitCode.FINISHED:
        return Decision(False, "the run is finished")
    if exit_code == ExitCode.FENCED:
        return Decision(False, "a newer attempt of this run has started")
    before, own = _split(events)
    if any(e["event"] == "finished" for e in own):
        return Decision(False, "the run is finished, but its last attempt ended with an error afterwards")
    failures = [e for e in own if e["event"] == "failed"]
    mistake = next((e for e in failures if e.get("user")), None)
    if exit_code == ExitCode.USER_ERROR or mistake is not None:
        why = f"it would fail again: {mistake['error'] if mistake else 'a user error, see the log'}"
        return Decision(False, why + _on_fewer_nodes(events))
    known = {_cause(e) for e in before if e["event"] == "failed"}
    # A machine fault, such as a killed data worker, has no fingerprint, because it may not occur again.
    repeated = next((e for e in failures if e.get("fingerprint") and _cause(e) in known), None)
    faulty = suspect_nodes(own)
    if repeated is not None and not faulty:
        when = "before the first step" if repeated.get("step") is None else f"in step {repeated['step']}"
        samples = ", ".join(map(str, repeated.get("samples") or ())) or "unknown"
        return Decision(
            False,
            f"the run failed twice in the same way {when}: {repeated['error']}; samples of the step: {samples}",
        )
    window = (now_sec - config.window_sec, now_sec + _CLOCK_SEC)
    recent = sum(e["event"] == "requeued" and window[0] < e["time"] <= window[1] for e in events)
    # A launcher returns the exit code of only one rank, which may be a hung rank that was killed.
    hang = next((e for e in own if e["event"] == "hang"), None)
    reason = _reason(exit_code) if hang is None else f"hung in {hang['in']}, stacks are in {hang['folder']}"
    if faulty:
        reason += "; hardware fault on " + ", ".join(f"{node} ({what})" for node, what in sorted(faulty.items()))
    if recent >= config.max_restarts:
        limit = f"{recent} restarts within {config.window_sec:g} s, and restart.max_restarts = {config.max_restarts}"
        return Decision(False, f"{limit}: {reason}")
    return Decision(True, f"{reason}; restart {recent + 1} of {config.max_restarts}")


def _on_fewer_nodes(events: Sequence[Event]) -> str:
    """Return a remedy if the newest attempt had fewer nodes than the recipe requires, and otherwise an empty string."""
    begin = max((i for i, e in enumerate(events) if e["event"] == "submitted"), default=0)
    fewer = next((e for e in events[begin:] if e["event"] == "fewer_nodes"), None)
    if fewer is None:
        return ""
    return (
        f"; this attempt had only {fewer['nodes']} nodes with {fewer['num_ranks']} ranks (restart.min_nodes): correct "
        f"the recipe, or submit the job again with restart.min_nodes={int(fewer['nodes']) + 1}"
    )


def current_attempt(events: Sequence[Event]) -> Sequence[Event]:
    """Return the events of the attempt that is running or has just ended."""
    return _split(events)[1]


def _split(events: Sequence[Event]) -> tuple[list[Event], list[Event]]:
    """Return the events of earlier attempts, and those of the attempt that is running or has just ended.

    When an attempt starts, ranks of an earlier attempt may still be running on a node that Slurm could not reach. Their
    events belong to the earlier attempt, even if they are at the end of the file.
    """
    begin = max((i for i, e in enumerate(events) if e["event"] in _BOUNDARIES), default=0)
    # No rank of an attempt writes an event before `started`.
    attempt = events[begin]["attempt"] if events and events[begin]["event"] == "started" else None
    before: list[Event] = list(events[:begin])
    own: list[Event] = []
    for event in events[begin:]:
        (before if "rank" in event and event["attempt"] != attempt else own).append(event)
    return before, own


def fingerprint(error: BaseException) -> str:
    """Return a string that is the same for two errors with the same cause.

    It consists of the error's class, its message without numbers, and the innermost function of this project in the
    traceback.
    """
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(_PROJECT)]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
    message = re.sub(r"0x[0-9a-fA-F]+|\d+(\.\d+)?", "#", one_line(error))
    return f"{message} at {where}"


def one_line(error: BaseException) -> str:
    """Return an error's class and message as one line of at most 500 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _cause(failure: Event) -> tuple[Any, Any]:
    return failure.get("step"), failure.get("fingerprint")


def _reason(exit_code: int) -> str:
    known = {
        ExitCode.FAILED: "a rank failed",
        ExitCode.STOPPED: "stopped cleanly by a signal",
        ExitCode.HUNG: "hung",
        ExitCode.PEER_LOST: "the connection to a rank was lost",
        ExitCode.FENCED: "a newer attempt of this run has started",
    }
    if exit_code > 128:
        return f"a rank was killed by signal {exit_code - 128}"
    return known.get(ExitCode(exit_code), "") if exit_code in known else f"exit code {exit_code}"


def read_config(run_dir: Path) -> RestartConfig:
    """Return the `restart` section of a run's recipe, or the defaults if there is no recipe or it cannot be read."""
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        return RestartConfig()
    try:
        return RestartConfig(**yaml.safe_load(path.read_text(encoding="utf-8")).get("restart", {}))
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, OSError) as error:
        print(f"{path}: damaged ({one_line(error)}); using the default restart settings", file=sys.stderr, flush=True)
        return RestartConfig()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `python -m trainer.restart`.

    Returns:
        The exit code: 0 if the job should be run again, 1 if not, and 2 if an argument is invalid.
    """
    parser = argparse.ArgumentParser(prog="python -m trainer.restart", description="Decide whether to run a job again.")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run's folder")
    parser.add_argument("--exit-code", type=int, required=True, help="the exit code of the ranks")
    parser.add_argument("--max-restarts", type=int, help="overrides the recipe's restart.max_restarts")
    parser.add_argument("--window-sec", type=float, help="overrides the recipe's restart.window_sec")
    options = parser.parse_args(arguments)
    try:
        if not options.run_dir.is_dir():
            raise UserError(f"{options.run_dir}: there is no such folder; use the folder of a run")
        config = read_config(options.run_dir)
        config = RestartConfig(
            config.max_restarts if options.max_restarts is None else options.max_restarts,
            config.window_sec if options.window_sec is None else options.window_sec,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    decision = decide(read_events(options.run_dir), options.exit_code, config, time.time())
    print(f"{'requeue' if decision.again else 'no requeue'}: {decision.why}", flush=True)
    # A fenced attempt has emitted its own event, and must not add events to the newer attempt.
    if options.exit_code not in (ExitCode.FINISHED, ExitCode.FENCED):
        event = "requeued" if decision.again else "refused"
        EventLog(options.run_dir, notify=Alerts(options.run_dir)).add(
            event, why=decision.why, exit_code=options.exit_code
        )
    return 0 if decision.again else 1


if __name__ == "__main__":
    sys.exit(main())
