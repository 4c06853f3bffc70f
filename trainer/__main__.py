"""Train a speech-text model with several routed audio encoders, or resume it from its last checkpoint.

    earshot train kit_cpu data.root=DIR                    train on this machine
    earshot train mowe_70b --dry-run                       check the recipe and its data, and print its layout
    earshot train recipe.yaml optim.lr=3e-4 data.datasets.0.weight=0.5

To resume a run that was stopped, repeat the same command. Under srun, torchrun or DeepSpeed's launcher, the command is
one rank. Otherwise, it starts all ranks on this machine.

The exit codes are documented in `docs/operations.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from model.errors import UserError, printable_lines
from trainer.parallel.environment import set_environment
from trainer.run import launch
from trainer.run.command import rank_command
from trainer.run.exit_codes import ExitCode
from trainer.telemetry.announce import print_timed
from trainer.telemetry.events import EventLog, read_events

if TYPE_CHECKING:
    from trainer.config.schema import Recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `earshot train`.

    Args:
        arguments: The arguments of the command; None for those of the process.

    Returns:
        The exit code (see `ExitCode`). It is 2 after a user error, which a one-line message on stderr describes.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_intermixed_args(arguments)
    set_environment()
    if not options.verbose:
        be_calm()
    try:
        return _run(options, arguments)
    except UserError as error:
        launch.report_error(str(error))
        return 2
    except KeyboardInterrupt:  # a second Ctrl-C, while the run saves
        return 128 + signal.SIGINT


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    if options.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from trainer.config.load import load_recipe
    from trainer.parallel.topology import build_topology

    recipe = load_recipe(options.recipe, options.overrides)
    build_topology(recipe.parallel, recipe.parallel.num_ranks)
    env = launch.rank_env(os.environ, recipe.parallel.num_ranks)
    if env is None and not options.dry_run:
        return _start_ranks(recipe, arguments)
    from trainer.engine.imports import lean_imports

    with lean_imports():
        from trainer.config.checks import check_folders, check_recipe, warnings_of

    check_recipe(recipe)
    if env is None or env.rank == 0:
        for warning in warnings_of(recipe.model):
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    if options.dry_run:
        from trainer.dry_run import check_data, check_tokenizer, describe

        if not options.no_data:
            check_data(recipe)
            try:
                check_folders(recipe)
            except UserError as error:  # A recipe can be checked before its weights are downloaded.
                print(f"warning: {error}", file=sys.stderr, flush=True)
        check_tokenizer(recipe)
        print(describe(recipe))
        return 0
    check_folders(recipe)
    assert env is not None
    launch.join(env)
    with lean_imports():
        from trainer.build import run_training

    return run_training(recipe, env)


def _start_ranks(recipe: Recipe, arguments: Sequence[str]) -> int:
    """Start all ranks on this machine. If a user error ends a new run before its first step, remove its folder."""
    from trainer.data.config_files import check_files

    check_files(recipe.data)  # before the ranks import packages, which takes a while
    if recipe.telemetry.progress:
        num = recipe.parallel.num_ranks
        ranks = "1 rank starts" if num == 1 else f"{num} ranks start"
        print_timed(f"{recipe.name}: {ranks}, importing PyTorch, DeepSpeed and Megatron", sys.stderr)
    root = Path(recipe.train.run_dir)
    new = [folder for folder in (root / recipe.name, root) if not folder.exists()]
    # The ranks do the remaining checks, which need modules that take seconds to import and that ranks import anyway.
    code = launch.start_ranks(recipe.parallel.num_ranks, rank_command("trainer", *arguments))
    if code == 128 + signal.SIGINT:
        events = read_events(root / recipe.name)
        has_saved = any(event["event"] == "saved" for event in events)
        if events:
            EventLog(root / recipe.name).add("cancelled", why="Ctrl-C")
        what = "; rerun the same command to resume from the last checkpoint" if has_saved else ", nothing was saved"
        print_timed(f"{recipe.name}: ended by Ctrl-C{what}", sys.stderr)
    if code == ExitCode.USER_ERROR and new:
        # Keep the folder if a step was done or another process uses it. The step of the event `failed` is checked too,
        # because the event `saved` is missing if the evaluation after the checkpoint failed.
        events = read_events(new[0])
        is_idle = all(event.get("step") is None for event in events)
        if is_idle and [event["event"] for event in events] in ([], ["started", "failed"]):
            shutil.rmtree(new[0], ignore_errors=True)
        if len(new) > 1:
            with contextlib.suppress(OSError):  # The folder does not exist, or is not empty.
                root.rmdir()
    return code


def _parser() -> argparse.ArgumentParser:
    from trainer.config.load import recipe_names

    parser = argparse.ArgumentParser(
        prog="earshot train",
        description=__doc__,
        epilog=f"Recipes: {', '.join(recipe_names())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name in trainer/recipes, or path to a .yaml file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="dotted recipe keys and their new values")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the recipe and its data, print its layout and sizes, and stop"
    )
    parser.add_argument("--no-data", action="store_true", help="with --dry-run, do not check that the data exists")
    parser.add_argument("--verbose", action="store_true", help="show the log lines of other libraries")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher appends it
    return parser


class _OneLine(logging.Formatter):
    """A formatter that escapes control characters, because log messages may contain names from data."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def be_calm() -> None:
    """Silence the warnings and log lines of other libraries, except errors, so that the progress bar stays readable."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_OneLine())
    warnings.filterwarnings("ignore")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("DeepSpeed", "megatron", "transformers", "torch", "alembic", "mlflow"):
        # A level would not suffice, because these libraries set the levels of their loggers when they are imported.
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)


def leave(code: int) -> NoReturn:
    """End the process with `code`.

    After a failure, the process ends without cleanup, because threads of libraries may wait for ranks that have ended.
    """
    if code not in (ExitCode.FAILED, ExitCode.PEER_LOST, 128 + signal.SIGINT):
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
