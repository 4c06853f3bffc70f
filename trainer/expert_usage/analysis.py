"""Profiles of encoder usage: the tasks on which each encoder expert ran, how this changed over a run, and the costs.

In shapes, G is the number of gates and K is the number of encoder experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from trainer.expert_usage.placement import EncoderTime, Placement, PlacementAdvice
from trainer.telemetry.expert_load import ExpertLoad, Floats, Load, add_up
from trainer.telemetry.load_history import LoadInterval

DEAD_SHARE = 0.001
"""The share of the latest clips below which an encoder expert is called dead."""
LATEST = 0.25
"""The share of a history's steps that counts as its latest steps and, for the drift, as its earliest steps."""
MAX_WINDOWS = 60
"""The largest number of windows into which a history is divided."""


@dataclass(frozen=True)
class Window:
    """The load of the encoder experts in some consecutive steps."""

    first_step: int
    last_step: int
    load: ExpertLoad


@dataclass(frozen=True)
class Profile:
    """The observed use of the encoders, and the conclusions from it."""

    run: str
    """The name of the run."""
    origin: str
    """A description of the data of the profile, such as a range of steps or a dataset."""
    primary: str | None
    """The name of the primary encoder; None if the model has none."""
    load: ExpertLoad
    """The total use of the encoder experts."""
    history: tuple[LoadInterval, ...]
    """The load of each interval of steps; empty for a pass over data."""
    time: EncoderTime | None
    """The time that the encoders took; None if it was not measured."""
    advice: PlacementAdvice | None
    """The suggested placement of encoder experts; None without measured costs."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """The number of skipped samples, by reason."""

    @property
    def dead(self) -> tuple[str, ...]:
        """The encoder experts that almost never run.

        They ran on less than `DEAD_SHARE` of the latest clips or, for a pass over data, of all clips.
        """
        latest = self._part(last=True) if self.history else self.load
        share = dict(zip(latest.experts, latest.total().clip_share, strict=True))
        return tuple(name for name in self.load.experts if self.load.cells and share.get(name, 0.0) < DEAD_SHARE)

    @property
    def imbalance(self) -> float | None:
        """The computing time of the encoders on the slowest rank, divided by the mean over ranks.

        This is the measured value if there is one, and otherwise the value that is expected from the placement. It is
        None if neither is known.
        """
        if self.time is not None:
            return self.time.costs.imbalance
        placement = self.advice and (self.advice.current or self.advice.suggested)
        return placement.imbalance if placement else None

    def last_used_step(self, expert: str) -> int | None:
        """Return the last step of the last interval in which an encoder expert ran.

        The result is None if it never ran or there is no history.
        """
        for interval in reversed(self.history):
            if expert in interval.load.experts:
                k = interval.load.experts.index(expert)
                if any(load.routed_clips[k] > 0 for load in interval.load.cells.values()):
                    return interval.step
        return None

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """The history, divided into at most `MAX_WINDOWS` windows of similar numbers of steps."""
        if not self.history:
            return ()
        first = self.history[0].step - self.history[0].num_steps
        width = max(1.0, (self.history[-1].step - first) / MAX_WINDOWS)
        parts: dict[int, list[LoadInterval]] = {}
        for interval in self.history:
            parts.setdefault(math.ceil((interval.step - first) / width), []).append(interval)
        return tuple(
            Window(part[0].step - part[0].num_steps + 1, part[-1].step, add_up(i.load for i in part))
            for part in parts.values()
        )

    @property
    def drift(self) -> dict[str, float]:
        """The change in the encoder experts' shares of the work from the first to the last quarter of steps, by task.

        The change is the total variation distance, from 0 (no change) to 1 (complete change). Only tasks with clips in
        both quarters are included.
        """
        names = self.load.experts
        if not self.history or not names:
            return {}
        early, late = self._part(last=False), self._part(last=True)
        before, after = early.by_task(), late.by_task()

        def spread(part: ExpertLoad, load: Load) -> Floats:
            routed = dict(zip(part.experts, load.routed_clips, strict=True))
            counts = np.array([routed.get(name, 0.0) for name in names])
            return counts / max(1.0, counts.sum())

        both = [task for task in before if task in after]
        return {t: float(abs(spread(early, before[t]) - spread(late, after[t])).sum()) / 2 for t in both}

    def _part(self, last: bool) -> ExpertLoad:
        """Return the load of the last quarter of the history if `last` is true, and of the first quarter otherwise."""
        first, end = self.windows[0].first_step, self.windows[-1].last_step
        span = (end - first + 1) * LATEST
        chosen = [w for w in self.windows if (w.last_step > end - span if last else w.first_step < first + span)]
        return add_up(w.load for w in chosen)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `profile.json`. Unknown values are None."""
        load = self.load
        return {
            "run": self.run,
            "origin": self.origin,
            "primary": self.primary,
            "gates": list(load.gates),
            "experts": list(load.experts),
            "skipped": dict(self.skipped),
            "tasks": {task: self._task_json(found) for task, found in load.by_task().items()},
            "cells": [{**group._asdict(), **_sums_json(found)} for group, found in sorted(load.cells.items())],
            "dead": list(self.dead),
            "last_used_step": {name: self.last_used_step(name) for name in load.experts},
            "windows": [_window_json(w, load.experts) for w in self.windows],
            "drift": self.drift,
            "imbalance": self.imbalance,
            "time": None if self.time is None else _time_json(self.time),
            "placement": None if self.advice is None else _advice_json(self.advice, self.time),
        }

    def _task_json(self, load: Load) -> dict[str, Any]:
        gates = self.load.gates
        encoders: dict[str, Any] = {}
        if self.primary is not None:
            encoders[self.primary] = _encoder_json(load.num_clips, 1.0, load.audio_sec, 1.0, {})
        for k, name in enumerate(self.load.experts):
            weight = {gate: float(load.mean_weight[g, k]) for g, gate in enumerate(gates)}
            encoders[name] = _encoder_json(
                load.routed_clips[k], load.clip_share[k], load.routed_sec[k], load.audio_share[k], weight
            )
        return {
            "num_clips": load.num_clips,
            "audio_sec": load.audio_sec,
            "entropy": dict(zip(gates, load.mean_entropy.tolist(), strict=True)),
            "entropy_of_mean": dict(zip(gates, load.entropy_of_mean.tolist(), strict=True)),
            "encoders": encoders,
        }


