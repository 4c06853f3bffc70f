"""What the encoders cost, what waiting for the slowest rank costs, and where experts would best be placed. Pure.

Shapes: E encoders (primary first), K experts, R ranks.
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
    """What the encoders took, per step."""

    costs: EncoderCosts
    num_steps: int
    """That were measured."""
    step_sec: float
    """Of the whole step."""
    audio_sec: Floats
    """[E] audio that each encoder read, on all ranks."""

    @property
    def lost_sec(self) -> float:
        """What the imbalance adds to each step."""
        return self.costs.slowest_sec - self.costs.mean_sec

    @property
    def total_sec(self) -> Floats:
        """[E] over all ranks."""
        return self.costs.compute_sec.sum(1)

    @property
    def sec_per_audio_sec(self) -> Floats:
        """[E] computing time per second of audio read; nan for an encoder that read none."""
        return np.divide(
            self.total_sec, self.audio_sec, out=np.full(len(self.audio_sec), np.nan), where=self.audio_sec > 0
        )


def measured_time(history: Sequence[LoadInterval]) -> EncoderTime | None:
    """Of the steps since the number of ranks or the encoders last changed; None where nothing was measured.

    The first interval is left out where there are others: it warms up.
    """
    alike = [i for i in history if i.costs.same_ranks(history[-1].costs)]
    if len(alike) > 1 and alike[0] is history[0]:
        alike = alike[1:]
    costs, num = sum((i.costs for i in alike[1:]), alike[0].costs), sum(i.num_steps for i in alike)
    if not num or costs.mean_sec <= 0:
        return None
    load = add_up(i.load for i in alike)
    routed = dict(zip(load.experts, load.total().routed_sec, strict=True))
    audio = [routed.get(name, load.total().audio_sec) for name in costs.encoders]
    return EncoderTime(costs.per_step(num), num, sum(i.step_sec for i in alike) / num, np.asarray(audio) / num)


@dataclass(frozen=True)
class Placement:
    """Experts on the `ep` slots of an expert-parallel group; ranks with the same slot share its experts' clips."""

    slots: tuple[int, ...]
    """[K] slot of each expert."""
    slot_sec: tuple[float, ...]
    """[ep] what each rank of a slot computes in the experts, its clips being spread evenly over them."""

    @property
    def slowest_sec(self) -> float:
        return max(self.slot_sec)

    @property
    def imbalance(self) -> float:
        """Fullest slot over mean; 1 where there is no work."""
        mean = sum(self.slot_sec) / len(self.slot_sec)
        return self.slowest_sec / mean if mean > 0 else 1.0


def place(costs_sec: Sequence[float], slots: Sequence[int], ep: int, num_ranks: int) -> Placement:
    """Experts that cost `costs_sec` [K] over all ranks, on given slots of groups of `ep` out of `num_ranks`."""
    loads = [0.0] * ep
    for cost, slot in zip(costs_sec, slots, strict=True):
        loads[slot] += cost * ep / num_ranks
    return Placement(tuple(slots), tuple(loads))


@dataclass(frozen=True)
class PlacementAdvice:
    """Where the experts are, and where they would best be."""

    experts: tuple[str, ...]
    costs_sec: tuple[float, ...]
    """[K] computing time over all ranks, per step or, for a pass over data, for all of it."""
    ep: int
    """The recipe's `parallel.expert`."""
    num_ranks: int
    current: Placement | None
    """None: nothing was measured with experts apart."""
    suggested: Placement
    """The costliest first onto the emptiest slot, at the recipe's `parallel.expert`."""
    others: tuple[Placement, ...]
    """The same for every other size of expert-parallel groups that uses all slots."""

    @property
    def saved_sec(self) -> float:
        """What `suggested` takes off the experts' time; 0 where the current placement is unknown or as good."""
        return max(0.0, self.current.slowest_sec - self.suggested.slowest_sec) if self.current else 0.0


def advise(
    experts: Sequence[str], costs_sec: Sequence[float], ep: int, num_ranks: int, current: Sequence[int] | None
) -> PlacementAdvice:
    """The advice for `experts` that cost `costs_sec` [K] over all ranks; `current`: slot of each, where it is known."""

    def best(size: int) -> Placement:
        return place(costs_sec, place_experts(costs_sec, size), size, num_ranks)

    others = tuple(best(n) for n in divisors(num_ranks) if n != ep and 1 < n <= len(experts))
    known = None if current is None else place(costs_sec, current, ep, num_ranks)
    return PlacementAdvice(tuple(experts), tuple(costs_sec), ep, num_ranks, known, best(ep), others)


def current_slots(time: EncoderTime, experts: Sequence[str], ep: int) -> tuple[int, ...]:
    """Slot of each expert, told by which ranks computed it: rank r has slot r mod ep."""
    rows = (time.costs.compute_sec[time.costs.encoders.index(name)] for name in experts)
    return tuple(int(np.argmax([row[slot::ep].sum() for slot in range(ep)])) for row in rows)
