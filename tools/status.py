"""Show the state, progress, scores, goodput and recent events of a run, or a table of all runs in a folder.

    earshot status runs/demo            a few lines about one run
    earshot status runs                 a table of all runs below the folder
    earshot status s3://bucket/runs     a table of all runs with checkpoints in the bucket
    earshot status runs --watch         a table that is updated every few seconds, until Ctrl-C
    earshot status runs/demo --json     a JSON object, or a list of objects for several runs

The command reads events.jsonl and metrics.jsonl in the runs' folders. It works while runs are training.

Exit code 0: success. 2: there is no run, or its files cannot be read.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.errors import UserError, printable_lines
from tools.run_status import Status, find_runs, is_run, read_status, read_stored
from trainer.telemetry.announce import duration
from trainer.telemetry.events import Event

_BARS = "▁▂▃▄▅▆▇█"
_NUM_BARS = 60
_WIDTH = 100
_WATCH_SEC = 5.0
_HOME = "\033[H\033[J"
"""The control sequence that moves the cursor to the top of the terminal and clears the terminal."""


def sparkline(values: Sequence[float], width: int = _NUM_BARS) -> str:
    """Return at most `width` bars, each of which shows the mean of consecutive values.

    `×` stands for values of which none is finite.
    """
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
    since = "" if status.state == "stored" else f" for {duration(status.since_sec)}"
    lines = [f"{status.name}: {status.state}{since}"]
    left = f", {duration(status.left_sec)} left" if status.left_sec is not None else ""
    ranks = f" on {status.num_ranks} ranks" if status.num_ranks else ""
    lines.append(f"  step      {status.step}{of}{share}{left}{ranks}")
    if status.stage is not None:
        lines[-1] += f", stage {status.stage}"
    if status.silent_sec is not None and status.silent_sec > 120:
        lines[-1] += f"; no event or logged step for {duration(status.silent_sec)}"
    if status.attempts:
        good = "unknown" if status.goodput is None else f"{status.goodput:.1%}"
        lines.append(f"  goodput   {good} over {status.attempts} attempt{'s' * (status.attempts != 1)}")
    if status.losses:
        lines.append(f"  loss      {status.losses[0]:.3f} {sparkline(status.losses)} {status.losses[-1]:.3f}")
    lines += _latest(status)
    lines += [f"  score     {name} {value:.3f}" for name, value in status.scores.items()]
    lines.append(f"  skipped   {status.num_skipped_updates} updates, {status.num_samples_skipped} samples")
    if status.straggler is not None:
        s = status.straggler
        where = f"rank {s['slow_rank']} on {s['slow_host']}"
        lines.append(f"  slow      {where} takes {s['times_median']} times as long as the others in {s['phase']}")
    lines += _plan(status)
    if status.events:
        lines += ["", *(_line(event, now_sec) for event in status.events)]
    return "\n".join(lines)


def _plan(status: Status) -> list[str]:
    """Return the lines about the comparison with the run's plan; empty if there was no comparison."""
    if status.plan is None:
        return []
    parts = status.plan.get("compared", {}).get("parts_sec", {})
    each = ", ".join(f"{name} {seconds:.3g} s ({planned:.3g})" for name, (seconds, planned) in parts.items())
    lines = textwrap.wrap(
        str(status.plan.get("why", "")), _WIDTH, initial_indent="  plan      ", subsequent_indent=" " * 12
    )
    if each:
        lines += textwrap.wrap(
            f"measured (planned): {each}", _WIDTH, initial_indent=" " * 12, subsequent_indent=" " * 12
        )
    return lines


def _latest(status: Status) -> list[str]:
    """Return the lines with the last learning rate, gradient norm, throughput and memory."""
    known = status.latest
    speed = [f"{known['tokens_per_sec']:,.0f} tokens/s"] if "tokens_per_sec" in known else []
    speed += [f"{known['audio_sec_per_sec']:.1f} s of audio per s"] if "audio_sec_per_sec" in known else []
    speed += [f"MFU {known['mfu']:.1%}"] if "mfu" in known else []
    speed += [f"{known['peak_bytes'] / 2**30:.1f} GiB at most on rank 0"] if "peak_bytes" in known else []
    update = [f"learning rate {known['lr']:.2g}"] if "lr" in known else []
    update += [f"gradient norm {known['grad_norm']:.3g}"] if "grad_norm" in known else []
    return [f"  {name:9} {', '.join(words)}" for name, words in (("speed", speed), ("update", update)) if words]


def _line(event: Event, now_sec: float) -> str:
    known = (
        "time",
        "event",
        "attempt",
        "host",
        "rank",
        "step",
        "fingerprint",
        "name",
        "num_ranks",
        "num_steps",
        "compared",
    )
    rest = "  ".join(f"{key}={_short(value)}" for key, value in event.items() if key not in known)
    step = f"step {event['step']}" if event.get("step") is not None else ""
    ago = f"{duration(now_sec - event['time'])} ago"
    return f"  {ago:>14}  #{event['attempt']:<3} {event['event']:<12} {step:<12} {rest}".rstrip()


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 70 else text[:67] + "…"


