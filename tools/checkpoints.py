"""List, verify, compare and remove the checkpoints of a run.

    earshot checkpoints runs/demo                    list the checkpoints
    earshot checkpoints runs/demo verify             compare every file with its checksum
    earshot checkpoints runs/demo diff 1000 2000     list the tensors that changed between two steps
    earshot checkpoints runs/demo prune --keep 2     remove all checkpoints except the newest two
    earshot checkpoints runs/demo rollback 1000      remove all checkpoints after step 1000, to resume from step 1000
    earshot checkpoints runs/demo sign               sign all checkpoints with the key in EARSHOT_CHECKPOINT_KEY

`prune` and `rollback` also remove files of frozen weights that no remaining checkpoint uses. Do not run these actions
during training.

Exit code 0: success. 1: `verify` or `sign` found a damaged checkpoint. 2: invalid arguments or unreadable files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import UserError
from trainer.__main__ import be_calm

if TYPE_CHECKING:
    from trainer.checkpoint.catalog import Checkpoints


_NUM_STEPS = {0: "no step", 1: "one step", 2: "two steps"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 1 if `verify` or `sign` found a damaged checkpoint, 2 after printing a UserError, else 0.
    """
    options = _parser().parse_args(arguments)
    be_calm()
    try:
        found = _open(options)
        report = _ACTIONS[options.action](found, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(report))
    return 0 if report.get("passed", True) else 1


def _open(options: argparse.Namespace) -> Checkpoints:
    from trainer.checkpoint.catalog import checkpoints_of
    from trainer.checkpoint.layout import step_of

    wanted = {"diff": 2, "rollback": 1}.get(options.action, 0)
    if len(options.steps) != wanted:
        steps = " ".join(map(str, options.steps)) or "nothing"
        raise UserError(f"{options.action}: takes {_NUM_STEPS[wanted]}, but {steps} was given")
    if step_of(Path(options.run).name) is not None:
        raise UserError(f"{options.run}: is a single checkpoint; use its run, or the folder that contains it")
    return checkpoints_of(options.run)


def _list(found: Checkpoints, options: argparse.Namespace) -> dict[str, Any]:
    from trainer.checkpoint.layout import frozen_folder_of
    from trainer.checkpoint.reader import DamagedError, read_manifest
    from trainer.scoring.table import format_table

    scores, rows = found.scores(), []
    for step in found.steps():
        row: dict[str, Any] = {"step": step}
        try:
            manifest = read_manifest(found.folder(step))
        except DamagedError as error:
            rows.append(row | {"note": str(error)})
            continue
        own = sum(f.size_bytes for name, f in manifest.files.items() if frozen_folder_of(name) is None)
        shared = sum(f.size_bytes for f in manifest.files.values()) - own
        parts = [f"{key.upper()}{n}" for key, n in manifest.topology.items() if key != "world" and n > 1]
        row |= {"MB": round(own / 1e6, 1), "frozen MB": round(shared / 1e6, 1), "ranks": manifest.topology["world"]}
        rows.append(row | {"layout": " ".join(parts), "score": scores.get(step), "note": ""})
    head = ("step", "MB", "frozen MB", "ranks", "layout", "score", "note")
    print(format_table([{key: row.get(key) for key in head} for row in rows]))
    return {"url": found.url, "checkpoints": rows}


def _verify(found: Checkpoints, options: argparse.Namespace) -> dict[str, Any]:
    from trainer.checkpoint.catalog import damage_of

    damages = {}
    for step in found.steps():
        damages[step] = damage_of(found.folder(step))
        print(f"step {step}: {damages[step] or 'intact'}", flush=True)
    return {"passed": not any(damages.values()), "damage": damages}


