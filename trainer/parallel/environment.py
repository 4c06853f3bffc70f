"""Settings that must be made before the first CUDA call and the first process group.

This module does not import torch.
"""

from __future__ import annotations

import math
import os
import resource
import sys
from collections.abc import Mapping, MutableMapping

from model.errors import UserError

_SETTINGS = {
    # Megatron needs communication kernels to start in the order in which they are launched.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # With this setting, a gloo group connects two ranks when they first communicate, instead of all pairs at once.
    "TORCH_GLOO_LAZY_INIT": "1",
}
_ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_ALLOCATOR = "expandable_segments:True"
"""The allocator setting. Segments of fixed size would become fragmented, since the length of packs differs between
steps."""

START_LIMIT = "EARSHOT_START_SEC"
"""The environment variable that sets the time in seconds within which the ranks of a job must have connected."""
_PAIR_SEC = 8e-6
"""The allowed time in seconds per pair of ranks. It is about twice the time that `bench.scale_start` measured on a busy
machine."""
_LAUNCH_SEC = 0.05
"""The assumed time in seconds by which each process delays the start of the last process."""

PROCESS_DESCRIPTORS = 256
"""The assumed number of file descriptors for files, libraries, data workers and their pipes."""
NCCL_DESCRIPTORS = 1024
"""The assumed number of file descriptors for all NCCL communicators of a rank."""
GLOO_GROUP_DESCRIPTORS = 4
"""The number of file descriptors of a gloo group without connections (a listener and its event loop), measured with
torch 2.13."""
STORE_DESCRIPTORS = 16
"""The number of file descriptors of rank 0's store without clients, measured with torch 2.13."""


def set_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that CUDA, its allocator and gloo read, and raise the limit on open files.

    This function must be called before the first CUDA call and the first process group. Variables that are already set
    keep their values.

    Args:
        environ: The environment variables.
    """
    for name, value in _SETTINGS.items():
        environ.setdefault(name, value)
    if not any(name in environ for name in _ALLOCATOR_NAMES):
        environ[_ALLOCATOR_NAMES[0]] = _ALLOCATOR
    raise_descriptor_limit()


def whole_number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return the value of an environment variable that is a whole number, at least 0.

    Args:
        environ: The environment variables.
        name: The variable.
        default: The value if the variable is not set or empty; None if it must be set.

    Raises:
        UserError: If the variable is not a whole number, or is not set although it must be.
    """
    text = environ.get(name, "").strip()
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise UserError(f"{name} = {text!r}: must be a whole number; the launcher or the scheduler sets it")
    return int(text)


def meeting_limit_sec(num_ranks: int, environ: Mapping[str, str] = os.environ) -> float:
    """Return the time limit in seconds within which all ranks must have found each other and connected.

    A gloo group of N ranks makes N² requests to the store of rank 0, which take `_PAIR_SEC` each.

    Args:
        num_ranks: The number of ranks.
        environ: The environment variables. If `START_LIMIT` is set, its value is returned instead.
    """
    return whole_number(environ, START_LIMIT, round(60 + _PAIR_SEC * num_ranks**2))


def start_limit_sec(num_ranks: int, environ: Mapping[str, str] = os.environ) -> float:
    """Return the time limit in seconds for the processes of a job step to start, connect and answer.

    In addition to `meeting_limit_sec`, the limit allows a minute and `_LAUNCH_SEC` per process. In this time, processes
    are launched and read their modules from a shared disk.
    """
    return meeting_limit_sec(num_ranks, environ) + 60 + _LAUNCH_SEC * num_ranks


def raise_descriptor_limit() -> int:
    """Raise this process's soft limit on open files to the hard limit, and return the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # macOS reports a hard limit that it does not accept.
            return soft
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def needed_descriptors(num_ranks: int, cuda: bool) -> int:
    """Return the largest number of file descriptors that rank 0 may need at once. Other ranks need fewer.

    All ranks connect to the store of rank 0. In the gloo group of the world, rank 0 may be connected to every other
    rank. In the gloo group of checkpoints, ranks are connected as rings and trees.

    Args:
        num_ranks: The number of ranks.
        cuda: True if ranks compute on GPUs and therefore have NCCL communicators.
    """
    store = STORE_DESCRIPTORS + num_ranks
    world = GLOO_GROUP_DESCRIPTORS + num_ranks - 1
    checkpoints = GLOO_GROUP_DESCRIPTORS + 2 * math.ceil(math.log2(max(2, num_ranks)))
    return PROCESS_DESCRIPTORS + (NCCL_DESCRIPTORS if cuda else 0) + store + world + checkpoints


def low_limit(limit: int, num_ranks: int, cuda: bool) -> str | None:
    """Return a warning if a limit of `limit` open files is too low for `num_ranks` ranks; None if it is sufficient."""
    needed = needed_descriptors(num_ranks, cuda)
    if limit >= needed:
        return None
    return (
        f"a process may open only {limit} files, but rank 0 of {num_ranks} may need {needed}; raise the hard limit "
        f"(ulimit -Hn {needed}, LimitNOFILE of slurmd, or /etc/security/limits.conf)"
    )
