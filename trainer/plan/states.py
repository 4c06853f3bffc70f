"""Model states of a rank (weights, gradients and optimizer state), in exact bytes.

The real modules of a rank are built on the meta device, and the bytes of their states are counted. For the LLM, these
are the modules of the rank's stage, in Megatron's own buffers. The distributed optimizer gives every data-parallel rank
an equal, contiguous part of each buffer (megatron-core 0.16.1, `DistributedOptimizer._build_model_gbuf_range`). For the
audio side, ZeRO-3 gives each of the n ranks that share a parameter ceil(numel / n) of its elements (deepspeed 0.19.8,
`Init._partition_param`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from model.llm.lora import add_llm_adapters
from model.llm.megatron import build_megatron
from model.llm.stages import Recompute
from model.llm.weights import global_parameters
from model.lora import NO_ADAPTERS, Adapters
from trainer.engine.llm_optimizer import FP32_REDUCTION, Reduction, data_parallel, freeze
from trainer.engine.optim import OptimConfig, setting_of
from trainer.parallel.topology import Topology

FP32_BYTES = 4
_MOMENTS = 2
_STEP_BYTES = 4
"""The size in bytes of AdamW's step counter. Each updated tensor has one."""
_NORM_BYTES = 16
"""The temporary bytes per gradient while the engines compute a gradient's norm: its fp64 copy, and the squares."""


