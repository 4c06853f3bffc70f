"""The process groups of a rank, created once and passed as a value."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from model.llm.context import ContextPart
from trainer.parallel.cpu import megatron_calls
from trainer.parallel.environment import low_limit, raise_descriptor_limit, set_environment
from trainer.parallel.meeting import on_one_machine, open_store, stay_on_this_machine
from trainer.parallel.topology import Coordinates, ExpertCoordinates, Topology


@dataclass(frozen=True)
class Groups:
    """The position of a rank and its process groups.

    The group `world` uses gloo for CPU tensors and NCCL for CUDA tensors. On GPUs, the other groups accept only CUDA
    tensors.
    """

    topology: Topology
    """The grid of ranks."""
    rank: int
    """The number of this rank in the world."""
    device: torch.device
    """The device on which this rank computes."""
    world: dist.ProcessGroup
    """All ranks."""
    replica: dist.ProcessGroup
    """The TP·PP ranks that together hold this rank's copy of the LLM's weights."""

    @property
    def place(self) -> Coordinates:
        """The coordinates of this rank."""
        return self.topology.coordinates(self.rank)

    @property
    def part(self) -> ContextPart:
        """The part of every pack that this rank holds."""
        return ContextPart(self.place.cp, self.topology.cp)

    @property
    def without_context(self) -> Groups:
        """These groups, with a topology in which context-parallel ranks count as replicas.

        They are used for packs that are not divided among context-parallel ranks.
        """
        return replace(self, topology=self.topology.without_context)

    @property
    def expert_place(self) -> ExpertCoordinates:
        """The coordinates of this rank in the grid of the LLM's FFN experts."""
        return self.topology.expert_coordinates(self.rank)

    @property
    def is_first_stage(self) -> bool:
        """True if this rank holds the first pipeline stage."""
        return self.place.pp == 0

    @property
    def is_last_stage(self) -> bool:
        """True if this rank holds the last pipeline stage."""
        return self.place.pp == self.topology.pp - 1


COLLECTIVE_TIMEOUT_SEC = 1800.0
"""The default time in seconds after which a collective fails."""


def connect(timeout_sec: float = COLLECTIVE_TIMEOUT_SEC) -> tuple[int, int, torch.device]:
    """Join the process group that the environment variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    `trainer.parallel.meeting` explains how the ranks find each other, and which other processes could connect.

    Collective: every rank of the world must call it.

    Args:
        timeout_sec: The time in seconds after which a collective fails.

    Returns:
        This rank, the number of ranks, and this rank's device.
    """
    set_environment()
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():
        warning = low_limit(raise_descriptor_limit(), int(os.environ.get("WORLD_SIZE", "1")), device.type == "cuda")
        if warning is not None and os.environ.get("RANK", "0") == "0":
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        if on_one_machine(os.environ):
            stay_on_this_machine(os.environ)
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        timeout = datetime.timedelta(seconds=timeout_sec)
        store = open_store(rank, world, timeout, os.environ)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return dist.get_rank(), dist.get_world_size(), device


@contextlib.contextmanager
def device_groups(device: torch.device) -> Iterator[None]:
    """Restrict groups that are created within the block to tensors on `device`, unless a backend is given explicitly.

    Megatron and DeepSpeed send only tensors on the device. By default, a group would inherit both backends of the
    world, and gloo would open sockets and start threads that are never used.
    """
    original = dist.new_group

    def new_group(
        ranks: Any = None, timeout: datetime.timedelta | None = None, backend: str | None = None, **options: Any
    ) -> Any:
        return original(ranks, timeout, backend or "nccl", **options)

    if device.type == "cuda":
        dist.new_group = new_group  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.new_group = original


def build_groups(topology: Topology, rank: int, device: torch.device, seed: int) -> Groups:
    """Create Megatron's process groups for a topology, and return the groups that the trainer itself uses.

    Collective: every rank of the world must call it.

    Args:
        topology: The grid of ranks.
        rank: This rank.
        device: The device of this rank.
        seed: The seed of Megatron's random generators.
    """
    from megatron.core import parallel_state, tensor_parallel

    with megatron_calls(), device_groups(device):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=topology.tp,
            pipeline_model_parallel_size=topology.pp,
            context_parallel_size=topology.cp,
            expert_model_parallel_size=topology.ffn_ep,
            expert_tensor_parallel_size=topology.expert_tp,
            virtual_pipeline_model_parallel_size=topology.vp if topology.vp > 1 else None,
            create_gloo_process_groups=False,  # Only Megatron's own checkpoints use them.
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        replica = parallel_state.get_model_parallel_group()
        at = (
            parallel_state.get_expert_data_parallel_rank(),
            parallel_state.get_expert_model_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_rank(),
        )
    assert topology.expert_coordinates(rank) == at, (topology, rank, at)
    world = dist.group.WORLD
    assert world is not None
    groups = Groups(topology, rank, device, world, replica)
    copy = groups.without_context
    assert set(dist.get_process_group_ranks(replica)) == set(copy.topology.replica_ranks(copy.place.dp))
    return groups
