"""HuBERT (arXiv 2106.07447) on waveforms of unequal length, from transformers' modules."""

from __future__ import annotations

from transformers import HubertConfig
from transformers.models.hubert.modeling_hubert import (
    HubertEncoder,
    HubertEncoderStableLayerNorm,
    HubertFeatureEncoder,
    HubertFeatureProjection,
    HubertPreTrainedModel,
)

from model.encoders.conv_stack import ConvStackNetwork, conv_stack_family


class RaggedHubert(ConvStackNetwork, HubertPreTrainedModel):
    """The modules of transformers' `HubertModel` under the same names, without its SpecAugment masking."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__(config)
        encoder = HubertEncoderStableLayerNorm if config.do_stable_layer_norm else HubertEncoder
        self._add_modules(HubertFeatureEncoder, HubertFeatureProjection, encoder)


HUBERT = conv_stack_family(HubertConfig, RaggedHubert)
