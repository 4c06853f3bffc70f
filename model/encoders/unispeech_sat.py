"""UniSpeech-SAT (arXiv 2110.05752) on waveforms of unequal length, from transformers' modules."""

from __future__ import annotations

from transformers import UniSpeechSatConfig
from transformers.models.unispeech_sat.modeling_unispeech_sat import (
    UniSpeechSatEncoder,
    UniSpeechSatEncoderStableLayerNorm,
    UniSpeechSatFeatureEncoder,
    UniSpeechSatFeatureProjection,
    UniSpeechSatPreTrainedModel,
)

from model.encoders.conv_stack import ConvStackNetwork, conv_stack_family


class RaggedUniSpeechSat(ConvStackNetwork, UniSpeechSatPreTrainedModel):
    """The modules of transformers' `UniSpeechSatModel` under the same names, without its SpecAugment masking."""

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__(config)
        encoder = UniSpeechSatEncoderStableLayerNorm if config.do_stable_layer_norm else UniSpeechSatEncoder
        self._add_modules(UniSpeechSatFeatureEncoder, UniSpeechSatFeatureProjection, encoder)


UNISPEECH_SAT = conv_stack_family(UniSpeechSatConfig, RaggedUniSpeechSat)