_OMITTED = ("MFU", "goodput", "tokens/s", "last event", "score")
"""The fields that a table of runs lacks on a narrow terminal, the least important one first."""


def as_table(runs: Sequence[tuple[str, Status | str]], now_sec: float, width: int | None = None) -> str:
    """Format several runs as a table.

    Args:
        runs: The path of each run, and its status or the reason why the run cannot be read.
        now_sec: The current time in seconds since the epoch.
        width: The number of columns of the terminal, to which rows are shortened by omitting fields; None for no limit.
    """
    head = ["run", "state", "step", "loss", "score", "tokens/s", "MFU", "goodput", "left", "last event"]
    rows = [head]
    for path, status in runs:
        rows.append([path, "unreadable", status] if isinstance(status, str) else [path, *_cells(status, now_sec)])
    widths = [max(len(row[i]) for row in rows if i < len(row) and len(row) == len(head)) for i in range(len(head))]
    widths[0] = max(len(row[0]) for row in rows)
    for name in _OMITTED if width is not None else ():
        if sum(widths) + 2 * (len(widths) - 1) <= (width or 0):
            break
        i = head.index(name)
        rows = [row[:i] + row[i + 1 :] if len(row) == len(head) else row for row in rows]
        head, widths = head[:i] + head[i + 1 :], widths[:i] + widths[i + 1 :]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)).rstrip() for row in rows)


def _cells(status: Status, now_sec: float) -> list[str]:
    score = next(iter(status.scores.items()), None)
    latest = status.latest
    event = status.events[-1] if status.events else None
    return [
        status.state,
        f"{status.step}/{status.num_steps}" if status.num_steps else str(status.step),
        f"{status.losses[-1]:.3f}" if status.losses else "-",
        "-" if score is None else f"{score[0]} {score[1]:.3f}",
        f"{latest['tokens_per_sec']:,.0f}" if "tokens_per_sec" in latest else "-",
        f"{latest['mfu']:.1%}" if "mfu" in latest else "-",
        "-" if status.goodput is None else f"{status.goodput:.0%}",
        "-" if status.left_sec is None else duration(status.left_sec),
        "-" if event is None else f"{event['event']} {duration(now_sec - event['time'])} ago",
    ]


def look(place: str, now_sec: float) -> Status | list[tuple[str, Status | str]]:
    """Return the status of the run at `place`, or the paths and statuses of all runs below `place`.

    Raises:
        UserError: If there is no run, or `place` is a run that cannot be read.
    """
    if "://" in place:
        return [(status.name, status) for status in read_stored(place, now_sec)]
    folder = Path(place)
    if is_run(folder) or not folder.is_dir():
        return read_status(folder, now_sec)
    found: list[tuple[str, Status | str]] = []
    for run in find_runs(folder):
        try:
            found.append((str(run.relative_to(folder)), read_status(run, now_sec)))
        except UserError as error:
            found.append((str(run.relative_to(folder)), str(error)))
    return found


def _text(place: str, as_json: bool) -> str:
    now_sec = time.time()
    found = look(place, now_sec)
    if not as_json:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        return describe(found, now_sec) if isinstance(found, Status) else as_table(found, now_sec, width)
    if isinstance(found, Status):
        return json.dumps(_tree(found), ensure_ascii=False)
    rows = [{"run": path, **({"error": s} if isinstance(s, str) else _tree(s))} for path, s in found]
    return json.dumps(rows, ensure_ascii=False)


def _tree(status: Status) -> dict[str, Any]:
    """Return a status as a tree for strict JSON. Numbers that are not finite are converted to text."""
    content = asdict(status)
    content["losses"] = [_finite(loss) for loss in status.losses]
    for key in ("scores", "latest"):
        content[key] = {name: _finite(value) for name, value in content[key].items()}
    return content


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 after printing a UserError, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="earshot status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("place", metavar="DIR", help="folder of a run, a folder of runs, or s3://BUCKET/PREFIX")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, or a list of objects for several runs"
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=_WATCH_SEC,
        metavar="SEC",
        help=f"print the status again every SEC seconds (default: {_WATCH_SEC:g})",
    )
    options = parser.parse_args(arguments)
    try:
        if options.watch is not None and not options.watch > 0:
            raise UserError(f"--watch {options.watch:g}: must be above 0")
        while True:
            text = _text(options.place, options.json)
            print(f"{_HOME if options.watch and not options.json else ''}{printable_lines(text)}", flush=True)
            if options.watch is None:
                return 0
            time.sleep(options.watch)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
