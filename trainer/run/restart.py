"""Run again, or not: what a batch script asks when its ranks have ended. Needs no torch.

    python -m trainer.restart runs/mowe_70b --exit-code 137    # one line; exit code 0: requeue, 1: do not

The answer is left in `events.jsonl` as `requeued` or `refused`; those `requeued` are what is counted.
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
from trainer.telemetry.events import Event, EventLog, read_events

_PROJECT = Path(__file__).parents[2]
_BORDERS = ("submitted", "started", "requeued", "refused")
"""What lies behind the last of these belongs to the attempt that has just ended."""


@dataclass(frozen=True)
class RestartConfig:
    """The recipe's `restart` section: when a job that ended early is run again."""

    max_restarts: int = 10
    """At most so many within the window."""
    window_sec: float = 86400.0
    """Restarts that lie further back are forgotten."""

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise UserError(f"restart.max_restarts = {self.max_restarts}: must be positive, or 0 for none")
        if self.window_sec <= 0:
            raise UserError(f"restart.window_sec = {self.window_sec}: must be positive")


@dataclass(frozen=True)
class Decision:
    """Whether to run again, and why."""

    again: bool
    why: str


def decide(events: Sequence[Event], exit_code: int, config: RestartConfig, now_sec: float) -> Decision:
    """Judge by the run's events and by how its last attempt ended.

    Args:
        events: all of the run's.
        exit_code: of the attempt; see `ExitCode`.
        config: the recipe's `restart` section.
        now_sec: Unix time.
    """
    if exit_code == ExitCode.FINISHED:
        return Decision(False, "the run is finished")
    begin = max((i for i, e in enumerate(events) if e["event"] in _BORDERS), default=0)
    if any(e["event"] == "finished" for e in events[begin:]):
        return Decision(False, "the run is finished; its last attempt was ended after that")
    before, failures = ([e for e in part if e["event"] == "failed"] for part in (events[:begin], events[begin:]))
    mistake = next((e for e in failures if e.get("user")), None)
    if exit_code == ExitCode.USER_ERROR or mistake is not None:
        return Decision(False, f"it would fail again: {mistake['error'] if mistake else 'a user error, see the log'}")
    known = {_cause(e) for e in before}
    repeated = next((e for e in failures if _cause(e) in known), None)
    if repeated is not None:
        place = "before the first step" if repeated.get("step") is None else f"step {repeated['step']}"
        samples = ", ".join(map(str, repeated.get("samples") or ())) or "unknown"
        return Decision(False, f"{place} failed twice the same way: {repeated['error']}; its samples: {samples}")
    recent = sum(e["event"] == "requeued" and e["time"] > now_sec - config.window_sec for e in events)
    # Of ranks that end differently a launcher shows one code: the hung rank that had to be killed hides the others'.
    hang = next((e for e in events[begin:] if e["event"] == "hang"), None)
    reason = _reason(exit_code) if hang is None else f"hung in {hang['in']}, stacks are in {hang['folder']}"
    if recent >= config.max_restarts:
        limit = f"{recent} restarts within {config.window_sec:g} s, restart.max_restarts = {config.max_restarts}"
        return Decision(False, f"{limit}: {reason}")
    return Decision(True, f"{reason}; restart {recent + 1} of {config.max_restarts}")


def fingerprint(error: BaseException) -> str:
    """The same for two errors of one cause: class, message without its numbers, and where it was raised."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(_PROJECT)]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
    message = re.sub(r"0x[0-9a-fA-F]+|\d+(\.\d+)?", "#", one_line(error))
    return f"{message} at {where}"


def one_line(error: BaseException) -> str:
    """Class and message, at most 500 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _cause(failure: Event) -> tuple[Any, Any]:
    return failure.get("step"), failure.get("fingerprint")


def _reason(exit_code: int) -> str:
    known = {
        ExitCode.FAILED: "a rank failed",
        ExitCode.STOPPED: "stopped in order by a signal",
        ExitCode.HUNG: "hung",
        ExitCode.PEER_LOST: "a rank was lost",
    }
    if exit_code > 128:
        return f"a rank was killed by signal {exit_code - 128}"
    return known.get(ExitCode(exit_code), "") if exit_code in known else f"exit code {exit_code}"


def read_config(run_dir: Path) -> RestartConfig:
    """The `restart` section of the run's own recipe; the defaults where it has none yet, or cannot be read."""
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        return RestartConfig()
    try:
        return RestartConfig(**yaml.safe_load(path.read_text(encoding="utf-8")).get("restart", {}))
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, OSError) as error:
        print(f"{path}: damaged ({one_line(error)}); taking the defaults of restart", file=sys.stderr, flush=True)
        return RestartConfig()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: run again; 1: do not; 2: a wrong argument."""
    parser = argparse.ArgumentParser(prog="python -m trainer.restart", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument("--exit-code", type=int, required=True, help="how the ranks ended")
    parser.add_argument("--max-restarts", type=int, help="instead of the recipe's restart.max_restarts")
    parser.add_argument("--window-sec", type=float, help="instead of the recipe's restart.window_sec")
    options = parser.parse_args(arguments)
    try:
        if not options.run_dir.is_dir():
            raise UserError(f"{options.run_dir}: no such run")
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
    if options.exit_code != ExitCode.FINISHED:
        event = "requeued" if decision.again else "refused"
        EventLog(options.run_dir).add(event, why=decision.why, exit_code=options.exit_code)
    return 0 if decision.again else 1


if __name__ == "__main__":
    sys.exit(main())
