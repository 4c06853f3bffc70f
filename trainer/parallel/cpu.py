"""Support for Megatron-core on machines without CUDA.

Megatron-core refers to CUDA explicitly in a few places: allocation, random state, and the type strings of the
distributed optimizer. Within a `megatron_calls()` block, CUDA is replaced by the CPU, or by the meta device, on which
tensors need no memory. DeepSpeed compares the same type strings and must never run within such a block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")

_depth = 0


class _CudaMeans(TorchFunctionMode):
    """A mode in which the device "cuda" is replaced by `device`.

    `Tensor.cuda()` does nothing, and `Tensor.type()` returns `torch.cuda.*`.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace(".meta.", ".").replace("torch.", "torch.cuda.")
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": self.device}
        return func(*args, **kwargs)


def _cpu_rng_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
    torch.set_rng_state(state)


class _Stream:
    """A dummy CUDA stream, which is also its own event. All work runs in order, so there is nothing to wait for."""

    def wait_stream(self, _stream: Any) -> None:
        """Do nothing."""

    def record_event(self) -> _Stream:
        """Return the event."""
        return self

    def synchronize(self) -> None:
        """Do nothing."""


_STREAM = _Stream()


def _split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Return the sizes of an all-to-all as NumPy values, because Megatron converts only tensors on a GPU."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _uneven_gather(even: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's gather along dimension 0 so that it pads parts of different sizes.

    gloo can only gather parts of equal size.
    """

    def gather(input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        sizes = None if output_split_sizes is None else list(output_split_sizes)
        if sizes is None or len(set(sizes)) == 1:
            return even(input_, group, output_split_sizes, use_global_buffer)
        padded = input_.new_zeros(max(sizes), *input_.shape[1:])
        padded[: len(input_)] = input_
        parts = even(padded, group).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return gather


def _uneven_scatter(even: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's reduce-scatter along dimension 0 so that it pads parts of different sizes."""

    def scatter(input_: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        sizes = None if input_split_sizes is None else list(input_split_sizes)
        if sizes is None or len(set(sizes)) == 1:
            return even(input_, group, input_split_sizes, use_global_buffer)
        padded = input_.new_zeros(len(sizes), max(sizes), *input_.shape[1:])
        for whole, part in zip(padded, input_.split(sizes), strict=True):
            whole[: len(part)] = part
        return even(padded.flatten(0, 1), group)[: sizes[group.rank()]]

    return scatter


def _replacements(device: torch.device) -> tuple[tuple[Any, str, Callable[..., Any]], ...]:
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim
    return (
        (torch.cuda, "Stream", lambda *_: _STREAM),
        (torch.cuda, "current_stream", lambda *_: _STREAM),
        (torch.cuda, "stream", lambda *_: contextlib.nullcontext()),
        (token_dispatcher, "maybe_move_tensor_to_cpu", _split_sizes),
        (mappings, "_gather_along_first_dim", _uneven_gather(gather)),
        (mappings, "_reduce_scatter_along_first_dim", _uneven_scatter(scatter)),
        (torch.cuda, "current_device", lambda: device),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "get_rng_state", _cpu_rng_state),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (megatron_random, "_get_cuda_rng_state", _cpu_rng_state),
        (megatron_random, "_set_cuda_rng_state", _set_cpu_rng_state),
    )


@contextlib.contextmanager
def megatron_calls(device: torch.device = CPU) -> Iterator[None]:
    """Make Megatron calls work without CUDA within the block. Every Megatron call must be in such a block.

    If there is a GPU, nothing is changed. Blocks may be nested, and the outermost block determines the device.
    Attributes of `torch.cuda` are replaced in the whole process, so no other thread may run DeepSpeed at the same time.
    Within the block, Megatron uses the CPU generator as its CUDA generator, so `model_parallel_cuda_manual_seed`
    reseeds it.

    Args:
        device: The device that replaces CUDA.
    """
    global _depth
    if torch.cuda.is_available() or _depth > 0:
        yield
        return
    replaced = [(owner, name, getattr(owner, name), new) for owner, name, new in _replacements(device)]
    _depth += 1
    try:
        for owner, name, _, new in replaced:
            setattr(owner, name, new)
        with _CudaMeans(device):
            yield
    finally:
        for owner, name, old, _ in replaced:
            setattr(owner, name, old)
        _depth -= 1
