"""Attention of encoders on CPUs in bf16, computed in fp32 (`model.precision.for_cpu_attention`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from model.precision import for_cpu_attention


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute the result of transformers' attention function `sdpa` from the same arguments."""
    attended, weights = sdpa_attention_forward(module, *for_cpu_attention(query, key, value), *args, **kwargs)
    return attended.to(query.dtype), weights


def use_fp32_attention() -> None:
    """Make all transformers models in this process use `attend`."""
    AttentionInterface.register("sdpa", attend)
