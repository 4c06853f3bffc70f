"""Model states of every kind of rank.

A kind is a stage of the LLM together with a place in the expert-parallel group, which determines the encoder experts of
a rank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from model.llm.stages import stage_chunks
from trainer.engine.llm_optimizer import FP32_REDUCTION, Reduction
from trainer.engine.optim import OptimConfig
from trainer.engine.placement import place
from trainer.parallel.topology import Topology
from trainer.plan.fake_ranks import fake_rank
from trainer.plan.sizes import SizedModel
from trainer.plan.states import Offload, States, audio_states, build_stage, llm_states

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RankStates:
    """The model states of all ranks."""

    topology: Topology
    """The layout of the ranks, without context parallelism."""
    llm: tuple[tuple[States, ...], ...]
    """The states of the LLM, indexed by [stage][copy of the weights]."""
    audio: tuple[tuple[States, ...], ...]
    """The states of the audio side, indexed by [place in the expert-parallel group][block that holds the partitions of
    the whole audio side]."""

    def of_rank(self, rank: int) -> States:
        """Return the model states of the LLM and of the audio side on `rank`."""
        at = self.topology.coordinates(rank)
        return self.llm[at.pp][at.dp] + self.audio[rank % self.topology.ep][rank // self.topology.shard_ranks]

    def fullest(self, stage: int, place: int) -> States:
        """Return the model states of the fullest rank of `stage` at `place`.

        Replicas differ in the padding of Megatron's buffers, and blocks in the tensors that they save in checkpoints.
        """
        audio = max(self.audio[place], key=lambda s: s.snapshot)
        return max(self.llm[stage], key=lambda s: s.total) + audio


def rank_states(
    model: SizedModel,
    topology: Topology,
    optim: OptimConfig,
    precision: str,
    ds_json: dict[str, Any],
    reduction: Reduction = FP32_REDUCTION,
    known: dict[Any, tuple[States, ...]] | None = None,
) -> RankStates:
    """Return the model states of all ranks. They are computed from the real modules, built on the meta device.

    Args:
        model: The model that the recipe describes.
        topology: The layout of the ranks.
        optim: The optimizer settings.
        precision: The value of `train.precision`.
        ds_json: The DeepSpeed JSON.
        reduction: The settings for the exchange of gradients and weights between replicas.
        known: A cache of the states of stages, to which this function adds. All calls that share it must have the same
            model and optimizer settings.
    """
    dtype = DTYPES[precision]
    stages: dict[int, tuple[States, ...]] = {}
    kinds = kinds_of_stages(model.llm.num_hidden_layers, topology)
    for stage in sorted(set(kinds)):
        key = (stage, dataclasses.replace(topology, ep=1, shard=None), precision, reduction)
        if known is not None and key in known:
            stages[stage] = known[key]
            continue
        with fake_rank(topology, topology.rank_of(0, stage, 0)):
            chunks, models = build_stage(
                model.llm, topology, stage, optim, dtype, adapters=model.adapters, reduction=reduction
            )
            stages[stage] = tuple(llm_states(chunks, models, topology.without_context, dtype))
        if known is not None:
            known[key] = stages[stage]
    llm = tuple(stages[kind] for kind in kinds)
    placement = place(model.config, topology.ep)
    audio = []
    for at in range(topology.ep):
        tower = model.shared_tower(placement.held_by(at))
        audio.append(audio_states(tower, optim, topology, dtype, Offload.of(ds_json)))
    return RankStates(topology.without_context, llm, tuple(audio))


def kinds_of_stages(num_layers: int, topology: Topology) -> list[int]:
    """Return, for each stage, the index of the first stage with the same shapes.

    Two stages have the same shapes if their chunks have equal numbers of layers and both or neither of them hold the
    embedding, and likewise for the output layer.
    """
    found: dict[tuple[bool, bool, tuple[int, ...]], int] = {}
    kinds = []
    for stage in range(topology.pp):
        chunks = stage_chunks(num_layers, topology.pp, topology.vp, stage)
        kinds.append(found.setdefault((stage == 0, stage == topology.pp - 1, chunks), stage))
    return kinds
