"""A backward pass for Megatron's linear layers with frozen weights that consists of one matrix product.

Megatron multiplies the gradient [t, 1, outputs] by the weight with `torch.matmul`. If the strides of this gradient
differ from those of a contiguous tensor, even if only in the dimension of size 1, `torch.matmul` computes t products of
one row each. In bf16 on CPUs, it also copies the weight for each of these products.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import layers
from torch import Tensor

_megatron_backward = layers.LinearWithFrozenWeight.backward


class LinearWithFrozenWeight(layers.LinearWithFrozenWeight):  # type: ignore[misc] # Megatron has no types
    """Megatron's function of the same name, which reads the gradient with two dimensions."""

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the input, [..., inputs], given that of the output, [..., outputs]."""
        grad_input, *others = _megatron_backward(ctx, grad_output.reshape(-1, grad_output.shape[-1]))
        return grad_input.view(*grad_output.shape[:-1], grad_input.shape[-1]), *others


def use_one_product() -> None:
    """Make Megatron's layers with frozen weights use this backward pass."""
    layers.LinearWithFrozenWeight = LinearWithFrozenWeight
