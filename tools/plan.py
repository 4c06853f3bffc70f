"""Estimate the memory, traffic and time of a training run before it starts.

    earshot plan mowe_70b                                       a plan for H100s
    earshot plan mowe_70b parallel.tensor=4 --accelerator a100  a different layout, for A100s
    earshot plan mowe_8b --fit                                  the fastest layout that fits
    earshot plan mowe_70b --explain                             the parts of a step's time
    earshot plan mowe_70b --sweep parallel.num_ranks=64,128,256 --price-per-gpu-hour 2.5

The command needs no GPU, cluster, weights or network. docs/plan.md explains the numbers.

Exit code 0: the run fits into memory. 2: it does not fit, or the recipe or an option is invalid.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError

if TYPE_CHECKING:
    from trainer.config.schema import Recipe
    from trainer.plan.accelerator import Accelerator
    from trainer.plan.advice import Advice
    from trainer.plan.data import DataSummary
    from trainer.plan.planner import Planner
    from trainer.plan.workload import Workload

_ADVICE_RANKS = 1024
"""The maximum number of ranks for which the command searches for a better layout without `--fit`."""


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
    from trainer.config.load import load_recipe

    _accelerator(options)
    if options.price_per_gpu_hour is not None and not 0 < options.price_per_gpu_hour < float("inf"):
        raise UserError(f"--price-per-gpu-hour {options.price_per_gpu_hour:g}: must be positive and finite")
    if options.sweep:
        for name in ("fit", "tokens_per_update", "explain", "store"):
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')}: a sweep only prints a table; remove it, or --sweep")
        return _sweep(options)
    if options.tokens_per_update is not None and not options.fit:
        raise UserError("--tokens-per-update: chooses the batch of --fit; add --fit")
    if options.plot is not None:
        raise UserError(f"--plot {options.plot}: draws a sweep; add --sweep KEY=v1,v2,…")
    recipe = load_recipe(options.recipe, options.overrides)
    # The following modules import PyTorch and Megatron, which takes seconds. A misspelled key is reported before that.
    from trainer.config.checks import check_recipe

    check_recipe(recipe)
    given = recipe
    _announce(recipe.name, options)
    planner, workload = _planner(options, recipe)
    from trainer.plan.advice import advise
    from trainer.plan.fit import batch_within, fit
    from trainer.plan.layouts import changes_between
    from trainer.plan.plan_json import as_json
    from trainer.plan.report import explain, report
    from trainer.plan.store import store

    if options.tokens_per_update is not None:
        recipe = batch_within(recipe, workload, options.tokens_per_update)
        planner, workload = _planner(options, recipe)
    advice: Advice | None = None
    changes: list[str] = []
    if options.fit:
        plan, _ = fit(planner, recipe, workload)
        changes = changes_between(given, plan.recipe)
        print(f"fastest layout that fits: {' '.join(changes) or 'the recipe without changes'}\n")
    else:
        plan = planner.plan(recipe, workload)
        searched = options.advice and recipe.parallel.num_ranks <= _ADVICE_RANKS
        advice = advise(planner, plan, workload) if searched else None
    print(report(plan, advice, options.price_per_gpu_hour))
    if options.explain:
        print(f"\n{explain(plan)}")
    if options.json:
        print(json.dumps({**as_json(plan), "changes": changes, "advice": advice and dataclasses.asdict(advice)}))
    sys.stdout.flush()
    plan.check_fits()
    if options.store:
        folder = Path(recipe.train.run_dir) / recipe.name
        store(plan, folder)
        print(f"stored in {folder}: the run will be compared with this plan", file=sys.stderr)
    return 0


def _announce(name: str, options: argparse.Namespace) -> None:
    """Print on a terminal what the command does, because it may take a minute on a slow machine."""
    if sys.stderr.isatty():
        search = (
            "" if not options.advice or options.fit else ", then looking for a faster layout (--no-advice skips this)"
        )
        what = "looking for the fastest layout" if options.fit else f"computing memory and time{search}"
        print(f"{name}: {what}", file=sys.stderr, flush=True)


def _accelerator(options: argparse.Namespace) -> Accelerator:
    """Return the accelerator of `--accelerator`, with the number of ranks in a node of `--per-node`."""
    from trainer.plan.accelerator import parse_accelerator

    found = parse_accelerator(options.accelerator)
    if options.per_node is None:
        return found
    if options.per_node < 1:
        raise UserError(f"--per-node {options.per_node}: must be at least 1")
    return dataclasses.replace(found, per_node=options.per_node)


def _planner(options: argparse.Namespace, recipe: Recipe) -> tuple[Planner, Workload]:
    """Return a planner for a recipe, and the workload of the recipe's data or of assumed lengths."""
    from trainer.engine.imports import lean_imports

    with lean_imports():
        from trainer.parallel.topology import build_topology
        from trainer.plan.planner import Planner
        from trainer.plan.workload import data_workload, typical_workload

    topology = build_topology(recipe.parallel, recipe.parallel.num_ranks)
    data = _data(options, recipe)
    if data is None:
        workload = typical_workload(recipe, topology, options.audio_sec, options.text_tokens)
    else:
        workload = data_workload(recipe, topology, data, options.text_tokens)
    return Planner(recipe, _accelerator(options)), workload


