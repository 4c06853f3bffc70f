"""What the encoders did and cost, per logging interval: gathered from all ranks, kept in `expert_load.jsonl`.

A rank adds clips and costs step by step (`LoadMeter`), all ranks' parts become one `LoadInterval`, and the run's folder
keeps one line of each. Intervals add up, so a finished run can be looked at as a whole or along its steps.

Shapes: E encoders (primary first), R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.batch import Batch
from model.errors import UserError
from model.lengths import SAMPLE_RATE
from model.router import Routing
from trainer.telemetry.expert_load import ClipGroup, ExpertLoad, Floats, add_up, group_of, load_metrics
from trainer.telemetry.jsonl import read_lines

HISTORY_NAME = "expert_load.jsonl"
MAX_SOURCES = 64
"""Per rank and process; clips of further ones count as `OTHER_SOURCES`, since a manifest may name one per clip."""
OTHER_SOURCES = "(others)"
_COST_FIELDS = 4


@dataclass(frozen=True)
class EncoderCosts:
    """What computing the encoders cost over some steps."""

    encoders: tuple[str, ...]
    """The primary, if any, and the experts."""
    compute_sec: Floats
    """[E, R]"""
    wait_sec: Floats
    """[E, R]"""
    sent_bytes: Floats
    """[E] of all ranks"""
    received_bytes: Floats
    """[E] of all ranks"""
    slowest_sec: float
    """Σ over steps of what the encoders took with everyone waiting for the slowest rank: the slowest in the primary,
    and then the slowest in the experts, which begin when the primary has ended."""

    def __add__(self, other: EncoderCosts) -> EncoderCosts:
        assert self.same_ranks(other), "intervals of other encoders or another number of ranks"
        return EncoderCosts(
            self.encoders,
            self.compute_sec + other.compute_sec,
            self.wait_sec + other.wait_sec,
            self.sent_bytes + other.sent_bytes,
            self.received_bytes + other.received_bytes,
            self.slowest_sec + other.slowest_sec,
        )

    def per_step(self, num_steps: int) -> EncoderCosts:
        """What one of `num_steps` steps took."""
        return EncoderCosts(
            self.encoders,
            self.compute_sec / num_steps,
            self.wait_sec / num_steps,
            self.sent_bytes / num_steps,
            self.received_bytes / num_steps,
            self.slowest_sec / num_steps,
        )

    def same_ranks(self, other: EncoderCosts) -> bool:
        """Whether the two can be added."""
        return (self.encoders, self.compute_sec.shape) == (other.encoders, other.compute_sec.shape)

    @property
    def num_ranks(self) -> int:
        return self.compute_sec.shape[1]

    @property
    def mean_sec(self) -> float:
        """What a rank computes on average."""
        return float(self.compute_sec.sum()) / self.num_ranks

    @property
    def imbalance(self) -> float:
        """Slowest over mean, 1 at best; 1 where nothing was computed."""
        return self.slowest_sec / self.mean_sec if self.mean_sec > 0 else 1.0

    def to_json(self) -> dict[str, Any]:
        return {
            "encoders": list(self.encoders),
            "compute_sec": self.compute_sec.round(5).tolist(),
            "wait_sec": self.wait_sec.round(5).tolist(),
            "sent_bytes": self.sent_bytes.tolist(),
            "received_bytes": self.received_bytes.tolist(),
            "slowest_sec": round(self.slowest_sec, 6),
        }

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> EncoderCosts:
        """Raises KeyError, TypeError or ValueError where the tree is not one of `to_json`."""

        def sums(name: str) -> Floats:
            return np.asarray(tree[name], dtype=np.float64)

        costs = EncoderCosts(
            tuple(map(str, tree["encoders"])),
            sums("compute_sec"),
            sums("wait_sec"),
            sums("sent_bytes"),
            sums("received_bytes"),
            float(tree["slowest_sec"]),
        )
        num = len(costs.encoders)
        if costs.compute_sec.ndim != 2 or len(costs.compute_sec) != num or costs.sent_bytes.shape != (num,):
            raise ValueError("costs do not fit their encoders")
        return costs


@dataclass(frozen=True)
class LoadInterval:
    """Some consecutive steps of all ranks."""

    step: int
    """The last of them, counted from 1."""
    num_steps: int
    step_sec: float
    """Their wall time on rank 0."""
    load: ExpertLoad
    costs: EncoderCosts

    def __add__(self, later: LoadInterval) -> LoadInterval:
        return LoadInterval(
            later.step,
            self.num_steps + later.num_steps,
            self.step_sec + later.step_sec,
            self.load + later.load,
            self.costs + later.costs,
        )

    def to_json(self) -> dict[str, Any]:
        """One line of the history."""
        head = {"step": self.step, "num_steps": self.num_steps, "step_sec": round(self.step_sec, 6)}
        return {**head, **self.load.to_json(), "costs": self.costs.to_json()}

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> LoadInterval:
        """Raises KeyError, TypeError or ValueError where the tree is not one of `to_json`."""
        return LoadInterval(
            int(tree["step"]),
            int(tree["num_steps"]),
            float(tree["step_sec"]),
            ExpertLoad.from_json(tree),
            EncoderCosts.from_json(tree["costs"]),
        )


@dataclass(frozen=True)
class RankLoad:
    """One rank's part of an interval."""

    load: ExpertLoad
    costs: Floats
    """[steps, E, 4]: seconds computing and waiting, bytes sent and received."""
    step_sec: float


