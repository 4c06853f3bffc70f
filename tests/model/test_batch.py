"""Ragged sequences: chosen and parted without loss, and without a copy where they lie as wanted."""

from __future__ import annotations

import pytest
import torch

from model.batch import Ragged

VALUES = torch.arange(10.0)
RAGGED = Ragged(VALUES, (2, 3, 1, 4))


@pytest.mark.parametrize(
    ("rows", "values", "is_view"),
    [([1, 2], [2, 3, 4, 5], True), ([3, 0], [6, 7, 8, 9, 0, 1], False), ([], [], True), ([2, 2], [5, 5], False)],
)
def test_select(rows: list[int], values: list[float], is_view: bool) -> None:
    found = RAGGED.select(rows)
    assert found.values.tolist() == values and found.lengths == tuple(RAGGED.lengths[i] for i in rows)
    assert (found.values.untyped_storage().data_ptr() == VALUES.untyped_storage().data_ptr()) == is_view


def test_partition() -> None:
    leaf = VALUES.clone().requires_grad_()
    first, second, none = Ragged(leaf, RAGGED.lengths).partition([[2, 3], [1, 0], []])
    assert first.values.tolist() == [5, 6, 7, 8, 9] and first.lengths == (1, 4)
    assert second.values.tolist() == [2, 3, 4, 0, 1] and second.lengths == (3, 2)
    assert none.values.tolist() == [] and none.lengths == () and none.values.requires_grad
    (first.values.sum() + 2 * second.values.sum() + none.values.sum()).backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [2] * 5 + [1] * 5


def test_a_partition_has_every_sequence_once() -> None:
    with pytest.raises(AssertionError):
        RAGGED.partition([[0, 1], [1, 2, 3]])
    assert [len(part) for part in Ragged(torch.zeros(0, 3), ()).partition([[], []])] == [0, 0]
