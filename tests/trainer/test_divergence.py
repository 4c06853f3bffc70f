"""Tests of the error message of a diverged run."""

from __future__ import annotations

import math

import pytest

from trainer.engine.optim import OptimConfig
from trainer.training.divergence import Divergence, Past

NAN = math.nan


def divergence(losses: list[float], num_skipped: int, **optim: float) -> Divergence:
    first_bad = len(losses) - num_skipped
    past = [Past(i + 1, loss, 2 * loss, i >= first_bad) for i, loss in enumerate(losses)]
    return Divergence(past, OptimConfig(lr=0.3, **optim), ["a", "b"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("losses", "num_skipped", "onset"),
    [
        ([3.0, 2.9, 2.8, NAN, NAN], 2, 4),  # the loss did not grow before
        ([3.0, 2.9, 2.8, 9.0, 40.0, NAN, NAN], 2, 4),  # the loss grew before
        ([3.0, 2.9, 9.0, 2.8, 40.0, NAN], 1, 5),  # a single high loss is not an onset if the loss recovers
        ([NAN, NAN], 2, 1),
    ],
)
def test_onset_is_where_the_loss_began_to_grow(losses: list[float], num_skipped: int, onset: int) -> None:
    assert divergence(losses, num_skipped).onset == onset


def test_message_names_history_causes_and_the_way_back() -> None:
    found = divergence([3.0, 2.9, 2.8, 9.0, 40.0, NAN, NAN], 2)
    text = found.message([2, 4], "runs/x")
    assert "2 steps in a row were skipped, the last at step 7" in text and "4: 9 (18), 5: 40 (80), 6: nan (nan)" in text
    assert (
        text.index("1. optim.lr = 0.3 is too high (try 0.1)") < text.index("there is no warm-up") < text.index("a, b")
    )
    assert text.endswith("step 2: `earshot checkpoints runs/x rollback 2`, then rerun with optim.lr=0.1")
    assert "the newest: rerun with optim.lr=0.1" in found.message([2, 3], "runs/x")
    assert "no checkpoint from before step 4: rerun" in found.message([], "runs/x")
    assert "\n" not in text and "gradients are not clipped" not in text
    assert "not clipped" in divergence([NAN], 1, clip_norm=0.0).message([], "runs/x")


def test_a_long_history_is_shown_around_the_onset() -> None:
    found = divergence([3.0] * 60 + [7.0, 90.0] + [NAN] * 10, 10)
    assert [p.step for p in found.shown()] == list(range(57, 65))
