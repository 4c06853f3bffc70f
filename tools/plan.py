"""Estimate the memory, traffic and time of a training run before it starts.

    earshot plan mowe_70b                                       on H100s
    earshot plan mowe_70b parallel.tensor=4 --accelerator a100  another layout, on A100s
    earshot plan mowe_8b --fit                                  the fastest layout that fits

The command needs no GPU, cluster, weights or network. docs/plan.md explains the numbers.

Exit code 0: the run fits into the accelerator's memory. 2: it does not fit, or the recipe is illegal.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from model.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 after printing a UserError, else 0.
    """
    from trainer.__main__ import be_calm

    options = _parser().parse_intermixed_args(sys.argv[1:] if arguments is None else list(arguments))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # A plan must not use a GPU even if there is one.
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
    # These modules import Megatron, which takes seconds, so an illegal recipe is reported first.
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
        print(f"fastest layout that fits: {' '.join(changes) or 'the recipe without changes'}\n")
    else:
        plan, changes = planner.plan(recipe, workload), []
    print(report(plan))
    if options.json:
        print(json.dumps({**as_json(plan), "changes": changes}))
    sys.stdout.flush()
    plan.check_fits()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="earshot plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe in trainer/recipes, or path of a .yaml file")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="recipe keys to change, such as parallel.tensor=4"
    )
    parser.add_argument(
        "--accelerator",
        default="h100",
        metavar="NAME[,key=value…]",
        help="h100, h200, a100, or numbers such as tflops and memory_gib (see docs/plan.md; default: h100)",
    )
    parser.add_argument(
        "--audio-sec",
        type=float,
        metavar="SEC",
        help="mean length of a clip in seconds (default: 10, or half of the longest clip if that is less)",
    )
    parser.add_argument(
        "--text-tokens", type=int, default=64, metavar="N", help="text tokens of a sample (default: 64)"
    )
    parser.add_argument("--fit", action="store_true", help="find the fastest layout that fits into the memory")
    parser.add_argument("--json", action="store_true", help="print one JSON object with all numbers on the last line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
