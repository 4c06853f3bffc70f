"""The costs of encoders and of waiting for the slowest rank, and the best placement of encoder experts on ranks.

In shapes, E is the number of encoders (the primary encoder comes first), K is the number of encoder experts, and R is
the number of ranks. An expert-parallel group of `ep` ranks has `ep` slots. Rank r is in slot r mod `ep` of its group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.parallel.balance import place_experts
from trainer.parallel.topology import divisors
from trainer.telemetry.expert_load import Floats, add_up
from trainer.telemetry.load_history import EncoderCosts, LoadInterval


@dataclass(frozen=True)
class EncoderTime:
    """The time of the encoders per step."""

    costs: EncoderCosts
    """The encoder costs by rank, per step."""
    num_steps: int
    """The number of steps that were measured."""
    step_sec: float
    """The duration of a whole step in seconds."""
    audio_sec: Floats
    """[E] seconds of audio that each encoder processed per step, summed over ranks."""

    @property
    def lost_sec(self) -> float:
        """The seconds that the imbalance adds to each step."""
        return self.costs.slowest_sec - self.costs.mean_sec

    @property
    def total_sec(self) -> Floats:
        """[E] computing time of each encoder per step, in seconds, summed over ranks."""
        return self.costs.compute_sec.sum(1)

    @property
    def sec_per_audio_sec(self) -> Floats:
        """[E] computing seconds per second of audio; nan for an encoder that processed no audio."""
        return np.divide(
            self.total_sec, self.audio_sec, out=np.full(len(self.audio_sec), np.nan), where=self.audio_sec > 0
        )


def measured_time(history: Sequence[LoadInterval]) -> EncoderTime | None:
    """Return the encoders' time over the intervals that have the same ranks and encoders as the last interval.

    The first interval of the history is excluded if there are others, because it contains the warm-up.

    Returns:
        The time per step; None if nothing was measured.
    """
    similar = [i for i in history if i.costs.same_ranks(history[-1].costs)]
    if len(similar) > 1 and similar[0] is history[0]:
        similar = similar[1:]
    costs, num = sum((i.costs for i in similar[1:]), similar[0].costs), sum(i.num_steps for i in similar)
    if not num or costs.mean_sec <= 0:
        return None
    load = add_up(i.load for i in similar)
    routed = dict(zip(load.experts, load.total().routed_sec, strict=True))
    audio = [routed.get(name, load.total().audio_sec) for name in costs.encoders]
    return EncoderTime(costs.per_step(num), num, sum(i.step_sec for i in similar) / num, np.asarray(audio) / num)


@dataclass(frozen=True)
class Placement:
    """The slots of encoder experts in an expert-parallel group. The ranks of a slot share the clips of its experts."""

    slots: tuple[int, ...]
    """[K] slot of each encoder expert."""
    slot_sec: tuple[float, ...]
    """[ep] seconds that each rank of a slot computes, if the slot's clips are spread evenly over its ranks."""

    @property
    def slowest_sec(self) -> float:
        """The computing seconds of a rank of the fullest slot."""
        return max(self.slot_sec)

    @property
    def imbalance(self) -> float:
        """The load of the fullest slot divided by the mean; 1 if there is no work."""
        mean = sum(self.slot_sec) / len(self.slot_sec)
        return self.slowest_sec / mean if mean > 0 else 1.0


def place(costs_sec: Sequence[float], slots: Sequence[int], ep: int, num_ranks: int) -> Placement:
    """Return the placement of encoder experts in given slots.

    Args:
        costs_sec: [K] computing seconds of each expert, summed over ranks.
        slots: [K] slot of each expert.
        ep: The size of the expert-parallel groups.
        num_ranks: The number of ranks.
    """
    loads = [0.0] * ep
    for cost, slot in zip(costs_sec, slots, strict=True):
        loads[slot] += cost * ep / num_ranks
    return Placement(tuple(slots), tuple(loads))


@dataclass(frozen=True)
class PlacementAdvice:
    """The current placement of the encoder experts, and better ones."""

    experts: tuple[str, ...]
    """The names of the encoder experts."""
    costs_sec: tuple[float, ...]
    """[K] computing seconds of each encoder expert, summed over ranks, per step, or over a whole pass over the data."""
    ep: int
    """The value of `parallel.expert`."""
    num_ranks: int
    """The number of ranks of the run."""
    current: Placement | None
    """The current placement; None if nothing was measured or every rank holds all encoder experts."""
    suggested: Placement
    """The placement for `parallel.expert` that puts each expert, in descending order of cost, into the emptiest slot.
    """
    others: tuple[Placement, ...]
    """The placement by the same rule for every other size of expert-parallel groups that leaves no slot empty."""

    @property
    def saved_sec(self) -> float:
        """The seconds that `suggested` saves per step; 0 if the current placement is unknown or equally good."""
        return max(0.0, self.current.slowest_sec - self.suggested.slowest_sec) if self.current else 0.0


def advise(
    experts: Sequence[str], costs_sec: Sequence[float], ep: int, num_ranks: int, current: Sequence[int] | None
) -> PlacementAdvice:
    """Return the best placements of the encoder experts.

    Args:
        experts: The names of the encoder experts.
        costs_sec: [K] computing seconds of each expert, summed over ranks.
        ep: The value of `parallel.expert`.
        num_ranks: The number of ranks.
        current: [K] current slot of each expert; None if it is not known.
    """

    def best(size: int) -> Placement:
        return place(costs_sec, place_experts(costs_sec, size), size, num_ranks)

    others = tuple(best(n) for n in divisors(num_ranks) if n != ep and 1 < n <= len(experts))
    known = None if current is None else place(costs_sec, current, ep, num_ranks)
    return PlacementAdvice(tuple(experts), tuple(costs_sec), ep, num_ranks, known, best(ep), others)


def current_slots(time: EncoderTime, experts: Sequence[str], ep: int) -> tuple[int, ...]:
    """Return the current slot of each encoder expert, which is the slot whose ranks spent the most time on it."""
    rows = (time.costs.compute_sec[time.costs.encoders.index(name)] for name in experts)
    return tuple(int(np.argmax([row[slot::ep].sum() for slot in range(ep)])) for row in rows)
