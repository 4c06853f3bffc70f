"""Compare the weights of two checkpoints, which may have been written by different topologies."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer.checkpoint.layout import PARAM, is_frozen
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.rect import matrix_of


@dataclass(frozen=True)
class Difference:
    """The differences between the weights of two checkpoints. Optimizer state is not compared."""

    changed: dict[str, float]
    """The relative change in each tensor: the norm of the difference divided by the tensor's norm in the first
    checkpoint."""
    num_equal: int
    """The number of tensors that are equal."""
    only_first: list[str]
    """The tensors of the first checkpoint that the second one lacks or has in a different shape."""
    only_second: list[str]
    """The tensors of the second checkpoint that the first one lacks or has in a different shape."""


def diff(first: Reader, second: Reader) -> Difference:
    """Compare the weights of two checkpoints, with at most two tensors in memory at once."""
    a, b = first.manifest.tensors, second.manifest.tensors
    common = [name for name in a if name in b and a[name].shape == b[name].shape]
    changed = {}
    for name in common:
        if a[name] == b[name] and is_frozen(a[name]):
            continue  # Both checkpoints refer to the same frozen file.
        whole = matrix_of(a[name].shape)
        before, after = (torch.empty(whole.rows, whole.cols, dtype=torch.float32) for _ in range(2))
        first.read_rect(name, PARAM, whole, before)
        second.read_rect(name, PARAM, whole, after)
        if not before.equal(after):
            changed[name] = float((after - before).norm() / before.norm().clamp(min=1e-30))
    same = set(common)
    return Difference(
        changed, len(common) - len(changed), [n for n in a if n not in same], [n for n in b if n not in same]
    )
