"""The data's part of a checkpoint: where every lane stands, in a few kilobytes of JSON.

`{version, seed, num_lanes, batch (the next one), sets (name → digest), lanes (their numbers), positions (set → one
number per lane), num_seen (one per lane), skipped (reason → lane → number)}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.errors import UserError

State = dict[str, Any]
STATE_VERSION = 2


@dataclass(frozen=True)
class LaneState:
    """Where one lane stands."""

    positions: dict[str, int] = field(default_factory=dict)
    """Set → samples of the lane that lie behind it there."""
    num_seen: int = 0
    """Samples of all sets, those that were skipped included."""
    skipped: dict[str, int] = field(default_factory=dict)
    """By reason."""


def new_state(
    seed: int, num_lanes: int, digests: Mapping[str, str], batch: int, lane_states: Mapping[int, LaneState]
) -> State:
    """The state from these lanes' accounts; `batch` is the next one."""
    names = sorted({name for a in lane_states.values() for name in a.positions})
    reasons = sorted({reason for a in lane_states.values() for reason in a.skipped})
    return {
        "version": STATE_VERSION,
        "seed": seed,
        "num_lanes": num_lanes,
        "batch": batch,
        "sets": dict(digests),
        "lanes": list(lane_states),
        "positions": {n: [a.positions.get(n, 0) for a in lane_states.values()] for n in names},
        "num_seen": [a.num_seen for a in lane_states.values()],
        "skipped": {r: {str(lane): a.skipped[r] for lane, a in lane_states.items() if r in a.skipped} for r in reasons},
    }


def open_state(
    state: State | None, lanes: Sequence[int], seed: int, num_lanes: int, digests: Mapping[str, str]
) -> tuple[int, list[LaneState]]:
    """(next batch, account of each of `lanes`); a null state is the beginning.

    Raises:
        UserError: the state is of another seed, number of lanes or other data, or lacks a lane.
    """
    if state is None:
        return 0, [LaneState() for _ in lanes]
    if state.get("version") != STATE_VERSION:
        raise UserError(f"data state: version {state.get('version')!r}, this program reads {STATE_VERSION}")
    for key, name, value in (("seed", "seed", seed), ("num_lanes", "data.num_lanes", num_lanes)):
        if state[key] != value:
            raise UserError(f"{name} = {value}: the checkpoint was made with {state[key]}; resume with that")
    for name, digest in digests.items():
        if state["sets"].get(name, digest) != digest:
            raise UserError(
                f"data.datasets '{name}': its shards or data.read_kib changed since the checkpoint; restore them, or "
                "rename the set to begin it anew"
            )
    row = {lane: i for i, lane in enumerate(state["lanes"])}
    if missing := [lane for lane in lanes if lane not in row]:
        raise UserError(f"data state: lanes {missing} are missing; merge the states of all ranks before resuming")
    return state["batch"], [
        LaneState(
            {name: counts[row[lane]] for name, counts in state["positions"].items()},
            state["num_seen"][row[lane]],
            {r: by_lane[str(lane)] for r, by_lane in state["skipped"].items() if str(lane) in by_lane},
        )
        for lane in lanes
    ]


def merge_states(states: Sequence[State]) -> State:
    """One state from all ranks' states of the same batch; any number of ranks can start from it."""
    keys = ("version", "seed", "num_lanes", "batch", "sets")
    common = {k: states[0][k] for k in keys}
    assert all({k: s[k] for k in keys} == common for s in states), "states of different batches or data"
    lanes = [lane for s in states for lane in s["lanes"]]
    assert len(lanes) == len(set(lanes)), "two states hold the same lane"
    lane_states: dict[int, LaneState] = {}
    for s in states:
        _, found = open_state(s, s["lanes"], s["seed"], s["num_lanes"], {})
        lane_states |= dict(zip(s["lanes"], found, strict=True))
    in_order = dict(sorted(lane_states.items()))
    return new_state(common["seed"], common["num_lanes"], common["sets"], common["batch"], in_order)


def num_skipped(state: State) -> dict[str, int]:
    """Skips by reason in the state's lanes, since the start of the training."""
    return {reason: sum(by_lane.values()) for reason, by_lane in state["skipped"].items()}
