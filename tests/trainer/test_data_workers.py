"""Tests that arrays in shared memory arrive in order and unchanged, even if they do not fit into the ring buffer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from model.errors import UserError
from trainer.data.workers import Workers

SIZES = (0, 1, 7, 1000, 30_000, 65_000, 200_000, 12)
"""The sizes of float32 arrays. An array of 200,000 values does not fit into a ring buffer of 256 KiB."""


def numbers(seed: int, num: int) -> Iterator[list[dict[str, object]]]:
    """Yield `num` lists with arrays and other small values."""
    rng = np.random.default_rng(seed)
    for i in range(num):
        sizes = rng.choice(SIZES, size=2)
        arrays = tuple(rng.standard_normal(n).astype(np.float32) for n in sizes)
        yield [{"number": i, "arrays": arrays, "flags": rng.integers(0, 2, 5).astype(bool)}]


def failing(kind: str) -> Iterator[list[int]]:
    yield [1]
    if kind == "user":
        raise UserError("data.x = 1: fix it")
    raise ZeroDivisionError("a mistake of ours")


def endless() -> Iterator[list[int]]:
    while True:
        yield [0]


@pytest.mark.slow
@pytest.mark.parametrize("num_ahead", [1, 3])
def test_everything_arrives_in_order_and_unchanged(num_ahead: int) -> None:
    workers = Workers([(1, 60), (2, 60)], serve=numbers, num_ahead=num_ahead, buffer_bytes=256 << 10)
    try:
        kept = []
        for expected in zip(numbers(1, 60), numbers(2, 60), strict=True):
            found = workers.lane_batches(0)
            kept.append((found, [x for part in expected for x in part]))
    finally:
        workers.close()
    for found, wanted in kept:  # the ring buffer has been overwritten since
        for a, b in zip(found, wanted, strict=True):
            assert a["number"] == b["number"]
            assert all(np.array_equal(x, y) for x, y in zip(a["arrays"], b["arrays"], strict=True))
            assert np.array_equal(a["flags"], b["flags"])


@pytest.mark.parametrize(("kind", "error", "words"), [("user", UserError, "fix it"), ("ours", RuntimeError, "ZeroDiv")])
def test_error_of_a_process_is_raised_after_its_earlier_results(kind: str, error: type, words: str) -> None:
    workers = Workers([(kind,)], serve=failing, num_ahead=2, buffer_bytes=4096)
    try:
        assert workers.lane_batches(0) == [1]
        with pytest.raises(error, match=words):
            workers.lane_batches(1)
    finally:
        workers.close()


def test_process_is_limited_in_how_far_it_is_ahead() -> None:
    workers = Workers([()], serve=endless, num_ahead=3, buffer_bytes=4096)
    try:
        workers.lane_batches(0)
        connection = workers._inboxes[0]._connection
        for _ in range(3):
            assert connection.poll(20)
            connection.recv()
        assert not connection.poll(0.3)
    finally:
        workers.close()
