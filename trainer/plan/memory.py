"""Peak memory of every distinct kind of rank, split by purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer.config.schema import Recipe
from trainer.engine.ds_config import BUCKET_ELEMENTS
from trainer.engine.optim import setting_of
from trainer.engine.placement import place
from trainer.parallel.packs import PackPlan
from trainer.parallel.topology import Topology
from trainer.plan.encoder_memory import AudioMemory, EncoderTracer, audio_memory
from trainer.plan.llm_memory import Kernels, StageMemory, interleaved_in_flight, stage_memory
from trainer.plan.ranks import DTYPES, RankStates, kinds_of_stages
from trainer.plan.sizes import SizedModel
from trainer.plan.states import FP32_BYTES, States
from trainer.plan.workload import EncoderWork, Workload


@dataclass(frozen=True)
class RankMemory:
    """The peak memory of the ranks of one kind, in bytes."""

    stages: tuple[int, ...]
    """The pipeline stages whose ranks are of this kind."""
    place: int
    """The position of these ranks in their expert-parallel groups."""
    states: States
    """The memory of weights, gradients and optimizer state."""
    activations: int
    """The memory of the LLM's activations."""
    encoder_activations: int
    """The memory of the audio side's activations."""
    buffers: int
    """The memory of ZeRO-3's buckets and gathered weights, Megatron's buffers, and tensors that are exchanged."""
    phase: str
    """The phase in which the peak occurs: `encode`, `llm`, `backward`, `reduce` or `update`."""
    phases: dict[str, tuple[int, int, int]]
    """The bytes of (activations, encoder activations, buffers), by phase."""
    whole_weights: int = 0
    """The part of the buffers for the audio side's whole weights; 0 if they are gathered per module."""
    whole_gradients: int = 0
    """The part of the buffers for the audio side's whole gradients in the backward pass; 0 if weights are gathered per
    module."""

    @property
    def total(self) -> int:
        """The peak memory."""
        return self.states.total + self.activations + self.encoder_activations + self.buffers


@dataclass(frozen=True)
class ZeroBuffers:
    """The memory that ZeRO-3 allocates for its own use, in bytes."""

    bucket: int
    """The buffer of gradients to be reduced (`reduce_bucket_size`). It stays allocated."""
    persistent: int
    """The parameters that stay gathered: small ones (`stage3_param_persistence_threshold`), or all of them."""
    gathered: int
    """The peak memory of the large parameters that are gathered while a module runs."""
    learned: int
    """The number of trainable parameters; a count, not bytes."""
    gradients: int = 0
    """The whole gradients of the backward pass, which are reduced at the end of this pass."""
    copies: int = 0
    """The copies into which gradients are packed in the order in which one collective sends them."""


def zero_buffers(tower: nn.Module, recipe: Recipe, ep: int, ds_json: dict[str, Any]) -> ZeroBuffers:
    """Return ZeRO-3's buffers on a rank that holds `tower`.

    Settings that are missing in the DeepSpeed JSON have the defaults of `DeepSpeedZeroConfig` in deepspeed 0.19.8.
    """
    zero, size = ds_json["zero_optimization"], DTYPES[recipe.train.precision].itemsize
    learned = sum(
        p.numel()
        for n, p in tower.named_parameters()
        if p.requires_grad and not setting_of(recipe.staged_optim, f"audio.{n}", p.dim()).frozen
    )
    if recipe.train.gather_audio_weights == "per_update":
        whole = sum(p.numel() for p in tower.parameters()) * size
        copies = min(learned, BUCKET_ELEMENTS) * FP32_BYTES
        return ZeroBuffers(0, whole, 0, learned, learned * FP32_BYTES, copies)
    threshold = int(zero.get("stage3_param_persistence_threshold", 1e5))
    reuse = int(zero.get("stage3_max_reuse_distance", 1e9))
    prefetch = int(zero.get("stage3_prefetch_bucket_size", 5e7))
    sizes = [p.numel() for p in tower.parameters()]
    large = sum(n for n in sizes if n > threshold)
    widest = max(
        (sum(p.numel() for p in m.parameters(recurse=False) if p.numel() > threshold) for m in tower.modules()),
        default=0,
    )
    # With expert parallelism, nothing is prefetched or kept for reuse (trainer/engine/module_weights.py).
    live = 2 * widest if ep > 1 else min(large, max(2 * widest, reuse) + prefetch)
    return ZeroBuffers(
        int(zero.get("reduce_bucket_size", 5e8)) * FP32_BYTES if zero.get("contiguous_gradients", True) else 0,
        (sum(sizes) - large) * size,
        min(large, live) * size,
        learned,
    )


