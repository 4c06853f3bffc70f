"""The Megatron model's core attention for packed sequences, with rotary embeddings and a causal mask per segment.

A *pack* is a packed sequence (`model.llm.packing`).

Shapes: t rows of a pack, H query heads and G key-value heads of this rank, D head width.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from model.llm.context import ContinuedAttention
from model.llm.features import AttentionLayer, Scales
from model.llm.norms import parameter_device
from model.llm.packing import PackedSequences
from model.llm.rotary import Rotary
from model.llm.scores import attend, widen_queries
from model.llm.varlen import attend_without_padding, varlen_attention
from model.transfer import to_device


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to the first R channels of `x` [t, heads, D], given cosine and sine [t, 1, R].

    As in Hugging Face, channel i is paired with i + R/2. The result has the dtype of `x`.
    """
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class PackedAttention(nn.Module):
    """Causal attention within each segment of a pack, to all previous tokens or to the tokens in a window.

    The module itself applies the rotary embedding, at the positions of the pack's rows in their sequences. On GPUs in
    half precision, attention is computed without padding by TransformerEngine if it is installed, and else by
    `model.llm.varlen`, unless only deterministic kernels are allowed. Otherwise, segments of similar length form a
    right-padded batch for PyTorch's attention. Under a causal mask, no token attends to padding after it.

    Args:
        config: Megatron's config.
        layer_number: The number of the layer, counted from 1.
        rotary: The rotary embedding; None for a layer without rotary embedding.
        layer: The description of the layer's attention. Only its window is used.
        scales: The factors for scores and queries, and the bound of scores.
        has_sinks: True if every head has an attention sink (`model.llm.scores`). Attention is then computed by PyTorch,
            as it is if scores have a bound.
        recompute: Whether the backward pass computes attention again from queries, keys and values.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        rotary: Rotary | None,
        layer: AttentionLayer,
        scales: Scales,
        has_sinks: bool = False,
        recompute: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.config = config
        self.layer_number = layer_number
        # This is not a buffer, since casting the model to bf16 would round the frequencies.
        self.rotary = rotary
        self.window, self.softmax_scale, self.long_queries = layer.window, scales.softmax, scales.long_queries
        self.cap = scales.scores_cap
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.sinks: nn.Parameter | None = None
        if has_sinks:
            self.softmax_scale = self.softmax_scale or config.kv_channels**-0.5
            self.sinks = nn.Parameter(torch.empty(heads, dtype=config.params_dtype, device=parameter_device(config)))
        engine = transformer_engine() if self.can_fuse else None
        self.fused = (
            engine.DotProductAttention(
                heads,
                config.kv_channels,
                num_gqa_groups=config.num_query_groups // config.tensor_model_parallel_size,
                attention_dropout=0.0,
                qkv_format="thd",
                attn_mask_type="padding_causal",
                layer_number=layer_number,
                window_size=None if self.window is None else (self.window - 1, 0),
                softmax_scale=self.softmax_scale,
            )
            if engine is not None and config.params_dtype != torch.float32 and not config.use_cpu_initialization
            else None
        )

        on_gpu = not config.use_cpu_initialization
        self.varlen = (
            varlen_attention(config.params_dtype, config.kv_channels)
            if on_gpu and self.fused is None and self.can_fuse
            else None
        )
        """The kernel of `model.llm.varlen`; None if another one is used."""

    @property
    def can_fuse(self) -> bool:
        """True if TransformerEngine or `model.llm.varlen` can compute this attention."""
        return self.sinks is None and self.cap is None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """Compute the attention of the pack's rows.

        Args:
            query: [t, H, D].
            key: [t, G, D].
            value: [t, G, D].
            attention_mask: Must be None.
            attn_mask_type: Not used. It is part of the signature in Megatron.
            attention_bias: Must be None.
            packed_seq_params: The pack, a `PackedSequences`.

        Returns:
            [t, H, D].
        """
        packed = packed_seq_params
        assert isinstance(packed, PackedSequences), "pass a PackedSequences as packed_seq_params"
        assert attention_mask is None and attention_bias is None
        assert query.shape[0] == packed.num_tokens, (query.shape, packed.num_tokens)
        if self.rotary is not None and self.rotary.inv_freq.device != query.device:
            self.rotary = replace(self.rotary, inv_freq=to_device(self.rotary.inv_freq, query.device))
        if self.training and self.recompute:
            attended: Tensor = checkpoint(partial(self._attend, packed=packed), False, query, key, value)
            return attended
        return self._attend(query, key, value, packed)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        if self.rotary is not None:
            cos, sin = packed.rotation(self.rotary, like=query)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if self.long_queries is not None:
            query = query * packed.query_factors(*self.long_queries, like=query)
        if self.sinks is not None:
            assert self.softmax_scale is not None
            query = widen_queries(query, self.sinks, self.softmax_scale)
        if packed.cache is None and not packed.gathers_keys:
            if self.fused is not None:
                return _attend_fused(self.fused, query, key, value, packed)
            if self.varlen is not None and not torch.are_deterministic_algorithms_enabled():
                settings = self.window, self.softmax_scale
                return attend_without_padding(self.varlen, query, key, value, packed, *settings)
        if packed.cache is not None:
            keys, values = packed.cache.store(self.layer_number, key, value, packed)
            if any(packed.starts):
                return self._attend_to_cache(query, keys, values, packed)
        return self._attend_within(query, key, value, packed)

    def _attend_within(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """Compute causal attention within each segment with PyTorch."""
        outputs = []
        if packed.gathers_keys:
            settings = packed.continued, self.window, self.softmax_scale, self.cap, get_context_parallel_group()
            outputs.append(ContinuedAttention.apply(query, key, value, *settings))
        for bucket in packed.buckets(query.device):
            padded = bucket.pad(query), bucket.pad(key), bucket.pad(value)
            if self.window is not None and self.window < bucket.max_length:
                mask = packed.window_mask(bucket.max_length, self.window, query.device)
                attended = _attend_masked(*padded, mask, self.softmax_scale, self.cap)
            else:
                attended = attend(*padded, None, self.softmax_scale, self.cap)
            outputs.append(bucket.unpad(attended))
        return torch.cat(outputs).index_select(0, packed.unbucket(query.device))

    def _attend_to_cache(self, query: Tensor, keys: Tensor, values: Tensor, packed: PackedSequences) -> Tensor:
        """Compute the attention of each segment to the cache of its sequence, up to the position of each row.

        `keys` and `values` are [sequences, tokens, G, D]. The result is 0 for rows of padding.
        """
        segments = packed.cached_segments(query.device)
        bucket = segments.bucket
        # `last` is [B, 1, L, 1], and `positions` is [keys].
        last = (segments.starts[:, None] + torch.arange(bucket.max_length, device=query.device))[:, None, :, None]
        positions = torch.arange(segments.num_keys, device=query.device)
        mask = positions <= last
        if self.window is not None:
            mask &= positions > last - self.window
        attended = _attend_masked(
            bucket.pad(query),
            keys[segments.sequences, : segments.num_keys].transpose(1, 2),
            values[segments.sequences, : segments.num_keys].transpose(1, 2),
            mask,
            self.softmax_scale,
            self.cap,
        )
        padding = query.new_zeros(*query.shape[:-1], attended.shape[-1])
        return padding.index_copy(0, bucket.rows, bucket.unpad(attended))


class GatedSelfAttention(SelfAttention):  # type: ignore[misc] # Megatron has no types
    """Megatron's attention, whose output is multiplied by the sigmoid of a gate.

    Megatron would compile this product. On CPUs, that takes seconds and needs a C++ compiler.
    """

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * torch.sigmoid(gate.reshape(x.shape))


def transformer_engine() -> ModuleType | None:
    """Return the module `transformer_engine.pytorch`, or None if it is not installed."""
    try:
        import transformer_engine.pytorch as engine
    except ImportError:
        return None
    return engine


def _attend_masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, cap: float | None
) -> Tensor:
    """Compute attention under a mask with PyTorch.

    Keys and values are repeated for all query heads. With a mask and `enable_gqa`, the only CUDA kernel of PyTorch
    would store the scores of all heads.

    Args:
        query: [B, H, L, D], or wider with a sink.
        key: [B, G, K, D].
        value: [B, G, K, D].
        mask: True where a query attends to a key; it can be broadcast to [B, H, L, K].
        scale: The factor on scores; None for 1/√D.
        cap: The bound of scores; None for no bound.

    Returns:
        [B, H, L, D].
    """
    copies = query.shape[1] // key.shape[1]
    key, value = (x[:, :, None].expand(-1, -1, copies, -1, -1).flatten(1, 2) for x in (key, value))
    return attend(query, key, value, mask, scale, cap)


def _attend_fused(fused: nn.Module, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
    """Compute causal attention within each segment with TransformerEngine, which reads the pack without padding."""
    ends = packed.segment_ends(query.device)
    longest = max(packed.lengths)
    attended = fused(
        query, key, value, cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    return attended.view_as(query)
