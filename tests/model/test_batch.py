"""Tests of `Ragged`: rows are selected without a copy if they are already in the required order in memory."""

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
