"""w2v-BERT 2.0 (arXiv 2312.05187), a Conformer on log-mel filter banks, from transformers' modules.

Shapes: B windows, M mel frames (10 ms), N mel bins, F frames (20 ms), D width, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import (
    Wav2Vec2BertEncoder,
    Wav2Vec2BertFeatureProjection,
    Wav2Vec2BertPreTrainedModel,
    Wav2Vec2BertSelfAttention,
)

from model.batch import Ragged
from model.config import EncoderConfig
from model.encoders.base import AudioEncoder, DrawnAsTransformers, call_layer, join_frames, length_mask
from model.encoders.conformer import by_distance, conformer_flops, positions_of, relative_flops
from model.encoders.family import EncoderFamily, ResolvedEncoder, encoder_error
from model.encoders.fbank import FFT_SAMPLES, FRAME_LENGTH, HOP_SAMPLES, num_fbank_frames, padded_fbank
from model.lengths import SAMPLE_RATE, Windowing
from model.transfer import to_device

STACKED = 2
"""The number of mel frames in one frame of the network."""
MIN_SAMPLES = FRAME_LENGTH + HOP_SAMPLES
"""The length to which shorter clips are padded, so that they have two mel frames and a variance."""


class ShawAttention(Wav2Vec2BertSelfAttention):
    """Attention with relative keys (arXiv 1803.02155), with the parameters of transformers' module.

    transformers creates a tensor [F, F, d] of the embedded distances. This class computes scores once per distance
    instead.
    """

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        relative_position_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend within each window.

        Args:
            hidden_states: [B, F, D].
            attention_mask: [B, 1, F, F] bool, true for real keys; None if there is no padding.
            relative_position_embeddings: Not used. It is part of the signature in transformers.

        Returns:
            The output [B, F, D], and None.
        """
        batch, frames, _ = hidden_states.shape
        query, key, value = (
            proj(hidden_states).view(batch, frames, self.num_heads, self.head_size).transpose(1, 2)
            for proj in (self.linear_q, self.linear_k, self.linear_v)
        )
        left, right = self.left_max_position_embeddings, self.right_max_position_embeddings
        distance = torch.arange(1 - frames, frames, device=hidden_states.device).clamp(-left, right)
        embedded = self.distance_embedding(distance + left)
        bias = by_distance(query @ embedded.T) * self.scaling
        if attention_mask is not None:
            bias = bias.masked_fill(~attention_mask, -torch.inf)
        dropout = self.dropout.p if self.training else 0.0
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return self.linear_out(context.transpose(1, 2).flatten(2)), None


class RaggedWav2Vec2Bert(DrawnAsTransformers, Wav2Vec2BertPreTrainedModel):
    """The modules of transformers' `Wav2Vec2BertModel` under the same names, without its SpecAugment masking."""

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__(config)
        self.feature_projection = Wav2Vec2BertFeatureProjection(config)
        encoder: Any = Wav2Vec2BertEncoder(config)
        encoder.embed_positions = None  # `positions_of` computes the positions.
        if config.position_embeddings_type == "relative_key":
            for layer in encoder.layers:
                layer.self_attn = ShawAttention(config)
        self.encoder = encoder
        self.post_init()

    def forward(self, features: Tensor, lengths: Sequence[int], recompute: bool = False) -> Tensor:
        """Encode stacked filter banks.

        Args:
            features: [B, max F, 2N].
            lengths: The number F of frames of each window.
            recompute: True to recompute every layer in the backward pass.

        Returns:
            [B, max F, D].
        """
        hidden, _ = self.feature_projection(features)
        mask = length_mask(lengths, hidden.shape[1], hidden.device)
        attention_mask = None
        if mask is not None:
            hidden = hidden.masked_fill(~mask[:, :, None], 0.0)
            attention_mask = mask[:, None, None].expand(-1, -1, hidden.shape[1], -1)
        hidden = self.encoder.dropout(hidden)
        positions = positions_of(self.config, hidden)
        for layer in self.encoder.layers:
            hidden = call_layer(layer, hidden, attention_mask, positions, mask, recompute=recompute)
        return hidden


