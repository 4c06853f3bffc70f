"""Tests of `bench.pipeline`: both arms compute the same loss with a tiny model, and each goal can be missed."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from bench import pipeline as bench
from bench.trainer_work import TINY
from tests.distributed.harness import run_ranks


@pytest.mark.slow
def test_both_arms_compute_the_same_loss() -> None:
    arguments = {"sizes": asdict(TINY), "rounds": 1, "pack_tokens": 64}
    found = run_ranks(2, "bench.pipeline:measure", arguments, timeout_sec=180)[0]
    spread, other = found[bench.SPREAD][1], found[bench.FIRST_STAGE][1]
    assert len(found[bench.SPREAD]) == 2 and spread["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert {"encode", "llm", "backward"} <= set(spread["phases"])
    assert min(spread["encoder_sec"]) > 1e-3
    assert other["encoder_sec"][0] > 1e-3 > 10 * other["encoder_sec"][1]  # no encoder call on the last stage


def records(sec: float, loss: float = 8.0) -> list[bench.Record]:
    warmup = {"loss": 8.0, "times": [9.0, 9.0], "phases": {"encode": 9.0}}
    steps = [{"loss": loss, "times": [sec, sec / 2]}, {"loss": 8.0, "times": [1.1 * sec, sec]}]
    return [warmup, *(step | {"phases": {"encode": sec}} for step in steps)]


@pytest.mark.parametrize(("sec", "loss", "passed"), [(1.4, 8.0, True), (1.2, 8.0, False), (1.4, 8.001, False)])
def test_every_goal_can_be_missed(sec: float, loss: float, passed: bool) -> None:
    found = {bench.SPREAD: records(1.0), bench.FIRST_STAGE: records(sec, loss)}
    result = bench.compare(found, cores=2)
    assert result["passed"] == passed and result["speed"] == pytest.approx(sec)
    assert result["arms"]["spread"]["busiest_rank_cpu_sec"] == pytest.approx(0.75)
    assert (result["decided_by"], bench.compare(found, cores=1)["decided_by"]) == bench.TIMES
