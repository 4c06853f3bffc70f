"""Statistics about which encoder experts the router chose for clips, as sums that can be added over steps and ranks.

The router decides per clip, so a sample with two clips counts twice, and a sample without audio does not count. With
several gates, or with `top_k` above 1, several experts may run on a clip. The fractions of clips then add up to more
than 1.

Shapes: B clips, G gates, K encoder experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.config import FORMER_GATES
from model.router import Routing

Floats = NDArray[np.float64]

UNNAMED = "-"
"""The language or source of clips whose manifest entry does not name one."""
ALL = "all"
"""The name that stands for all tasks."""
BANDS_SEC = (1, 2, 5, 10, 20, 30)
"""The bounds between duration bands, in seconds."""
BANDS = tuple(f"{a}-{b} s" for a, b in zip((0, *BANDS_SEC), BANDS_SEC, strict=False)) + (f"{BANDS_SEC[-1]}+ s",)
_DIGITS = 6


class ClipGroup(NamedTuple):
    """The properties by which clips are grouped."""

    task: str
    language: str
    source: str
    band: str
    """The duration band, one of `BANDS`."""


def group_of(task: str, meta: Mapping[str, Any], seconds: float) -> ClipGroup:
    """Return the group of a clip.

    Args:
        task: The task of the clip's sample.
        meta: The fields of the manifest entry of the clip's sample.
        seconds: The duration of the clip.
    """
    language, source = (str(meta.get(name) or UNNAMED) for name in ("language", "source"))
    return ClipGroup(task, language, source, BANDS[sum(seconds >= end for end in BANDS_SEC)])


@dataclass(frozen=True)
class Load:
    """The load of encoder experts, as sums over a set of clips."""

    num_clips: int
    audio_sec: float
    entropy: Floats
    """The sum over clips of the entropy of each gate's probabilities, in nats, of shape [G]."""
    probs: Floats
    """The sum of each gate's probabilities, of shape [G, K]."""
    weights: Floats
    """The sum of the mixing weights, of shape [G, K]. The weight is the probability if the gate chose the expert, and 0
    otherwise."""
    routed_clips: Floats
    """The number of clips on which each expert ran, of shape [K]."""
    routed_sec: Floats
    """The total duration of these clips in seconds, of shape [K]."""

    @staticmethod
    def none(num_gates: int, num_experts: int) -> Load:
        """Return the load of an empty set of clips."""
        gates, experts = np.zeros(num_gates), np.zeros(num_experts)
        pairs = np.zeros((num_gates, num_experts))
        return Load(0, 0.0, gates, pairs, pairs, experts, experts)

    def __add__(self, other: Load) -> Load:
        return Load(
            self.num_clips + other.num_clips,
            self.audio_sec + other.audio_sec,
            self.entropy + other.entropy,
            self.probs + other.probs,
            self.weights + other.weights,
            self.routed_clips + other.routed_clips,
            self.routed_sec + other.routed_sec,
        )

    def with_experts(self, places: Sequence[int | None]) -> Load:
        """Return the load for a different list of experts.

        Args:
            places: For each expert in the new list, its index in the old list, or None if it is not in the old list.
        """
        index = [len(self.routed_clips) if place is None else place for place in places]

        def moved(values: Floats) -> Floats:
            return np.concatenate([values, np.zeros((*values.shape[:-1], 1))], axis=-1)[..., index]

        pairs, experts = (self.probs, self.weights), (self.routed_clips, self.routed_sec)
        return Load(self.num_clips, self.audio_sec, self.entropy, *map(moved, pairs), *map(moved, experts))

    @property
    def clip_share(self) -> Floats:
        """The fraction of clips on which each expert ran, of shape [K]; NaN if there are no clips."""
        return _over(self.routed_clips, self.num_clips)

    @property
    def audio_share(self) -> Floats:
        """The fraction of audio, by duration, that each expert processed, of shape [K]; NaN if there are no clips."""
        return _over(self.routed_sec, self.audio_sec)

    @property
    def mean_weight(self) -> Floats:
        """The mean mixing weight over all clips, of shape [G, K]."""
        return _over(self.weights, self.num_clips)

    @property
    def mean_entropy(self) -> Floats:
        """The mean entropy of each gate, in nats, of shape [G]. It is low if the gate is confident about each clip."""
        return _over(self.entropy, self.num_clips)

    @property
    def entropy_of_mean(self) -> Floats:
        """The entropy of each gate's mean probabilities, in nats, of shape [G].

        It is low if the gate prefers few experts for all clips.
        """
        mean = _over(self.probs, self.num_clips)
        return -(mean * np.log(np.where(mean > 0, mean, 1.0))).sum(-1)

    def to_json(self) -> list[Any]:
        """Return the sums as a list that can be written as JSON and that `from_json` reads."""
        arrays = (self.entropy, self.probs, self.weights, self.routed_clips, self.routed_sec)
        return [self.num_clips, round(self.audio_sec, _DIGITS), *(a.round(_DIGITS).tolist() for a in arrays)]

    @staticmethod
    def from_json(fields: Sequence[Any], num_gates: int, num_experts: int) -> Load:
        """Return the load that `to_json` converted to `fields`.

        Raises:
            ValueError, TypeError: If the fields do not have the shapes for G gates and K experts.
        """
        num_clips, audio_sec, *arrays = fields
        pairs, experts = (num_gates, num_experts), (num_experts,)
        shapes = ((num_gates,), pairs, pairs, experts, experts)
        sums = [np.asarray(a, dtype=np.float64).reshape(s) for a, s in zip(arrays, shapes, strict=True)]
        return Load(int(num_clips), float(audio_sec), *sums)