@dataclass(frozen=True)
class MemoryModel:
    """The parts of a topology's memory, from which `of` computes the memory of each kind of rank."""

    topology: Topology
    microbatches: int
    """The number of micro-batches in a step."""
    stages: dict[int, StageMemory]
    """The memory of one stage of each kind (see `kinds_of_stages`), by the index of the stage."""
    kinds: tuple[int, ...]
    """The key in `stages` for each stage of the pipeline."""
    audio: tuple[AudioMemory, ...]
    """The audio side's memory on the fullest rank at each place in the expert-parallel group."""
    zero: tuple[ZeroBuffers, ...]
    """ZeRO-3's buffers, by place in the expert-parallel group."""
    travelling: int
    """The bytes of audio embeddings and tokens that one rank sends and receives in a step."""

    def of(self, stage: int, place: int, states: States) -> RankMemory:
        """Return the peak memory, over the phases of a step, of the ranks of `stage` at `place`."""
        llm, audio = self.stages[self.kinds[stage]], self.audio[place]
        states = dataclasses.replace(states, weights=states.weights - llm.smaller_weights)
        zero = self.zero[place]
        permanent = zero.bucket + zero.persistent + llm.buffer
        pipeline = self._pipeline(stage)
        phases = {
            "encode": (0, audio.kept + audio.forward, permanent + zero.gathered + states.gradient_copies),
            "llm": (pipeline, audio.kept, permanent + self.travelling),
            "backward": (
                0,
                audio.kept + audio.backward,
                permanent + zero.gathered + zero.gradients + self.travelling,
            ),
            "reduce": (0, 0, permanent + zero.gradients + zero.copies),
            "update": (0, 0, permanent + states.gradient_copies + states.norm),
        }
        phase, (activations, encoders, buffers) = max(phases.items(), key=lambda item: sum(item[1]))
        whole = zero.persistent if zero.gradients else 0
        return RankMemory((stage,), place, states, activations, encoders, buffers, phase, phases, whole, zero.gradients)

    def _pipeline(self, stage: int) -> int:
        """Return the peak bytes of activations of a stage."""
        pp, vp = self.topology.pp, self.topology.vp
        flight = interleaved_in_flight(stage, pp, self.microbatches, vp)
        return self.stages[self.kinds[stage]].peak(flight, vp)


