"""Report how often a run uses each encoder expert for each task, the experts' cost, and the use of FFN experts.

    earshot profile runs/demo                                  the routing during training
    earshot profile runs/demo --data test.jsonl                the routing of different data
    earshot profile runs/demo --fail-on dead,imbalance=1.5     a check for automated pipelines

The command prints tables, writes report.html, profile.json, cells.csv and plots, and adds these files to the run in
its trackers. docs/profile.md explains the numbers.

Exit code 0: success. 1: a limit of --fail-on is exceeded. 2: invalid arguments, or a run or data that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from model.errors import UserError
from tools.options import check_model, check_output
from trainer.__main__ import be_calm


@dataclass(frozen=True)
class Limits:
    """The limits of `--fail-on`."""

    dead: bool = False
    """True to fail if an encoder expert or an FFN expert is dead, which means that it is (almost) never chosen."""
    imbalance: float = math.inf
    """The largest allowed load of the slowest rank, relative to the mean load."""
    overload: float = math.inf
    """The largest allowed number of choices of an FFN expert, relative to the mean over the experts of its layer."""

    @staticmethod
    def parse(text: str) -> Limits:
        """Parse the value of `--fail-on`, such as `dead,imbalance=1.5`.

        Raises:
            UserError: If the value is not of this form.
        """
        limits = Limits()
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if part == "dead":
                limits = replace(limits, dead=True)
            elif name == "imbalance":
                limits = replace(limits, imbalance=_limit(part, value, "slowest rank / mean"))
            elif name == "overload":
                limits = replace(limits, overload=_limit(part, value, "share / even share"))
            else:
                raise UserError(
                    f"--fail-on {part}: must be dead, imbalance=NUMBER or overload=NUMBER, or several joined by commas"
                )
        return limits


def _limit(part: str, value: str, what: str) -> float:
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if not 1.0 <= limit < math.inf:
        name = part.partition("=")[0]
        raise UserError(f"--fail-on {part}: must be a number of at least 1 ({what}), e.g. {name}=1.5")
    return limit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 1 if a limit of `--fail-on` is exceeded, 2 after printing a UserError, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="earshot profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or of one of its checkpoints")
    parser.add_argument(
        "--data", type=Path, help="profile the routing of this manifest (JSONL) or folder of shards instead"
    )
    parser.add_argument("--split", help="with --data: use only this split (default: all splits)")
    parser.add_argument(
        "--out", type=Path, help="folder for the files (default: RUN/profile, with --data RUN/profile-data)"
    )
    parser.add_argument(
        "--fail-on",
        default="",
        metavar="LIMITS",
        help="limits that set the exit code to 1 if they are exceeded, e.g. dead,imbalance=1.5",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    options = parser.parse_args(arguments)
    be_calm()
    try:
        return _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    check_model(options.run)
    from trainer.expert_usage.files import write_files
    from trainer.expert_usage.history import find_run, profile_history, profile_tokens
    from trainer.expert_usage.text import describe
    from trainer.expert_usage.tokens import describe_tokens, failures_of, write_token_files
    from trainer.telemetry.trackers.table import add_files

    limits = Limits.parse(options.fail_on)
    where = find_run(options.run)
    folder = options.out or where.run_dir / ("profile" if options.data is None else "profile-data")
    check_output(f"--out {folder}", folder, is_folder=True)
    if options.data is None:
        if options.split is not None:
            raise UserError(f"--split {options.split}: applies to --data only; add --data, or remove --split")
        profile = profile_history(where)
    else:
        from trainer.expert_usage.forward import profile_data

        profile = profile_data(where, options.data, options.split)
    print(describe(profile))
    files = write_files(profile, folder)
    tokens = profile_tokens(where) if options.data is None else None
    if tokens is not None:
        print("\n" + describe_tokens(tokens))
        files += write_token_files(tokens, folder)
    print(f"\n{', '.join(f.name for f in files)} in {folder}")
    for failure in add_files(where.run_dir, files, folder.name):
        print(f"not added to {failure}", file=sys.stderr)
    failures = []
    if limits.dead and profile.dead:
        failures.append(f"dead: {', '.join(profile.dead)}")
    if limits.imbalance < math.inf and profile.imbalance is None:
        raise UserError(
            f"--fail-on imbalance={limits.imbalance:g}: the run has no measurement of the imbalance; remove this limit"
        )
    if profile.imbalance is not None and profile.imbalance > limits.imbalance:
        failures.append(f"imbalance {profile.imbalance:.3f} > {limits.imbalance:g}")
    if limits.overload < math.inf and tokens is None:
        raise UserError(f"--fail-on overload={limits.overload:g}: the LLM of the run has no experts; remove this limit")
    if tokens is not None:
        failures += failures_of(tokens, limits.dead, limits.overload)
    if failures:
        print(f"failed: {'; '.join(failures)}", file=sys.stderr)
    if options.json:
        print(json.dumps({"passed": not failures, "failures": failures, "folder": str(folder), **profile.to_json()}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
