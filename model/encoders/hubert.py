"""HuBERT (arXiv 2106.07447) on waveforms of unequal length, from transformers' modules.

Shapes: B windows, T audio samples, F frames (20 ms), D width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import HubertConfig
from transformers.models.hubert.modeling_hubert import (
    HubertEncoder,
    HubertEncoderStableLayerNorm,
    HubertFeatureEncoder,
    HubertFeatureProjection,
    HubertPreTrainedModel,
)

from model.encoders.base import DrawnAsTransformers, call_layer, length_mask
from model.encoders.conv_stack import RaggedGroupNormConvLayer, add_positions, conv_features


class RaggedHubert(DrawnAsTransformers, HubertPreTrainedModel):
    """The parts and parameter names of transformers' `HubertModel`, without its masking for pre-training."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__(config)
        self.feature_extractor = HubertFeatureEncoder(config)
        if config.feat_extract_norm == "group":
            self.feature_extractor.conv_layers[0] = RaggedGroupNormConvLayer(config)
        self.feature_projection = HubertFeatureProjection(config)
        self.encoder = (HubertEncoderStableLayerNorm if config.do_stable_layer_norm else HubertEncoder)(config)
        self.post_init()

    def forward(self, waves: Tensor, num_samples: Sequence[int], recompute: bool = False) -> Tensor:
        """Encode `waves[B, max T]`, zero past each length, to `[B, max F, D]`, F counted by `conv_lengths`."""
        stable, encoder = self.config.do_stable_layer_norm, self.encoder
        features, frames = conv_features(self.feature_extractor.conv_layers, self.config, waves, num_samples, recompute)
        hidden = self.feature_projection(features)
        mask = length_mask(frames, hidden.shape[1], hidden.device)
        attention_mask = None if mask is None else mask[:, None, None].expand(-1, -1, hidden.shape[1], -1)
        hidden = add_positions(encoder.pos_conv_embed, hidden, mask)
        hidden = encoder.dropout(hidden if stable else encoder.layer_norm(hidden))
        for layer in encoder.layers:
            hidden = call_layer(layer, hidden, attention_mask, recompute=recompute)
        return encoder.layer_norm(hidden) if stable else hidden
