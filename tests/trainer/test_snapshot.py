"""Tests of the copy of a rank's state in host memory: its content and its size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trainer.checkpoint import snapshot
from trainer.checkpoint.layout import Shard
from trainer.checkpoint.rect import matrix_of
from trainer.checkpoint.snapshot import HostBuffer, place_values

GIB = 2**30


def pinned_bytes(sizes: list[int]) -> int:
    """Return the bytes that torch's allocator of pinned memory takes for allocations of these sizes."""
    return sum(1 << (size - 1).bit_length() for size in sizes)


def shards(seed: int, rows: int = 5) -> list[Shard]:
    generator = torch.Generator().manual_seed(seed)

    def shard(name: str, dtype: torch.dtype, *shape: int) -> Shard:
        value = torch.randn(shape, generator=generator).to(dtype)
        return Shard(name, shape, matrix_of(shape), {"param": value, "exp_avg": value.float() + 1}, 3, True)

    return [shard("a", torch.float32, rows, 3), shard("b", torch.bfloat16, 7, 1), shard("c", torch.float32, 1000, 40)]


def test_copies_equal_what_was_copied_and_do_not_overlap(monkeypatch: Any) -> None:
    monkeypatch.setattr(snapshot, "CHUNK_BYTES", 4096)
    buffer = HostBuffer(torch.device("cpu"))
    for given in (shards(0), shards(1), shards(2, rows=50)):
        copies = buffer.copy(given)
        assert [c.name for c in copies] == ["a", "b", "c"]
        for one, copied in zip(given, copies, strict=True):
            for kind, value in one.values.items():
                assert torch.equal(copied.values[kind], value) and copied.values[kind].data_ptr() != value.data_ptr()


def test_memory_is_reused_by_the_next_save() -> None:
    buffer = HostBuffer(torch.device("cpu"))
    first = [v.data_ptr() for shard in buffer.copy(shards(0)) for v in shard.values.values()]
    assert [v.data_ptr() for shard in buffer.copy(shards(1)) for v in shard.values.values()] == first


def test_a_shard_that_is_copied_again_has_its_current_values() -> None:
    buffer, given = HostBuffer(torch.device("cpu")), shards(0)
    buffer.copy(given)
    for value in (v for shard in given for v in shard.values.values()):
        value.mul_(-2)
    moved = [replace(given[0], step=4), shards(1)[1], given[2]]
    for one, copied in zip(moved, buffer.copy(moved), strict=True):
        assert copied.step == one.step
        assert all(torch.equal(copied.values[kind], value) for kind, value in one.values.items())


def test_pinned_memory_is_hardly_more_than_the_state() -> None:
    """Check a state of 6.3 GiB, for which a single allocation would take 8 GiB."""
    generator = np.random.default_rng(0)
    pieces = generator.lognormal(np.log(2e6), 1.5, 1600)
    values = np.ceil(pieces * 6.3 * GIB / pieces.sum() / 4).astype(int) * 4
    places, sizes = place_values(values.tolist())
    assert pinned_bytes([int(values.sum())]) == 8 * GIB
    assert pinned_bytes(sizes) <= 1.03 * values.sum()
    ends = sorted((p.chunk, p.start, p.start + int(n)) for p, n in zip(places, values, strict=True))
    assert all(one[0] != other[0] or one[2] <= other[1] for one, other in zip(ends, ends[1:], strict=False))
    assert all(end <= sizes[chunk] for chunk, _, end in ends)


def test_value_larger_than_a_chunk_shares_its_own_chunk_with_small_ones() -> None:
    values = [snapshot.CHUNK_BYTES + 64, *[snapshot.CHUNK_BYTES // 4] * 3]
    places, sizes = place_values(values)
    assert sizes == [2 * snapshot.CHUNK_BYTES] and {p.chunk for p in places} == {0}
