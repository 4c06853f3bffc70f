"""Tests of the losses that the spike guard rejects."""

from __future__ import annotations

import json
import math

import pytest

from model.errors import UserError
from trainer.config.spike import SpikeConfig
from trainer.training.spike_guard import SpikeGuard


def fed(config: SpikeConfig, losses: list[float]) -> SpikeGuard:
    guard = SpikeGuard(config)
    for step, loss in enumerate(losses, start=1):
        guard.note(step, loss, skipped=guard.judge(loss) is not None)
    return guard


def test_losses_that_are_not_finite_are_always_rejected() -> None:
    guard = SpikeGuard(SpikeConfig())
    assert guard.judge(math.nan) == "loss is nan" and guard.judge(math.inf) == "loss is inf"
    assert guard.judge(1e9) is None


def test_a_spike_is_measured_by_the_median_of_accepted_losses() -> None:
    guard = fed(SpikeConfig(factor=3.0, window_steps=5), [100.0, 2.0, 2.0, 2.0, 2.0])
    assert guard.judge(6.0) is None
    assert "3.5 times the median of the losses of the last 5 applied updates" in str(guard.judge(7.0))
    guard.note(6, 7.0, skipped=True)
    guard.note(7, 7.0, skipped=True)
    assert (guard.num_skipped_updates, guard.in_a_row) == (2, 2) and guard.judge(7.0) is not None
    guard.note(8, 2.0, skipped=False)
    assert (guard.num_skipped_updates, guard.in_a_row) == (2, 0)
    assert (
        fed(SpikeConfig(factor=3.0, window_steps=5), [2.0] * 4).judge(100.0) is None
    )  # there are too few losses to compare with


def test_resumed_run_judges_like_an_uninterrupted_one() -> None:
    config = SpikeConfig(factor=2.0, window_steps=3)
    losses = [3.0, 2.0, math.nan, 2.5, 9.0, 2.0, 8.0]
    whole = fed(config, losses)
    resumed = SpikeGuard(config)
    resumed.restore(json.loads(json.dumps(fed(config, losses[:4]).state)))
    for step, loss in enumerate(losses[4:], start=5):
        resumed.note(step, loss, skipped=resumed.judge(loss) is not None)
    assert resumed.state == whole.state and whole.num_skipped_updates == 3
    resumed.restore(None)
    resumed.forget_after(2)
    assert resumed.state["recent"] == [(2, 2.0)]


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"factor": 0.5}, "spike.factor"), ({"window_steps": 0}, "window_steps"), ({"max_in_a_row": 0}, "max_in_a_row")],
)
def test_invalid_settings_are_refused(fields: dict[str, float], key: str) -> None:
    with pytest.raises(UserError, match=key):
        SpikeConfig(**fields)  # type: ignore[arg-type]


def test_a_median_of_zero_makes_no_loss_a_spike() -> None:
    assert fed(SpikeConfig(factor=2.0, window_steps=3), [0.0] * 3).judge(1.0) is None


def test_a_new_stage_may_have_a_much_higher_loss() -> None:
    guard = SpikeGuard(SpikeConfig(factor=2.0, window_steps=3))
    for step in range(1, 4):
        guard.note(step, 1.0, skipped=False)
    guard.forget_until(0)
    assert guard.judge(5.0) is not None
    guard.forget_until(3)
    assert guard.judge(5.0) is None
