"""WavLM (arXiv 2110.13900) on waveforms of unequal length, from transformers' modules.

Shapes: B windows, T audio samples, F frames (20 ms), H heads, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from model.encoders.conv_stack import (
    RaggedGroupNormConvLayer,
    add_positions,
    conv_features,
    conv_stack_family,
    conv_stack_flops,
    padded_conv_lengths,
)


class GatedBiasAttention(WavLMAttention):
    """Attention with WavLM's gated relative position bias and the parameters of transformers' `WavLMAttention`.

    transformers passes the weights of child modules to a function. This class calls every child module, as ZeRO-3
    requires, and uses PyTorch's scaled dot-product attention.
    """

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        index: int = 0,
    ) -> tuple[Tensor, None, Tensor]:
        """Attend within each window.

        Args:
            hidden_states: [B, F, D].
            attention_mask: [B, 1, 1, F], 0 for real frames and -inf for padding; None if there is no padding.
            position_bias: [H, F, F], which the first layer computes; None in the first layer.
            index: Not used. It is part of the signature in transformers.

        Returns:
            The output [B, F, D], None, and the position bias for the next layer.
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
        """Return the position bias [H, query, key]. The table is read once per distance instead of once per pair of
        frames."""
        device = self.gru_rel_pos_const.device
        distance = torch.arange(1 - query_length, key_length, device=device)
        by_distance = self.rel_attn_embed(self._relative_positions_bucket(distance)).T
        return by_distance.unfold(1, key_length, 1).flip(1)


class RaggedWavLM(DrawnAsTransformers, WavLMPreTrainedModel):
    """The modules of transformers' `WavLMModel` under the same names, without its SpecAugment masking."""

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
        """Encode waveforms.

        Args:
            waves: [B, max T], zero after the end of each window.
            num_samples: The length of each window.
            recompute: True to recompute every layer in the backward pass.

        Returns:
            [B, max F, D]. The number F of valid frames of each window is the last of `conv_lengths`.
        """
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


def _flops(hf: Any, samples: int) -> float:
    """Return the forward FLOPs of one window, for the network of `conv_stack_flops` and the gated position bias."""
    frames = padded_conv_lengths(hf, samples)[-1]
    # These are the projection of the gates, the gated bias, and its addition to the attention scores.
    bias = 16.0 * frames * hf.hidden_size + 3.0 * hf.num_attention_heads * frames**2
    return conv_stack_flops(hf, samples) + hf.num_hidden_layers * bias


WAVLM = conv_stack_family(WavLMConfig, RaggedWavLM, flops=_flops)
