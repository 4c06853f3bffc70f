"""Deterministic kernels for `train.deterministic`: the same inputs give the same bits on the same devices."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch

from model.errors import UserError

_VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),  # cuBLAS then shares no workspace between streams.
    "NCCL_ALGO": ("^NVLS", "Ring", "Tree", "CollnetDirect", "CollnetChain"),  # Megatron accepts only these values.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),  # TransformerEngine's attention reads this variable.
}
"""The allowed values of environment variables that libraries read when they start. An unset variable is set to its
first value."""


def check_variables(environ: Mapping[str, str]) -> None:
    """Check that no environment variable makes a library use kernels that are not deterministic.

    Raises:
        UserError: If a variable has a value that does not guarantee determinism.
    """
    for name, allowed in _VARIABLES.items():
        if environ.get(name, allowed[0]) not in allowed:
            raise UserError(
                f"train.deterministic = true: the environment has {name}={environ[name]}; unset it, or set it to "
                f"{' or '.join(allowed)}"
            )


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Restrict torch, cuBLAS, cuDNN, NCCL and TransformerEngine to deterministic kernels within the block.

    An operation without a deterministic kernel raises RuntimeError. All settings are restored at the end.

    Args:
        wanted: False to change nothing.

    Raises:
        UserError: If an environment variable has a value that is not allowed, or CUDA was started before cuBLAS could
            be configured.
    """
    if not wanted:
        yield
        return
    check_variables(os.environ)
    if torch.cuda.is_initialized() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        raise UserError(
            "train.deterministic = true: CUDA was started before cuBLAS could be configured; set "
            f"CUBLAS_WORKSPACE_CONFIG={_VARIABLES['CUBLAS_WORKSPACE_CONFIG'][0]} in the environment"
        )
    with ExitStack() as restore:
        for name, (first, *_) in _VARIABLES.items():
            if name not in os.environ:
                os.environ[name] = first
                restore.callback(os.environ.pop, name, None)
        _set_torch(restore)
        yield


def _set_torch(restore: ExitStack) -> None:
    restore.callback(
        torch.use_deterministic_algorithms,
        torch.are_deterministic_algorithms_enabled(),
        warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    # Without warn_only, flash and memory-efficient attention use their deterministic backward passes.
    torch.use_deterministic_algorithms(True)
    restore.callback(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled())
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Uninitialized memory is filled with NaN, so that results cannot depend on it unnoticed.
    for owner, name, value in (
        (torch.utils.deterministic, "fill_uninitialized_memory", True),
        (torch.backends.cudnn, "deterministic", True),
        (torch.backends.cudnn, "benchmark", False),
    ):
        restore.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)
