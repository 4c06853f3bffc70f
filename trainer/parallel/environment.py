"""Environment variables and limits that a process needs before its first CUDA call and its first process group.

This module does not import torch.
"""

from __future__ import annotations

import math
import os
import resource
import sys
from collections.abc import MutableMapping

_SETTINGS = {
    # Megatron needs communication kernels to start in the order in which they are issued.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # A gloo group connects two ranks when they first communicate, instead of all pairs of ranks at the beginning.
    "TORCH_GLOO_LAZY_INIT": "1",
}
_ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_ALLOCATOR = "expandable_segments:True"
"""The default allocator setting. Packs differ in length from step to step, which would fragment fixed segments."""

PROCESS_DESCRIPTORS = 256
"""Assumed number of descriptors for files, libraries, data workers and their pipes."""
NCCL_DESCRIPTORS = 1024
"""Assumed number of descriptors for all NCCL communicators of a rank."""
GLOO_GROUP_DESCRIPTORS = 4
"""Number of descriptors of a gloo group without connections (a listener and its loop), measured with torch 2.13."""
STORE_DESCRIPTORS = 16
"""Number of descriptors of rank 0's store without those of its clients, measured with torch 2.13."""


def set_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the environment variables of CUDA, its allocator and gloo, and raise the limit on open files.

    Call this function before the first CUDA call and the first process group. Variables that are already set are kept.

    Args:
        environ: The environment variables.
    """
    for name, value in _SETTINGS.items():
        environ.setdefault(name, value)
    if not any(name in environ for name in _ALLOCATOR_NAMES):
        environ[_ALLOCATOR_NAMES[0]] = _ALLOCATOR
    raise_descriptor_limit()


def raise_descriptor_limit() -> int:
    """Raise this process's soft limit on open files to the hard limit, and return the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # macOS reports a hard limit that it does not grant
            return soft
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def needed_descriptors(num_ranks: int, cuda: bool) -> int:
    """Return how many files rank 0 may have open at once, which are more than those of any other rank.

    All ranks are connected to the store of rank 0, and to rank 0 itself in the gloo group of the world. Checkpoints use
    another gloo group, in which a rank is connected only to its neighbors in rings and trees.

    Args:
        num_ranks: The number of ranks of the run.
        cuda: Whether ranks compute on GPUs, and therefore have NCCL communicators.
    """
    store = STORE_DESCRIPTORS + num_ranks
    world = GLOO_GROUP_DESCRIPTORS + num_ranks - 1
    checkpoints = GLOO_GROUP_DESCRIPTORS + 2 * math.ceil(math.log2(max(2, num_ranks)))
    return PROCESS_DESCRIPTORS + (NCCL_DESCRIPTORS if cuda else 0) + store + world + checkpoints


def low_limit(limit: int, num_ranks: int, cuda: bool) -> str | None:
    """Return an error message if the limit on open files is too low for a run, else None.

    Args:
        limit: The number of files that a process may open.
        num_ranks: The number of ranks of the run.
        cuda: Whether ranks compute on GPUs.
    """
    needed = needed_descriptors(num_ranks, cuda)
    if limit >= needed:
        return None
    return (
        f"a process may open {limit} files, a rank of {num_ranks} may need {needed}: raise the hard limit "
        f"(ulimit -Hn {needed}, LimitNOFILE of slurmd, or /etc/security/limits.conf)"
    )