def _data(options: argparse.Namespace, recipe: Recipe) -> DataSummary | None:
    """Return the lengths of the recipe's samples; None if lengths are assumed.

    Raises:
        UserError: If the data is requested but missing or unreadable.
    """
    from trainer.plan.data import is_present, summarize

    if options.audio_sec is not None and options.data:
        raise UserError(f"--audio-sec {options.audio_sec:g}: --data reads the lengths of clips; pass only one of them")
    wanted = options.data or (options.data is None and options.audio_sec is None and is_present(recipe.data))
    return summarize(recipe) if wanted else None


def _sweep(options: argparse.Namespace) -> int:
    """Print a table with one plan for every combination of the values of `--sweep`, and draw it if `--plot` is given.

    Returns:
        The exit code: 0 if at least one plan fits, 2 if no plan fits.
    """
    from trainer.config.load import load_recipe
    from trainer.engine.imports import lean_imports

    recipe = load_recipe(options.recipe, options.overrides)  # Report a misspelled key before importing PyTorch.
    with lean_imports():
        from trainer.config.checks import check_recipe
        from trainer.plan.plan import Plan
        from trainer.plan.report import WIDTH
        from trainer.plan.sweep import as_tree, check_keys, fastest, parse_sweeps, sweep, sweep_table
        from trainer.plan.sweep_plot import check_plot, plot

    swept = parse_sweeps(options.sweep)
    check_keys(swept, lambda override: load_recipe(options.recipe, [*options.overrides, override]))
    if options.plot is not None:
        check_plot(options.plot)

    def planned(overrides: list[str]) -> Plan:
        variant = load_recipe(options.recipe, [*options.overrides, *overrides])
        check_recipe(variant)
        planner, workload = _planner(options, variant)
        return planner.plan(variant, workload)

    device = _accelerator(options).name
    found = sweep(recipe.name, device, swept, planned, options.price_per_gpu_hour)
    print(sweep_table(found))
    if best := fastest(found):
        print("", *textwrap.wrap(best, WIDTH), sep="\n")
    if options.plot is not None:
        plot(as_tree(found), options.plot)
        print(f"plot: {options.plot}")
    if options.json:
        print(json.dumps(as_tree(found)))
    return 0 if found.any_fits else 2


def _count(text: str) -> float:
    """Parse a positive number with an optional suffix, such as 500k or 2.1M, for argparse."""
    units = {"k": 1e3, "M": 1e6}
    try:
        number = float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number such as 500k or 2.1M")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="earshot plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe in trainer/recipes, or path to a .yaml file")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],  # Without a default, argparse calls the overrides required if the recipe is missing.
        help="recipe keys to change, such as parallel.tensor=4",
    )
    parser.add_argument(
        "--accelerator",
        default="h100",
        metavar="NAME[,key=value…]",
        help="h100, h200, a100, a .json file from bench.calibrate, or your own values such as tflops=900,memory_gib=90 "
        "(see docs/plan.md; default: h100)",
    )
    parser.add_argument(
        "--per-node",
        type=int,
        metavar="N",
        help="number of ranks in a node (default: `per_node` of the accelerator, usually 8)",
    )
    parser.add_argument(
        "--audio-sec",
        type=float,
        metavar="SEC",
        help="mean length of a clip in seconds, if lengths are assumed (default: 10, or half of data.max_audio_sec if "
        "that is less)",
    )
    parser.add_argument(
        "--data",
        action=argparse.BooleanOptionalAction,
        help="read the lengths of clips from the recipe's manifests and shards, including from object storage; "
        "--no-data assumes lengths (default: read them if all data is on this machine)",
    )
    parser.add_argument("--text-tokens", type=int, default=64, metavar="N", help="text tokens per sample (default: 64)")
    parser.add_argument("--fit", action="store_true", help="find the fastest layout that fits into the memory")
    parser.add_argument(
        "--tokens-per-update",
        type=_count,
        metavar="N",
        help="with --fit, also set data.global_batch_samples to the largest value with at most N tokens, such as 2.1M",
    )
    parser.add_argument(
        "--explain", action="store_true", help="print the parts of a step's time, and how to shorten them"
    )
    parser.add_argument(
        "--no-advice",
        dest="advice",
        action="store_false",
        help="do not search for a better layout, which takes longer than the plan (no search is done above 1024 ranks)",
    )
    parser.add_argument(
        "--price-per-gpu-hour", type=float, metavar="PRICE", help="price of one accelerator for an hour, to print costs"
    )
    parser.add_argument(
        "--sweep",
        action="append",
        metavar="KEY=v1,v2,…",
        help="print only a table with one plan for each value of a recipe key; if repeated, for all combinations of "
        "values",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png|FILE.html",
        help="also draw the table of --sweep: time, MFU, memory, cost",
    )
    parser.add_argument(
        "--store", action="store_true", help="store the plan in the run's folder, so that the run is compared with it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with all numbers on the last line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