def memory_model(
    recipe: Recipe,
    model: SizedModel,
    topology: Topology,
    ds_json: dict[str, Any],
    tracer: EncoderTracer,
    workload: Workload,
    work: Sequence[EncoderWork],
    packs: PackPlan,
    kernels: Kernels,
    known: dict[Any, StageMemory] | None = None,
) -> MemoryModel:
    """Build the memory model of a topology by tracing the real modules.

    Args:
        recipe: The recipe of the run.
        model: The model that the recipe describes.
        topology: The layout of the ranks.
        ds_json: The DeepSpeed JSON.
        tracer: The tracer of the model's encoders.
        workload: The samples of a step.
        work: The encoders' work in this topology; see `encoder_work`.
        packs: The LLM's packs in this topology.
        kernels: The settings that determine which kernels the ranks run.
        known: A cache of the memory of traced stages, to which this function adds. All calls that share it must have
            the same model, optimizer settings and kernels.
    """
    train, dtype = recipe.train, DTYPES[recipe.train.precision]
    microbatches = packs.num_microbatches * kernels.mechanisms.context
    kinds = kinds_of_stages(model.llm.num_hidden_layers, topology)
    known = {} if known is None else known
    stages = _traced_stages(recipe, model, topology, set(kinds), packs, microbatches, kernels, known)
    placement, audio, zero = place(model.config, topology.ep), [], []
    bucket = int(ds_json["zero_optimization"].get("reduce_bucket_size", 5e8))
    if train.gather_audio_weights == "per_update":
        bucket = 0
    for at in range(topology.ep):
        tower = model.shared_tower(placement.held_by(at))
        buffers = zero_buffers(tower, recipe, topology.ep, ds_json)
        again = train.recompute_encoder_calls
        rank = fullest_rank(tracer, work, range(at, topology.world, topology.ep), again)
        loaded = workload.loaded_by(rank)
        audio.append(audio_memory(tracer, work, rank, loaded, bucket, buffers.learned, again))
        zero.append(buffers)
    per_rank = -(-workload.tokens // topology.world) * model.llm.hidden_size * dtype.itemsize
    return MemoryModel(
        topology,
        microbatches,
        stages,
        tuple(kinds),
        tuple(audio),
        tuple(zero),
        3 * per_rank,
    )


def _traced_stages(
    recipe: Recipe,
    model: SizedModel,
    topology: Topology,
    wanted: Iterable[int],
    packs: PackPlan,
    microbatches: int,
    kernels: Kernels,
    known: dict[Any, StageMemory],
) -> dict[int, StageMemory]:
    """Return the memory of pipeline stages, by stage. Stages that are not in `known` are traced and added."""
    train, dtype = recipe.train, DTYPES[recipe.train.precision]
    context = kernels.mechanisms.context
    lengths = packs.lengths(0, 0)
    if context > 1:
        lengths = (-(-packs.pack_tokens // (context * topology.tp)) * topology.tp,)
    stages = {}
    for stage in sorted(wanted):
        key = (
            stage,
            dataclasses.replace(topology, ep=1, shard=None),
            lengths,
            microbatches,
            dtype,
            train.recompute_llm,
            kernels.deterministic,
        )
        if key not in known:
            known[key] = stage_memory(
                model.llm,
                topology,
                stage,
                lengths,
                microbatches,
                optim=recipe.staged_optim,
                dtype=dtype,
                recompute=train.recompute_llm,
                kernels=kernels,
                adapters=model.adapters,
            )
        stages[stage] = known[key]
    return stages


def fullest_rank(
    tracer: EncoderTracer, work: Sequence[EncoderWork], ranks: Sequence[int], recompute_calls: bool = False
) -> int:
    """Return the rank among `ranks` whose encoder calls need the most memory.

    If calls run again in the backward pass, a rank needs memory for the clips of all calls, but only for the
    activations of its largest call.
    """

    def needed(rank: int) -> float:
        calls = [
            (tracer.calls(name).kept(clips), sum(clips) * FP32_BYTES)
            for one in work
            for name, calls in zip(one.names, one.calls[rank], strict=True)
            for clips in calls
        ]
        if not recompute_calls:
            return sum(kept for kept, _ in calls)
        return max((kept for kept, _ in calls), default=0.0) + sum(size for _, size in calls)

    return max(ranks, key=needed)


def kinds_of_ranks(model: MemoryModel, states: RankStates) -> list[RankMemory]:
    """Return the memory of every distinct kind of rank, with stages of equal memory merged."""
    found: dict[tuple[Any, ...], RankMemory] = {}
    for stage in range(model.topology.pp):
        for at in range(model.topology.ep):
            one = model.of(stage, at, states.fullest(stage, at))
            key = (at, one.states, one.activations, one.encoder_activations, one.buffers)
            stages = found[key].stages if key in found else ()
            found[key] = dataclasses.replace(one, stages=(*stages, stage))
    return list(found.values())
