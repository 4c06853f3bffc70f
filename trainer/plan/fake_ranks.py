"""Emulation of one rank of a cluster, with process groups of the full size and modules on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from trainer.parallel.cpu import megatron_calls
from trainer.parallel.topology import Topology

META = torch.device("meta")


@contextlib.contextmanager
def fake_rank(topology: Topology, rank: int) -> Iterator[None]:
    """Make this process act as `rank` of `topology` within the block.

    Megatron's process groups exist, but collectives return immediately without sending data. Tensors and modules are
    created on the meta device. The process must not see a GPU and must not have initialized `torch.distributed`.
    """
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not torch.cuda.is_available(), "hide the GPUs first (CUDA_VISIBLE_DEVICES=)"
    assert not dist.is_initialized(), "torch.distributed is already initialized in this process"
    dist.init_process_group("fake", rank=rank, world_size=topology.world, store=FakeStore())
    try:
        with torch.random.fork_rng(devices=[]), megatron_calls(META), META:
            parallel_state.initialize_model_parallel(
                topology.tp,
                topology.pp,
                topology.vp if topology.vp > 1 else None,
                context_parallel_size=topology.cp,
                expert_model_parallel_size=topology.ffn_ep,
                expert_tensor_parallel_size=topology.expert_tp,
                create_gloo_process_groups=False,
            )
            tensor_parallel.model_parallel_cuda_manual_seed(0)
            yield
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_global_memory_buffer()
        dist.destroy_process_group()
