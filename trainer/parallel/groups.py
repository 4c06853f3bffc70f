"""Process groups of one rank: created once, passed as a value."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainer.parallel.cpu import megatron_calls
from trainer.parallel.environment import low_limit, raise_descriptor_limit, set_environment
from trainer.parallel.topology import Coordinates, Topology


@dataclass(frozen=True)
class Groups:
    """A rank's place and means of talking.

    In `world`, CPU tensors travel by gloo and CUDA tensors by NCCL; on GPUs the other groups carry CUDA tensors only.
    """

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
    """Join the process group named by RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; returns (rank, world, device).

    Collective: every rank of the world must call it.
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
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_sec))
    return dist.get_rank(), dist.get_world_size(), device


@contextlib.contextmanager
def device_groups(device: torch.device) -> Iterator[None]:
    """Let groups that are created inside, without a backend of their own, carry tensors of `device` only.

    Megatron and DeepSpeed send no others. By default a group inherits the world's two backends, and with them a gloo
    group, whose sockets and threads nobody would use.
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
    """Create Megatron's groups for `topology` and name those the trainer uses itself.

    Collective: every rank of the world must call it.
    """
    from megatron.core import parallel_state, tensor_parallel

    with megatron_calls(), device_groups(device):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=topology.tp,
            pipeline_model_parallel_size=topology.pp,
            create_gloo_process_groups=False,  # they serve Megatron's own checkpoints
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        replica = parallel_state.get_model_parallel_group()
    assert set(dist.get_process_group_ranks(replica)) == set(topology.replica_ranks(topology.coordinates(rank).dp))
    world = dist.group.WORLD
    assert world is not None
    return Groups(topology, rank, device, world, replica)