@dataclass(frozen=True)
class ExpertLoad:
    """The load of each group of clips."""

    gates: tuple[str, ...]
    experts: tuple[str, ...]
    cells: Mapping[ClipGroup, Load]

    @staticmethod
    def of(
        routing: Routing | None, groups: Sequence[ClipGroup], seconds: Sequence[float], experts: Sequence[str]
    ) -> ExpertLoad:
        """Return the load of B clips.

        Args:
            routing: The decisions of the router for the clips; None if the model has no experts.
            groups: The group of each clip, of length B.
            seconds: The duration of each clip, of length B.
            experts: The names of the K experts.
        """
        num, gates = len(groups), () if routing is None else routing.gates
        pairs = (num, len(gates), len(experts))
        probs, chosen = np.zeros(pairs), np.zeros(pairs)
        if routing is not None:
            probs, chosen = routing.on_host[0].double().numpy(), routing.on_host[1].numpy()
        runs = np.asarray(chosen.any(axis=1), dtype=np.float64)
        entropy = -(probs * np.log(np.where(probs > 0, probs, 1.0))).sum(-1)
        assert probs.shape == pairs, (probs.shape, pairs)
        cells = {}
        for group in dict.fromkeys(groups):
            rows = [i for i, other in enumerate(groups) if other == group]
            sec = np.asarray(seconds, dtype=np.float64)[rows]
            cells[group] = Load(
                len(rows),
                float(sec.sum()),
                entropy[rows].sum(0),
                probs[rows].sum(0),
                (probs * chosen)[rows].sum(0),
                runs[rows].sum(0),
                sec @ runs[rows],
            )
        return ExpertLoad(gates, tuple(experts), cells)

    def __add__(self, other: ExpertLoad) -> ExpertLoad:
        """Add two loads by group. Experts are matched by name, since one load may have more of them."""
        if not self.cells:
            return other
        if not other.cells:
            return self
        assert self.gates == other.gates, (self.gates, other.gates)
        names = tuple(dict.fromkeys((*self.experts, *other.experts)))
        cells = self._with_experts(names)
        for group, load in other._with_experts(names).items():
            cells[group] = cells[group] + load if group in cells else load
        return ExpertLoad(self.gates, names, cells)

    def _with_experts(self, names: tuple[str, ...]) -> dict[ClipGroup, Load]:
        if names == self.experts:
            return dict(self.cells)
        places = [self.experts.index(name) if name in self.experts else None for name in names]
        return {group: load.with_experts(places) for group, load in self.cells.items()}

    def total(self, wanted: Callable[[ClipGroup], bool] = lambda group: True) -> Load:
        """Return the sum over all groups for which `wanted` returns True."""
        return sum((v for g, v in self.cells.items() if wanted(g)), Load.none(len(self.gates), len(self.experts)))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that have clips, in alphabetical order."""
        return tuple(sorted({group.task for group in self.cells}))

    def by_task(self) -> dict[str, Load]:
        """Return the load of each task by name, and the load of all tasks together under the name `ALL`.

        The result is empty if there are no clips.
        """
        tasks = {task: self.total(lambda g, task=task: g.task == task) for task in self.tasks}  # type: ignore[misc]
        return {ALL: self.total(), **tasks} if tasks else {}

    def to_json(self) -> dict[str, Any]:
        """Return a tree that can be written as JSON and that `from_json` reads. Sums are rounded to 6 decimals."""
        cells = [[*group, *load.to_json()] for group, load in sorted(self.cells.items())]
        return {"gates": list(self.gates), "experts": list(self.experts), "cells": cells}

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> ExpertLoad:
        """Return the load that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: If the tree was not written by `to_json`.
        """
        gates = tuple(FORMER_GATES.get(str(gate), str(gate)) for gate in tree["gates"])
        experts = tuple(map(str, tree["experts"]))
        cells = {
            ClipGroup(*map(str, row[:4])): Load.from_json(row[4:], len(gates), len(experts)) for row in tree["cells"]
        }
        return ExpertLoad(gates, experts, cells)


def load_metrics(load: ExpertLoad) -> dict[str, float]:
    """Return the metrics `routing/<task or all>/...` by name; empty if there are no experts or no clips."""
    if not load.experts or not load.cells:
        return {}
    metrics: dict[str, float] = {"routing/num_dead": float((load.total().routed_clips == 0).sum())}
    for task, found in load.by_task().items():
        for g, gate in enumerate(load.gates):
            metrics[f"routing/{task}/entropy_{gate}"] = float(found.mean_entropy[g])
            metrics[f"routing/{task}/entropy_of_mean_{gate}"] = float(found.entropy_of_mean[g])
        for k, expert in enumerate(load.experts):
            metrics[f"routing/{task}/{expert}/clip_share"] = float(found.clip_share[k])
            metrics[f"routing/{task}/{expert}/audio_share"] = float(found.audio_share[k])
            for g, gate in enumerate(load.gates):
                metrics[f"routing/{task}/{expert}/weight_{gate}"] = float(found.mean_weight[g, k])
    return metrics


def add_up(loads: Iterable[ExpertLoad]) -> ExpertLoad:
    """Return the sum of several loads, which is empty if there are none."""
    return sum(loads, ExpertLoad((), (), {}))


def _over(values: Floats, divisor: float) -> Floats:
    return values / divisor if divisor else np.full(values.shape, np.nan)
