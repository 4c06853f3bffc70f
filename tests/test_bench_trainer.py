"""Tests of `bench.trainer`: all arms train the same tiny model, and each goal can be missed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from bench import trainer as bench
from bench.trainer_work import TINY, draw_samples
from tests.distributed.harness import run_ranks

WORK = {"clips": 8, "tokens": 400, "audio_sec": 20.0}


def measured(setting: dict[str, Any]) -> dict[str, Any]:
    return run_ranks(2, "bench.trainer_arms:measure", {"setting": setting, "sizes": asdict(TINY)}, timeout_sec=180)[0]


@pytest.mark.slow
def test_arms_train_the_same_model() -> None:
    pytest.importorskip("accelerate")
    ours = measured({"kind": "earshot", "expert": 2, "pack_tokens": 64})
    balanced = measured({"kind": "balanced", "micro": 2})
    grouped = measured({"kind": "grouped", "micro": 4})
    assert len(ours["losses"]) == 1 + TINY.updates and min(ours["losses"]) > 5  # log(4096) = 8.3
    assert balanced["losses"] == pytest.approx(ours["losses"], rel=1e-5)
    # The first update of this arm has the same clips as well. The clips of later updates are sorted by length.
    assert grouped["losses"][0] == pytest.approx(ours["losses"][0], rel=1e-5)
    for found in (ours, balanced, grouped):
        assert found["sec"] > 0 and found["cpu_sec"] > 0 and found["peak_mib"] > 100


def records(sec: float, peak_mib: float = 900.0, loss: float = 8.0) -> list[bench.Record]:
    return [{"sec": s, "cpu_sec": 9 + s, "peak_mib": peak_mib, "losses": [loss, 7.0]} for s in (sec, 1.1 * sec)]


def test_a_slower_peer_meets_the_goals() -> None:
    found = {"earshot": records(2.0), "padded": records(6.0), "grouped": records(4.2)}
    result = bench.compare(found, WORK, ranks=2, cores=2)
    assert result["passed"] and result["best_peer"] == "grouped" and result["decided_by"] == "time"
    assert result["speed"] == pytest.approx(2.1) and result["memory"] == pytest.approx(1.0)
    assert result["arms"]["earshot"]["tokens_per_sec"] == pytest.approx(400 / 2.1)
    assert result["arms"]["padded"]["cpu_sec_per_clip"] == pytest.approx(15.3 / 8)


def test_cpu_time_decides_on_a_busy_machine() -> None:
    found = {"earshot": records(2.0), "padded": records(6.0), "grouped": records(4.2)}
    result = bench.compare(found, WORK, ranks=2, cores=1)
    assert not result["passed"] and result["decided_by"] == "CPU time"
    assert result["speed"] == pytest.approx((13.2 / 11 + 13.62 / 11.2) / 2)


@pytest.mark.parametrize(
    "ours", [records(2.3), records(2.0, peak_mib=901.0), records(2.0, loss=8.01)], ids=["speed", "memory", "loss"]
)
def test_every_goal_can_be_missed(ours: list[bench.Record]) -> None:
    found = {"earshot": ours, "padded": records(6.0), "grouped": records(4.2)}
    assert not bench.compare(found, WORK, ranks=2, cores=2)["passed"]


def test_clips_have_the_lengths_of_the_kit(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("bench.trainer_work.KIT", tmp_path)  # the kit is not there
    seconds = sorted(len(s.clips[0]) / 16_000 for s in draw_samples(TINY))
    assert 0.1 < seconds[0] < 1 and 1 < sum(seconds) / len(seconds) < 4 and seconds[-1] <= 12.5
