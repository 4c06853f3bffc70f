"""The norms of a Megatron layer, and the addition of the output of attention or of the MLP to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def parameter_device(config: TransformerConfig) -> Any:
    """Return the device on which Megatron creates parameters; None for the default device."""
    return None if config.use_cpu_initialization else torch.cuda.current_device()


class RMSNorm(nn.Module):
    """An RMSNorm over the last dimension.

    Its weight is marked for Megatron's gradient all-reduce of sequence parallelism.

    Args:
        config: Megatron's config.
        hidden_size: The size of the last dimension.
        eps: The number that is added to the mean square.
        from_zero: True if each channel is multiplied by 1 + weight, as in Gemma, instead of by the weight.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, from_zero: bool = False, **_: Any
    ) -> None:
        super().__init__()
        self.eps, self.from_zero = eps, from_zero
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=parameter_device(config)))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.is_recomputed = False
        self.latest: CheckpointWithoutOutput | None = None
        """The latest output, which `recompute_after` discards."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` [..., hidden_size], normalized."""
        if not (self.is_recomputed and self.training):
            return self._normalize(x)
        self.latest = CheckpointWithoutOutput(fp8=None)
        output: Tensor = self.latest.checkpoint(self._normalize, x)
        return output

    def _normalize(self, x: Tensor) -> Tensor:
        if not self.from_zero:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # Gemma multiplies in fp32, since 1 + weight has too few digits in bf16.
        return nn.functional.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).to(x.dtype)

    def recompute_after(self, consumer: nn.Module) -> None:
        """Discard the norm's output after each forward pass of `consumer`, and recompute it in the backward pass."""
        self.is_recomputed = True
        consumer.register_forward_hook(self._discard)

    def _discard(self, _module: nn.Module, _args: Any, output: tuple[Tensor, Any]) -> None:
        if self.latest is not None:
            self.latest.discard_output_and_register_recompute(output[0])
            self.latest = None


class AllHeadsNorm(nn.Module):
    """An RMSNorm over the heads of all tensor-parallel ranks together, as for the queries and keys of OLMo 2.

    Every rank holds the weights of all heads, but uses only the weights of the heads that it computes. The weights are
    marked for Megatron's all-reduce of sequence parallelism, which sums the ranks' gradients.

    Args:
        config: Megatron's config.
        num_heads: The number of heads over all ranks. If it is less than the number of ranks, several ranks compute the
            same head.
        hidden_size: The width D of a head.
        eps: The number that is added to the mean square.
    """

    def __init__(self, config: TransformerConfig, num_heads: int, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__()
        self.eps, self.num_heads, self.width = eps, num_heads, hidden_size
        self.tp_size = config.tensor_model_parallel_size
        self.weight = nn.Parameter(
            torch.ones(num_heads * hidden_size, dtype=config.params_dtype, device=parameter_device(config))
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's heads `x` [t, 1, heads of this rank, D], normalized over the heads of all ranks."""
        own, weight = x.shape[-2], self.weight.view(self.num_heads, self.width)
        values = x.float()
        squares = values.square().sum((-2, -1), keepdim=True)
        if self.tp_size > 1:
            copies = own * self.tp_size // self.num_heads
            # Values are summed over ranks in the forward pass, and gradients in the backward pass.
            squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares)) / copies
            first = parallel_state.get_tensor_model_parallel_rank() // copies * own
            weight = weight[first : first + own]
        scale = torch.rsqrt(squares / (self.num_heads * self.width) + self.eps)
        return (values * scale * weight).to(x.dtype)  # As in transformers, the product is rounded.


class Addition(nn.Module):
    """The addition of the output of attention or of the feed-forward network to its input: x + scale · norm(output).

    It replaces Megatron's bias-dropout-add.

    Args:
        norm: A function that builds the norm for the output; None for no norm.
        scale: The factor by which the output is multiplied.
    """

    def __init__(self, norm: Callable[[], nn.Module] | None, scale: float) -> None:
        super().__init__()
        self.norm = None if norm is None else norm()
        self.scale = scale

    def forward(self, _training: bool, _fused: bool) -> Callable[[tuple[Tensor, None], Tensor, float], Tensor]:
        """Return the function that computes the sum. It has the signature of Megatron's `get_bias_dropout_add`."""
        return self._add

    def _add(self, output_and_bias: tuple[Tensor, None], residual: Tensor, dropout: float) -> Tensor:
        output, bias = output_and_bias
        assert bias is None and dropout == 0.0
        if self.norm is not None:
            output = self.norm(output)
        return torch.add(residual, output, alpha=self.scale)
