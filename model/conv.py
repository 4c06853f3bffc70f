"""1-D convolutions that are fast on CPUs even if every batch has a different length.

oneDNN compiles a kernel for each input shape and caches the last thousand kernels, but batches of clips rarely repeat a
shape. A convolution that is computed as a matmul needs no compilation. If channels are last in memory, each window of
the input is a contiguous slice.

Shapes: B clips, T input steps, L output steps, C input channels, O output channels, k taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Conv1d(nn.Conv1d):
    """An `nn.Conv1d` that is computed as a matmul on CPUs, unless it is grouped or dilated.

    Parameters and results are those of `nn.Conv1d`. The result `[B, O, L]` of the matmul has channels last in memory,
    so that another layer of this class can read it without a copy.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _conv_forward(self, input, weight, bias)


def use_matrix_products(module: nn.Module, devices: Sequence[str] = ("cpu",)) -> None:
    """Make every `nn.Conv1d` in `module` compute its result in the same way as `Conv1d`, even if it has weight norm.

    Args:
        module: The module, which is changed in place.
        devices: The device types on which matmuls are used. With `meta`, a run on the meta device saves the same
            tensors for the backward pass as a run on a CPU.
    """
    forward = partial(_conv_forward, devices=tuple(devices))
    for child in module.modules():
        if isinstance(child, nn.Conv1d):
            child._conv_forward = MethodType(forward, child)  # type: ignore[method-assign]


def _conv_forward(
    layer: nn.Conv1d, input: Tensor, weight: Tensor, bias: Tensor | None, devices: Sequence[str] = ("cpu",)
) -> Tensor:
    plain = layer.groups == 1 and layer.dilation == (1,) and layer.padding_mode == "zeros"
    if input.device.type not in devices or not plain or isinstance(layer.padding, str):
        return nn.Conv1d._conv_forward(layer, input, weight, bias)
    (stride,), (padding,) = layer.stride, layer.padding
    steps = F.pad(input.transpose(1, 2), (0, 0, padding, padding))
    return _WindowProduct.apply(steps, weight, bias, stride).transpose(1, 2)


class _WindowProduct(torch.autograd.Function):
    """The convolution [B, L, O] of steps [B, T, C] with weight [O, C, k] and bias [O]; L = (T - k) // stride + 1."""

    @staticmethod
    def forward(ctx: Any, steps: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        steps = steps.contiguous()
        (clips, size, channels), (_, _, taps) = steps.shape, weight.shape
        length = (size - taps) // stride + 1
        assert length > 0, f"{size} steps for {taps} taps"
        # The taps and channels of a window are contiguous in memory.
        windows = steps.as_strided((clips, length, taps * channels), (size * channels, stride * channels, 1))
        rows = windows.reshape(clips * length, taps * channels)
        matrix = weight.transpose(1, 2).flatten(1)
        product = rows @ matrix.t() if bias is None else torch.addmm(bias, rows, matrix.t())
        ctx.save_for_backward(rows, matrix)
        ctx.shape, ctx.stride = (clips, size, channels), stride
        return product.view(clips, length, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, matrix = ctx.saved_tensors
        clips, size, channels = ctx.shape
        length, stride = grad.shape[1], ctx.stride
        grad = grad.flatten(0, 1)
        grad_steps = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            windows = (grad @ matrix).view(clips, length, -1, channels)
            grad_steps = grad.new_zeros(clips, size, channels)
            for tap in range(windows.shape[2]):
                grad_steps[:, tap : tap + (length - 1) * stride + 1 : stride] += windows[:, :, tap]
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.t() @ rows).unflatten(1, (-1, channels)).transpose(1, 2)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_steps, grad_weight, grad_bias, None
