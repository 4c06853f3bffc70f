"""Check, before a job starts, that the data and weights of its recipe exist.

    python -m trainer.job.check RECIPE key=value …

The command also prints the properties of the recipe (`Facts`) as one line of JSON, even if data or weights are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from model.errors import UserError

if TYPE_CHECKING:
    from trainer.config.schema import Recipe


@dataclass(frozen=True)
class Facts:
    """The properties of a recipe that a job needs."""

    run_dir: str
    """The run's folder."""
    num_ranks: int
    tensor: int
    """The size of a tensor-parallel group."""
    min_nodes: int | None
    """The recipe's `restart.min_nodes`."""
    stores: tuple[str, ...]
    """URLs of the buckets from which samples are read."""
    trackers: tuple[str, ...]
    """URLs of the servers to which trackers send metrics."""
    host_gib: float = 0.0
    """The host memory that each node needs, according to the plan; 0 if there is no plan."""
    disk_gib: float = 0.0
    """The disk space that the run's checkpoints need, according to the plan; 0 if there is no plan, or if they are
    written to a bucket."""
    checkpoints: str = ""
    """The folder of the run's checkpoints; empty if they are written to a bucket."""
    plan: str = ""
    """The text of the plan; empty if there is none."""
    plan_json: str = ""
    """The numbers of the plan as one JSON object; empty if there is none."""
    fewer_ranks: tuple[int, ...] = ()
    """The smaller rank counts with which a restarted job may continue, the largest first."""
    ranks_per_node: int = 0
    """The number of ranks on a node; 0 if it is not needed."""

    @staticmethod
    def from_json(line: str) -> Facts:
        """Return the facts that a line of JSON contains."""
        tree = json.loads(line)
        fields: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in tree.items()}
        return Facts(**fields)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `python -m trainer.job.check`.

    Args:
        arguments: The command line's arguments; None uses those of the process.

    Returns:
        The exit code: 0, or 2 after printing an error.
    """
    parser = argparse.ArgumentParser(prog="python -m trainer.job.check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument(
        "--retry-sec", type=float, default=10.0, help="how long an unreachable bucket is retried (default 10)"
    )
    parser.add_argument(
        "--per-node",
        type=int,
        metavar="N",
        help="also check the smaller layouts that restart.min_nodes allows, with N ranks per node",
    )
    options = parser.parse_args(arguments)
    try:
        _check(options.recipe, options.overrides, options.retry_sec, options.per_node)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _check(name: str, overrides: Sequence[str], retry_sec: float, per_node: int | None) -> None:
    from trainer.config.load import load_recipe

    recipe = load_recipe(name, overrides)  # The modules below import torch, which takes seconds.
    from trainer.data.prepare import check_stored
    from trainer.storage.open import join_url, scheme_of
    from trainer.telemetry.trackers.table import TRACKERS, check_trackers

    run_root = Path(recipe.train.run_dir)
    check_trackers(recipe.telemetry.trackers)
    servers = [TRACKERS[name].server(run_root) for name in recipe.telemetry.trackers]
    urls = [join_url(recipe.data.root, part.shards) for part in recipe.data.datasets if part.shards is not None]
    facts = Facts(
        str(run_root / recipe.name),
        recipe.parallel.num_ranks,
        recipe.parallel.tensor,
        recipe.restart.min_nodes,
        tuple(url for url in urls if scheme_of(url)),
        tuple(_address(url) for url in servers if url is not None),
        checkpoints="" if scheme_of(recipe.run_url) else recipe.run_url,
    )
    if per_node is not None and recipe.restart.min_nodes is not None:
        facts = replace(facts, ranks_per_node=min(per_node, recipe.parallel.num_ranks))
        facts = replace(facts, fewer_ranks=fewer_ranks(recipe, facts.ranks_per_node))
    # If a check below fails, the caller records the failure in the run's folder, which these facts name.
    print(json.dumps(asdict(facts)), flush=True)
    check_weights(recipe, os.environ)
    check_stored(replace(recipe.data, retry_sec=retry_sec))


def fewer_ranks(recipe: Recipe, per_node: int) -> tuple[int, ...]:
    """Return the smaller rank counts that `restart.min_nodes` allows and for which the recipe is valid.

    Args:
        recipe: The recipe.
        per_node: The number of ranks on a node.

    Returns:
        The numbers, the largest first.

    Raises:
        UserError: If `restart.min_nodes` allows fewer nodes, but the recipe is not valid for any of these numbers.
    """
    from trainer.config.checks import check_recipe

    most, least = recipe.parallel.num_ranks // per_node - 1, recipe.restart.min_nodes
    assert least is not None
    found, why = [], ""
    for num_nodes in range(most, least - 1, -1):
        parallel = replace(recipe.parallel, num_ranks=num_nodes * per_node)
        try:
            check_recipe(replace(recipe, parallel=parallel))
        except UserError as error:
            why = why or str(error)
        else:
            found.append(parallel.num_ranks)
    if why and not found:
        nodes = f"{most} nodes" if least == most else f"any of {least} to {most} nodes"
        raise UserError(
            f"restart.min_nodes = {least}: the recipe is not valid on {nodes} of {per_node} ranks ({why}); change the "
            "recipe, or set restart.min_nodes=null"
        )
    return tuple(found)


def _address(url: str) -> str:
    """Return the scheme, host and port of a URL, without credentials, since other users can see a command line."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def check_weights(recipe: Recipe, environ: Mapping[str, str]) -> None:
    """Check that weights and tokenizers that a recipe names by hub id are on this machine if the hub is disabled.

    Args:
        recipe: The recipe.
        environ: The environment variables. HF_HUB_OFFLINE disables the hub.

    Raises:
        UserError: If weights or a tokenizer are missing while the hub is disabled.
    """
    if environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    model = recipe.model
    named = {"model.llm.weights": model.llm.weights, "data.tokenizer.path": recipe.data.tokenizer.path}
    named |= {"model.primary.weights": model.primary.weights} if model.primary is not None else {}
    named |= {f"model.experts '{expert.name}'.weights": expert.weights for expert in model.experts}
    for key, name in named.items():
        if name is None or Path(name).exists():
            continue
        file = "tokenizer_config.json" if key == "data.tokenizer.path" else "config.json"
        try:
            found = isinstance(try_to_load_from_cache(name, file), str)
        except HFValidationError:
            found = False
        if not found:
            raise UserError(
                f"{key} = {name}: neither a path nor in the hub's cache of this machine (HF_HOME), and HF_HUB_OFFLINE "
                f"is set; download it first: hf download {name}"
            )


if __name__ == "__main__":
    sys.exit(main())
