"""The history of encoder load and costs, which `expert_load.jsonl` stores with one line per logging interval.

The load is the number and duration of the clips on which each encoder expert ran, with statistics of the router's
decisions (`trainer.telemetry.expert_load`). The costs are the time and the traffic of running the encoders. Each rank
adds up its clips and costs in a `LoadMeter`. At the end of an interval, the parts of all ranks are merged into a
`LoadInterval`, which becomes one line of the file. Intervals can be added, so that a run can be examined as a whole or
over time.

Shapes: E encoders (the primary encoder first), R ranks.
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
from trainer.telemetry.expert_load import ClipGroup, ExpertLoad, Floats, Load, add_up, group_of, load_metrics
from trainer.telemetry.jsonl import read_lines

HISTORY_NAME = "expert_load.jsonl"
"""The name of the file in the run's folder."""
MAX_SOURCES = 64
"""The maximum number of sources that a process distinguishes. A manifest may name a different source for each clip."""
OTHER_SOURCES = "(others)"
"""The source of all clips beyond the first `MAX_SOURCES` sources."""
_COST_FIELDS = 4


@dataclass(frozen=True)
class EncoderCosts:
    """The costs of running the encoders over a number of steps."""

    encoders: tuple[str, ...]
    """The names of the primary encoder, if any, and of the experts."""
    compute_sec: Floats
    """The seconds that each rank spent running each encoder, of shape [E, R]."""
    wait_sec: Floats
    """The seconds that each rank spent in exchanges with other ranks, including waiting for them, of shape [E, R]. The
    time of an exchange is divided evenly among the encoders."""
    sent_bytes: Floats
    """The number of bytes that all ranks sent for each encoder, of shape [E]."""
    received_bytes: Floats
    """The number of bytes that all ranks received for each encoder, of shape [E]."""
    slowest_sec: float
    """The compute time of the slowest rank, summed over steps. All other ranks wait for this rank.

    In each step, this is the time of the slowest rank in the primary encoder plus the time of the slowest rank in the
    experts. The experts start after the primary encoder has finished.
    """

    def __add__(self, other: EncoderCosts) -> EncoderCosts:
        assert self.same_ranks(other), "intervals with different encoders or numbers of ranks"
        return EncoderCosts(
            self.encoders,
            self.compute_sec + other.compute_sec,
            self.wait_sec + other.wait_sec,
            self.sent_bytes + other.sent_bytes,
            self.received_bytes + other.received_bytes,
            self.slowest_sec + other.slowest_sec,
        )

    def per_step(self, num_steps: int) -> EncoderCosts:
        """Return these costs divided by `num_steps`, the number of steps over which they were summed."""
        return EncoderCosts(
            self.encoders,
            self.compute_sec / num_steps,
            self.wait_sec / num_steps,
            self.sent_bytes / num_steps,
            self.received_bytes / num_steps,
            self.slowest_sec / num_steps,
        )

    def same_ranks(self, other: EncoderCosts) -> bool:
        """Return whether `other` has the same encoders and the same number of ranks, so that the two can be added."""
        return (self.encoders, self.compute_sec.shape) == (other.encoders, other.compute_sec.shape)

    @property
    def num_ranks(self) -> int:
        return self.compute_sec.shape[1]

    @property
    def mean_sec(self) -> float:
        """The mean compute time of a rank, in seconds."""
        return float(self.compute_sec.sum()) / self.num_ranks

    @property
    def imbalance(self) -> float:
        """The ratio of the slowest rank's time to the mean time.

        The ideal value is 1. The result is also 1 if nothing was computed.
        """
        return self.slowest_sec / self.mean_sec if self.mean_sec > 0 else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the costs as a JSON-compatible tree that `from_json` reads."""
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
        """Return the costs that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: If the tree was not written by `to_json`.
        """

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
            raise ValueError("the shapes of the costs do not match the number of encoders")
        return costs


@dataclass(frozen=True)
class LoadInterval:
    """The load and the costs of several consecutive steps on all ranks."""

    step: int
    """The last of the steps, counted from 1."""
    num_steps: int
    step_sec: float
    """The wall time of all `num_steps` steps on rank 0, in seconds."""
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
        """Return the interval as a tree that `from_json` reads. It becomes one line of the history."""
        head = {"step": self.step, "num_steps": self.num_steps, "step_sec": round(self.step_sec, 6)}
        return {**head, **self.load.to_json(), "costs": self.costs.to_json()}

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> LoadInterval:
        """Return the interval that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: If the tree was not written by `to_json`.
        """
        return LoadInterval(
            int(tree["step"]),
            int(tree["num_steps"]),
            float(tree["step_sec"]),
            ExpertLoad.from_json(tree),
            EncoderCosts.from_json(tree["costs"]),
        )


@dataclass(frozen=True)
class RankLoad:
    """The part of an interval that one rank contributes."""

    load: ExpertLoad
    costs: Floats
    """The seconds spent computing and waiting, and the bytes sent and received, of shape [steps, E, 4]."""
    step_sec: float
    """The wall time of the steps, in seconds."""


RANK_LOAD_KINDS = (RankLoad, ExpertLoad, Load, ClipGroup)
"""The class `RankLoad`, and the classes of the objects that it contains."""


class LoadMeter:
    """A meter that adds up the load and the costs of one rank over a logging interval.

    Args:
        experts: The names of the encoder experts.
        primary: The name of the encoder that always runs; None if there is none.
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
        """Add the clips of a step.

        Args:
            batch: This rank's part of the global batch.
            routing: The decisions of the router for the clips; None if the model has no experts.
        """
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
        """Add the costs of a step.

        Args:
            costs: For each encoder that this rank called, by name: the seconds of computing, the seconds of waiting,
                the bytes sent and the bytes received.
            step_sec: The wall time of the step.
        """
        assert set(costs) <= set(self.encoders), (sorted(costs), self.encoders)
        self._costs.append([costs.get(name, (0.0,) * _COST_FIELDS) for name in self.encoders])
        self._step_sec += step_sec

    def take(self) -> RankLoad:
        """Return the sums since the last call, and reset the meter."""
        costs = np.asarray(self._costs, dtype=np.float64).reshape(-1, len(self.encoders), _COST_FIELDS)
        taken = RankLoad(add_up(self._loads), costs, self._step_sec)
        self._start()
        return taken

    def merge(self, step: int, parts: Sequence[RankLoad]) -> LoadInterval:
        """Merge the parts of all ranks into the interval that ends with `step`.

        Args:
            step: The last step of the interval, counted from 1.
            parts: The parts, by rank.
        """
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
    """Return an interval's metrics by name: the metrics of `load_metrics`, and the costs as `encoders/...`.

    Seconds and bytes are per step. Seconds are means over ranks, and bytes are sums over ranks.
    """
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
    """Return the intervals of a run in order.

    Args:
        path: The file `expert_load.jsonl` of the run.

    Raises:
        UserError: If the file does not exist, is empty, contains invalid lines, or mixes different models.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: does not exist, so the run has no routing history; check the path, continue the run to "
            "record one, or profile a dataset with earshot profile --data"
        )
    intervals: list[LoadInterval] = []
    for number, (_, record) in enumerate(read_lines(path), start=1):
        try:
            interval = LoadInterval.from_json(record)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} line {number}: is not a routing record ({error!r}); restore the file") from None
        if intervals and interval.load.cells and interval.load.gates != (known := _gates(intervals, interval)):
            raise UserError(
                f"{path} line {number}: the gates are {interval.load.gates}, but {known} in earlier lines, so "
                "the file mixes two models; restore the file"
            )
        intervals.append(interval)
    if not intervals:
        raise UserError(f"{path}: empty because the run ended before its first logging step; continue the run")
    return intervals


def _gates(before: Sequence[LoadInterval], interval: LoadInterval) -> tuple[str, ...]:
    """Return the gates of the last interval that has clips, or the gates of `interval` if no interval has clips."""
    return next((i.load.gates for i in reversed(before) if i.load.cells), interval.load.gates)
