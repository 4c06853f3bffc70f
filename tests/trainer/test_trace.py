"""Tests of the trace of phases, which covers only the selected steps and contains nested phases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from model.errors import UserError
from trainer.telemetry.metrics import PhaseTimer
from trainer.telemetry.profile_config import ProfileConfig
from trainer.telemetry.trace import WAIT, Trace


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def spans(folder: Path) -> list[dict]:
    return [e for e in json.loads((folder / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]


def run(folder: Path, steps: str, num_steps: int, stop_after: int = 0, start: int = 0) -> PhaseTimer:
    timer = PhaseTimer()
    trace = Trace(ProfileConfig(steps), timer, folder, 0, None, lambda events: [events])
    for step in range(start + 1, num_steps + 1):
        trace.begin(step)
        with timer("outer"), timer("inner"):
            pass
        trace.end(step, last=step == stop_after)
        if step == stop_after:
            break
    return timer


def test_trace_contains_the_selected_steps_only(tmp_path: Path) -> None:
    timer = run(tmp_path, "10:12", 14)
    assert {e["args"]["step"] for e in spans(tmp_path)} == {10, 11}
    assert timer.listener is None and WAIT in timer.take()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rank0.json", "trace.json"]


def test_phases_are_nested(tmp_path: Path) -> None:
    run(tmp_path, "1:2", 1)
    by_name = {e["name"]: e for e in spans(tmp_path)}
    assert [e["name"] for e in spans(tmp_path)] == [WAIT, "inner", "outer", "step 1"]
    for inside, around in (("inner", "outer"), ("outer", "step 1"), (WAIT, "step 1")):
        a, b = by_name[inside], by_name[around]
        assert b["ts"] <= a["ts"] and a["ts"] + a["dur"] <= b["ts"] + b["dur"] + 0.01


def test_stop_writes_the_steps_so_far(tmp_path: Path) -> None:
    run(tmp_path, "2:9", 9, stop_after=3)
    assert {e["args"]["step"] for e in spans(tmp_path)} == {2, 3}


def test_resumed_run_traces_the_remaining_selected_steps(tmp_path: Path) -> None:
    run(tmp_path / "between", "2:5", 6, start=3)
    assert {e["args"]["step"] for e in spans(tmp_path / "between")} == {4}
    run(tmp_path / "after", "2:5", 9, start=6)
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize("steps", ["10", "12:10", "0:3", "5:5", "a:b", "1:2:3", "-1:4"])
def test_steps_are_checked(steps: str) -> None:
    with pytest.raises(UserError, match=r"profile\.steps = "):
        ProfileConfig(steps)
    assert list(ProfileConfig("10:12").range) == [10, 11] and list(ProfileConfig().range) == []
