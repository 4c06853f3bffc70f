"""The store through which ranks find each other, and its protection against other processes.

torch's stores have no authentication, so every process that can connect to a store can read and change it. Therefore,
ranks on one machine use a file that only their user can open, or a port that only this machine can reach. Ranks on
several machines use a port of the first machine, and prefix all names in the store with a hash of the secret of their
job.

The store of torchrun outlives the ranks. After a restart, the store still contains the addresses of the previous ranks.
The ranks of every start therefore first agree on a name that no other start uses.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping, MutableMapping

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

FILE = "EARSHOT_MEETING_FILE"
"""The environment variable with the path to the file in which ranks meet. The launcher for a single machine sets it."""
SECRET = "EARSHOT_JOB_SECRET"
"""The environment variable with the secret that all ranks of a job share. `earshot job` generates a new secret for
every start."""
_POLL_SEC = 0.05
_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def on_one_machine(environ: Mapping[str, str]) -> bool:
    """Return whether the launcher says that all ranks are on this machine."""
    if FILE in environ or environ.get("WORLD_SIZE", "1") == "1":
        return True
    if "LOCAL_WORLD_SIZE" in environ:
        return environ["LOCAL_WORLD_SIZE"] == environ["WORLD_SIZE"]
    # Within an interactive step of one task, a launcher may start ranks on other nodes. Every rank must therefore be a
    # task of the step.
    is_of_srun = environ.get("SLURM_STEP_NUM_TASKS") == environ["WORLD_SIZE"]
    return is_of_srun and environ.get("SLURM_STEP_NUM_NODES") == "1"


def stay_on_this_machine(environ: MutableMapping[str, str]) -> None:
    """Make gloo and NCCL use only the loopback interface, unless the user has chosen another interface."""
    for name in _INTERFACES:
        environ.setdefault(name, _LOOPBACK)


def open_store(rank: int, world: int, timeout: datetime.timedelta, environ: Mapping[str, str]) -> dist.Store:
    """Return the store in which the ranks find each other.

    Collective: every rank of the world must call it.

    Args:
        rank: This rank.
        world: The number of ranks.
        timeout: The time after which a wait for another rank fails.
        environ: The environment variables: `FILE`, or MASTER_ADDR and MASTER_PORT, and `SECRET`.

    Raises:
        TimeoutError: If the store is that of torchrun, and other ranks have not arrived within `timeout`.
    """
    store: dist.Store
    is_of_torchrun = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if FILE in environ:
        store = dist.FileStore(environ[FILE], world)
    elif on_one_machine(environ) and not is_of_torchrun:
        store = loopback_store(int(environ["MASTER_PORT"]), rank, world, timeout)
    else:  # torchrun's agent listens at this port already, or rank 0 starts to listen.
        store, _, _ = next(rendezvous("env://", rank, world, timeout=timeout))
    store.set_timeout(timeout)
    secret = environ.get(SECRET, "")
    store = dist.PrefixStore(hashlib.sha256(f"earshot ranks {secret}".encode()).hexdigest(), store)
    return dist.PrefixStore(_name_of_start(store, rank, world, timeout), store) if is_of_torchrun else store


def _name_of_start(store: dist.Store, rank: int, world: int, timeout: datetime.timedelta) -> str:
    """Agree on a name that no previous start of these ranks has used.

    Collective: every rank of the world must call it.

    Every rank except rank 0 writes a random number, and rank 0 writes its answer under this number. An answer to a
    previous start therefore cannot be mistaken for this answer. Rank 0 may first read numbers of previous ranks, so it
    keeps answering until all ranks have confirmed the name. The number of restarts in torchrun's environment cannot
    serve as the name, because it may differ between nodes.

    Returns:
        The name, which is the same on all ranks.

    Raises:
        TimeoutError: If a rank has not confirmed the name within `timeout`.
    """
    own = secrets.token_hex(16)
    if rank != 0:
        store.set(f"arrived/{rank}", own)
        name = store.get(f"answer/{own}").decode()
        store.set(f"confirmed/{name}/{rank}", "")
        return name
    deadline = time.monotonic() + timeout.total_seconds()
    missing = list(range(1, world))
    while missing:
        for other in missing:
            if store.check([f"arrived/{other}"]):
                store.set(f"answer/{store.get(f'arrived/{other}').decode()}", own)
        missing = [other for other in missing if not store.check([f"confirmed/{own}/{other}"])]
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {missing} did not arrive within {timeout.total_seconds():g} s")
        time.sleep(_POLL_SEC)
    return own


def loopback_store(port: int, rank: int, world: int, timeout: datetime.timedelta) -> dist.TCPStore:
    """Return a store that listens on the loopback interface. torch itself would listen on all interfaces."""
    if rank != 0:
        return dist.TCPStore("127.0.0.1", port, world, False, timeout, wait_for_workers=False)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(world)
        descriptor = os.dup(listener.fileno())  # The store closes the descriptor that it is given.
    return dist.TCPStore("127.0.0.1", port, world, True, timeout, wait_for_workers=False, master_listen_fd=descriptor)
