"""Process groups of one rank: created once, passed as a value."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainer.parallel.cpu import megatron_calls
from trainer.parallel.topology import Coordinates, Topology


@dataclass(frozen=True)
class Groups:
    """A rank's place and means of talking. CPU tensors travel by gloo, CUDA tensors by NCCL, in the same groups."""

    topology: Topology
    rank: int
    device: torch.device
    world: dist.ProcessGroup
    replica: dist.ProcessGroup
    """The TP·PP ranks that hold one LLM."""

    @property
    def place(self) -> Coordinates:
        return self.topology.coordinates(self.rank)

    @property
    def is_first_stage(self) -> bool:
        return self.place.pp == 0

    @property
    def is_last_stage(self) -> bool:
        return self.place.pp == self.topology.pp - 1


COLLECTIVE_TIMEOUT_SEC = 1800.0
"""A collective that takes longer fails."""


def connect(timeout_sec: float = COLLECTIVE_TIMEOUT_SEC) -> tuple[int, int, torch.device]:
    """Join the process group named by RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; returns (rank, world, device)."""
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_sec))
    return dist.get_rank(), dist.get_world_size(), device


def build_groups(topology: Topology, rank: int, device: torch.device, seed: int) -> Groups:
    """Create Megatron's groups for `topology` and name those the trainer uses itself."""
    from megatron.core import parallel_state, tensor_parallel

    with megatron_calls():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=topology.tp,
            pipeline_model_parallel_size=topology.pp,
            create_gloo_process_groups=True,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        replica = parallel_state.get_model_parallel_group()
    assert set(dist.get_process_group_ranks(replica)) == set(topology.replica_ranks(topology.coordinates(rank).dp))
    world = dist.group.WORLD
    assert world is not None
    return Groups(topology, rank, device, world, replica)
