"""The data state of a checkpoint: the position of every lane in every dataset, as a few kilobytes of JSON.

Its keys are:

- `version`: version of this format.
- `seed`, `num_lanes`: settings of the order of samples.
- `batch`: number of the next global batch.
- `sets`: digest of the order of each dataset, by the dataset's name.
- `lanes`: numbers of the lanes in this state.
- `positions`: position of every lane in each dataset, by the dataset's name.
- `num_seen`: number of samples that every lane has drawn.
- `skipped`: number of skipped samples, by reason and then by lane.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.errors import UserError

State = dict[str, Any]
"""The data state. The docstring of this module lists its keys."""
STATE_VERSION = 2


@dataclass(frozen=True)
class LaneState:
    """The progress of one lane."""

    positions: dict[str, int] = field(default_factory=dict)
    """The number of samples that the lane has drawn from each dataset, by the dataset's name."""
    num_seen: int = 0
    """The number of samples drawn from all datasets, including skipped ones."""
    skipped: dict[str, int] = field(default_factory=dict)
    """The number of skipped samples by reason."""


def new_state(
    seed: int, num_lanes: int, digests: Mapping[str, str], batch: int, lane_states: Mapping[int, LaneState]
) -> State:
    """Combine lane states into a data state.

    Args:
        seed: The seed for the order.
        num_lanes: The number of all lanes.
        digests: The digest of the order of each dataset, by the dataset's name.
        batch: The number of the next global batch.
        lane_states: The state of each lane, by the lane's number.
    """
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
    """Check a data state, and return the number of the next batch and the states of some lanes.

    Args:
        state: The data state; None at the beginning of a run.
        lanes: The numbers of the lanes.
        seed: The expected seed for the order.
        num_lanes: The expected number of all lanes.
        digests: The expected digest of the order of each dataset, by the dataset's name.

    Raises:
        UserError: If the version, the seed, the number of lanes or a digest differs from the expected one, or a lane is
            missing.
    """
    if state is None:
        return 0, [LaneState() for _ in lanes]
    if state.get("version") != STATE_VERSION:
        raise UserError(
            f"data state: has format version {state.get('version')!r}, but this program reads {STATE_VERSION}; "
            "resume with the program that wrote the checkpoint"
        )
    for key, name, value in (("seed", "seed", seed), ("num_lanes", "data.num_lanes", num_lanes)):
        if state[key] != value:
            raise UserError(f"{name} = {value}: the checkpoint was made with {state[key]}; set it back to resume")
    for name, digest in digests.items():
        if state["sets"].get(name, digest) != digest:
            raise UserError(
                f"data.datasets '{name}': its shards or data.read_kib changed since the checkpoint; restore them, or "
                "rename the dataset to read it from its beginning"
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
    """Merge the states of all ranks into one, from which any number of ranks can resume.

    All states must have been yielded after the same batch.
    """
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
    """Return the number of samples, by reason, that the lanes of `state` have skipped since the start of the run."""
    return {reason: sum(by_lane.values()) for reason, by_lane in state["skipped"].items()}
