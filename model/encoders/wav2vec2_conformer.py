"""wav2vec 2.0 with Conformer layers (fairseq S2T, arXiv 2010.05171), on waveforms of unequal length.

Shapes: B windows, T audio samples, F frames (20 ms), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Wav2Vec2ConformerConfig
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import (
    Wav2Vec2ConformerConvolutionModule,
    Wav2Vec2ConformerEncoder,
    Wav2Vec2ConformerEncoderLayer,
    Wav2Vec2ConformerFeatureEncoder,
    Wav2Vec2ConformerFeatureProjection,
    Wav2Vec2ConformerPreTrainedModel,
)

from model.encoders.base import DrawnAsTransformers, call_layer, length_mask
from model.encoders.conformer import FixedBatchNorm, conformer_flops, positions_of, relative_flops
from model.encoders.conv_stack import (
    CONV_STACK_DEFAULTS,
    RaggedGroupNormConvLayer,
    conv_features,
    conv_only_flops,
    conv_stack_family,
    padded_conv_lengths,
)


class MaskedConvolutions(Wav2Vec2ConformerConvolutionModule):
    """transformers' convolution module, with two changes.

    Padding is set to zero before the depthwise convolution, and the batch norm uses fixed statistics.
    """

    def __init__(self, config: Wav2Vec2ConformerConfig) -> None:
        super().__init__(config)
        self.batch_norm = FixedBatchNorm(config.hidden_size)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve `hidden_states` [B, F, D] over time, given the bool mask [B, F] of real frames."""
        hidden = self.glu(self.pointwise_conv1(self.layer_norm(hidden_states).transpose(1, 2)))
        if mask is not None:
            hidden = hidden.masked_fill(~mask[:, None], 0.0)
        hidden = self.activation(self.batch_norm(self.depthwise_conv(hidden)))
        return self.dropout(self.pointwise_conv2(hidden)).transpose(1, 2)


class MaskedConformerLayer(Wav2Vec2ConformerEncoderLayer):
    """transformers' Conformer layer, which also passes the mask to the convolution module."""

    def __init__(self, config: Wav2Vec2ConformerConfig) -> None:
        super().__init__(config)
        self.conv_module = MaskedConvolutions(config)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, attention_mask: Tensor | None, positions: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Return the output [B, F, D] of the layer.

        Args:
            hidden: [B, F, D].
            attention_mask: [B, 1, F, F] bool, true for real keys; None if there is no padding.
            positions: The result of `positions_of`.
            mask: [B, F] bool, true for real frames; None if there is no padding.
        """
        hidden = hidden + 0.5 * self.ffn1(self.ffn1_layer_norm(hidden))
        attended, _ = self.self_attn(
            self.self_attn_layer_norm(hidden), attention_mask=attention_mask, relative_position_embeddings=positions
        )
        hidden = hidden + self.self_attn_dropout(attended)
        hidden = hidden + self.conv_module(hidden, mask)
        hidden = hidden + 0.5 * self.ffn2(self.ffn2_layer_norm(hidden))
        return self.final_layer_norm(hidden)


class RaggedWav2Vec2Conformer(DrawnAsTransformers, Wav2Vec2ConformerPreTrainedModel):
    """The modules of transformers' `Wav2Vec2ConformerModel` under the same names, without its SpecAugment masking."""

    def __init__(self, config: Wav2Vec2ConformerConfig) -> None:
        super().__init__(config)
        self.feature_extractor = Wav2Vec2ConformerFeatureEncoder(config)
        if config.feat_extract_norm == "group":
            self.feature_extractor.conv_layers[0] = RaggedGroupNormConvLayer(config)
        self.feature_projection = Wav2Vec2ConformerFeatureProjection(config)
        encoder: Any = Wav2Vec2ConformerEncoder(config)
        encoder.embed_positions = None  # `positions_of` computes the positions.
        encoder.pos_conv_embed = None  # transformers does not use this module.
        for i in range(config.num_hidden_layers):
            encoder.layers[i] = MaskedConformerLayer(config)
        self.encoder = encoder
        self.post_init()

    def forward(self, waves: Tensor, num_samples: Sequence[int], recompute: bool = False) -> Tensor:
        """Encode waveforms; see `ConvStackNetwork.forward`."""
        features, frames = conv_features(self.feature_extractor.conv_layers, self.config, waves, num_samples, recompute)
        hidden, _ = self.feature_projection(features)
        mask = length_mask(frames, hidden.shape[1], hidden.device)
        attention_mask = None if mask is None else mask[:, None, None].expand(-1, -1, hidden.shape[1], -1)
        hidden = self.encoder.dropout(hidden)
        positions = positions_of(self.config, hidden)
        for layer in self.encoder.layers:
            hidden = call_layer(layer, hidden, attention_mask, positions, mask, recompute=recompute)
        return self.encoder.layer_norm(hidden)


def _flops(hf: Any, samples: int) -> float:
    """Return the forward FLOPs of one window: convolutions, projection and Conformer layers."""
    frames = padded_conv_lengths(hf, samples)[-1]
    layer = conformer_flops(hf, frames, hf.conv_depthwise_kernel_size)
    if hf.position_embeddings_type == "relative":
        layer += relative_flops(hf, frames)
    return conv_only_flops(hf, samples) + hf.num_hidden_layers * layer


WAV2VEC2_CONFORMER = conv_stack_family(
    Wav2Vec2ConformerConfig,
    RaggedWav2Vec2Conformer,
    flops=_flops,
    defaults={**CONV_STACK_DEFAULTS, "conformer_conv_dropout": 0.0},
)
