"""Tests of comparing planned with measured step times, with simulated ranks."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from bench import plan_time
from trainer.plan.accelerator import KNOWN


@pytest.mark.slow
def test_rates_and_steps_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = dataclasses.asdict(dataclasses.replace(KNOWN["h100"], tflops=1.0, fp32_tflops=1.0, memory_tb_s=0.008))
    rates |= {"matrix": [[10.0, 0.02], [300.0, 0.05]], "kernel_us": 2.0}
    steps = [0.7, 50.0, 0.8]  # another program delayed the second step

    def start_ranks(world: int, command: list[str]) -> int:
        rounds = [
            {"rates": rates, "link": [1e9, 1e-4], "steps": [s], "cpu": [0.7], "phases": [{"llm": s}]} for s in steps
        ]
        for rank in range(world):
            Path(os.environ["PLAN_TIME_RESULT"], f"{rank}.json").write_text(json.dumps(rounds))
        return 0

    monkeypatch.setattr(plan_time, "start_ranks", start_ranks)
    for name in ("PLAN_TIME_RESULT", "PLAN_TIME_ROUNDS"):
        monkeypatch.setenv(name, "")  # restores the variables after the test
    found = plan_time.compare("demo_cpu", 3)
    wall, best, cpu = (found[name] for name in ("wall", "best", "cpu"))
    assert (wall["measured_sec"], best["measured_sec"], cpu["measured_sec"]) == (0.8, 0.7, 0.7)
    assert wall["planned_sec"] == best["planned_sec"] == cpu["planned_sec"]  # without a pipeline, and at equal rates
    low, high = wall["range_sec"]
    assert low < wall["planned_sec"] < high
    for one in (wall, best, cpu):
        assert one["in_range"] == (low <= one["measured_sec"] <= high)
        assert one["gflops"] == pytest.approx(50.0)
    assert found["phases_sec"] == {"llm": 0.8}
