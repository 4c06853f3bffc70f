"""A short form of `make kill-all`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.kill_all import PAIRS, WRITERS, Writer, kill, make_source, pair

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize("writer", WRITERS, ids=lambda w: w.name)
def test_a_killed_writer_loses_nothing(writer: Writer, source: Path, tmp_path: Path) -> None:
    kill(writer, source, tmp_path, num_kills=3, choose=random.Random(1))


@pytest.mark.parametrize("writer", PAIRS, ids=lambda w: w.name)
def test_two_writers_at_once_lose_nothing(writer: Writer, source: Path, tmp_path: Path) -> None:
    pair(writer, source, tmp_path, num_trials=2)
