"""Tests of the gated activation in a Megatron layer's feed-forward network."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from model.llm import mlp
from model.llm.mlp import SwiGLUFunction, gated


@pytest.mark.parametrize("fused", [False, True])
def test_swiglu_and_its_gradient_equal_those_of_autograd(fused: bool) -> None:
    both = torch.randn(5, 1, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gate, up = both.chunk(2, dim=-1)
    expected = functional.silu(gate) * up
    grad = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    (expected_grad,) = torch.autograd.grad(expected, both, grad)
    with torch.compiler.set_stance("force_eager"):  # runs the code for CUDA without a compiler
        found = SwiGLUFunction.apply(both, False, False) if fused else gated(both, "silu")
        (found_grad,) = torch.autograd.grad(found, both, grad)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_grad, expected_grad)


def test_on_cuda_swiglu_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(mlp.SwiGLUFunction, "apply", lambda both, *_: calls.append(both))

    class OnGPU:
        is_cuda = True

    gated(OnGPU(), "silu")  # type: ignore[arg-type]
    assert len(calls) == 1
