"""The origins of FFN experts, as they are stored in checkpoints and exports and printed by profiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.errors import UserError
from trainer.config.convert import from_tree

KEY = "ffn_experts"
"""The entry of a checkpoint's state that contains the origins."""


@dataclass(frozen=True)
class Provenance:
    """The origin of an FFN expert that a recipe adds to the LLM."""

    name: str
    """The name of the expert."""
    origin: str
    """The value of `from` in the recipe."""
    run: str
    """The name of the run; empty if the expert is not from a run."""
    step: int | None
    """The number of steps after which the donor's checkpoint was saved; None if the expert is not from a run."""
    recipe: str
    """The SHA-256 digest of the recipe of the run; empty if the expert is not from a run."""
    datasets: tuple[str, ...]
    """The manifests or folders of shards of the run's datasets."""
    checkpoint: str
    """The SHA-256 digest of the checkpoint's manifest, which contains the checksums of all its files."""
    tensors: str
    """The SHA-256 digest of the expert's initial weights in fp32, layer by layer in the order gate, up, down."""


def read_origins(tree: Any, where: str) -> list[Provenance]:
    """Return the origins in the state of a checkpoint; empty if the recipe added no FFN experts.

    Args:
        tree: The value of the entry `KEY`, of any type; None if the state does not have this entry.
        where: The URL of the checkpoint, for error messages.

    Raises:
        UserError: If the entry does not have the format that a run writes.
    """
    if tree is None:
        return []
    if not isinstance(tree, list):
        raise UserError(f"{where}: {KEY} is not a list; use another checkpoint")
    try:
        return [from_tree(Provenance, one, KEY) for one in tree]
    except UserError as error:
        raise UserError(f"{where}: {error}; use another checkpoint") from None
