"""Create a folder with files for you to edit: Slurm scripts, DeepSpeed configs and a commented recipe.

earshot init my_project
cd my_project && sbatch slurm/train_8b.sh recipe.yaml data.root=/data
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from model.errors import UserError
from trainer.config.load import RECIPES, recipe_names
from trainer.config.shipped import shipped

FOLDERS = ("slurm", "ds_configs")
RECIPE = "recipe.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="earshot init",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", metavar="DIR", nargs="?", type=Path, default=Path(), help="default: the current folder"
    )
    parser.add_argument("--recipe", default="mowe_8b", help="recipe to start from (default: mowe_8b)")
    options = parser.parse_args(arguments)
    try:
        written = write(options.folder, options.recipe)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {', '.join(written)} to {options.folder.resolve()}")
    print(f"next: edit {RECIPE} and slurm/env.sh, then  earshot train {RECIPE} --dry-run --no-data")
    return 0


def write(folder: Path, recipe: str) -> list[str]:
    """Copy the Slurm scripts, DeepSpeed configs and a recipe to `folder`, which is created if it is missing.

    Args:
        folder: The folder. Existing files in it are never overwritten.
        recipe: The name of a recipe that is part of the project.

    Returns:
        The folders and files that were written, relative to `folder`.

    Raises:
        UserError: If the recipe is unknown, or a file or folder exists already or cannot be written.
    """
    if recipe not in recipe_names():
        raise UserError(f"--recipe {recipe}: choose one of {', '.join(recipe_names())}")
    in_the_way = [name for name in (*FOLDERS, RECIPE) if (folder / name).exists()]
    if in_the_way:
        raise UserError(f"{folder / in_the_way[0]}: exists already; move it away, or choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FOLDERS:
            shutil.copytree(shipped(name), folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
        for script in (folder / "slurm").glob("*.sh"):
            script.chmod(0o755)
        text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
        (folder / RECIPE).write_text(_own_commands(text, recipe), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
    return [f"{name}/" for name in FOLDERS] + [RECIPE]


def _own_commands(text: str, recipe: str) -> str:
    """Return a recipe in which the commands of the comment at its start name `RECIPE`, so that its changes apply."""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if not line.startswith("#"):
            break
        if line.startswith("#   "):
            line = re.sub(rf"(?<= ){recipe}(?= )", RECIPE, line)
            lines[number] = re.sub(r"(slurm/\w+\.sh )(?=\w+(\.\w+)*=)", rf"\1{RECIPE} ", line)
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