class Wav2Vec2Bert(AudioEncoder):
    """w2v-BERT 2.0 as an `AudioEncoder`. The parameters under `encoder.` have transformers' names.

    Args:
        encoder: The network.
        resolved: The encoder's settings.
    """

    def __init__(self, encoder: RaggedWav2Vec2Bert, resolved: ResolvedEncoder) -> None:
        config: Any = resolved.hf_config
        super().__init__(config.hidden_size, resolved.windowing, resolved.frame_samples)
        self.encoder = encoder
        self.num_mels = config.feature_projection_input_dim // STACKED

    def encode(self, windows: Ragged) -> Tensor:
        """Implement `AudioEncoder.encode`."""
        features, lengths = stacked_fbank(windows, self.num_mels)
        hidden = self.encoder(features.to(self.dtype), lengths, recompute=self.recompute)
        return join_frames(hidden, lengths, [self.num_own_frames(t) for t in windows.lengths])


@torch.no_grad()
def stacked_fbank(audio: Ragged, num_mels: int) -> tuple[Tensor, tuple[int, ...]]:
    """Return pairs of mel frames. Each mel bin has zero mean and unit variance over the clip.

    The result equals that of `SeamlessM4TFeatureExtractor(num_mel_bins=num_mels)` on each clip. If the number of mel
    frames is odd, the last one counts towards the mean and the variance, but is not part of a pair.

    Args:
        audio: The waveforms [ΣT].
        num_mels: The number N of mel bins.

    Returns:
        [B, max F, 2N] in fp32, of which the first F frames of each clip are valid, and the number F for each clip.
    """
    mel, lengths = padded_fbank(audio, num_mels, "povey", scale=2.0**15, least_frames=STACKED)
    count = to_device(lengths, mel.device)[:, None, None]
    mask = length_mask(lengths, mel.shape[1], mel.device)
    centered = mel - mel.sum(1, keepdim=True) / count
    if mask is not None:
        centered = centered.masked_fill(~mask[:, :, None], 0.0)
    variance = centered.square().sum(1, keepdim=True) / (count - 1)
    normal = centered / (variance + 1e-7).sqrt()
    pairs = tuple(m // STACKED for m in lengths)
    return normal[:, : STACKED * max(pairs)].reshape(len(pairs), max(pairs), STACKED * num_mels), pairs


def _windowing(_config: EncoderConfig, _hf_config: Any, window_samples: int) -> Windowing:
    """Return the windowing. Windows are computed at their own length, but at least at `MIN_SAMPLES`."""
    return Windowing(window_samples, MIN_SAMPLES)


def _check(config: EncoderConfig, hf_config: Any) -> None:
    """Check that the network supports all settings of a transformers config.

    Raises:
        UserError: If the config has an adapter, or its input features are not pairs of mel frames.
    """
    if hf_config.add_adapter:
        raise encoder_error(
            config, "config.add_adapter = true", "not supported (it changes the frame rate): use another checkpoint"
        )
    width = hf_config.feature_projection_input_dim
    if width % STACKED:
        what = f"config.feature_projection_input_dim = {width}"
        raise encoder_error(config, what, "set it to twice the number of mel bins")


def _features(hf_config: Any) -> dict[str, Any]:
    """Return the fields of preprocessor_config.json that `stacked_fbank` requires."""
    return {
        "feature_extractor_type": "SeamlessM4TFeatureExtractor",
        "num_mel_bins": hf_config.feature_projection_input_dim // STACKED,
        "sampling_rate": SAMPLE_RATE,
        "stride": STACKED,
    }


def _flops(hf: Any, samples: int) -> float:
    """Return the forward FLOPs of one window: mel filters, projection and Conformer layers."""
    mel_frames = num_fbank_frames(max(samples, MIN_SAMPLES))
    frames, width = mel_frames // STACKED, hf.hidden_size
    features = hf.feature_projection_input_dim
    flops = (FFT_SAMPLES // 2 + 1) * features * mel_frames + 2.0 * frames * features * width
    layer = conformer_flops(hf, frames, hf.conv_depthwise_kernel_size)
    if hf.position_embeddings_type in ("relative", "relative_key"):
        layer += relative_flops(hf, frames, projected=hf.position_embeddings_type == "relative")
    return flops + hf.num_hidden_layers * layer


WAV2VEC2_BERT = EncoderFamily(
    config_class=Wav2Vec2BertConfig,
    network=RaggedWav2Vec2Bert,
    wrapper=Wav2Vec2Bert,
    windowing=_windowing,
    flops=_flops,
    defaults={
        "hidden_dropout": 0.0,
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "conformer_conv_dropout": 0.0,
        "layerdrop": 0.0,
        "apply_spec_augment": False,
    },
    check=_check,
    normalizes=None,
    features=_features,
    feature_extractor=SeamlessM4TFeatureExtractor,
)
