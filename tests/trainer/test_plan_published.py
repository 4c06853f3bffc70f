"""Tests that plans agree with published training runs (`bench/published.csv`)."""

from __future__ import annotations

import pytest

from bench.plan_published import MEMORY_LIMIT, RMS_LIMIT, TIME_LIMITS, Published, compare, mechanisms_of, published, rms
from trainer.plan.mechanisms import Mechanisms

ROWS = published()


def counted(*counts: str) -> list[Published]:
    return [row for row in ROWS if row.counts in counts]


def test_every_row_has_a_source_and_counts_only_without_what_the_trainer_lacks() -> None:
    assert len(ROWS) == len({row.id for row in ROWS}) == 41
    assert all(row.source for row in ROWS)
    for row in counted("yes"):
        found = mechanisms_of(row)
        assert (found.context, found.overlap_tensor, found.fp8, found.sharded_weights) == (1, False, False, False)
        assert "deterministic" not in row.note
    assert Mechanisms().labels() == []


def test_runs_that_count_are_planned_within_the_goals() -> None:
    ratios = [compare(row, memory=False).ratio for row in counted("yes")]
    assert len(ratios) == 8
    assert TIME_LIMITS[0] <= min(ratios) and max(ratios) <= TIME_LIMITS[1]
    assert rms(ratios) <= RMS_LIMIT


@pytest.mark.timeout(300)
def test_runs_of_nvidia_are_planned_with_their_mechanisms() -> None:
    ratios = [compare(row, memory=False).ratio for row in counted("what-if") if "dgxc" in row.source]
    assert len(ratios) == 10
    assert TIME_LIMITS[0] <= min(ratios) and max(ratios) <= TIME_LIMITS[1]
    assert rms(ratios) <= RMS_LIMIT


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name",
    [
        "8B bf16 8",
        "70B SFT fp8 32",
        "70B SFT fp8 32 mlp",
        "70B SFT fp8 32 pp8",
        "7B tp4 H100",
        "7B tp4 A100",
        "7B pp4 A100",
    ],
)
def test_published_peaks_of_memory(name: str) -> None:
    (row,) = [row for row in ROWS if row.id == name]
    ratio = compare(row, memory=True).memory_ratio
    assert ratio is not None and abs(ratio - 1) <= MEMORY_LIMIT
