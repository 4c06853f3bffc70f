"""Which encoder earns its keep: python -m tools.profile_experts RUN|CHECKPOINT [--data MANIFEST|SHARDS].

    python -m tools.profile_experts runs/demo                       the routing history of a run
    python -m tools.profile_experts runs/demo --data test.jsonl     its router over other data, forward only
    python -m tools.profile_experts runs/demo --fail-on dead,imbalance=1.5     for pipelines

Prints tables; writes report.html, profile.json, cells.csv and plots; adds them to the run in MLflow. docs/profile.md
says what each number means. Exit code 1: a limit of --fail-on is exceeded; 2: a mistake in what was asked.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError
from tools.options import check_output
from trainer.__main__ import be_calm


@dataclass(frozen=True)
class Limits:
    """What --fail-on asks for."""

    dead: bool = False
    imbalance: float = math.inf

    @staticmethod
    def parse(text: str) -> Limits:
        """From e.g. `dead,imbalance=1.5`. Raises UserError."""
        limits = Limits()
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if part == "dead":
                limits = Limits(True, limits.imbalance)
            elif name == "imbalance":
                limits = Limits(limits.dead, _limit(part, value))
            else:
                raise UserError(f"--fail-on {part}: legal are dead and imbalance=NUMBER, joined by commas")
        return limits


def _limit(part: str, value: str) -> float:
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if not 1.0 <= limit < math.inf:
        raise UserError(f"--fail-on {part}: give a number of at least 1 (slowest rank / mean), e.g. imbalance=1.5")
    return limit


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.profile_experts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a run, or of one of its checkpoints")
    parser.add_argument("--data", type=Path, help="route this instead: a manifest (JSONL), or a folder of shards")
    parser.add_argument("--split", help="with --data: only this split (default: all)")
    parser.add_argument("--out", type=Path, help="folder for the files (default: RUN/profile, RUN/profile-data)")
    parser.add_argument("--fail-on", default="", metavar="LIMITS", help="e.g. dead,imbalance=1.5: exit code 1 if so")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args(arguments)
    be_calm()
    try:
        return _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from trainer.expert_usage.files import write_files
    from trainer.expert_usage.history import find_run, profile_history
    from trainer.expert_usage.text import describe
    from trainer.telemetry.tracker import log_artifacts

    limits = Limits.parse(options.fail_on)
    where = find_run(options.run)
    folder = options.out or where.run_dir / ("profile" if options.data is None else "profile-data")
    check_output(f"--out {folder}", folder, is_folder=True)
    if options.data is None:
        if options.split is not None:
            raise UserError(f"--split {options.split}: needs --data; a run's history is of what it trained on")
        profile = profile_history(where)
    else:
        from trainer.expert_usage.forward import profile_data

        profile = profile_data(where, options.data, options.split)
    print(describe(profile))
    files = write_files(profile, folder)
    print(f"\n{', '.join(f.name for f in files)} in {folder}")
    if (reason := log_artifacts(where.run_dir, files, folder.name)) is not None:
        print(f"not added to MLflow: {reason}", file=sys.stderr)
    failures = []
    if limits.dead and profile.dead:
        failures.append(f"dead: {', '.join(profile.dead)}")
    if limits.imbalance < math.inf and profile.imbalance is None:
        raise UserError(f"--fail-on imbalance={limits.imbalance:g}: nothing was measured or computed to compare with")
    if profile.imbalance is not None and profile.imbalance > limits.imbalance:
        failures.append(f"imbalance {profile.imbalance:.3f} > {limits.imbalance:g}")
    if failures:
        print(f"failed: {'; '.join(failures)}", file=sys.stderr)
    if options.json:
        print(json.dumps({"passed": not failures, "failures": failures, "folder": str(folder), **profile.to_json()}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
