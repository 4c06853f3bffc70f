"""data2vec for audio (arXiv 2202.03555) on waveforms of unequal length, from transformers' modules.

Shapes: B windows, F frames (20 ms), D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Data2VecAudioConfig
from transformers.models.data2vec.modeling_data2vec_audio import (
    Data2VecAudioEncoder,
    Data2VecAudioFeatureEncoder,
    Data2VecAudioFeatureProjection,
    Data2VecAudioPositionalConvEmbedding,
    Data2VecAudioPreTrainedModel,
)

from model.encoders.conv_stack import (
    ConvStackNetwork,
    MaskedPositions,
    conv_stack_family,
    conv_stack_flops,
)


class RaggedPositions(MaskedPositions, Data2VecAudioPositionalConvEmbedding):
    """transformers' convolutional position embeddings, with padding set to zero before each of the convolutions.

    transformers sets padding to zero only before the first convolution. The output of the later convolutions then
    depends on the length of the padding.
    """

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the positions [B, F, D] of `hidden` [B, F, D], given the bool mask [B, F] of real frames."""
        hidden = hidden.transpose(1, 2)
        for layer in self.layers:
            if mask is not None:
                hidden = hidden.masked_fill(~mask[:, None], 0.0)
            hidden = layer(hidden)
        return hidden.transpose(1, 2)


class RaggedData2VecAudio(ConvStackNetwork, Data2VecAudioPreTrainedModel):
    """The modules of transformers' `Data2VecAudioModel` under the same names, without its SpecAugment masking."""

    def __init__(self, config: Data2VecAudioConfig) -> None:
        super().__init__(config)
        self.feature_extractor = Data2VecAudioFeatureEncoder(config)
        self.feature_projection = Data2VecAudioFeatureProjection(config)
        self.encoder = Data2VecAudioEncoder(config)
        self.encoder.pos_conv_embed = RaggedPositions(config)
        self.post_init()


def _flops(hf: Any, samples: int) -> float:
    """Return the forward FLOPs of one window, with all convolutions of the positions."""
    return conv_stack_flops(hf, samples, position_taps=hf.num_conv_pos_embeddings * hf.conv_pos_kernel_size)


DATA2VEC_AUDIO = conv_stack_family(Data2VecAudioConfig, RaggedData2VecAudio, flops=_flops)
