"""The division of the audio side's parameters, gradients and optimizer state among ranks by ZeRO-3.

The ranks are divided into blocks of `parallel.audio_shard` consecutive ranks, by default one block of all ranks. An
encoder expert is sharded over those ranks of a block that hold it, and all other modules are sharded over the whole
block. Blocks hold copies of the same partitions, as in MiCS (Zhang et al. 2022, arXiv 2205.00119): weights are gathered
within a block, and gradients are reduced within a block and then summed over blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups

from model.audio_tower import AudioTower
from trainer.parallel.topology import Topology


def partition(tower: AudioTower, ds_config: dict[str, Any], topology: Topology, rank: int) -> None:
    """Shard every parameter over the ranks that share it.

    Collective: every rank of the world must call it.

    `deepspeed.initialize` would shard any remaining parameter over the wrong group.
    """
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False)
    block: Any = None
    replicas: Any = None
    if topology.num_shard_copies > 1:
        block = _group(topology.shard_groups(of_experts=False), rank)
        replicas = block if topology.ep == 1 else _group(topology.shard_groups(of_experts=True), rank)
    elif topology.ep > 1:
        replicas = _deepspeed_replicas(topology.ep)
    for name, module in tower.named_children():
        group = replicas if name == "experts" else block
        deepspeed.zero.Init(module=module, data_parallel_group=group, config_dict_or_path=ds_config)
    if topology.ep > 1 and topology.num_shard_copies == 1:
        for parameter in tower.experts.parameters():
            # With this value, DeepSpeed averages gradients over all ranks instead of only the encoder ranks. It does so
            # only if weights are gathered per module, which is not allowed with several blocks.
            parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
            parameter.ds_zero_partition_group_name = _name(topology.ep)  # type: ignore[attr-defined]


def copies_of_partitions(topology: Topology, rank: int) -> dist.ProcessGroup | None:
    """Return the group of ranks that hold copies of this rank's partitions, or None if no other rank holds a copy.

    Collective: every rank of the world must call it.
    """
    if topology.num_shard_copies == 1:
        return None
    return _group([topology.shard_copies(first) for first in range(topology.shard_ranks)], rank)


def _group(groups: Sequence[range], rank: int) -> dist.ProcessGroup:
    """Create process groups, and return the one that contains `rank`.

    Collective: every rank of the world must call it with the same `groups`.
    """
    found = [dist.new_group(list(ranks)) for ranks in groups]
    mine: dist.ProcessGroup = next(g for g, ranks in zip(found, groups, strict=True) if rank in ranks)
    return mine


def _deepspeed_replicas(ep: int) -> Any:
    """Return the group of ranks that hold the same encoder experts as this rank, as DeepSpeed creates it."""
    if _name(ep) not in deepspeed_groups._get_expert_data_parallel_group_dict():
        deepspeed_groups._create_expert_and_data_parallel(ep)
    return deepspeed_groups._get_expert_data_parallel_group(_name(ep))


def _name(ep: int) -> str:
    return f"ep_size_{ep}"
