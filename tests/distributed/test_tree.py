"""Tests of collectives with a logarithmic number of rounds, also for numbers of ranks that are not powers of two."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from tests.distributed.harness import run_ranks
from trainer.parallel.exchange import gather_distinct
from trainer.parallel.tree import all_gather_numbers, broadcast_bytes, gather_bytes


def body() -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    numbers = all_gather_numbers(np.array([[rank, 10 * rank]], dtype=np.int64), None)
    floats = all_gather_numbers(np.array([rank / 2]), None)
    gathered = gather_bytes(b"x" * rank, None)
    last = broadcast_bytes(f"from {rank}".encode(), world - 1, None)
    empty = broadcast_bytes(b"", 0, None)
    distinct = gather_distinct(["odd" if rank % 2 else "even", "name"], dist.group.WORLD)
    half = dist.new_group(list(range(1, world, 2))) if world > 1 else None
    inside = all_gather_numbers(np.array([rank]), half).ravel().tolist() if rank % 2 else None
    dist.barrier()  # rank 0 serves the store, which the odd ranks need until their group is connected
    dist.destroy_process_group()
    return {
        "numbers": numbers.tolist(),
        "floats": floats.tolist(),
        "gathered": None if gathered is None else [len(part) for part in gathered],
        "last": last.decode(),
        "empty": empty.decode(),
        "distinct": distinct,
        "inside": inside,
    }


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_every_rank_gets_the_values_of_all(world: int) -> None:
    for rank, found in enumerate(run_ranks(world, body)):
        assert found["numbers"] == [[[r, 10 * r]] for r in range(world)]
        assert found["floats"] == [[r / 2] for r in range(world)]
        assert found["gathered"] == (list(range(world)) if rank == 0 else None)
        assert found["last"] == f"from {world - 1}" and found["empty"] == ""
        assert found["distinct"] == [["even", "name"], ["odd", "name"]][: min(world, 2)]
        assert found["inside"] == (list(range(1, world, 2)) if rank % 2 else None)
