"""Tests that a test covers every property of every registered family, and that docs/families.md lists these tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.family_table import ENCODERS, TABLES, Fill, empty_cells, fill, markdown
from trainer.parity_llms import MIXTURES

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


@pytest.mark.parametrize(("families", "columns"), TABLES.values(), ids=list(TABLES))
def test_every_cell_is_filled(families: Iterable[str], columns: dict[str, list[Fill]]) -> None:
    assert empty_cells(families, columns) == []
    for fills in columns.values():
        for one in fills:
            assert one.families and one.families <= {*families, *MIXTURES}, one.place


def test_a_family_without_a_test_is_found() -> None:
    column = {"FLOPs": [fill(test_a_family_without_a_test_is_found, ["whisper"])]}
    assert empty_cells(["whisper", "new"], {**column, **ENCODERS})[0] == ("new", "FLOPs")


def test_the_page_has_the_table() -> None:
    assert markdown() in PAGE.read_text(encoding="utf-8"), "insert the output of: python -m tests.family_table"
