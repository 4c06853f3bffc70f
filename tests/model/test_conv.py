"""Tests that convolutions that are computed as matmuls equal PyTorch's convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.conv import Conv1d, use_matrix_products


def gradients(layer: nn.Conv1d, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    grads = [out.detach(), x.grad, *(p.grad for p in layer.parameters())]
    layer.zero_grad()
    return [g.clone() for g in grads if g is not None]


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "padding", "bias"),
    [
        (5, 3, 1, 1, True),
        (5, 3, 2, 1, True),
        (1, 10, 5, 0, False),
        (6, 8, 4, 0, True),
        (3, 2, 3, 0, True),
        (4, 1, 1, 0, False),
    ],
)
@pytest.mark.parametrize("size", [11, 24])
def test_equals_torch(channels: int, kernel: int, stride: int, padding: int, bias: bool, size: int) -> None:
    torch.manual_seed(0)
    theirs = nn.Conv1d(channels, 7, kernel, stride, padding, bias=bias).double()
    ours = Conv1d(channels, 7, kernel, stride, padding, bias=bias).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, channels, size, dtype=torch.float64)
    for a, b in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_consecutive_layers_need_no_copies() -> None:
    first = Conv1d(2, 3, 3, padding=1)(torch.randn(2, 2, 9))
    assert first.transpose(1, 2).is_contiguous()


def test_layers_of_other_libraries_are_replaced() -> None:
    torch.manual_seed(0)
    plain, grouped = nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3, groups=2)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3), dim=2)
    module = nn.Sequential(plain, grouped, normed, nn.Conv1d(4, 4, 3, dilation=2))
    x = torch.randn(2, 4, 20)
    before = module(x)
    assert not before.transpose(1, 2).is_contiguous()
    use_matrix_products(module)
    torch.testing.assert_close(module(x), before)
    assert plain(x).transpose(1, 2).is_contiguous(), "not computed by matrix products"
    assert normed(x).transpose(1, 2).is_contiguous(), "not computed by matrix products"
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_frozen_input_gets_no_gradient() -> None:
    layer = Conv1d(2, 3, 3)
    layer.weight.requires_grad_(False)
    layer(torch.randn(1, 2, 5)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias is not None and layer.bias.grad is not None