class LoadMeter:
    """Adds up what one rank does between two logging steps.

    Args:
        experts: names of the routed encoders.
        primary: name of the one that always runs, if any.
    """

    def __init__(self, experts: Sequence[str], primary: str | None) -> None:
        self.experts, self.has_primary = tuple(experts), primary is not None
        self.encoders = (*(() if primary is None else (primary,)), *experts)
        self._sources: set[str] = set()
        self._start()

    def _start(self) -> None:
        self._loads: list[ExpertLoad] = []
        self._costs: list[list[Sequence[float]]] = []
        self._step_sec = 0.0

    def add_clips(self, batch: Batch, routing: Routing | None) -> None:
        """This rank's clips of a step, and what the router decided for them."""
        seconds = [n / SAMPLE_RATE for n in batch.clips.lengths]
        owners = [batch.samples[i] for i in batch.clip_owner]
        groups = [group_of(s.task, s.meta, sec) for s, sec in zip(owners, seconds, strict=True)]
        self._loads.append(ExpertLoad.of(routing, [self._known(g) for g in groups], seconds, self.experts))

    def _known(self, group: ClipGroup) -> ClipGroup:
        if group.source not in self._sources:
            if len(self._sources) >= MAX_SOURCES:
                return group._replace(source=OTHER_SOURCES)
            self._sources.add(group.source)
        return group

    def add_step(self, costs: Mapping[str, Sequence[float]], step_sec: float) -> None:
        """What a step cost this rank: per encoder that it called, seconds computing and waiting, bytes sent and
        received; and the step's wall time."""
        assert set(costs) <= set(self.encoders), (sorted(costs), self.encoders)
        self._costs.append([costs.get(name, (0.0,) * _COST_FIELDS) for name in self.encoders])
        self._step_sec += step_sec

    def take(self) -> RankLoad:
        """Everything since the last call; starts again from nothing."""
        costs = np.asarray(self._costs, dtype=np.float64).reshape(-1, len(self.encoders), _COST_FIELDS)
        taken = RankLoad(add_up(self._loads), costs, self._step_sec)
        self._start()
        return taken

    def merge(self, step: int, parts: Sequence[RankLoad]) -> LoadInterval:
        """All ranks' parts of the interval that ends with `step`."""
        costs = np.stack([part.costs for part in parts])  # [R, steps, E, 4]
        first = 1 if self.has_primary else 0
        compute = costs[..., 0]
        slowest = compute[..., :first].sum(-1).max(0).sum() + compute[..., first:].sum(-1).max(0).sum()
        total = costs.sum(1)
        return LoadInterval(
            step,
            costs.shape[1],
            parts[0].step_sec,
            add_up(part.load for part in parts),
            EncoderCosts(
                self.encoders,
                total[..., 0].T,
                total[..., 1].T,
                total[..., 2].sum(0),
                total[..., 3].sum(0),
                float(slowest),
            ),
        )


def interval_metrics(interval: LoadInterval) -> dict[str, float]:
    """Metrics by name: those of the routing, and `encoders/…`: per step, seconds of a rank on average, bytes of all."""
    costs, num = interval.costs, interval.num_steps
    metrics = load_metrics(interval.load)
    for e, name in enumerate(costs.encoders):
        metrics[f"encoders/{name}/compute_sec"] = float(costs.compute_sec[e].mean()) / num
        metrics[f"encoders/{name}/wait_sec"] = float(costs.wait_sec[e].mean()) / num
        metrics[f"encoders/{name}/sent_bytes"] = float(costs.sent_bytes[e]) / num
        metrics[f"encoders/{name}/received_bytes"] = float(costs.received_bytes[e]) / num
    metrics["encoders/imbalance"] = costs.imbalance
    return metrics


def read_history(path: Path) -> list[LoadInterval]:
    """The intervals of a run, in order.

    Raises:
        UserError: no such file, or it is none of ours.
    """
    if not path.is_file():
        raise UserError(f"{path}: no routing history: train the run with this version, or profile data with --data")
    intervals: list[LoadInterval] = []
    for number, (_, record) in enumerate(read_lines(path), start=1):
        try:
            interval = LoadInterval.from_json(record)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} line {number}: not a record of routing ({error!r}); restore the file") from None
        if intervals and interval.load.cells and interval.load.gates != (known := _gates(intervals, interval)):
            raise UserError(f"{path} line {number}: gates {interval.load.gates}, before {known}: not of one model")
        intervals.append(interval)
    if not intervals:
        raise UserError(f"{path}: empty: the run ended before its first logging step")
    return intervals


def _gates(before: Sequence[LoadInterval], interval: LoadInterval) -> tuple[str, ...]:
    """Of the last interval that had clips."""
    return next((i.load.gates for i in reversed(before) if i.load.cells), interval.load.gates)
