"""The feed-forward part of a Megatron layer, with a SwiGLU that keeps only its input for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional


class SwiGLUMLP(MLP):
    """Megatron's MLP for SwiGLU without biases.

    Autograd would keep the activated gate and the copies of both halves of the input, 2 f values more per token. With
    selective recomputation, the output is not kept either.
    """

    def __init__(self, config: TransformerConfig) -> None:
        projections = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(config, projections, ffn_hidden_size=config.ffn_hidden_size)

    def forward(self, hidden_states: Tensor, per_token_scale: None = None, **_: Any) -> tuple[Tensor, None]:
        """Return the output [t/TP, 1, hidden] for an input of the same shape, and no bias."""
        assert per_token_scale is None
        both, _bias = self.linear_fc1(hidden_states)
        if not (self.training and self.config.recompute_granularity == "selective"):
            output, bias = self.linear_fc2(swiglu(both))
            return output, bias
        activation = CheckpointWithoutOutput(fp8=None)
        output, bias = self.linear_fc2(activation.checkpoint(swiglu, both))
        activation.discard_output_and_register_recompute(output)
        return output, bias


def swiglu(both: Tensor) -> Tensor:
    """Return silu(gate) · up, [..., f], for `both` [..., 2 f], in which the columns of gate precede those of up."""
    result: Tensor = _SwiGLU.apply(both)
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
