"""Copies in host memory of what a rank saves: the only part of a save for which training stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trainer.checkpoint.layout import Shard

_ALIGNMENT = 64


class HostBuffer:
    """Memory that is allocated once and filled at every save: fresh pages would cost more than the copy."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._memory = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def copy(self, shards: Sequence[Shard]) -> list[Shard]:
        """The shards with their values here. What an earlier call returned is overwritten."""
        sizes = [_padded(value) for shard in shards for value in shard.values.values()]
        if sum(sizes) > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # free it first
            self._memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self._pinned)
        at, copies = 0, []
        for shard in shards:
            values = {}
            for kind, value in shard.values.items():
                num_bytes = value.numel() * value.element_size()
                place = self._memory[at : at + num_bytes].view(value.dtype).view(value.shape)
                values[kind] = place.copy_(value, non_blocking=True)
                at += _padded(value)
            copies.append(replace(shard, values=values))
        if self._pinned:
            torch.cuda.synchronize()
        return copies


def _padded(value: Tensor) -> int:
    num_bytes = value.numel() * value.element_size()
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
