"""A sweep over values of a recipe's keys: one run per combination, as the tasks of a Slurm job array.

    python -m trainer.job.sweep RECIPE optim.lr=1e-4,3e-4 seed=0,1 data.root=/data

The command checks every combination and prints one line per run. `slurm/sweep.sh` submits them.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from model.errors import UserError

TASK = "SLURM_ARRAY_TASK_ID"
"""The environment variable that contains the index of a task in its job array."""


def combinations(recipe: str, overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every run of a sweep.

    Args:
        recipe: The name or the file of the recipe.
        overrides: The `key=value` arguments. A value with commas outside of brackets and quotes is a list of values.

    Returns:
        One list of overrides per run. Each ends with a `name` that contains the values that differ between runs.
    """
    choices = []
    for override in overrides:
        key, _, text = override.partition("=")
        choices.append([(key, value) for value in _split(text)])
    swept = {own[0][0] for own in choices if len(own) > 1}
    given = next((values[0][1] for values in choices if values[0][0] == "name"), None)
    base = given or Path(recipe).stem
    runs = []
    for chosen in itertools.product(*choices):
        words = [f"{key.rpartition('.')[2]}_{value}" for key, value in chosen if key in swept]
        name = re.sub(r"[^\w.+-]", "_", "-".join([base, *words]))
        runs.append([*(f"{key}={value}" for key, value in chosen if key != "name"), f"name={name}"])
    return runs


def choose(recipe: str, overrides: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Return the overrides of this task of a job array, or `overrides` unchanged outside of an array.

    Raises:
        UserError: If the array has more tasks than there are runs.
    """
    if TASK not in environ:
        return list(overrides)
    runs, index = combinations(recipe, overrides), int(environ[TASK])
    if index >= len(runs):
        raise UserError(f"--array: there is a task {index}, but only {len(runs)} runs; use --array=0-{len(runs) - 1}")
    return runs[index]


def _split(text: str) -> list[str]:
    """Split a value at its commas, except commas in brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        depth += (char in "[{" and not quote) - (char in "]}" and not quote)
        if char == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `python -m trainer.job.sweep`.

    Returns:
        The exit code: 0, or 2 after printing an error.
    """
    from trainer.config.load import load_recipe

    parser = argparse.ArgumentParser(prog="python -m trainer.job.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", metavar="key=v1,v2,…", nargs="*")
    parser.add_argument("--folder", action="store_true", help="print only the folder that contains the runs")
    options = parser.parse_intermixed_args(arguments)
    recipe = options.recipe
    try:
        runs = combinations(recipe, options.overrides)
        if options.folder:
            print(load_recipe(recipe, runs[0]).train.run_dir)
            return 0
        names = [load_recipe(recipe, run).name for run in runs]
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled is not None:
            raise UserError(f"{recipe}: two runs would have the name {doubled}; list each value of a key only once")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
