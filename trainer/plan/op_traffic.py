"""Memory traffic of PyTorch operations that take as long as their reads and writes.

Matmuls, and convolutions that compute more than they read and write, are excluded: their time follows from their FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

_MATMULS = {"addbmm", "addmm", "addmv", "baddbmm", "bmm", "dot", "mm", "mv"}
_WRITE_ONLY = {"copy_", "fill_", "zero_"}
_NO_KERNEL = ("empty", "new_empty", "_unsafe_view", "transpose_", "squeeze_", "unsqueeze_", "t_", "resize_")


def op_traffic(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, ridge: float) -> tuple[int, int]:
    """Return the bytes that an operation reads and writes, and the number of kernels that it launches (0 or 1).

    Views and allocations launch no kernel. The bytes of matmuls are 0.

    Args:
        func: The ATen operator.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: Its result.
        ridge: The number of FLOPs per byte above which a convolution is not bound by memory. Its bytes are then 0.
    """
    name = func._schema.name.split("::")[-1]
    if name.startswith(_NO_KERNEL) or _is_view(func):
        return 0, 0
    if name in _MATMULS:
        return 0, 1
    if name in ("convolution", "convolution_backward"):
        return _of_convolution(name, args, out, ridge)
    read = written = 0
    for argument, value in zip(func._schema.arguments, (*args, *kwargs.values()), strict=False):
        size = sum(_bytes(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
        changed = argument.alias_info is not None and argument.alias_info.is_write
        read += 0 if changed and name in _WRITE_ONLY else size
        written += size if changed else 0
    if not written:
        written = sum(_bytes(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
    return read + written, 1


def _of_convolution(name: str, args: Sequence[Any], out: Any, ridge: float) -> tuple[int, int]:
    """Return the bytes of a convolution (input, weight, …) or its gradients (output's gradient, input, weight, …)."""
    if name == "convolution":
        output, data, weight = out, args[0], args[1]
        moved = sum(map(_bytes, (output, data, weight)))
    else:
        output, data, weight = args[:3]
        moved = 0
        if out[0] is not None:  # the gradient of the input
            moved += sum(map(_bytes, (output, weight, data)))
        if out[1] is not None:  # the gradient of the weight
            moved += sum(map(_bytes, (output, data, weight)))
    # The bytes of the weight are ignored here, since a call with many clips reads the weight once.
    flops = 2 * output.numel() * math.prod(weight.shape[1:])
    return (moved if flops < ridge * (_bytes(output) + _bytes(data)) else 0), 1


def _is_view(func: Any) -> bool:
    """Return True if the operator's results are views of its inputs."""
    infos = [r.alias_info for r in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's values; values that an expanded tensor repeats are counted once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
