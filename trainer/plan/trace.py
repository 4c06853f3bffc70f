"""Memory of a module, measured on the meta device: the bytes kept for the backward pass, the peaks, and the traffic.

On the meta device, every operation creates tensors of the real shape and dtype without allocating memory. The storages
of these tensors are counted while they exist. Memory that kernels allocate internally (workspaces of convolutions and
matmuls) is not included. The bytes that operations read and write are counted as well (`op_traffic`).
"""

from __future__ import annotations

import math
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

from trainer.plan.op_traffic import op_traffic


@dataclass(frozen=True)
class Traced:
    """The memory of one call of a module in bytes, without its parameters and their gradients."""

    kept: int
    """The memory held after the forward pass: saved tensors and the output."""
    forward: int
    """The peak of the forward pass."""
    backward: int
    """The peak of the backward pass, including the memory held after the forward pass."""
    moved_forward: int = 0
    """The bytes that the forward pass reads and writes, except in matmuls and attention."""
    moved_backward: int = 0
    """The bytes that the backward pass reads and writes, except in matmuls and attention."""
    kernels_forward: int = 0
    """The number of kernels that the forward pass launches."""
    kernels_backward: int = 0
    """The number of kernels that the backward pass launches."""
    attention_forward: int = 0
    """The FLOPs of fused attention in the forward pass."""
    attention_again: int = 0
    """The FLOPs of fused attention that the backward pass spends on recomputing forward passes."""


def trace(
    forward: Callable[[], Tensor], existing: Iterable[Tensor], device: str = "cpu", ridge: float = math.inf
) -> Traced:
    """Run `forward` and its backward pass, and measure their memory.

    Args:
        forward: A function on meta tensors. All storages that it creates are counted.
        existing: Tensors that exist already and are not counted.
        device: The type of device whose kernels are counted, `cuda` or `cpu`.
        ridge: The number of FLOPs per byte above which a convolution's bytes do not count as traffic.
    """
    with (
        _Bytes(existing, ridge) as count,
        _resized_storages(count),
        _flash_attention(device, count),
        _fused_norms(device),
    ):
        output = forward()
        kept, peak, moved, kernels, attention = count.now, count.peak, count.moved, count.kernels, count.attention
        count.peak, count.moved, count.kernels, count.attention = count.now, 0, 0, 0
        if output.requires_grad:
            output.backward(torch.empty_like(output))
        return Traced(kept, peak, count.peak, moved, count.moved, kernels, count.kernels, attention, count.attention)


def extrapolated(found: Sequence[Traced], layers: int) -> Traced:
    """Extrapolate the memory of all layers from measurements with one layer and with two layers.

    Args:
        found: The measurements with one layer and, if there are several layers, with two.
        layers: The number of layers.
    """
    one, two = found[0], found[-1]
    more = max(0, layers - len(found))
    return Traced(*(b + more * (b - a) for a, b in zip(astuple(one), astuple(two), strict=True)))


@contextmanager
def _flash_attention(device: str, count: _Bytes) -> Iterator[None]:
    """Count the memory of attention as fused kernels use it, that is, without the scores, and the FLOPs.

    On the meta device, torch would choose the unfused implementation. CPUs use it only for a trainable mask (WavLM's
    gated position bias), for which CUDA has a fused kernel that returns the gradient of the mask
    (`_scaled_dot_product_efficient_attention_backward`). The function is replaced because a dispatch mode would not be
    active during the recomputation of activation checkpointing.
    """
    plain = functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        biased = attn_mask is not None and attn_mask.is_floating_point() and attn_mask.shape[-2] > 1
        if attn_mask is not None and attn_mask.requires_grad and not (biased and device == "cuda"):
            return plain(query, key, value, attn_mask, **kwargs)
        # Every score and every product of a score and a value takes a multiply-add.
        scores = query.shape[:-1].numel() * key.shape[-2]
        count.attention += 2 * scores * (query.shape[-1] + value.shape[-1])
        if biased and device == "cuda":
            return cast(Tensor, _BiasedFlash.apply(query, key, value, attn_mask))
        return cast(Tensor, _Flash.apply(query, key, value))

    functional.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


@contextmanager
def _fused_norms(device: str) -> Iterator[None]:
    """Count the memory of RMSNorm as CUDA's fused kernel uses it, which keeps its input and an fp32 scale per row.

    On the meta device and on the CPU, torch decomposes the norm into operations on fp32 copies. If `device` is not
    `cuda`, nothing is replaced.
    """
    plain = functional.rms_norm
    if device != "cuda":
        yield
        return

    def normalize(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return plain(x, shape, weight, eps) if weight is None else cast(Tensor, _FusedRmsNorm.apply(x, weight))

    functional.rms_norm = normalize  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.rms_norm = plain


@contextmanager
def _resized_storages(count: _Bytes) -> Iterator[None]:
    """Report every change in a storage's size to `count`."""
    plain = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        result = plain(storage, size)
        count.resized(storage)
        return result

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]


class _FusedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty((*x.shape[:-1], 1), dtype=torch.float32))
        return x.clone()  # reads and writes as many bytes as the norm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return x + grads[0], torch.empty_like(weight)


class PackedFlash(torch.nn.Module):
    """A module on the meta device that uses as much memory as TransformerEngine's attention on packed segments."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        """Return a tensor `[t, H, D]`, given query `[t, H, D]` and key and value `[t, G, D]`."""
        return cast(Tensor, _Flash.apply(query, key, value))


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, torch.empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


class _BiasedFlash(torch.autograd.Function):
    """Attention with a bias [B, H, F, F], which is copied to memory with aligned rows and read once."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        aligned, out = bias.clone(), torch.empty_like(query)
        aligned.sum()
        ctx.save_for_backward(query, key, value, out, torch.empty(query.shape[:-1], dtype=torch.float32), aligned)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, _, bias = ctx.saved_tensors
        gradients = tuple(torch.empty_like(t) for t in (query, key, value))
        return (*gradients, bias.clone() if ctx.needs_input_grad[3] else None)


class _Bytes(TorchDispatchMode):
    """A counter of the bytes of all meta storages that exist (`now`), and of the maximum (`peak`).

    It also counts the bytes that operations read and write (`moved`), their number (`kernels`), and the FLOPs of fused
    attention (`attention`).
    """

    def __init__(self, existing: Iterable[Tensor], ridge: float = math.inf) -> None:
        super().__init__()
        self.now = self.peak = self.moved = self.kernels = self.attention = 0
        self._ridge = ridge
        self._alive = {t.untyped_storage()._cdata: 0 for t in existing}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        moved, kernels = op_traffic(func, args, kwargs or {}, out, self._ridge)
        self.moved += moved
        self.kernels += kernels
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

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Record the new size of a storage. Selective recomputation frees the storages of tensors that still exist."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            self.now += size - self._alive[key]
            self._alive[key] = size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._alive.pop(key)
