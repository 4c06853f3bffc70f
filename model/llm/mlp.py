"""The feed-forward network of a Megatron layer, with a gate that saves only its input for the backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import SwiGLUFunction
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from model.llm.features import Activation


class GatedMLP(MLP):
    """Megatron's MLP with a gate (SwiGLU or GeGLU, arXiv 2002.05202) and without biases.

    Autograd would also save intermediate results of the gate, which are 2 f values per token, where f is the hidden
    width of the network. With selective recomputation, the gate's output is not saved either.
    """

    def __init__(self, config: TransformerConfig, activation: Activation = "silu") -> None:
        projections = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(config, projections, ffn_hidden_size=config.ffn_hidden_size)
        self.gated = partial(gated, activation=activation)

    def forward(self, hidden_states: Tensor, per_token_scale: None = None, **_: Any) -> tuple[Tensor, None]:
        """Return the output [t/TP, 1, hidden] for an input of the same shape, and no bias."""
        assert per_token_scale is None
        both, _bias = self.linear_fc1(hidden_states)
        if not (self.training and self.config.recompute_granularity == "selective"):
            output, bias = self.linear_fc2(self.gated(both))
            return output, bias
        activation = CheckpointWithoutOutput(fp8=None)
        output, bias = self.linear_fc2(activation.checkpoint(self.gated, both))
        activation.discard_output_and_register_recompute(output)
        return output, bias


class GeGLUMLP(GatedMLP):
    """A `GatedMLP` with the tanh approximation of GELU, as in Gemma."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, "gelu_tanh")


MLPS: dict[Activation, type[GatedMLP]] = {"silu": GatedMLP, "gelu_tanh": GeGLUMLP}
"""The feed-forward network for each activation function. These are separate classes, because Megatron logs a warning
about a ModuleSpec of a class that it does not know."""


def gated(both: Tensor, activation: Activation) -> Tensor:
    """Return activation(gate) · up, [..., f], for `both` [..., 2 f], in which the columns of gate come first.

    On CUDA, SwiGLU is computed by Megatron's function, which `torch.compile` fuses into one kernel per pass. Per token,
    the fused kernels read and write 3 f values in the forward pass and 5 f in the backward pass. PyTorch's separate
    kernels read and write 5 f values in the forward pass and 15 f in the backward pass.
    """
    result: Tensor
    if activation == "silu" and both.is_cuda:
        result = SwiGLUFunction.apply(both, False, False)
    else:
        result = (_SwiGLU if activation == "silu" else _GeGLU).apply(both)
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
        return torch.cat((torch.ops.aten.silu_backward(grad * up, gate), grad * functional.silu(gate)), dim=-1)


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return functional.gelu(gate, approximate="tanh") * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
        of_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
        return torch.cat((of_gate, grad * functional.gelu(gate, approximate="tanh")), dim=-1)
