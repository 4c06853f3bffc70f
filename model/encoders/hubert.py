"""HuBERT (arXiv 2106.07447) on waveforms of unequal length, from transformers' modules.

Shapes: B windows, T audio samples, F frames (20 ms), D width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import HubertConfig, Wav2Vec2FeatureExtractor
from transformers.models.hubert.modeling_hubert import (
    HubertEncoder,
    HubertEncoderStableLayerNorm,
    HubertFeatureEncoder,
    HubertFeatureProjection,
    HubertPreTrainedModel,
)

from model.encoders.base import DrawnAsTransformers, call_layer, length_mask
from model.encoders.conv_stack import (
    CONV_STACK_DEFAULTS,
    ConvStackEncoder,
    RaggedGroupNormConvLayer,
    add_positions,
    check_conv_stack,
    conv_features,
    conv_stack_flops,
    conv_stack_windowing,
    normalizes_as_published,
)
from model.encoders.family import EncoderFamily


class RaggedHubert(DrawnAsTransformers, HubertPreTrainedModel):
    """The modules of transformers' `HubertModel` under the same names, without its masking for pre-training."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__(config)
        self.feature_extractor = HubertFeatureEncoder(config)
        if config.feat_extract_norm == "group":
            self.feature_extractor.conv_layers[0] = RaggedGroupNormConvLayer(config)
        self.feature_projection = HubertFeatureProjection(config)
        self.encoder = (HubertEncoderStableLayerNorm if config.do_stable_layer_norm else HubertEncoder)(config)
        self.post_init()

    def forward(self, waves: Tensor, num_samples: Sequence[int], recompute: bool = False) -> Tensor:
        """Encode waveforms.

        Args:
            waves: [B, max T], zero after each length.
            num_samples: The length of each window.
            recompute: True to recompute every layer in the backward pass.

        Returns:
            [B, max F, D]; the valid F of each window is the last of `conv_lengths`.
        """
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


HUBERT = EncoderFamily(
    config_class=HubertConfig,
    network=RaggedHubert,
    wrapper=ConvStackEncoder,
    windowing=conv_stack_windowing,
    flops=conv_stack_flops,
    defaults=CONV_STACK_DEFAULTS,
    check=check_conv_stack,
    normalizes=normalizes_as_published,
    feature_extractor=Wav2Vec2FeatureExtractor,
)
