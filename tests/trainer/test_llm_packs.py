"""Tests of what the LLM engine computes for packs: losses of samples, gradients of packs, and logits of rows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from model.batch import IGNORE
from model.losses.next_token import NextToken
from model.losses.vocabulary import Vocabulary
from trainer.engine import token_losses
from trainer.engine.microbatches import TrainedPacks
from trainer.engine.packs import Packs
from trainer.engine.token_losses import PackedLoss


def packs() -> Packs:
    """Return two packs of 4000 rows. The first has samples 2 and 0 and padding, the second only sample 1."""
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
    step = step_of(2, [], packs().labels)
    assert [part.shape for part in step.audio] == [(2000, 2)] * 4
    step.audio[1].sum().backward()
    assert [part.grad is None for part in step.audio] == [True, False, True, True]


def step_of(tp: int, losses: list[Any], labels: torch.Tensor) -> TrainedPacks:
    groups = SimpleNamespace(topology=SimpleNamespace(tp=tp), is_first_stage=True)
    return TrainedPacks(None, cast(Any, groups), replace(packs(), labels=labels), losses, None)


def test_only_rows_with_a_label_need_logits() -> None:
    labels = torch.full((8000,), IGNORE)
    labels[[3, 3999]] = 7
    step = step_of(1, [PackedLoss(NextToken(), cast(Any, None), 0.5)], labels)
    rows = [step.labelled_rows(m) for m in range(2)]
    assert rows[0] is not None and rows[0].tolist() == [3, 3999]
    assert rows[1] is not None and rows[1].tolist() == [0], "a pack without labels needs one row, which is ignored"
    assert step_of(2, step.losses, labels).labelled_rows(0) is None, "tensor-parallel ranks hold different rows"
    compared = replace(step.losses[0], rows=(torch.tensor([1]),))
    assert step_of(1, [compared], labels).labelled_rows(0) is None, "a reference needs other rows as well"


def test_weights_of_samples_scale_the_loss_but_not_the_values_that_are_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_losses, "TensorParallelVocabulary", Vocabulary)
    labels, logits = torch.full((8000,), IGNORE), torch.randn(1, 4000, 5)
    labels[[3, 3010]] = torch.tensor([2, 4])  # in samples 2 and 0
    weights = np.array([3.0, 1.0, 0.25, 1.0])
    losses = [PackedLoss(NextToken(), cast(Any, None), 0.5, sample_weights=weights)]
    some, whole = step_of(1, losses, labels), step_of(2, losses, labels)
    each = torch.nn.functional.cross_entropy(logits[0, [3, 3010]], labels[[3, 3010]], reduction="none")
    expected = 0.5 * (0.25 * each[0] + 3.0 * each[1])
    torch.testing.assert_close(some.loss(0, logits[:, [3, 3010]])[0], expected)
    torch.testing.assert_close(whole.loss(0, logits)[0], expected)
    torch.testing.assert_close(whole.token_losses[0][0][[3, 3010]], each)
    sums = packs().sum_by_sample([whole.token_losses[0][0], torch.zeros(4000)], torch.device("cpu"))
    torch.testing.assert_close(0.5 * losses[0].total(sums), expected)


def test_the_loss_of_chosen_rows_is_that_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_losses, "TensorParallelVocabulary", Vocabulary)
    labels, logits = torch.full((8000,), IGNORE), torch.randn(1, 4000, 5)
    labels[[3, 3999]] = torch.tensor([2, 4])
    losses = [PackedLoss(NextToken(), cast(Any, None), 0.5)]
    some, whole = step_of(1, losses, labels), step_of(2, losses, labels)
    total = some.loss(0, logits[:, [3, 3999]])[0]
    assert total > 0
    torch.testing.assert_close(total, whole.loss(0, logits)[0])
    torch.testing.assert_close(some.token_losses, whole.token_losses)
