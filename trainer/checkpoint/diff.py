"""What changed between two checkpoints, tensor by tensor, whatever topologies wrote them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer.checkpoint.layout import PARAM, matrix_of
from trainer.checkpoint.reader import Reader


@dataclass(frozen=True)
class Difference:
    """Of the weights; optimizer state is not compared."""

    changed: dict[str, float]
    """Norm of the change over the norm of the first one, by tensor."""
    num_equal: int
    only_first: list[str]
    only_second: list[str]
    """Tensors that the other lacks, or has in another shape."""


def diff(first: Reader, second: Reader) -> Difference:
    """Compare; holds two tensors at a time."""
    a, b = first.manifest.tensors, second.manifest.tensors
    common = [name for name in a if name in b and a[name].shape == b[name].shape]
    changed = {}
    for name in common:
        if a[name].pieces == b[name].pieces and all("/" in file for file, _ in a[name].pieces):
            continue  # the same frozen file
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
