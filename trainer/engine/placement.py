"""The placement of encoder experts on ranks, and the cost of encoding a clip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.config import EncoderConfig, ModelConfig
from model.encoders.registry import encoder_flops, encoder_windowing
from model.lengths import num_samples
from trainer.parallel.balance import Floats, place_experts
from trainer.parallel.dispatch import ClipCost
from trainer.parallel.plan import Ints

_STEP_SAMPLES = num_samples(0.5)


@dataclass(frozen=True)
class Placement:
    """The assignment of encoder experts to the places of an expert-parallel group.

    The group is a block of neighboring ranks that together hold every expert once. A place is the index of a rank in
    the group.
    """

    names: tuple[str, ...]
    """The names of the experts."""
    places: tuple[int, ...]
    """The place of each expert, in the order of `names`."""
    ep: int
    """The number of places, which is the size of the group."""

    def held_by(self, rank: int) -> tuple[str, ...]:
        """Return the names of the experts of which the rank with the global number `rank` holds a shard."""
        return tuple(n for n, place in zip(self.names, self.places, strict=True) if place == rank % self.ep)

    @property
    def has_empty_place(self) -> bool:
        """True if some ranks hold no expert."""
        return len(set(self.places)) < self.ep


def place(config: ModelConfig, ep: int) -> Placement:
    """Distribute the encoder experts over `ep` places so that the places have similar costs.

    The cost of an expert is the number of its FLOPs for ten seconds of audio.
    """
    costs = [encoder_flops(e, num_samples(10)) for e in config.experts]
    return Placement(tuple(e.name for e in config.experts), place_experts(costs, ep), ep)


def clip_cost(config: EncoderConfig) -> ClipCost:
    """Return a function that estimates the FLOPs of an encoder's forward pass for clips of given lengths.

    The function takes lengths in audio samples, rounds them up to a multiple of half a second, and looks the FLOPs up
    in a table.
    """
    window = encoder_windowing(config).window_samples
    steps = -(-window // _STEP_SAMPLES)
    table = np.array([0.0, *(encoder_flops(config, min(window, i * _STEP_SAMPLES)) for i in range(1, steps + 1))])

    def cost_of(samples: Ints) -> Floats:
        steps = -(-samples // _STEP_SAMPLES)
        windows, rest = np.divmod(np.arange(steps.max(initial=0) + 1) * _STEP_SAMPLES, window)
        return (windows * table[-1] + table[-(-rest // _STEP_SAMPLES)])[steps]

    return cost_of
