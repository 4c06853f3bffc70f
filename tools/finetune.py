"""Fine-tune Whisper base and SmolLM2-135M on real recordings, and compare the scores before and after.

earshot finetune data.root=DIR               trains on the kit of real recordings in DIR
earshot finetune stages.1.steps=1000         trains for more steps

The command downloads the models, trains the recipe finetune_cpu, and evaluates the dev split before and after
training. Rerun an interrupted command to resume it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.errors import UserError
from tools.demo import read_jsonl, report, run_command
from tools.fetch_models import MODELS, fetch
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.run.command import module_command

RECIPE = "finetune_cpu"
SPLIT = "dev"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 after printing a UserError, else the exit code of the training run.
    """
    parser = argparse.ArgumentParser(
        prog="earshot finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help=f"keys of the recipe {RECIPE} to change, e.g. data.root=DIR"
    )
    options = parser.parse_args(arguments)
    keys = [f"eval.final_split={SPLIT}", "eval.before=true", *options.overrides]
    try:
        recipe = load_recipe(RECIPE, keys)
        rows = rows_of(recipe)
        fetch_weights(recipe)
        print(f"training: earshot train {RECIPE} {' '.join(keys)}", flush=True)
        code = run_command(module_command("trainer", RECIPE, *keys))
        if code == 0:
            run_dir = Path(recipe.train.run_dir) / recipe.name
            print("\n" + report(run_dir, rows, next_steps(recipe, run_dir), recipe.eval.final_split))
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def rows_of(recipe: Recipe) -> list[dict[str, Any]]:
    """Return the rows of all manifests in a recipe.

    Raises:
        UserError: If a manifest does not exist.
    """
    found = []
    for manifest in dict.fromkeys(dataset.manifest for dataset in recipe.data.datasets if dataset.manifest is not None):
        path = Path(recipe.data.root) / manifest
        if not path.is_file():
            raise UserError(f"{path}: no such manifest; give data.root=DIR, the folder of the kit")
        found += read_jsonl(path)
    return found


def fetch_weights(recipe: Recipe) -> None:
    """Download the missing weights of a recipe, as far as `earshot models` offers them.

    Raises:
        UserError: If a download fails.
    """
    by_name = {model.name: model for model in MODELS}
    weights = [*(encoder.weights for encoder in recipe.model.encoders), recipe.model.llm.weights]
    for folder in dict.fromkeys(Path(name) for name in weights if name is not None):
        if not folder.exists() and folder.name in by_name:
            print(f"models: earshot models {folder.name} --out {folder.parent}", flush=True)
            fetch(by_name[folder.name], folder.parent)


def next_steps(recipe: Recipe, run_dir: Path) -> str:
    """Return a text with the run's files and the commands that a user may want to try next."""
    return "\n".join(
        [
            f"files           {run_dir}/  (summary.json, metrics.jsonl, predictions, checkpoints)",
            f"test split      earshot evaluate {run_dir} --data {recipe.data.root}/asr.jsonl --split test",
            f"export          earshot export {run_dir} my_model",
            "train longer    earshot finetune stages.1.steps=1000 name=longer",
            "your data       docs/finetune.md",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
