"""Train a chain of recipes, one run after the other.

    earshot chain unimoe_cpu data.root=DIR              run or resume all runs of the chain
    earshot chain unimoe_cpu --list                     print the runs and their progress
    earshot chain unimoe_cpu --show unimoe_mixture      print the resolved recipe of one run
    earshot chain unimoe_cpu unimoe_align:train.steps=100      change a recipe key of one run

A finished run is not started again, and an unfinished run resumes from its newest checkpoint. Rerun the same command
to continue a chain that was stopped.

Exit code 0: all runs are finished. 1: a run was stopped. 2: the chain is invalid. Otherwise, it is the exit code of the
run that failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from model.errors import UserError
from trainer.__main__ import be_calm
from trainer.checkpoint.catalog import SUBFOLDER, open_checkpoints
from trainer.config.chain import chain_names, load_chain
from trainer.config.load import dump
from trainer.config.schema import Recipe
from trainer.run.command import module_command
from trainer.storage.open import join_url
from trainer.telemetry.events import read_events
from trainer.telemetry.jsonl import write_atomically


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="earshot chain",
        description=__doc__,
        epilog=f"Chains: {', '.join(chain_names())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("chain", metavar="CHAIN", help="name of a chain, or path of its YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="recipe keys to change in all runs; NAME:KEY=VALUE changes one run",
    )
    parser.add_argument("--show", metavar="NAME", help="print the resolved recipe of a run")
    parser.add_argument("--list", action="store_true", help="print the runs and their progress")
    options = parser.parse_intermixed_args(arguments)
    be_calm()
    try:
        recipes = load_chain(options.chain, options.overrides)
        if options.list:
            for recipe in recipes:
                print(f"{recipe.name:24} step {steps_done(recipe)} of {recipe.train.steps}, in {recipe.run_url}")
            return 0
        if options.show is not None:
            print(dump(_named(recipes, options.show)), end="")
            return 0
        return run(recipes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _named(recipes: Sequence[Recipe], name: str) -> Recipe:
    for recipe in recipes:
        if recipe.name == name:
            return recipe
    raise UserError(
        f"--show {name}: the chain has no run of this name; its runs are {', '.join(r.name for r in recipes)}"
    )


def run(recipes: Sequence[Recipe]) -> int:
    """Train the runs in order until one of them does not finish, and return the exit code of the command.

    Args:
        recipes: The recipes of the chain.
    """
    for number, recipe in enumerate(recipes, start=1):
        where = f"run {number} of {len(recipes)}, {recipe.name}"
        if is_finished(recipe):
            print(f"chain: {where}: finished", flush=True)
            continue
        print(f"chain: {where}: starts at step {steps_done(recipe)} of {recipe.train.steps}", flush=True)
        folder = Path(recipe.train.run_dir) / "chain"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{recipe.name}.yaml"
        write_atomically(path, dump(recipe))
        code = subprocess.run(module_command("trainer", str(path)), check=False).returncode
        if code:
            print(f"chain: {where}: ended with exit code {code}; the same command resumes", file=sys.stderr, flush=True)
            return code
        if not is_finished(recipe):
            print(f"chain: {where}: was stopped; the same command resumes", file=sys.stderr, flush=True)
            return 1
    return 0


def is_finished(recipe: Recipe) -> bool:
    """Return whether a run completed its last step, or was stopped early by a condition in its recipe."""
    done = steps_done(recipe)
    if done >= recipe.train.steps:
        return True
    events = read_events(Path(recipe.train.run_dir) / recipe.name)
    begin = max((i for i, event in enumerate(events) if event["event"] == "started"), default=0)
    return any(event["event"] == "finished" for event in events[begin:])


def steps_done(recipe: Recipe) -> int:
    """Return the step of the newest checkpoint of a run; 0 if there is no checkpoint."""
    return max(open_checkpoints(join_url(recipe.run_url, SUBFOLDER)).steps(), default=0)


if __name__ == "__main__":
    sys.exit(main())
