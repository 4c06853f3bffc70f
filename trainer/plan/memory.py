"""Memory of every distinct kind of rank, at its worst moment, by what it goes to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer.config.schema import Recipe
from trainer.engine.optim import setting_of
from trainer.engine.placement import place
from trainer.parallel.packs import PackPlan
from trainer.parallel.topology import Topology
from trainer.plan.encoder_memory import AudioMemory, EncoderTracer, audio_memory
from trainer.plan.llm_memory import StageMemory, in_flight, stage_memory
from trainer.plan.ranks import DTYPES, RankStates, distinct_stages, like
from trainer.plan.sizes import SizedModel
from trainer.plan.states import FP32_BYTES, States
from trainer.plan.workload import EncoderWork, Workload


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the ranks of one kind, at the moment when they need most."""

    stages: tuple[int, ...]
    """Pipeline stages of the kind."""
    place: int
    """In the expert-parallel group."""
    states: States
    activations: int
    """The LLM's."""
    encoder_activations: int
    buffers: int
    """ZeRO-3's buckets and gathered weights, Megatron's gathering buffer, tensors that travel."""
    phase: str
    """When: encode, llm, backward or update."""
    phases: dict[str, tuple[int, int, int]]
    """Of every phase: activations, encoder activations, buffers."""

    @property
    def total(self) -> int:
        return self.states.total + self.activations + self.encoder_activations + self.buffers


@dataclass(frozen=True)
class ZeroBuffers:
    """What ZeRO-3 allocates for itself, in bytes."""

    bucket: int
    """For gradients on their way (`reduce_bucket_size`); stays."""
    persistent: int
    """Small parameters that stay gathered (`stage3_param_persistence_threshold`)."""
    gathered: int
    """Large ones that are gathered at the same time, at most."""
    learned: int
    """Parameters that learn (a number, not bytes)."""

    @property
    def total(self) -> int:
        return self.bucket + self.persistent + self.gathered


def zero_buffers(tower: nn.Module, recipe: Recipe, ep: int, ds_json: dict[str, Any]) -> ZeroBuffers:
    """For a rank that holds `tower`. Defaults are DeepSpeed's (deepspeed 0.19.8, `DeepSpeedZeroConfig`)."""
    zero, size = ds_json["zero_optimization"], DTYPES[recipe.train.precision].itemsize
    threshold = int(zero.get("stage3_param_persistence_threshold", 1e5))
    reuse = int(zero.get("stage3_max_reuse_distance", 1e9))
    prefetch = int(zero.get("stage3_prefetch_bucket_size", 5e7))
    sizes = [p.numel() for p in tower.parameters()]
    large = sum(n for n in sizes if n > threshold)
    widest = max(
        (sum(p.numel() for p in m.parameters(recurse=False) if p.numel() > threshold) for m in tower.modules()),
        default=0,
    )
    # With experts on other ranks nothing is fetched ahead or kept for reuse (trainer/engine/encoders.py).
    live = 2 * widest if ep > 1 else min(large, max(2 * widest, reuse) + prefetch)
    learned = sum(
        p.numel()
        for n, p in tower.named_parameters()
        if p.requires_grad and not setting_of(recipe.optim, f"audio.{n}", p.dim()).frozen
    )
    return ZeroBuffers(
        int(zero.get("reduce_bucket_size", 5e8)) * FP32_BYTES if zero.get("contiguous_gradients", True) else 0,
        (sum(sizes) - large) * size,
        min(large, live) * size,
        learned,
    )


