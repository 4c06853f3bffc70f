"""wav2vec 2.0 (arXiv 2006.11477), XLS-R (2111.09296) and MMS (2305.13516), from transformers' modules."""

from __future__ import annotations

from transformers import Wav2Vec2Config
from transformers.models.wav2vec2.modeling_wav2vec2 import (
    Wav2Vec2Encoder,
    Wav2Vec2EncoderStableLayerNorm,
    Wav2Vec2FeatureEncoder,
    Wav2Vec2FeatureProjection,
    Wav2Vec2PreTrainedModel,
)

from model.encoders.conv_stack import ConvStackNetwork, conv_stack_family


class RaggedWav2Vec2(ConvStackNetwork, Wav2Vec2PreTrainedModel):
    """The modules of transformers' `Wav2Vec2Model` under the same names, without its SpecAugment masking."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__(config)
        encoder = Wav2Vec2EncoderStableLayerNorm if config.do_stable_layer_norm else Wav2Vec2Encoder
        self._add_modules(Wav2Vec2FeatureEncoder, Wav2Vec2FeatureProjection, encoder)


WAV2VEC2 = conv_stack_family(Wav2Vec2Config, RaggedWav2Vec2)
