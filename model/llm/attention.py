"""The core attention of the Megatron model for packed sequences: rotary embedding and causal attention per segment.

Shapes: t rows of a pack, H query heads and G key-value heads of this rank, D head width.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from model.llm.packing import PackedSequences
from model.transfer import to_device


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to `x` [t, heads, D]; as in Hugging Face, i is paired with i + D/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class PackedAttention(nn.Module):
    """Causal attention within each segment of a pack.

    The module applies the rotary embedding itself, so that positions come from the pack and a cache can continue them.
    TransformerEngine computes attention if it is installed, on GPUs in half precision. Otherwise, segments of similar
    length form a right-padded batch for PyTorch's attention: under a causal mask, no token sees the padding after it.

    Args:
        config: Megatron's config.
        layer_number: The number of the layer, from 1.
        inv_freq: The inverse frequencies [D/2] of the rotary embedding, in fp32.
        scaling: The factor on cosine and sine.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, *, inv_freq: Tensor, scaling: float, **_: Any
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_number = layer_number
        # This is no buffer, since casting the model to bf16 would round the frequencies.
        self.inv_freq = inv_freq
        self.scaling = scaling
        engine = transformer_engine()
        self.fused = (
            engine.DotProductAttention(
                config.num_attention_heads // config.tensor_model_parallel_size,
                config.kv_channels,
                num_gqa_groups=config.num_query_groups // config.tensor_model_parallel_size,
                attention_dropout=0.0,
                qkv_format="thd",
                attn_mask_type="padding_causal",
                layer_number=layer_number,
            )
            if engine is not None and config.params_dtype != torch.float32 and not config.use_cpu_initialization
            else None
        )

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
        """Attend.

        Args:
            query: [t, H, D].
            key: [t, G, D].
            value: [t, G, D].
            attention_mask: must be None.
            attn_mask_type: not used; part of the signature in Megatron.
            attention_bias: must be None.
            packed_seq_params: The pack, a `PackedSequences`.

        Returns:
            [t, H, D].
        """
        packed = packed_seq_params
        assert isinstance(packed, PackedSequences), "pass a PackedSequences as packed_seq_params"
        assert attention_mask is None and attention_bias is None
        assert query.shape[0] == packed.num_tokens, (query.shape, packed.num_tokens)
        if self.inv_freq.device != query.device:
            self.inv_freq = to_device(self.inv_freq, query.device)
        if self.training and self.config.recompute_granularity == "selective":
            attended: Tensor = checkpoint(partial(self._attend, packed=packed), False, query, key, value)
            return attended
        return self._attend(query, key, value, packed)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        cos, sin = packed.rotation(self.inv_freq, self.scaling, like=query)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if packed.cache is None:
            if self.fused is not None:
                return _attend_fused(self.fused, query, key, value, packed)
            return _attend_within(query, key, value, packed)
        keys, values = packed.cache.store(self.layer_number, key, value, packed)
        if not any(packed.starts):
            return _attend_within(query, key, value, packed)
        return _attend_to_cache(query, keys, values, packed)


def transformer_engine() -> ModuleType | None:
    """Return the module `transformer_engine.pytorch`, or None if it is not installed."""
    try:
        import transformer_engine.pytorch as engine
    except ImportError:
        return None
    return engine


def _attend_fused(fused: nn.Module, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
    """Compute causal attention within each segment by TransformerEngine, which takes the pack as it is."""
    ends = packed.segment_ends(query.device)
    longest = max(packed.lengths)
    attended = fused(
        query, key, value, cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    return attended.view_as(query)


def _attend_within(query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
    """Compute causal attention within each segment by PyTorch."""
    outputs = []
    for bucket in packed.buckets(query.device):
        q, k, v = bucket.pad(query), bucket.pad(key), bucket.pad(value)
        outputs.append(bucket.unpad(functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)))
    return torch.cat(outputs).index_select(0, packed.unbucket(query.device))


def _attend_to_cache(query: Tensor, keys: Tensor, values: Tensor, packed: PackedSequences) -> Tensor:
    """Compute the attention of each segment to the cache of its sequence, up to the position of each row.

    `keys` and `values` are [sequences, tokens, G, D]. The result is 0 for rows of padding.
    """
    segments = packed.cached_segments(query.device)
    bucket = segments.bucket
    # [B, 1, L, keys]
    last = segments.starts[:, None] + torch.arange(bucket.max_length, device=query.device)
    mask = torch.arange(segments.num_keys, device=query.device) <= last[:, None, :, None]
    attended = functional.scaled_dot_product_attention(
        bucket.pad(query),
        keys[segments.sequences, : segments.num_keys].transpose(1, 2),
        values[segments.sequences, : segments.num_keys].transpose(1, 2),
        attn_mask=mask,
        enable_gqa=True,
    )
    return torch.zeros_like(query).index_copy(0, bucket.rows, bucket.unpad(attended))
