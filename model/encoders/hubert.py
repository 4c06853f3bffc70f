"""HuBERT (arXiv 2106.07447) on waveforms of unequal length, from transformers' modules."""

from __future__ import annotations

from transformers import HubertConfig, Wav2Vec2FeatureExtractor
from transformers.models.hubert.modeling_hubert import (
    HubertEncoder,
    HubertEncoderStableLayerNorm,
    HubertFeatureEncoder,
    HubertFeatureProjection,
    HubertPreTrainedModel,
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


class RaggedHubert(ConvStackNetwork, HubertPreTrainedModel):
    """The modules of transformers' `HubertModel` under the same names, without its masking for pre-training."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__(config)
        self.feature_extractor = HubertFeatureEncoder(config)
        if config.feat_extract_norm == "group":
            self.feature_extractor.conv_layers[0] = RaggedGroupNormConvLayer(config)
        self.feature_projection = HubertFeatureProjection(config)
        self.encoder = (HubertEncoderStableLayerNorm if config.do_stable_layer_norm else HubertEncoder)(config)
        self.post_init()


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
