"""Activation memory of a stage of the LLM in the 1F1B schedule, traced with the real modules."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from model.llm.attention import PackedAttention
from model.llm.context import ContextPart
from model.llm.features import attention_layers
from model.llm.megatron import embed_tokens
from model.llm.packing import PackedSequences
from model.llm.stages import Recompute, stage_chunks
from model.lora import NO_ADAPTERS, Adapters
from trainer.engine.optim import OptimConfig
from trainer.parallel.topology import Topology
from trainer.plan.experts import as_dense, expert_plan
from trainer.plan.fake_ranks import fake_rank
from trainer.plan.mechanisms import AS_BUILT, Mechanisms
from trainer.plan.states import build_stage
from trainer.plan.trace import PackedFlash, Traced, extrapolated, trace
from trainer.plan.what_if import what_if_bytes


@dataclass(frozen=True)
class StageMemory:
    """The memory of one stage of the LLM besides its model states, in bytes."""

    traced: Traced
    """The traced memory of one micro-batch."""
    layers: int
    """The bytes that the layers alone keep for one micro-batch."""
    buffer: int
    """The buffer in which Megatron's sequence parallelism gathers hidden states. It stays allocated."""
    boundary: int
    """The hidden states [t/(CP·TP), H] of a micro-batch that are sent between stages."""
    audio: int
    """The received audio embeddings of all micro-batches on stage 0; 0 on other stages."""
    graphed: int = 0
    """The bytes that the capture of CUDA graphs holds for one micro-batch (`Mechanisms.mlp`)."""
    smaller_weights: int = 0
    """The bytes by which weights in fp8 are smaller than the weights of the model states."""

    def peak(self, in_flight: float, virtual_stages: int = 1) -> int:
        """Return the peak bytes of activations while `in_flight` micro-batches await their backward passes.

        With virtual stages, the activations of the embedding and the output layer are counted for one micro-batch. The
        gradients of the audio embeddings are as large as the embeddings, and are concatenated after the last
        micro-batch. CUDA graphs are captured in the order of the schedule.
        """
        worst = max(self.traced.forward, self.traced.backward)
        waiting = self.layers if virtual_stages > 1 else self.traced.kept
        trained = int((in_flight - 1) * waiting) + worst + 2 * (self.audio + self.boundary)
        return max(trained, 3 * self.audio, int(in_flight * self.graphed))


def in_flight(stage: int, pp: int, microbatches: int) -> int:
    """Return the largest number of micro-batches that a stage holds between their forward and backward passes.

    The schedule is Megatron's 1F1B (Narayanan et al. 2021, arXiv 2104.04473).
    """
    return min(pp - stage, microbatches)


def interleaved_in_flight(stage: int, pp: int, microbatches: int, virtual_stages: int) -> float:
    """Return the largest number of micro-batches, in units of a whole stage, that a rank with virtual stages holds.

    A rank starts 2 (PP - stage - 1) + (V - 1) PP + 1 forward passes of its V chunks before the first backward pass
    (megatron-core 0.16.1, `get_pp_rank_microbatches`).
    """
    if virtual_stages == 1:
        return in_flight(stage, pp, microbatches)
    chunks = min(2 * (pp - stage - 1) + (virtual_stages - 1) * pp + 1, microbatches * virtual_stages)
    return chunks / virtual_stages


@dataclass(frozen=True)
class Kernels:
    """The settings that determine which kernels a rank runs, and therefore which tensors it keeps."""

    device: str = "cuda"
    """The type of device, `cuda` or `cpu`."""
    deterministic: bool = False
    """The value of `train.deterministic`. If it is false, attention in bf16 on GPUs needs no padding of packs."""
    mechanisms: Mechanisms = AS_BUILT

    def attends_unpadded(self, dtype: torch.dtype) -> bool:
        """Return whether attention in `dtype` reads packs without padding, if its kernel supports the LLM."""
        return not self.deterministic and self.device == "cuda" and dtype != torch.float32


