"""The origin of every expert in the LLM's layers, which checkpoints, exports and profiles state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.errors import UserError
from trainer.config.convert import from_tree

KEY = "ffn_experts"
"""The entry of a checkpoint's state with the origins."""


@dataclass(frozen=True)
class Provenance:
    """The origin of an expert."""

    name: str
    """The name of the expert."""
    origin: str
    """The value of `from` in the recipe."""
    run: str
    """The name of the run; empty if the expert is not from a run."""
    step: int | None
    """The number of steps after which the checkpoint was saved; None if it is not from a run."""
    recipe: str
    """The SHA-256 digest of the recipe of the run; empty if it is not from a run."""
    datasets: tuple[str, ...]
    """The manifests of the datasets that the run was trained on."""
    checkpoint: str
    """The SHA-256 digest of the manifest of the checkpoint, which contains the checksums of all its files."""
    tensors: str
    """The SHA-256 digest of the expert's initial weights in fp32, layer by layer: gate, up, down."""


def read_origins(tree: Any, where: str) -> list[Provenance]:
    """Return the origins in the state of a checkpoint; none if the LLM got no experts.

    Args:
        tree: The entry `KEY`, which may be anything; None if there is none.
        where: The place of the checkpoint, for error messages.

    Raises:
        UserError: If the entry is not what a run writes.
    """
    if tree is None:
        return []
    if not isinstance(tree, list):
        raise UserError(f"{where}: {KEY} is not a list; use another checkpoint")
    try:
        return [from_tree(Provenance, one, KEY) for one in tree]
    except UserError as error:
        raise UserError(f"{where}: {error}; use another checkpoint") from None
