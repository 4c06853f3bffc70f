"""Support for Megatron-core on machines without CUDA.

Megatron-core refers to CUDA explicitly in a few places: allocation, random state, and the type strings of the
distributed optimizer. Within a `megatron_calls()` block, CUDA is replaced by the CPU, or by the meta device, on which
nothing takes memory. DeepSpeed compares the same type strings and must never run within such a block.
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
    """A mode in which "cuda" means `device`, `Tensor.cuda()` does nothing, and `Tensor.type()` returns
    `torch.cuda.*`."""

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


def _replacements(device: torch.device) -> tuple[tuple[Any, str, Callable[..., Any]], ...]:
    from megatron.core.tensor_parallel import random as megatron_random

    return (
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

    If there is a GPU, nothing is changed. Blocks may be nested; the outermost one decides which device "CUDA" means.

    Attributes of `torch.cuda` are replaced in the whole process, so no other thread may run DeepSpeed meanwhile.
    Megatron's "CUDA" generator is the CPU generator within the block: `model_parallel_cuda_manual_seed` reseeds it.

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
