"""Tests of finding the rank for which all others wait. It is found by its work, not by the duration of its steps."""

from __future__ import annotations

import statistics
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_ranks
from trainer.telemetry.config import TelemetryConfig
from trainer.telemetry.metrics import PhaseTimer, StepReport
from trainer.telemetry.straggler import RankWork, Straggler, StragglerMeter, _medians_of_others, work_metrics
from trainer.telemetry.waiting import WaitSampler
from trainer.training import rank_work
from trainer.training.rank_work import Work


def parts(*work_sec: float, step_sec: float = 10.0) -> list[RankWork]:
    """Return the work of ranks that work in `encode` for the given seconds, and wait for the rest of the step."""
    return [
        RankWork(r, f"node{r}", {"load": 1.0, "encode": step_sec}, {"encode": step_sec - sec})
        for r, sec in enumerate(work_sec)
    ]


def test_three_slow_stretches_in_a_row_make_a_straggler() -> None:
    meter = StragglerMeter(slow=1.3, stretch_sec=20.0)
    found = [meter.add(parts(4.0, 4.0, 6.0, 4.2), num_steps=1) for _ in range(10)]
    # A stretch consists of two intervals of 11 s, so the third stretch ends with the sixth interval.
    assert [bool(f) for f in found] == [False] * 5 + [True] + [False] * 4
    assert found[5] == [Straggler(2, "node2", round(7.0 / 5.0, 2), "encode")]
    summary = meter.summary()
    assert summary[2] == {
        "rank": 2,
        "host": "node2",
        "work_sec": {"load": 1.0, "encode": 6.0},
        "wait_sec": {"encode": 4.0},
    }


def test_noise_is_not_a_straggler() -> None:
    meter = StragglerMeter(slow=1.3, stretch_sec=0.0)
    for i in range(12):
        assert meter.add(parts(9.0 if i % 3 else 4.0, 4.0, 4.0, 4.0), 1) == []  # slow at most twice in a row
    assert meter.add(parts(4.0), 1) == []  # a single rank cannot be slower than others


def test_straggler_is_reported_again_after_a_recovery() -> None:
    meter = StragglerMeter(slow=1.3, stretch_sec=0.0)
    slow, even = parts(4.0, 8.0), parts(4.0, 4.0)
    found = [bool(meter.add(p, 1)) for p in (slow, slow, slow, slow, even, slow, slow, slow)]
    assert found == [False, False, True, False, False, False, False, True]


def test_metrics_of_an_interval() -> None:
    metrics = work_metrics(parts(4.0, 4.0, 7.0), num_steps=2)
    assert metrics["ranks/slowest"] == 2 and metrics["ranks/slowest_times_median"] == pytest.approx(8 / 5)
    assert metrics["ranks/max_work/encode_sec"] == pytest.approx(3.5)
    assert metrics["ranks/max_wait_sec"] == pytest.approx(3.0) and metrics["ranks/min_wait_sec"] == pytest.approx(1.5)


def test_median_of_the_others_excludes_the_rank_itself() -> None:
    generator = np.random.default_rng(0)
    for num in (2, 3, 4, 5, 9, 10):
        values = generator.integers(0, 4, num).astype(float)  # with ties
        others = [statistics.median(np.delete(values, i).tolist()) for i in range(num)]
        assert _medians_of_others(values).tolist() == others


def test_ten_thousand_ranks_are_judged_quickly() -> None:
    work = [4.0] * 10_240
    work[7000] = 6.0
    meter, found, times = StragglerMeter(slow=1.3, stretch_sec=0.0), [], []
    for _ in range(6):
        listed = parts(*work)
        start = time.thread_time()
        found.append(meter.add(listed, 1))
        times.append(time.thread_time() - start)
    assert found[2] == [Straggler(7000, "node7000", 1.4, "encode")]
    assert min(times) < 0.05, times


def test_stragglers_are_judged_off_the_training_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, reported = [], []
    add = StragglerMeter.add

    def noted(self: StragglerMeter, listed: Any, num_steps: int) -> list[Straggler]:
        threads.append(threading.get_ident())
        return [*add(self, listed, num_steps), Straggler(num_steps, "n", 2.0, "encode")]

    monkeypatch.setattr(StragglerMeter, "add", noted)
    monkeypatch.setattr(rank_work, "gather_values", lambda mine, group, kinds: [mine])
    groups: Any = SimpleNamespace(rank=0, world=None, topology=SimpleNamespace(world=1))
    report = StepReport(step=7, loss=0.0, grad_norm=0.0, lr=0.0, phase_sec={"encode": 1.0})
    with Work(TelemetryConfig(), WaitSampler(PhaseTimer()), groups, lambda *what: reported.append(what)) as work:
        work.add(report)
        work.take(report)
        assert work.summary[0]["work_sec"] == {"encode": 1.0}
    assert threads and threading.get_ident() not in threads
    assert [(event, step) for event, step, _ in reported] == [("straggler", 7)]


def waiting_body() -> dict[str, Any]:
    """Let rank 1 sleep while rank 0 waits for it in a collective, and return the seconds of phases and of waits."""
    dist.init_process_group("gloo")
    timer = PhaseTimer()
    with WaitSampler(timer) as waits:
        for _ in range(10):
            with timer("encode"):
                if dist.get_rank() == 1:
                    time.sleep(0.2)
                dist.all_reduce(torch.ones(1))
            with timer("load"):
                time.sleep(0.05)
                dist.barrier()
    return {"phases": timer.take(), "waits": waits.take()}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_waiting_for_a_rank_does_not_count_as_work() -> None:
    fast, slow = run_ranks(2, waiting_body)
    assert fast["phases"]["encode"] == pytest.approx(slow["phases"]["encode"], rel=0.25)
    assert fast["waits"]["encode"] > 0.7 * fast["phases"]["encode"]
    assert slow["waits"].get("encode", 0.0) < 0.3 * slow["phases"]["encode"]
