"""wav2vec 2.0 (arXiv 2006.11477), XLS-R (2111.09296) and MMS (2305.13516), from transformers' modules."""

from __future__ import annotations

from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor
from transformers.models.wav2vec2.modeling_wav2vec2 import (
    Wav2Vec2Encoder,
    Wav2Vec2EncoderStableLayerNorm,
    Wav2Vec2FeatureEncoder,
    Wav2Vec2FeatureProjection,
    Wav2Vec2PreTrainedModel,
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


class RaggedWav2Vec2(ConvStackNetwork, Wav2Vec2PreTrainedModel):
    """The modules of transformers' `Wav2Vec2Model` under the same names, without its masking for pre-training."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__(config)
        self.feature_extractor = Wav2Vec2FeatureEncoder(config)
        if config.feat_extract_norm == "group":
            self.feature_extractor.conv_layers[0] = RaggedGroupNormConvLayer(config)
        self.feature_projection = Wav2Vec2FeatureProjection(config)
        self.encoder = (Wav2Vec2EncoderStableLayerNorm if config.do_stable_layer_norm else Wav2Vec2Encoder)(config)
        self.post_init()


WAV2VEC2 = EncoderFamily(
    config_class=Wav2Vec2Config,
    network=RaggedWav2Vec2,
    wrapper=ConvStackEncoder,
    windowing=conv_stack_windowing,
    flops=conv_stack_flops,
    defaults=CONV_STACK_DEFAULTS,
    check=check_conv_stack,
    normalizes=normalizes_as_published,
    feature_extractor=Wav2Vec2FeatureExtractor,
)
