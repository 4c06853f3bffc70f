"""How many bytes a piece of the real model keeps for its backward pass, and how many it takes at most on the way.

The modules run on the meta device: every operation makes tensors of the real shape and dtype without memory, and
whoever counts their storages from birth to death knows what a device would have held. Not counted: what kernels
allocate within themselves (workspaces of convolutions and matrix products).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Traced:
    """Bytes of one call of a module, beyond its parameters and their gradients."""

    kept: int
    """After the forward pass: saved tensors and the output."""
    forward: int
    """Peak of the forward pass."""
    backward: int
    """Peak of the backward pass, what is kept included."""


def trace(forward: Callable[[], Tensor], existing: Iterable[Tensor]) -> Traced:
    """Run `forward` and its backward pass, which begins with a gradient like its output.

    Args:
        forward: on meta tensors; what it makes is counted.
        existing: tensors that are there anyway.
    """
    with _Bytes(existing) as count, _flash_attention():
        output = forward()
        kept, peak = count.now, count.peak
        count.peak = count.now
        if output.requires_grad:
            output.backward(torch.empty_like(output))
        return Traced(kept, peak, count.peak)


def extrapolated(found: Sequence[Traced], layers: int) -> Traced:
    """From what one layer takes, and two, to what all take."""
    one, two = found[0], found[-1]
    more = max(0, layers - len(found))
    return Traced(*(b + more * (b - a) for a, b in zip(astuple(one), astuple(two), strict=True)))


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Attention as the fused kernels keep it: never the scores. The meta device alone would choose the plain formula.

    With a mask that learns (WavLM's gated position bias) the formula it is, as on the CPU. The function is exchanged: a
    mode of torch would not be there where a checkpoint computes again.
    """
    plain = functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if attn_mask is None or not attn_mask.requires_grad:
            return cast(Tensor, _Flash.apply(query, key, value))
        return plain(query, key, value, attn_mask, **kwargs)

    functional.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, torch.empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


class _Bytes(TorchDispatchMode):
    """Bytes of the meta storages that are alive, and the most there were."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive = {t.untyped_storage()._cdata: 0 for t in existing}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._alive.pop(key)
