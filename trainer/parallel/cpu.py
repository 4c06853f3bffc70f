"""Megatron-core without CUDA.

Megatron-core names CUDA in a few places (allocation, random state, the type strings of the distributed optimizer).
`megatron_calls()` turns those into CPU for as long as a Megatron call lasts, or into the meta device, where nothing
takes memory. DeepSpeed compares the same type strings and must never run inside it.
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
    """`device="cuda"` is `device`, `Tensor.cuda()` does nothing, `Tensor.type()` answers `torch.cuda.*`."""

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
    """Surround every Megatron call with this; it does nothing where there is a GPU, and may be nested: the outermost
    decides which device "CUDA" means.

    It replaces attributes of `torch.cuda` for the whole process while it is active, so no other thread may run
    DeepSpeed meanwhile. Inside it Megatron's "CUDA" generator is the CPU generator: `model_parallel_cuda_manual_seed`
    reseeds that.
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
