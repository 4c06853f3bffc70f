"""The nodes on which ranks run."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

import numpy as np

from trainer.parallel.groups import Groups
from trainer.parallel.plan import Ints
from trainer.parallel.tree import all_gather_numbers


def nodes_of_ranks(groups: Groups) -> Ints | None:
    """Return the number of each rank's node; None if no node has more than one rank.

    Collective: every rank of the world must call it.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")  # Machines may have the same name.
    machine = socket.gethostname() + (boot.read_text() if boot.is_file() else "")
    digest = hashlib.sha256(machine.encode()).digest()
    names = all_gather_numbers(np.frombuffer(digest[:8], dtype=np.int64), groups.world)[:, 0]
    _, first, number = np.unique(names, return_index=True, return_inverse=True)
    if len(first) == len(names):
        return None
    ordered = np.argsort(np.argsort(first))  # Nodes are numbered in the order of their first ranks.
    return ordered[number]