def stage_memory(
    hf_config: PretrainedConfig,
    topology: Topology,
    stage: int,
    lengths: tuple[int, ...],
    num_packs: int,
    *,
    optim: OptimConfig,
    dtype: torch.dtype,
    recompute: Recompute,
    kernels: Kernels,
    adapters: Adapters = NO_ADAPTERS,
) -> StageMemory:
    """Return the memory of a pipeline stage besides its model states.

    All layers of a stage have the same shapes, and are assumed to have the same attention. The stage is therefore
    traced with one layer and with two layers, and every further layer is assumed to need as much as the second one.

    Args:
        hf_config: The configuration of the whole LLM.
        topology: The layout of the ranks.
        stage: The index of the stage.
        lengths: The lengths of a pack's segments, in tokens. Their sum is t, the length of the pack.
        num_packs: The number of micro-batches in a step.
        optim: The optimizer settings, which determine the frozen parameters.
        dtype: The dtype of weights and activations.
        recompute: The value of `train.recompute_llm`.
        kernels: The settings that determine which kernels the ranks run.
        adapters: The low-rank adapters.
    """
    layers = sum(stage_chunks(hf_config.num_hidden_layers, topology.pp, topology.vp, stage))
    plain = dataclasses.replace(topology, vp=1)
    experts = expert_plan(hf_config, topology, sum(lengths), num_packs, dtype.itemsize, recompute == "full")
    hf_config = as_dense(hf_config)
    found, buffer = [], 0
    with fake_rank(plain, topology.rank_of(0, stage, 0)):
        for count in range(1, min(2, layers) + 1):
            small = _with_equal_layers(hf_config, count * topology.pp)
            (gpt,), (model,) = build_stage(small, plain, stage, optim, dtype, recompute, adapters)
            traced, buffer = _trace(gpt, model, topology, stage, lengths, kernels)
            found.append(traced)
    hidden = sum(lengths) // (topology.cp * topology.tp) * hf_config.hidden_size * dtype.itemsize
    whole = extrapolated(found, layers)
    what_if = what_if_bytes(hf_config, topology, sum(lengths) // topology.cp, dtype, recompute, kernels.mechanisms)
    change = what_if.kept
    if experts is not None:
        change += experts.layer_bytes * experts.num_layers // hf_config.num_hidden_layers
    # With full recomputation, `change` applies only to the layer that is being recomputed.
    kept = 0 if recompute == "full" else layers * change
    in_layers = layers * (found[-1].kept - found[0].kept) if layers > 1 else whole.kept
    whole = Traced(whole.kept + kept, whole.forward + (kept or change), whole.backward + (kept or change))
    received = num_packs * hidden if stage == 0 else 0
    fewer = layers * what_if.graphed, layers * what_if.smaller_weights
    return StageMemory(whole, in_layers + kept, buffer, hidden, received, *fewer)


def _with_equal_layers(hf_config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """Return the config of an LLM with `num_layers` layers that all have the most frequent attention in `hf_config`.

    Layers of one kind share the cosines, sines and mask of a pack. If the second layer were of a different kind, it
    would allocate its own, and the extrapolation would count them for every layer.
    """
    small, layers = copy.deepcopy(hf_config), attention_layers(hf_config)
    typical = layers.index(max(layers, key=layers.count))
    small.num_hidden_layers = num_layers
    for key in ("layer_types", "no_rope_layers"):
        if getattr(hf_config, key, None) is not None:
            setattr(small, key, [getattr(hf_config, key)[typical]] * num_layers)
    return small


def _trace(
    gpt: Any, model: nn.Module, topology: Topology, stage: int, lengths: tuple[int, ...], kernels: Kernels
) -> tuple[Traced, int]:
    """Return the traced memory of one micro-batch, and the bytes of Megatron's gathering buffer."""
    from megatron.core import parallel_state

    packed = PackedSequences(lengths=lengths)
    if topology.cp > 1:
        packed = PackedSequences.of_part(lengths, ContextPart(0, topology.cp))
    config, rows = gpt.config, packed.num_tokens
    share, dtype = rows // topology.tp, config.params_dtype

    def forward() -> Tensor:
        decoder_input = labels = None
        if stage == 0:
            text = embed_tokens(gpt, torch.empty(rows, dtype=torch.int64))
            arrived = torch.empty(share, 1, config.hidden_size, dtype=dtype, requires_grad=True)
            decoder_input = torch.where(torch.empty(share, 1, 1, dtype=torch.bool), arrived, text)
        else:
            gpt.set_input_tensor(torch.empty(share, 1, config.hidden_size, dtype=dtype, requires_grad=True))
        if stage == topology.pp - 1:
            labels = torch.empty(1, rows, dtype=torch.int64)
        output: Tensor = model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=decoder_input,
            labels=labels,
            packed_seq_params=packed,
        )
        return output if labels is None else output.float().sum()

    unpadded = kernels.attends_unpadded(dtype)
    for module in gpt.modules():
        if unpadded and isinstance(module, PackedAttention) and module.can_fuse:
            module.fused = PackedFlash()
    states = [*gpt.parameters(), *(p.main_grad for p in gpt.parameters() if hasattr(p, "main_grad"))]
    gpt.train()
    with torch.no_grad():
        forward()  # allocates Megatron's own buffers
    buffers = list(parallel_state.get_global_memory_buffer().buffer.values())
    return trace(forward, [*states, *buffers], kernels.device), sum(t.untyped_storage().nbytes() for t in buffers)
