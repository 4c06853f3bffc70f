"""`python -m trainer.job.check RECIPE key=value …`: what must a job know of a recipe, and is there what it reads?

A line of stdout is a JSON object, see `Facts`: also where the data is then found missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError

if TYPE_CHECKING:
    from trainer.data.config import DataConfig


@dataclass(frozen=True)
class Facts:
    """Of a recipe, what a job must know."""

    run_dir: str
    num_ranks: int
    tensor: int
    stores: tuple[str, ...]
    """URLs of buckets that samples are read from."""
    tracker: str | None
    """URL of the MLflow server; None: files, or none."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line that tells what to mend."""
    parser = argparse.ArgumentParser(prog="python -m trainer.job.check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--retry-sec", type=float, default=10.0, help="how long a bucket may be away (default 10)")
    options = parser.parse_args(arguments)
    try:
        _check(options.recipe, options.overrides, options.retry_sec)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _check(name: str, overrides: Sequence[str], retry_sec: float) -> None:
    from trainer.config.load import load_recipe
    from trainer.storage.open import join_url, scheme_of
    from trainer.telemetry.tracker import tracking_uri

    recipe = load_recipe(name, overrides)
    run_root = Path(recipe.train.run_dir)
    tracker = tracking_uri(run_root) if recipe.telemetry.mlflow else ""
    urls = [join_url(recipe.data.root, part.shards) for part in recipe.data.sets if part.shards is not None]
    facts = Facts(
        str(run_root / recipe.name),
        recipe.parallel.num_ranks,
        recipe.parallel.tensor,
        tuple(url for url in urls if scheme_of(url)),
        tracker if tracker.startswith("http") else None,
    )
    print(json.dumps(asdict(facts)), flush=True)  # also where the data is then refused: that belongs to this run
    check_data(recipe.data, retry_sec)


def check_data(data: DataConfig, retry_sec: float) -> None:
    """Ask for every manifest and every shard index.

    Raises:
        UserError: one is not there, or cannot be read.
    """
    from trainer.data.shards import read_index
    from trainer.storage.open import join_url, open_store

    if not data.sets:
        raise UserError("data.sets is empty: give at least one set with a manifest or shards")
    for part in data.sets:
        if part.shards is not None:
            read_index(open_store(join_url(data.root, part.shards), retry_sec))
        elif part.manifest is not None and not (path := Path(data.root) / part.manifest).is_file():
            raise UserError(f"data.sets '{part.name}': {path}: no such file; check data.root = {data.root}")


if __name__ == "__main__":
    sys.exit(main())
