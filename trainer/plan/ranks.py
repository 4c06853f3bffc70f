"""The distinct kinds of ranks of a job, and what each holds: a stage of the LLM and a place of the encoders."""

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
    """Model states of all ranks: the LLM's follow from stage and replica, the audio side's from the expert place."""

    topology: Topology
    llm: tuple[tuple[States, ...], ...]
    """[stage][replica]"""
    audio: tuple[States, ...]
    """By place in the expert-parallel group."""

    def of_rank(self, rank: int) -> States:
        """Both sides together."""
        at = self.topology.coordinates(rank)
        return self.llm[at.pp][at.dp] + self.audio[rank % self.topology.ep]

    def fullest(self, stage: int, place: int) -> States:
        """Of the replica that holds most (they differ by the padding of Megatron's buffers)."""
        return max(self.llm[stage], key=lambda s: s.total) + self.audio[place]


def rank_states(
    model: SizedModel, topology: Topology, optim: OptimConfig, precision: str, ds_json: dict[str, Any]
) -> RankStates:
    """Build every distinct rank's real modules, without memory, and count."""
    dtype = DTYPES[precision]
    stages: dict[int, tuple[States, ...]] = {}
    for stage in distinct_stages(topology.pp):
        with fake_rank(topology, topology.rank_of(0, stage, 0)):
            gpt, wrapped = build_stage(model.llm, topology, stage, optim, dtype, recompute=False)
            stages[stage] = tuple(llm_states(gpt, wrapped, topology, dtype))
    llm = tuple(stages[like(stage, topology.pp)] for stage in range(topology.pp))
    placement = place(model.config, topology.ep)
    audio = []
    for at in range(topology.ep):
        tower = model.tower(placement.held_by(at))
        audio.append(audio_states(tower, optim, topology, dtype, Offload.of(ds_json)))
    return RankStates(topology, llm, tuple(audio))


def distinct_stages(pp: int) -> list[int]:
    """First, any in the middle, last: all others are like one of these."""
    return sorted({0, min(1, pp - 1), pp - 1})


def like(stage: int, pp: int) -> int:
    """The one of `distinct_stages` that `stage` equals."""
    return stage if stage in (0, pp - 1) else 1
