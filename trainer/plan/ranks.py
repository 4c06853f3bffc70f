"""Model states of every kind of rank.

A kind is a stage of the LLM together with a place in the expert-parallel group, which determines the encoder experts of
a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

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
    llm: tuple[tuple[States, ...], ...]
    """The states of the LLM, indexed by [stage][replica]."""
    audio: tuple[States, ...]
    """The states of the audio side, indexed by the place in the expert-parallel group."""

    def of_rank(self, rank: int) -> States:
        """Return the model states of `rank`: those of the LLM and of the audio side."""
        at = self.topology.coordinates(rank)
        return self.llm[at.pp][at.dp] + self.audio[rank % self.topology.ep]

    def fullest(self, stage: int, place: int) -> States:
        """Return the model states of the fullest rank of `stage` at `place`.

        Replicas differ by the padding of Megatron's buffers.
        """
        return max(self.llm[stage], key=lambda s: s.total) + self.audio[place]


def rank_states(
    model: SizedModel, topology: Topology, optim: OptimConfig, precision: str, ds_json: dict[str, Any]
) -> RankStates:
    """Return the model states of all ranks, computed from the real modules built on the meta device."""
    dtype = DTYPES[precision]
    stages: dict[int, tuple[States, ...]] = {}
    for stage in distinct_stages(topology.pp):
        with fake_rank(topology, topology.rank_of(0, stage, 0)):
            gpt, wrapped = build_stage(model.llm, topology, stage, optim, dtype, False, model.adapters)
            stages[stage] = tuple(llm_states(gpt, wrapped, topology, dtype))
    llm = tuple(stages[like(stage, topology.pp)] for stage in range(topology.pp))
    placement = place(model.config, topology.ep)
    audio = []
    for at in range(topology.ep):
        tower = model.tower(placement.held_by(at))
        audio.append(audio_states(tower, optim, topology, dtype, Offload.of(ds_json)))
    return RankStates(topology, llm, tuple(audio))


def distinct_stages(pp: int) -> list[int]:
    """Return one stage of each kind: the first, one in the middle and the last, if they exist."""
    return sorted({0, min(1, pp - 1), pp - 1})


def like(stage: int, pp: int) -> int:
    """Return the stage among `distinct_stages` that has the same shapes as `stage`."""
    return stage if stage in (0, pp - 1) else 1
