"""Tests of the attention of bf16 encoders on CPUs, which is computed in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, WhisperConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from trainer.engine.cpu_attention import use_fp32_attention


@pytest.fixture
def fp32_attention() -> Iterator[None]:
    """Switch fp32 attention on for one test."""
    use_fp32_attention()
    yield
    AttentionInterface.register("sdpa", sdpa_attention_forward)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_gets_fp32_and_the_model_keeps_its_dtype(
    fp32_attention: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    original, seen = functional.scaled_dot_product_attention, []

    def spy(query: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append(query.dtype)
        return original(query, *args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    config = WhisperConfig(
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        max_source_positions=10,
        attn_implementation="sdpa",
    )
    model = WhisperEncoder(config).to(dtype)
    hidden = model(torch.randn(1, 8, 20, dtype=dtype)).last_hidden_state
    assert seen == [torch.float32, torch.float32] and hidden.dtype == dtype
    hidden.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.layers.parameters())
