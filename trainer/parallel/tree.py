"""Collectives for small values on the host. Their number of rounds grows with the logarithm of the number of ranks.

gloo's own collectives pass data around a ring, in which one rank after another waits for its neighbor. With ten
thousand ranks, a ring takes about half a second even for one number.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist


def all_gather_numbers(values: np.ndarray, group: dist.ProcessGroup | None) -> np.ndarray:
    """Return the arrays of all ranks, which have the same shape and dtype, as one array [ranks, ...].

    Collective: every rank of `group` must call it.

    In each round, a rank doubles the number of arrays that it has (Bruck et al., "Efficient algorithms for all-to-all
    communications in multiport message-passing systems", 1997, section 4). There are ceil(log2(ranks)) rounds.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    # Row i is the array of rank (rank + i) % world.
    found = torch.empty((world, *values.shape), dtype=torch.from_numpy(values[:0].copy()).dtype)
    found[0] = torch.from_numpy(np.ascontiguousarray(values))
    count = 1
    while count < world:
        more = min(count, world - count)
        sent = dist.isend(found[:more], group=group, group_dst=(rank - count) % world)
        dist.recv(found[count : count + more], group=group, group_src=(rank + count) % world)
        assert sent is not None
        sent.wait()
        count += more
    return np.roll(found.numpy(), rank, axis=0)


def gather_bytes(payload: bytes, group: dist.ProcessGroup | None) -> list[bytes] | None:
    """Return the payloads of all ranks, in the order of the ranks, on rank 0 of `group`; None on other ranks.

    Collective: every rank of `group` must call it.

    The payloads may have different sizes. They are sent along a binomial tree, so that rank 0 receives few messages.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    parts = [payload]
    distance = 1
    while distance < world:
        if rank % (2 * distance):
            sizes = torch.tensor([len(part) for part in parts])
            dist.send(sizes, group=group, group_dst=rank - distance)
            dist.send(_as_tensor(b"".join(parts)), group=group, group_dst=rank - distance)
            return None
        if rank + distance < world:
            sizes = torch.empty(min(distance, world - rank - distance), dtype=torch.int64)
            dist.recv(sizes, group=group, group_src=rank + distance)
            joined = torch.empty(int(sizes.sum()), dtype=torch.uint8)
            dist.recv(joined, group=group, group_src=rank + distance)
            parts += [part.numpy().tobytes() for part in joined.split(sizes.tolist())]
        distance *= 2
    return parts


def broadcast_bytes(payload: bytes | None, source: int, group: dist.ProcessGroup | None) -> bytes:
    """Return the payload of one rank on all ranks.

    Collective: every rank of `group` must call it.

    Args:
        payload: The payload on the rank `source`; ignored on all other ranks.
        source: The rank within `group` that sends its payload.
        group: The ranks that take part; None for the world.
    """
    mine = payload if dist.get_rank(group) == source else None
    size = torch.tensor([len(mine) if mine is not None else 0])
    dist.broadcast(size, group=group, group_src=source)
    data = torch.empty(int(size), dtype=torch.uint8) if mine is None else _as_tensor(mine)
    dist.broadcast(data, group=group, group_src=source)
    return data.numpy().tobytes()


def _as_tensor(payload: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
