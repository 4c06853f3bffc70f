"""What a process needs before its first CUDA call and its first process group. Imports no torch."""

from __future__ import annotations

import math
import os
import resource
import sys
from collections.abc import MutableMapping

_SETTINGS = {
    # Megatron: communication kernels start in the order in which they are issued.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Connections of a gloo group are made when they are used, not between all pairs of its ranks at once.
    "TORCH_GLOO_LAZY_INIT": "1",
}
_ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_ALLOCATOR = "expandable_segments:True"
"""Packs differ in length from step to step; fixed segments would fragment."""

PROCESS_DESCRIPTORS = 256
"""Allowance for files, libraries, data workers and their pipes; an assumption."""
NCCL_DESCRIPTORS = 1024
"""Allowance for all of a rank's NCCL communicators; an assumption."""
GLOO_GROUP_DESCRIPTORS = 4
"""Of a gloo group without connections, measured with torch 2.13: a listener and its event loop."""
STORE_DESCRIPTORS = 16
"""Of rank 0's store besides its clients, measured likewise."""


def set_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what CUDA, its allocator and gloo read from the environment, and raise the limit on open files.

    Call it before the first CUDA call and the first process group. What the user has set stays.

    Args:
        environ: the variables to add to.
    """
    for name, value in _SETTINGS.items():
        environ.setdefault(name, value)
    if not any(name in environ for name in _ALLOCATOR_NAMES):
        environ[_ALLOCATOR_NAMES[0]] = _ALLOCATOR
    raise_descriptor_limit()


def raise_descriptor_limit() -> int:
    """Raise this process's soft limit on open files to the hard one; returns the limit that holds from now on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # macOS names a hard limit that it does not grant
            return soft
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def needed_descriptors(num_ranks: int, cuda: bool) -> int:
    """Return how many files the busiest rank of a run may have open at once.

    That is rank 0: it holds the store that all ranks connect to, and every rank sends it what it reports. The world has
    one gloo group, in which any pair of ranks may talk, and checkpoints have another, in which rings and trees do.

    Args:
        num_ranks: of the run.
        cuda: whether ranks compute on GPUs, and so have NCCL communicators.
    """
    store = STORE_DESCRIPTORS + num_ranks
    world = GLOO_GROUP_DESCRIPTORS + num_ranks - 1
    checkpoints = GLOO_GROUP_DESCRIPTORS + 2 * math.ceil(math.log2(max(2, num_ranks)))
    return PROCESS_DESCRIPTORS + (NCCL_DESCRIPTORS if cuda else 0) + store + world + checkpoints


def low_limit(limit: int, num_ranks: int, cuda: bool) -> str | None:
    """Return what to tell the user if `limit` open files are too few for a run of `num_ranks`; None if they suffice."""
    needed = needed_descriptors(num_ranks, cuda)
    if limit >= needed:
        return None
    return (
        f"a process may open {limit} files, a rank of {num_ranks} may need {needed}: raise the hard limit "
        f"(ulimit -Hn {needed}, LimitNOFILE of slurmd, or /etc/security/limits.conf)"
    )