@dataclass(frozen=True)
class States:
    """The number of bytes of model states on one rank's device."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    """AdamW's two moments and the fp32 master weights, which ZeRO-3 always keeps and Megatron keeps with bf16."""
    snapshot: int = 0
    """The largest number of bytes that a save copies to host memory: fp32 weights, moments, and frozen weights."""
    saved_once: int = 0
    """The part of `snapshot` that only the first save copies: frozen weights, which all checkpoints share."""
    gradient_copies: int = 0
    """The fp32 copies of the rank's part of bf16 gradients. They exist from an update to the next pass of the LLM."""
    norm: int = 0
    """The temporary bytes for the gradient norm, which is computed tensor by tensor. A sum has the larger value."""

    def __add__(self, other: States) -> States:
        return States(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.snapshot + other.snapshot,
            self.saved_once + other.saved_once,
            self.gradient_copies + other.gradient_copies,
            max(self.norm, other.norm),
        )

    @property
    def total(self) -> int:
        """The total number of bytes."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Offload:
    """The ZeRO-3 states that are kept in host memory (`zero_optimization.offload_*`)."""

    weights: bool = False
    optimizer: bool = False
    """True if the optimizer state, and with it the gradients, is kept in host memory."""

    @classmethod
    def of(cls, ds_json: dict[str, Any]) -> Offload:
        """Return the settings of a DeepSpeed JSON file."""
        zero = ds_json["zero_optimization"]
        weights, optimizer = ((zero.get(k) or {}).get("device", "none") for k in ("offload_param", "offload_optimizer"))
        return cls(weights != "none", optimizer != "none")


def build_stage(
    hf_config: PretrainedConfig,
    topology: Topology,
    stage: int,
    optim: OptimConfig,
    dtype: torch.dtype,
    recompute: Recompute = "none",
    adapters: Adapters = NO_ADAPTERS,
    reduction: Reduction = FP32_REDUCTION,
) -> tuple[list[Any], list[Any]]:
    """Build a pipeline stage of the LLM. It must be called within `fake_rank` of one of the stage's ranks.

    Args:
        hf_config: The configuration of the LLM.
        topology: The layout of the ranks.
        stage: The index of the stage.
        optim: The optimizer settings, which determine the frozen parameters.
        dtype: The dtype of weights and activations.
        recompute: The value of `train.recompute_llm`.
        adapters: The low-rank adapters.
        reduction: The settings for the exchange of gradients and weights between replicas.

    Returns:
        The stage's chunks, and the chunks wrapped for data parallelism. If the whole stage is frozen, both are the
        chunks.
    """
    chunks = build_megatron(
        hf_config,
        tp_size=topology.tp,
        pp_size=topology.pp,
        vp_size=topology.vp,
        cp_size=topology.cp,
        first_stage=stage == 0,
        last_stage=stage == topology.pp - 1,
        dtype=dtype,
        recompute=recompute,
        ep_size=topology.ffn_ep,
        expert_tp_size=topology.expert_tp,
    )
    for chunk in chunks:
        expert_tp = 0, topology.expert_tp
        add_llm_adapters(chunk, hf_config, adapters, tp_rank=0, tp_size=topology.tp, expert_tp=expert_tp)
    settings = freeze(chunks, hf_config, optim)
    if all(s.frozen for s in settings.values()):
        return chunks, chunks
    return chunks, data_parallel(chunks, reduction)


def llm_states(
    chunks: Sequence[nn.Module], models: Sequence[Any], topology: Topology, dtype: torch.dtype
) -> list[States]:
    """Return the LLM's states of every data-parallel rank.

    Args:
        chunks: The first result of `build_stage`.
        models: The second result of `build_stage`.
        topology: The layout of the ranks without context parallelism, because ranks with the same weights share their
            states.
        dtype: The dtype of the weights.
    """
    wrapped = [] if models is chunks else models
    dense = [buffer for model in wrapped for buffer in model.buffers]
    experts = [buffer for model in wrapped for buffer in model.expert_parallel_buffers]
    num_copies = topology.dp * topology.tp // (topology.ffn_ep * topology.expert_tp)
    frozen = sum(p.numel() for _, p in global_parameters(chunks) if not p.requires_grad)
    buffers = [*dense, *experts]
    weights = frozen * dtype.itemsize + sum(b.param_data.numel() * b.param_data.element_size() for b in buffers)
    gradients = sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers)
    per_element = FP32_BYTES * (_MOMENTS + (dtype != torch.float32))
    found = []
    for dp in range(topology.dp):
        copy = topology.expert_coordinates(topology.rank_of(dp, 0, 0)).dp
        spans = [span for buffer in dense for span in _spans(buffer, dp, topology.dp)]
        spans += [span for buffer in experts for span in _spans(buffer, copy, num_copies)]
        optimizer = sum(spans) * per_element + len(spans) * _STEP_BYTES
        once = frozen * dtype.itemsize if dp == 0 else 0
        snapshot = sum(spans) * FP32_BYTES * (_MOMENTS + 1) + once
        copies = sum(spans) * FP32_BYTES if any(b.grad_data.dtype != torch.float32 for b in buffers) else 0
        norm = max(spans, default=0) * _NORM_BYTES
        found.append(States(weights, gradients, optimizer, snapshot, once, copies, norm))
    return found


def _spans(buffer: Any, dp: int, dp_size: int) -> Iterable[int]:
    """Yield, for each parameter, the number of its elements that data-parallel rank `dp` updates, unless it is 0."""
    for start, end, bucket in buffer.param_index_map.values():
        first, last = buffer.bucket_indices[bucket]
        share = (last - first) // dp_size
        mine = min(end, first + (dp + 1) * share) - max(start, first + dp * share)
        if mine > 0:
            yield mine


def audio_states(
    tower: nn.Module, optim: OptimConfig, topology: Topology, dtype: torch.dtype, offload: Offload
) -> tuple[States, ...]:
    """Return the audio side's states of one rank in each block that holds the partitions of the whole audio side.

    The blocks differ only in the tensors that they save in checkpoints.

    Args:
        tower: The audio tower, with only those encoder experts that the rank holds.
        optim: The optimizer settings.
        topology: The layout of the ranks.
        dtype: The dtype of the weights.
        offload: The states that are kept in host memory.
    """
    total = learned = largest = 0
    groups = set()
    saved, saved_once = (np.zeros(topology.num_shard_copies, dtype=np.int64) for _ in range(2))
    for name, parameter in tower.named_parameters():
        expert = name.startswith("experts.")
        share = -(-parameter.numel() // topology.num_sharers(of_experts=expert))
        total += share
        setting = setting_of(optim, f"audio.{name}", parameter.dim())
        block = topology.saving_block(f"audio.{name}")
        if parameter.requires_grad and not setting.frozen:
            learned += share
            largest = max(largest, share)
            groups.add((setting.lr, setting.weight_decay, expert and topology.ep > 1))
            saved[block] += share * FP32_BYTES * (_MOMENTS + 1)
        else:
            saved_once[block] += share * dtype.itemsize
    # A master copy exists even with fp32 weights. DeepSpeed would use the weights themselves, but it checks this by
    # comparing a torch.device with a string, which is always false.
    optimizer = learned * FP32_BYTES * (_MOMENTS + 1) + len(groups) * _STEP_BYTES
    return tuple(
        States(
            0 if offload.weights else total * dtype.itemsize,
            0 if offload.optimizer else learned * FP32_BYTES,
            0 if offload.optimizer else optimizer,
            each + once,
            once,
            norm=largest * _NORM_BYTES,
        )
        for each, once in zip(saved.tolist(), saved_once.tolist(), strict=True)
    )
