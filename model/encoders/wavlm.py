"""WavLM (arXiv 2110.13900) on waveforms of unequal length, from transformers' modules.

Shapes: B windows, T audio samples, F frames (20 ms), H heads, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import WavLMConfig
from transformers.models.wavlm.modeling_wavlm import (
    WavLMAttention,
    WavLMEncoder,
    WavLMEncoderStableLayerNorm,
    WavLMFeatureEncoder,
    WavLMFeatureProjection,
    WavLMPreTrainedModel,
)

from model.encoders.base import DrawnAsTransformers, call_layer, length_mask
from model.encoders.conv_stack import RaggedGroupNormConvLayer, add_positions, conv_features


class GatedBiasAttention(WavLMAttention):
    """Attention with WavLM's gated relative position bias, same parameters as transformers' `WavLMAttention`.

    transformers passes the children's weights to a functional; here every child is called, which ZeRO-3 needs, and
    the scores go through SDPA.
    """

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        index: int = 0,
    ) -> tuple[Tensor, None, Tensor]:
        """`hidden_states[B, F, D]`; `attention_mask[B, 1, 1, F]`: 0 for keys that count, -inf for padding.

        `position_bias[H, F, F]` comes from the first layer, which computes it, and is returned for the next.
        """
        batch, frames, _ = hidden_states.shape
        if position_bias is None:
            position_bias = self.compute_bias(frames, frames)
        heads = hidden_states.view(batch, frames, self.num_heads, self.head_dim).transpose(1, 2)
        gates = self.gru_rel_pos_linear(heads).view(batch, self.num_heads, frames, 2, 4).sum(-1).sigmoid()
        gate_a, gate_b = gates.chunk(2, dim=-1)
        gate = gate_a * (gate_b * self.gru_rel_pos_const - 1.0) + 2.0
        bias = gate * position_bias if attention_mask is None else torch.addcmul(attention_mask, gate, position_bias)
        query, key, value = (
            proj(hidden_states).view(batch, frames, self.num_heads, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return self.out_proj(context.transpose(1, 2).flatten(2)), None, position_bias

    def compute_bias(self, query_length: int, key_length: int) -> Tensor:
        """`[H, query, key]`: one table look-up per distance, not per pair."""
        device = self.gru_rel_pos_const.device
        distance = torch.arange(1 - query_length, key_length, device=device)
        by_distance = self.rel_attn_embed(self._relative_positions_bucket(distance)).T
        return by_distance.unfold(1, key_length, 1).flip(1)


class RaggedWavLM(DrawnAsTransformers, WavLMPreTrainedModel):
    """The parts and parameter names of transformers' `WavLMModel`, without its masking for pre-training."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__(config)
        self.feature_extractor = WavLMFeatureEncoder(config)
        if config.feat_extract_norm == "group":
            self.feature_extractor.conv_layers[0] = RaggedGroupNormConvLayer(config)
        self.feature_projection = WavLMFeatureProjection(config)
        self.encoder = (WavLMEncoderStableLayerNorm if config.do_stable_layer_norm else WavLMEncoder)(config)
        for i, layer in enumerate(self.encoder.layers):
            layer.attention = GatedBiasAttention(
                embed_dim=config.hidden_size,
                num_heads=config.num_attention_heads,
                dropout=config.attention_dropout,
                num_buckets=config.num_buckets,
                max_distance=config.max_bucket_distance,
                has_relative_position_bias=i == 0,
            )
        self.post_init()

    def forward(self, waves: Tensor, num_samples: Sequence[int], recompute: bool = False) -> Tensor:
        """Encode `waves[B, max T]`, zero past each length, to `[B, max F, D]`, F counted by `conv_lengths`."""
        stable, encoder = self.config.do_stable_layer_norm, self.encoder
        features, frames = conv_features(self.feature_extractor.conv_layers, self.config, waves, num_samples, recompute)
        hidden, _ = self.feature_projection(features)
        mask = length_mask(frames, hidden.shape[1], hidden.device)
        key_bias = None
        if mask is not None:
            key_bias = hidden.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)[:, None, None]
        hidden = add_positions(encoder.pos_conv_embed, hidden, mask)
        hidden = encoder.dropout(hidden if stable else encoder.layer_norm(hidden))
        position_bias = None
        for layer in encoder.layers:
            hidden, position_bias = call_layer(layer, hidden, key_bias, position_bias, recompute=recompute)
        return encoder.layer_norm(hidden) if stable else hidden
