"""List recipes, print a recipe with all its values, or explain the keys.

earshot recipe                        list the recipes that are part of the project
earshot recipe --keys optim           explain every key of a section: its type, default and meaning
earshot recipe --show kit_cpu         print a recipe with all its values, including defaults
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence

from model.errors import UserError

_MAX_WIDTH = 120
"""The largest width of the list of recipes, in columns."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_intermixed_args(sys.argv[1:] if arguments is None else list(arguments))
    try:
        print(_text(options), end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _text(options: argparse.Namespace) -> str:
    from trainer.config.load import RECIPES, dump, load_recipe, recipe_names

    if options.show is not None:
        return dump(load_recipe(options.show, options.overrides))
    if options.overrides:
        first = options.overrides[0]
        raise UserError(
            f"{first}: unexpected argument; to show a recipe use --show {'RECIPE' if '=' in first else first}, and put "
            "key=value overrides after it"
        )
    if options.markdown or options.keys is not None:
        from trainer.config.reference import as_markdown, as_text, sections

        if options.markdown:
            return as_markdown(sections())
        found = sections(options.keys or None)
        if not found:
            known = dict.fromkeys(s.path.split(".")[0] for s in sections() if s.path)
            raise UserError(f"--keys {options.keys}: no such section; choose one of {', '.join(known)}")
        return as_text(found) + "\n"
    names = recipe_names()
    indent = max(map(len, names)) + 2
    width = min(shutil.get_terminal_size().columns, _MAX_WIDTH)
    lines = []
    for name in names:
        head = _first_sentences(RECIPES.joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
        lines += textwrap.wrap(head, width, initial_indent=f"{name:{indent}}", subsequent_indent=" " * indent)
    return "\n".join(lines) + "\n"


def _first_sentences(recipe: str) -> str:
    """Return the first two sentences of the comment at the start of a recipe."""
    comment = itertools.takewhile(
        lambda line: line.startswith("# ") and not line.startswith("#   "), recipe.splitlines()
    )
    return " ".join(re.split(r"(?<=\.) ", " ".join(line.removeprefix("# ") for line in comment))[:2])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="earshot recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--keys", nargs="?", const="", metavar="SECTION", help="explain all keys, or the keys of one section"
    )
    kind.add_argument(
        "--show", metavar="RECIPE", help="print a recipe with all its values; key=value overrides may follow"
    )
    kind.add_argument("--markdown", action="store_true", help="print the text of docs/recipe.md")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="with --show: recipe keys to change")
    return parser


if __name__ == "__main__":
    sys.exit(main())