@dataclass(frozen=True)
class MemoryModel:
    """What the memory of a topology is made of, before it is put together per kind of rank."""

    topology: Topology
    microbatches: int
    stages: dict[int, StageMemory]
    """By representative stage."""
    audio: tuple[AudioMemory, ...]
    """By place, of its fullest rank."""
    zero: tuple[ZeroBuffers, ...]
    """By place."""
    travelling: int
    """Bytes of embeddings and tokens of a step on one rank, sent and received."""
    largest_group: tuple[int, ...]
    """By place: bytes of fp32 parameters that AdamW updates at once on the audio side."""

    def of(self, stage: int, place: int, states: States) -> RankMemory:
        """The ranks of `stage` at `place`: the worst of the step's phases."""
        topology, llm, audio = self.topology, self.stages[like(stage, self.topology.pp)], self.audio[place]
        zero = self.zero[place]
        standing = zero.bucket + zero.persistent + llm.buffer
        flying = llm.peak(in_flight(stage, topology.pp, self.microbatches))
        phases = {
            "encode": (0, audio.kept + audio.forward, standing + zero.gathered),
            "llm": (flying, audio.kept, standing + self.travelling),
            "backward": (0, audio.kept + audio.backward, standing + zero.gathered + self.travelling),
            "update": (0, 0, standing + 3 * self.largest_group[place]),
        }
        phase, (activations, encoders, buffers) = max(phases.items(), key=lambda item: sum(item[1]))
        return RankMemory((stage,), place, states, activations, encoders, buffers, phase, phases)


def memory_model(
    recipe: Recipe,
    model: SizedModel,
    topology: Topology,
    ds_json: dict[str, Any],
    tracer: EncoderTracer,
    workload: Workload,
    work: Sequence[EncoderWork],
    packs: PackPlan,
) -> MemoryModel:
    """Trace what the recipe's step keeps. `tracer` has all experts; the other arguments are this topology's."""
    train, dtype = recipe.train, DTYPES[recipe.train.precision]
    stages = {
        stage: stage_memory(
            model.llm,
            topology,
            stage,
            packs.lengths(0, 0),
            packs.num_microbatches,
            optim=recipe.optim,
            dtype=dtype,
            recompute=train.recompute_llm,
        )
        for stage in distinct_stages(topology.pp)
    }
    placement, audio, zero, groups = place(model.config, topology.ep), [], [], []
    bucket = int(ds_json["zero_optimization"].get("reduce_bucket_size", 5e8))
    for at in range(topology.ep):
        tower = model.tower(placement.held_by(at))
        buffers = zero_buffers(tower, recipe, topology.ep, ds_json)
        rank = fullest_rank(tracer, work, range(at, topology.world, topology.ep))
        loaded = [int(n) for n in workload.audio_samples[workload.source_ranks == rank] if n]
        audio.append(audio_memory(tracer, work, rank, loaded, bucket, buffers.learned))
        zero.append(buffers)
        groups.append(_largest_group(tower, recipe, topology))
    per_rank = -(-workload.tokens // topology.world) * model.llm.hidden_size * dtype.itemsize
    return MemoryModel(topology, packs.num_microbatches, stages, tuple(audio), tuple(zero), 3 * per_rank, tuple(groups))


def fullest_rank(tracer: EncoderTracer, work: Sequence[EncoderWork], ranks: Sequence[int]) -> int:
    """Of `ranks`, the one whose encoder calls keep most."""

    def kept(rank: int) -> float:
        return sum(
            tracer.calls(name).kept(clips)
            for one in work
            for name, calls in zip(one.names, one.calls[rank], strict=True)
            for clips in calls
        )

    return max(ranks, key=kept)


def _largest_group(tower: nn.Module, recipe: Recipe, topology: Topology) -> int:
    """Bytes of the largest set of parameters that ZeRO-3 updates together: those of one setting."""
    sums: dict[tuple[float, float, bool], int] = {}
    for name, p in tower.named_parameters():
        expert = name.startswith("experts.") and topology.ep > 1
        setting = setting_of(recipe.optim, f"audio.{name}", p.dim())
        if p.requires_grad and not setting.frozen:
            sharers = topology.world // topology.ep if expert else topology.world
            key = (setting.lr, setting.weight_decay, expert)
            sums[key] = sums.get(key, 0) + -(-p.numel() // sharers) * FP32_BYTES
    return max(sums.values(), default=0)


def kinds_of_ranks(model: MemoryModel, states: RankStates) -> list[RankMemory]:
    """Every distinct kind, stages that are alike together."""
    found: dict[tuple[Any, ...], RankMemory] = {}
    for stage in range(model.topology.pp):
        for at in range(model.topology.ep):
            one = model.of(stage, at, states.fullest(stage, at))
            key = (at, one.states, one.activations, one.encoder_activations, one.buffers)
            stages = found[key].stages if key in found else ()
            found[key] = dataclasses.replace(one, stages=(*stages, stage))
    return list(found.values())
