"""A profile: which encoder earns its keep, for whom, since when, and at what cost. Pure.

Shapes: G gates, K experts.
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
"""An expert that runs less than this share of the latest clips is dead."""
LATEST = 0.25
"""Part of a history's steps that counts as the latest, and as the earliest for the drift."""
MAX_WINDOWS = 60


@dataclass(frozen=True)
class Window:
    """Some consecutive steps of a history."""

    first_step: int
    last_step: int
    load: ExpertLoad


@dataclass(frozen=True)
class Profile:
    """What was seen, and what follows from it."""

    run: str
    origin: str
    """What was seen, in words."""
    primary: str | None
    load: ExpertLoad
    history: tuple[LoadInterval, ...]
    """Empty for a pass over data."""
    time: EncoderTime | None
    advice: PlacementAdvice | None
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Samples of the data that could not be used, by reason."""

    @property
    def dead(self) -> tuple[str, ...]:
        """Experts that hardly run: less than `DEAD_SHARE` of the latest clips, of all of them for a pass over data."""
        latest = self._part(last=True) if self.history else self.load
        share = dict(zip(latest.experts, latest.total().clip_share, strict=True))
        return tuple(name for name in self.load.experts if self.load.cells and share.get(name, 0.0) < DEAD_SHARE)

    @property
    def imbalance(self) -> float | None:
        """Measured, or expected of the placement where nothing was measured; None without either."""
        if self.time is not None:
            return self.time.costs.imbalance
        placement = self.advice and (self.advice.current or self.advice.suggested)
        return placement.imbalance if placement else None

    def last_used_step(self, expert: str) -> int | None:
        """Last step of the last interval in which it ran; None: never, or no history."""
        for interval in reversed(self.history):
            if expert in interval.load.experts:
                k = interval.load.experts.index(expert)
                if any(load.routed_clips[k] > 0 for load in interval.load.cells.values()):
                    return interval.step
        return None

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """The history in at most `MAX_WINDOWS` parts of about equally many steps."""
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
        """Per task with clips early and late: how far the experts' shares of the work moved from the first to the last
        quarter of the steps, 0 (not at all) to 1 (wholly): total variation distance."""
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
        """The first or last quarter of a history."""
        first, end = self.windows[0].first_step, self.windows[-1].last_step
        span = (end - first + 1) * LATEST
        chosen = [w for w in self.windows if (w.last_step > end - span if last else w.first_step < first + span)]
        return add_up(w.load for w in chosen)

    def to_json(self) -> dict[str, Any]:
        """Everything, as `profile.json` holds it; what has no number is null."""
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