def _encoder_json(
    clips: float, clip_share: float, audio_sec: float, audio_share: float, weight: dict[str, float]
) -> dict[str, Any]:
    return {
        "num_clips": int(clips),
        "clip_share": float(clip_share),
        "audio_sec": float(audio_sec),
        "audio_share": float(audio_share),
        "weight": weight,
    }


def _sums_json(load: Load) -> dict[str, Any]:
    names = ("num_clips", "audio_sec", "entropy", "probs", "weights", "routed_clips", "routed_sec")
    return dict(zip(names, load.to_json(), strict=True))


def _window_json(window: Window, experts: Sequence[str]) -> dict[str, Any]:
    tasks = {}
    for task, load in window.load.by_task().items():
        routed = dict(zip(window.load.experts, load.routed_clips.tolist(), strict=True))
        tasks[task] = {"num_clips": load.num_clips, "routed_clips": [routed.get(name, 0.0) for name in experts]}
    return {"first_step": window.first_step, "last_step": window.last_step, "tasks": tasks}


def _time_json(time: EncoderTime) -> dict[str, Any]:
    costs, encoders = time.costs, {}
    for e, name in enumerate(costs.encoders):
        rate = float(time.sec_per_audio_sec[e])
        encoders[name] = {
            "compute_sec": float(costs.compute_sec[e].mean()),
            "compute_sec_max": float(costs.compute_sec[e].max()),
            "wait_sec": float(costs.wait_sec[e].mean()),
            "sent_bytes": float(costs.sent_bytes[e]),
            "received_bytes": float(costs.received_bytes[e]),
            "sec_per_audio_sec": rate if math.isfinite(rate) else None,
        }
    return {
        "num_ranks": costs.num_ranks,
        "num_steps": time.num_steps,
        "step_sec": time.step_sec,
        "encoders": encoders,
        "compute_sec_by_rank": {
            name: row.tolist() for name, row in zip(costs.encoders, costs.compute_sec, strict=True)
        },
        "wait_sec_by_rank": costs.wait_sec.sum(0).tolist(),
        "mean_sec": costs.mean_sec,
        "slowest_sec": costs.slowest_sec,
        "imbalance": costs.imbalance,
        "lost_sec": time.lost_sec,
        "lost_share": time.lost_sec / time.step_sec if time.step_sec > 0 else 0.0,
    }


def _advice_json(advice: PlacementAdvice, time: EncoderTime | None) -> dict[str, Any]:
    def shown(placement: Placement | None) -> dict[str, Any] | None:
        if placement is None:
            return None
        names = [
            [name for name, slot in zip(advice.experts, placement.slots, strict=True) if slot == wanted]
            for wanted in range(len(placement.slot_sec))
        ]
        return {
            "ep": len(placement.slot_sec),
            "slots": names,
            "slot_sec": list(placement.slot_sec),
            "slowest_sec": placement.slowest_sec,
            "imbalance": placement.imbalance,
        }

    return {
        "ep": advice.ep,
        "num_ranks": advice.num_ranks,
        "costs_sec": dict(zip(advice.experts, advice.costs_sec, strict=True)),
        "current": shown(advice.current),
        "suggested": shown(advice.suggested),
        "others": [shown(other) for other in advice.others],
        "saved_sec": advice.saved_sec,
        "saved_share": advice.saved_sec / time.step_sec if time is not None and time.step_sec > 0 else None,
    }