def _diff(checkpoints: Checkpoints, options: argparse.Namespace) -> dict[str, Any]:
    from trainer.checkpoint.diff import diff
    from trainer.checkpoint.reader import DamagedError, Reader, read_manifest

    _check_steps(checkpoints, options.steps)
    try:
        folders = [checkpoints.folder(n) for n in options.steps]
        readers = [Reader(folder, read_manifest(folder)) for folder in folders]
        found = diff(*readers)
    except DamagedError as error:
        raise UserError(
            f"{checkpoints.url}: {error}; run `earshot checkpoints {options.run} verify` to list the damage"
        ) from None
    for name in found.only_first:
        print(f"only in step {options.steps[0]}: {name}")
    for name in found.only_second:
        print(f"only in step {options.steps[1]}: {name}")
    for name, relative in sorted(found.changed.items(), key=lambda item: -item[1]):
        print(f"{relative:9.2e}  {name}")
    print(
        f"{len(found.changed)} tensors changed (listed with the relative norm of the change), "
        f"{found.num_equal} are equal"
    )
    return {
        "changed": found.changed,
        "num_equal": found.num_equal,
        "only_first": found.only_first,
        "only_second": found.only_second,
    }


def _prune(found: Checkpoints, options: argparse.Namespace) -> dict[str, Any]:
    from trainer.checkpoint.config import CheckpointConfig

    best = {} if options.keep_best is None else {"best_metric": "noted", "best_is": options.keep_best}
    config = CheckpointConfig(keep_last=options.keep, keep_every_steps=options.keep_every, **best)
    removed, steps = found.clean_up(config, found.steps()[-1]), found.steps()
    for url in removed:
        print(f"removed {url}")
    print(f"{len(steps)} checkpoints remain")
    return {"removed": removed, "steps": steps}


def _rollback(found: Checkpoints, options: argparse.Namespace) -> dict[str, Any]:
    from trainer.checkpoint.config import CheckpointConfig

    _check_steps(found, options.steps)
    (newest,) = options.steps
    removed = found.clean_up(CheckpointConfig(keep_last=len(found.steps())), newest)
    for url in removed:
        print(f"removed {url}")
    print(f"the run's next attempt resumes from step {newest}")
    return {"removed": removed, "steps": found.steps()}


def _check_steps(found: Checkpoints, steps: Sequence[int]) -> None:
    """Raise a UserError that lists the known checkpoints if one of `steps` has no checkpoint."""
    known = found.steps()
    for step in steps:
        if step not in known:
            listed = ", ".join(map(str, known))
            raise UserError(f"{found.url}: there is no checkpoint of step {step}; the checkpoints are {listed}")


def _sign(found: Checkpoints, options: argparse.Namespace) -> dict[str, Any]:
    from trainer.checkpoint.catalog import sign_checkpoint
    from trainer.checkpoint.reader import DamagedError
    from trainer.checkpoint.signing import VARIABLE, signing_key

    key = signing_key()
    if key is None:
        raise UserError(f"sign: {VARIABLE} is not set; make a key with `openssl rand -hex 32`")
    signed, damages = [], {}
    for step in found.steps():
        try:
            if sign_checkpoint(found.folder(step), key):
                signed.append(step)
                print(f"step {step}: signed", flush=True)
        except DamagedError as error:
            damages[step] = str(error)
            print(f"step {step}: not signed: {error}", flush=True)
    return {"passed": not damages, "signed": signed, "damage": damages}


_ACTIONS = {"list": _list, "verify": _verify, "diff": _diff, "prune": _prune, "rollback": _rollback, "sign": _sign}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="earshot checkpoints", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="the run, as a folder or as s3://…")
    parser.add_argument("action", nargs="?", default="list", choices=tuple(_ACTIONS), help="default: list")
    parser.add_argument("steps", nargs="*", type=int, help="for diff: the two steps to compare; for rollback: the step")
    parser.add_argument(
        "--keep", type=int, default=2, help="for prune: the number of newest checkpoints to keep (default: 2)"
    )
    parser.add_argument(
        "--keep-every",
        type=int,
        default=0,
        metavar="STEPS",
        help="for prune: also keep checkpoints of multiples of this step",
    )
    parser.add_argument(
        "--keep-best", choices=("lowest", "highest"), help="for prune: also keep the checkpoint with the best score"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
