"""Tests of the LLM engine's results for packs: losses by sample, and gradients by micro-batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch

from trainer.engine.llm import _TrainedPacks
from trainer.engine.packs import Packs


def packs() -> Packs:
    """Return two packs of 4000 rows: one with samples 2 and 0 and padding, and one with sample 1 alone."""
    rows = torch.zeros(8000, dtype=torch.int64)
    return Packs(
        lengths=((3000, 900, 100), (4000,)),
        token_ids=rows,
        labels=rows,
        samples=((2, 0), (1,)),
        audio=torch.zeros(8000, 2),
        audio_mask=rows.bool(),
        num_samples=4,
    )


def test_losses_are_summed_by_sample_without_padding() -> None:
    losses = [torch.full((4000,), 0.5), torch.full((4000,), 0.25)]
    sums = packs().sum_by_sample(losses, torch.device("cpu"))
    assert sums.tolist() == [450.0, 1000.0, 1500.0, 0.0]
    assert packs().sum_by_sample([], torch.device("cpu")).tolist() == [0.0] * 4


def test_micro_batch_does_not_change_the_gradients_of_others() -> None:
    engine = SimpleNamespace(groups=SimpleNamespace(topology=SimpleNamespace(tp=2), is_first_stage=True))
    step = _TrainedPacks(cast(Any, engine), packs(), [], None)
    assert [part.shape for part in step.audio] == [(2000, 2)] * 4
    step.audio[1].sum().backward()
    assert [part.grad is None for part in step.audio] == [True, False, True, True]
