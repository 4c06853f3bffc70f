"""Bytes that a rank holds from its first step to its last: weights, gradients, optimizer. Exact.

The LLM's are those of the real modules of the rank's stage in Megatron's real buffers, built on the meta device; the
distributed optimizer gives every data-parallel rank an equal run of each buffer (megatron-core 0.16.1,
`DistributedOptimizer._build_model_gbuf_range`). The audio side's are those of the real modules too: ZeRO-3 gives each
of the n ranks that share a parameter ceil(numel / n) elements of it (deepspeed 0.19.8, `Init._partition_param`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from model.llm.megatron import build_megatron
from model.llm.weights import global_parameters
from trainer.engine.llm import data_parallel, freeze
from trainer.engine.optim import OptimConfig, setting_of
from trainer.parallel.topology import Topology

FP32_BYTES = 4
_MOMENTS = 2
_STEP_BYTES = 4
"""AdamW's step count, one per tensor that it updates."""


@dataclass(frozen=True)
class States:
    """Bytes of model states on one rank's device."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    """fp32 master weights (ZeRO-3's always, Megatron's with bf16) and AdamW's two moments."""
    snapshot: int = 0
    """Bytes of host memory that a save copies the states to, at most: fp32 weights, moments, and what is frozen."""

    def __add__(self, other: States) -> States:
        return States(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.snapshot + other.snapshot,
        )

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Offload:
    """Which of ZeRO-3's states live in the host's memory instead (`zero_optimization.offload_*`)."""

    weights: bool = False
    optimizer: bool = False
    """Gradients go with it."""

    @classmethod
    def of(cls, ds_json: dict[str, Any]) -> Offload:
        """As a DeepSpeed JSON says."""
        zero = ds_json["zero_optimization"]
        weights, optimizer = ((zero.get(k) or {}).get("device", "none") for k in ("offload_param", "offload_optimizer"))
        return cls(weights != "none", optimizer != "none")


def build_stage(
    hf_config: PretrainedConfig, topology: Topology, stage: int, optim: OptimConfig, dtype: torch.dtype, recompute: bool
) -> tuple[Any, nn.Module]:
    """(GPTModel, the same wrapped for data parallelism) of a pipeline stage; within `fake_rank` of one of its ranks.

    Where nothing of the LLM learns, the second is the first.
    """
    gpt = build_megatron(
        hf_config,
        tp_size=topology.tp,
        pp_size=topology.pp,
        first_stage=stage == 0,
        last_stage=stage == topology.pp - 1,
        dtype=dtype,
        recompute=recompute,
    )
    settings = freeze(gpt, hf_config, optim)
    return gpt, gpt if all(s.frozen for s in settings.values()) else data_parallel(gpt)


def llm_states(gpt: nn.Module, model: nn.Module, topology: Topology, dtype: torch.dtype) -> list[States]:
    """Of every data-parallel rank of the stage that `build_stage` built."""
    buffers = list(getattr(model, "buffers", ())) if model is not gpt else []
    frozen = sum(p.numel() for _, p in global_parameters(gpt) if not p.requires_grad)
    weights = frozen * dtype.itemsize + sum(b.param_data.numel() * b.param_data.element_size() for b in buffers)
    gradients = sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers)
    per_element = FP32_BYTES * (_MOMENTS + (dtype != torch.float32))
    found = []
    for dp in range(topology.dp):
        runs = [run for buffer in buffers for run in _runs(buffer, dp, topology.dp)]
        optimizer = sum(runs) * per_element + len(runs) * _STEP_BYTES
        snapshot = sum(runs) * FP32_BYTES * (_MOMENTS + 1) + (frozen * dtype.itemsize if dp == 0 else 0)
        found.append(States(weights, gradients, optimizer, snapshot))
    return found


def _runs(buffer: Any, dp: int, dp_size: int) -> Iterable[int]:
    """Elements of each parameter that data-parallel rank `dp` updates."""
    for start, end, bucket in buffer.param_index_map.values():
        first, last = buffer.bucket_indices[bucket]
        share = (last - first) // dp_size
        mine = min(end, first + (dp + 1) * share) - max(start, first + dp * share)
        if mine > 0:
            yield mine


def audio_states(
    tower: nn.Module, optim: OptimConfig, topology: Topology, dtype: torch.dtype, offload: Offload
) -> States:
    """Of a rank that holds `tower` (with its own experts only)."""
    total = learned = 0
    groups = set()
    for name, parameter in tower.named_parameters():
        expert = name.startswith("experts.")
        sharers = topology.world // topology.ep if expert else topology.world
        share = -(-parameter.numel() // sharers)
        total += share
        setting = setting_of(optim, f"audio.{name}", parameter.dim())
        if parameter.requires_grad and not setting.frozen:
            learned += share
            groups.add((setting.lr, setting.weight_decay, expert and topology.ep > 1))
    # A master copy in fp32 too: DeepSpeed would share the weights there, but compares a device with its name for it.
    optimizer = learned * FP32_BYTES * (_MOMENTS + 1) + len(groups) * _STEP_BYTES
    return States(
        0 if offload.weights else total * dtype.itemsize,
        0 if offload.optimizer else learned * FP32_BYTES,
        0 if offload.optimizer else optimizer,
        learned * FP32_BYTES * (_MOMENTS + 1) + (total - learned) * dtype.itemsize,
    )
