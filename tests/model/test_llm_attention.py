"""Tests of attention over packs: the call of TransformerEngine is equivalent to the computation with SDPA."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from model.config import LLMConfig
from model.llm import attention as attention_module
from model.llm import scores, varlen
from model.llm.attention import PackedAttention
from model.llm.features import AttentionLayer, Scales
from model.llm.layer_config import transformer_config
from model.llm.packing import KVCache, PackedSequences
from model.llm.reference import resolve_hf_config
from model.llm.rotary import rotary_embeddings


class ByContract:
    """A copy of TransformerEngine's `DotProductAttention` that follows its documentation for the layout `thd`.

    It returns the output as `[t, H · D]`.
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
    ) -> Tensor:
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_kv)
        assert max_seqlen_q == max_seqlen_kv == int(cu_seqlens_q.diff().max())
        outputs = []
        for start, stop in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
            q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (query, key, value))
            attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            outputs.append(attended[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs)


def test_the_fused_path_computes_the_same() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    hf_config = resolve_hf_config(LLMConfig(config={"model_type": "llama", **sizes, **heads}))
    rotary = rotary_embeddings(hf_config)[""]
    attention = PackedAttention(
        transformer_config(hf_config), 1, rotary=rotary, layer=AttentionLayer(), scales=Scales()
    )
    assert attention.fused is None, "fp32 must be computed by SDPA"
    packed = PackedSequences(lengths=(5, 1, 9))
    query, key, value = torch.randn(15, 4, 8), torch.randn(15, 2, 8), torch.randn(15, 2, 8)
    expected = attention(query, key, value, packed_seq_params=packed)
    attention.fused = ByContract()  # type: ignore[assignment]
    torch.testing.assert_close(attention(query, key, value, packed_seq_params=packed), expected)


def test_the_fused_path_gets_the_window_and_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the arguments. TransformerEngine's window counts the tokens before a token; ours also counts the token."""
    asked: dict[str, Any] = {}

    def stub(*_args: Any, **options: Any) -> nn.Module:
        asked.update(options)
        return nn.Identity()

    monkeypatch.setattr(attention_module, "transformer_engine", lambda: SimpleNamespace(DotProductAttention=stub))
    hf_config = resolve_hf_config(LLMConfig(config={"model_type": "llama", "num_hidden_layers": 1}))
    config = transformer_config(hf_config, dtype=torch.bfloat16)
    config.use_cpu_initialization = False
    PackedAttention(config, 1, rotary=None, layer=AttentionLayer(window=4), scales=Scales(softmax=0.3))
    assert asked["window_size"] == (3, 0) and asked["softmax_scale"] == 0.3
    PackedAttention(config, 1, rotary=None, layer=AttentionLayer(), scales=Scales())
    assert asked["window_size"] is None and asked["softmax_scale"] is None


def varlen_by_contract(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """Do what the documentation of `torch.nn.attention.varlen.varlen_attn` says, for causal attention."""
    assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k) and window_size[1] == 0
    assert max_q == max_k == int(cu_seq_q.diff().max()) and enable_gqa == (query.shape[1] != key.shape[1])
    outputs = []
    for start, stop in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (query, key, value))
        rows = torch.arange(stop - start)
        before = rows[:, None] - rows
        mask = (before >= 0) & ((before <= window_size[0]) | (window_size[0] == -1))
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_attention_without_padding_computes_the_same(window: int | None, kv_heads: int) -> None:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "num_hidden_layers": 1}
    config = transformer_config(resolve_hf_config(LLMConfig(config={"model_type": "llama", **sizes})))
    layer, scales = AttentionLayer(window=window), Scales(softmax=0.3)
    attention = PackedAttention(config, 1, rotary=None, layer=layer, scales=scales)
    assert attention.varlen is None, "the kernel needs a GPU"
    packed = PackedSequences(lengths=(5, 1, 9))
    inputs = [torch.randn(15, heads, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    expected = attention(*inputs, packed_seq_params=packed)
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    calls: list[Any] = []

    def recorded(*args: Any, **options: Any) -> Tensor:
        calls.append(options)
        return varlen_by_contract(*args, **options)

    attention.varlen = recorded
    found = attention(*inputs, packed_seq_params=packed)
    assert calls[0]["window_size"] == (-1 if window is None else window - 1, 0)
    torch.testing.assert_close(found, expected)
    for own, other in zip(torch.autograd.grad(found.square().sum(), inputs), gradients, strict=True):
        torch.testing.assert_close(own, other)
    torch.use_deterministic_algorithms(True)
    try:
        attention(*inputs, packed_seq_params=packed)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(calls) == 1, "the gradients of the kernel may differ between runs"


def test_attention_without_padding_needs_a_gpu_and_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = [(8, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability[0])
    assert varlen.varlen_attention(torch.bfloat16, 64) is varlen_attn
    assert set(inspect.signature(varlen_by_contract).parameters) <= set(inspect.signature(varlen_attn).parameters)
    for dtype, width in ((torch.float32, 64), (torch.bfloat16, 264), (torch.bfloat16, 20)):
        assert varlen.varlen_attention(dtype, width) is None
    capability[0] = (7, 5)
    assert varlen.varlen_attention(torch.bfloat16, 64) is None


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_mask_is_not_combined_with_groups(monkeypatch: pytest.MonkeyPatch, is_cached: bool) -> None:
    """Check that `enable_gqa` is not used with a mask, because PyTorch's only GPU kernel for both stores all scores."""
    calls: list[dict[str, Any]] = []

    def recorded(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        calls.append({**options, "copies": query.shape[1] // key.shape[1]})
        return scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr(scores.functional, "scaled_dot_product_attention", recorded)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = transformer_config(resolve_hf_config(LLMConfig(config={"model_type": "llama", **sizes})))
    attention = PackedAttention(config, 1, rotary=None, layer=AttentionLayer(window=4), scales=Scales())
    cache = KVCache(1, 16)
    query, key, value = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    with torch.no_grad():
        for part in (slice(0, 6), slice(6, 9)) if is_cached else (slice(0, 9),):
            length = part.stop - part.start
            packed = cache.extend([length]) if is_cached else PackedSequences(lengths=(length,))
            attention(query[part], key[part], value[part], packed_seq_params=packed)
    assert all(call["attn_mask"] is not None and call["copies"] == 1 for call in calls)
    assert len(calls) == 1 + is_cached and not any(call.get("enable_gqa") for call in calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_for_cpus_gets_fp32(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []

    def spy(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(query.dtype)
        return scaled_dot_product_attention(query, *args, **kwargs)

    monkeypatch.setattr(scores.functional, "scaled_dot_product_attention", spy)
    query, key, value = (torch.randn(2, heads, 5, 8).to(dtype).requires_grad_() for heads in (4, 2, 2))
    attended = scores.attend(query, key, value, None, None)
    wanted = scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True, enable_gqa=True)
    assert seen == [torch.float32] and attended.dtype == dtype
    torch.testing.assert_close(attended, wanted.to(dtype))
    attended.float().sum().backward()
    assert query.grad is not None and query.grad.dtype == dtype
