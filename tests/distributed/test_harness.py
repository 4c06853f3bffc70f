from __future__ import annotations

import os
import sys
import time

import pytest

from tests.distributed.harness import run_ranks

HERE = "tests.distributed.test_harness"


def report(word: str) -> list[str]:
    return [word, os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"]]


def fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        sys.exit("the cause is here")
    time.sleep(60)


def hang() -> None:
    time.sleep(60)


def test_returns_every_ranks_value() -> None:
    assert run_ranks(2, f"{HERE}:report", {"word": "hi"}) == [["hi", "0", "2", "1"], ["hi", "1", "2", "1"]]


def test_a_failing_rank_ends_all_and_shows_why() -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)ranks \[1\] of 2 failed.*the cause is here"):
        run_ranks(2, f"{HERE}:fail_on_rank_1", timeout_sec=50)
    assert time.monotonic() - started < 30


def test_the_deadline_ends_all() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] of 2 were still running after 1 s"):
        run_ranks(2, f"{HERE}:hang", timeout_sec=1)
