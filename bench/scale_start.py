"""The time that ranks need to connect to each other, which `bench.scale` measures for several rank counts.

In a gloo group, each rank reads the addresses of all other ranks from the store of rank 0, so the store answers N²
requests. The time is measured with real processes on this machine, which are forked so that they do not import PyTorch
again. These processes share the machine's cores with the store. On a cluster, the store has a core to itself, so the
measured time per pair of ranks is probably an overestimate.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import time
from multiprocessing.queues import SimpleQueue

import torch.distributed as dist

from trainer.parallel.environment import set_environment

_TIMEOUT = datetime.timedelta(seconds=300)


def start_sec(num_ranks: int) -> float:
    """Return the wall time in seconds that `num_ranks` processes of this machine need to create a gloo group."""
    context = multiprocessing.get_context("fork")
    found: SimpleQueue[float] = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        context.Process(target=_rank, args=(rank, num_ranks, port, found), daemon=True) for rank in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(_TIMEOUT.total_seconds())
            assert rank.exitcode == 0, rank.exitcode
    finally:
        for rank in ranks:
            rank.kill()
    return found.get()


def _rank(rank: int, num_ranks: int, port: int, found: SimpleQueue[float]) -> None:
    set_environment()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, num_ranks, rank == 0, _TIMEOUT)
    start = time.perf_counter()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=_TIMEOUT)
    dist.barrier()
    if rank == 0:
        found.put(time.perf_counter() - start)
    dist.barrier()
    os._exit(0)
