"""Tests that bootstrap resampling agrees with theoretical results."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.scoring import metric as metric_module
from trainer.scoring.metric import Metric, interval, mean, paired_difference, resampled_sums


def test_interval_of_a_mean_equals_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = mean("m", values)
    low, high = interval(found.value(resampled_sums(found.statistics, 4000)))
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_draws_do_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = np.arange(14.0).reshape(7, 2)
    whole = resampled_sums(statistics, 40)
    assert whole.shape == (40, 2) and (whole[:, 1] - whole[:, 0] == 7).all()
    monkeypatch.setattr(metric_module, "_MAX_DRAWS", 21)
    assert (resampled_sums(statistics, 40) == whole).all()


def test_pairing_finds_a_small_steady_difference() -> None:
    generator = np.random.default_rng(2)
    errors = generator.integers(0, 9, 300).astype(float)
    words = np.full(300, 10.0)
    a = Metric("wer", np.stack([errors, words], axis=1), lower_is_better=True)
    steady = Metric("wer", np.stack([errors + (np.arange(300) % 5 == 0), words], axis=1), lower_is_better=True)
    rows = np.arange(300)
    found = paired_difference(a, steady, rows)
    assert found.value == pytest.approx(0.02) and found.is_significant and found.p < 0.01
    shuffled = Metric("wer", np.stack([generator.permutation(errors), words], axis=1), lower_is_better=True)
    chance = paired_difference(a, shuffled, rows)
    assert not chance.is_significant and chance.p > 0.05
    same = paired_difference(a, a, rows)
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_uncounted_rows_are_ignored() -> None:
    found = mean("m", [1.0, 5.0, 3.0], np.array([True, False, True]))
    assert found.rows([1, 2]).tolist() == [2] and found.rows([1]).tolist() == []
