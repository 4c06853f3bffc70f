"""Test whether all ranks can communicate, and measure the bandwidth between them.

    srun python -m trainer.job.all_reduce

Every rank prints two lines of JSON. The first line reports that the rank has started, and the second line reports the
bandwidth of an all-reduce over all ranks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from datetime import timedelta

from trainer.run import launch

_NUM_TIMES = 5


def main() -> int:
    """Run an all-reduce as one task of `srun`.

    Returns:
        The exit code 0.

    Raises:
        RuntimeError: If a rank cannot be reached.
    """
    env = launch.rank_env(os.environ, num_ranks=0)
    assert env is not None, "not a task of srun"
    launch.join(env)
    import torch
    import torch.distributed as dist

    from trainer.parallel.environment import meeting_limit_sec
    from trainer.parallel.groups import connect
    from trainer.parallel.meeting import loopback_store, on_one_machine

    node = socket.gethostname().partition(".")[0]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit_sec = meeting_limit_sec(env.world_size)
    timeout = timedelta(seconds=limit_sec)
    if on_one_machine(os.environ):
        _meeting = loopback_store(port + 1, env.rank, env.world_size, timeout)
    else:
        _meeting = dist.TCPStore(address, port + 1, env.world_size, env.rank == 0, timeout, wait_for_workers=False)
    # If the all-reduce below hangs, a node that has not printed this line is at fault.
    print(json.dumps({"node": node, "arrived": True}), flush=True)
    _, _, device = connect(limit_sec)
    num_bytes = (256 if device.type == "cuda" else 4) << 20
    numbers = torch.ones(num_bytes // 4, device=device)
    dist.all_reduce(numbers)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(_NUM_TIMES):
        dist.all_reduce(numbers)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / _NUM_TIMES
    # In a ring, each link carries every byte twice, except for the share of one rank.
    bus = 2 * (env.world_size - 1) / env.world_size * num_bytes / seconds / 1e9
    print(json.dumps({"node": node, "mib": num_bytes >> 20, "gb_per_sec": bus}), flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
