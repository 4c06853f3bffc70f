"""`python -m tools.plan RECIPE [key=value …]`: what a job will need and how long it will take, before it runs.

Needs no GPU, no cluster, no weights and no network. Exit code 2, after one line, for an illegal recipe and for one that
does not fit into the accelerator's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from model.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    from trainer.__main__ import be_calm

    options = _parser().parse_intermixed_args(sys.argv[1:] if arguments is None else list(arguments))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a plan must not touch a GPU, where there is one
    be_calm()
    try:
        return _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from trainer.config.checks import check_recipe
    from trainer.config.load import load_recipe
    from trainer.plan.accelerator import parse_accelerator

    accelerator = parse_accelerator(options.accelerator)
    recipe = load_recipe(options.recipe, options.overrides)
    check_recipe(recipe)
    # Importing Megatron takes seconds: not before the recipe is known to be legal.
    from trainer.parallel.topology import build_topology
    from trainer.plan.fit import fit
    from trainer.plan.plan import Planner, as_json
    from trainer.plan.report import report
    from trainer.plan.workload import typical_workload

    topology = build_topology(recipe.parallel, recipe.parallel.num_ranks)
    workload = typical_workload(recipe, topology, options.audio_sec, options.text_tokens)
    planner = Planner(recipe, accelerator)
    if options.fit:
        plan, changes = fit(planner, recipe, workload)
        print(f"fastest that fits: {' '.join(changes) or 'the recipe as it is'}\n")
    else:
        plan, changes = planner.plan(recipe, workload), []
    print(report(plan))
    if options.json:
        print(json.dumps({**as_json(plan), "changes": changes}))
    sys.stdout.flush()
    plan.check_fits()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.plan", description=__doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="name in trainer/recipes, or path of a .yaml file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="recipe keys to change, dotted")
    parser.add_argument(
        "--accelerator",
        default="h100",
        metavar="NAME[,key=value…]",
        help="h100, h200 or a100, or numbers (tflops, memory_gib, … see docs/plan.md); default h100",
    )
    parser.add_argument("--audio-sec", type=float, help="mean length of a clip; default 10, or half the longest")
    parser.add_argument("--text-tokens", type=int, default=64, help="text tokens of a sample; default 64")
    parser.add_argument("--fit", action="store_true", help="propose the fastest layout that fits")
    parser.add_argument("--json", action="store_true", help="end with all numbers as one JSON object on one line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
