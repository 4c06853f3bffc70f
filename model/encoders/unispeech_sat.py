"""UniSpeech-SAT (arXiv 2110.05752) on waveforms of unequal length, from transformers' modules."""

from __future__ import annotations

from transformers import UniSpeechSatConfig, Wav2Vec2FeatureExtractor
from transformers.models.unispeech_sat.modeling_unispeech_sat import (
    UniSpeechSatEncoder,
    UniSpeechSatEncoderStableLayerNorm,
    UniSpeechSatFeatureEncoder,
    UniSpeechSatFeatureProjection,
    UniSpeechSatPreTrainedModel,
)

from model.encoders.conv_stack import (
    CONV_STACK_DEFAULTS,
    ConvStackEncoder,
    ConvStackNetwork,
    RaggedGroupNormConvLayer,
    check_conv_stack,
    conv_stack_flops,
    conv_stack_windowing,
    normalizes_as_published,
)
from model.encoders.family import EncoderFamily


class RaggedUniSpeechSat(ConvStackNetwork, UniSpeechSatPreTrainedModel):
    """The modules of transformers' `UniSpeechSatModel` under the same names, without its masking for pre-training."""

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__(config)
        self.feature_extractor = UniSpeechSatFeatureEncoder(config)
        if config.feat_extract_norm == "group":
            self.feature_extractor.conv_layers[0] = RaggedGroupNormConvLayer(config)
        self.feature_projection = UniSpeechSatFeatureProjection(config)
        self.encoder = (UniSpeechSatEncoderStableLayerNorm if config.do_stable_layer_norm else UniSpeechSatEncoder)(
            config
        )
        self.post_init()


UNISPEECH_SAT = EncoderFamily(
    config_class=UniSpeechSatConfig,
    network=RaggedUniSpeechSat,
    wrapper=ConvStackEncoder,
    windowing=conv_stack_windowing,
    flops=conv_stack_flops,
    defaults=CONV_STACK_DEFAULTS,
    check=check_conv_stack,
    normalizes=normalizes_as_published,
    feature_extractor=Wav2Vec2FeatureExtractor,
)
