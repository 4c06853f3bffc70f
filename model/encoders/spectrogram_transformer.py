"""The Audio Spectrogram Transformer (AST, arXiv 2104.01778), which is trained on sounds of all kinds.

Shapes: B windows, T audio samples, M mel frames (10 ms), N mel bins, Q frequency bands, E frames (100 ms), D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ASTConfig, ASTFeatureExtractor
from transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer import ASTModel

from model.batch import Ragged
from model.config import EncoderConfig
from model.encoders.base import AudioEncoder, DrawnAsTransformers, call_layer, join_frames, layer_flops
from model.encoders.family import EncoderFamily, ResolvedEncoder, encoder_error
from model.encoders.fbank import FFT_SAMPLES, FRAME_LENGTH, HOP_SAMPLES, num_fbank_frames, padded_fbank
from model.lengths import SAMPLE_RATE, Windowing

TIME_STRIDE = 10
"""The number of mel frames between two patches."""
FRAME_SAMPLES = TIME_STRIDE * HOP_SAMPLES
NUM_CLASS_TOKENS = 2


class AveragedAST(DrawnAsTransformers, ASTModel):
    """transformers' `ASTModel`, with the same parameters, which returns one vector per time step."""

    def forward(self, mel: Tensor, recompute: bool = False) -> Tensor:  # type: ignore[override]
        """Encode mel spectrograms of the config's `max_length`.

        Args:
            mel: [B, M, N].
            recompute: True to recompute every layer in the backward pass.

        Returns:
            [B, E, D], the mean over the frequency bands of the patches at each time.
        """
        hidden = self.embeddings(mel)
        for layer in self.layers:
            hidden = call_layer(layer, hidden, recompute=recompute)
        bands, steps = patches(self.config)
        return self.layernorm(hidden)[:, NUM_CLASS_TOKENS:].unflatten(1, (bands, steps)).mean(1)


class AST(AudioEncoder):
    """AST as an `AudioEncoder`. The parameters under `encoder.` have transformers' names.

    Every window is padded to the full length, as in pre-training. Frames of padding are dropped after encoding.

    Args:
        encoder: The network.
        resolved: The encoder's settings.
    """

    def __init__(self, encoder: AveragedAST, resolved: ResolvedEncoder) -> None:
        config: Any = resolved.hf_config
        super().__init__(config.hidden_size, resolved.windowing, resolved.frame_samples)
        self.encoder = encoder
        self.num_mels, self.max_length = config.num_mel_bins, config.max_length
        self.num_steps = patches(config)[1]
        self.extractor = dict(resolved.extractor)

    def encode(self, windows: Ragged) -> Tensor:
        """Implement `AudioEncoder.encode`."""
        hidden = self.encoder(self.features(windows).to(self.dtype), recompute=self.recompute)
        wanted = [self.num_own_frames(t) for t in windows.lengths]
        return join_frames(hidden, [min(n, self.num_steps) for n in wanted], wanted)

    @torch.no_grad()
    def features(self, windows: Ragged) -> Tensor:
        """Return the spectrograms [B, M, N] in fp32. They equal those of transformers' `ASTFeatureExtractor`."""
        mel, _ = padded_fbank(windows, self.num_mels, "hann")
        mel = F.pad(mel, (0, 0, 0, self.max_length - mel.shape[1]))
        if not self.extractor["do_normalize"]:
            return mel
        return (mel - self.extractor["mean"]) / (2 * self.extractor["std"])


def patches(hf_config: Any) -> tuple[int, int]:
    """Return the number of frequency bands and the number of time steps."""
    size = hf_config.patch_size
    bands = (hf_config.num_mel_bins - size) // hf_config.frequency_stride + 1
    return bands, (hf_config.max_length - size) // hf_config.time_stride + 1


def _windowing(config: EncoderConfig, hf_config: Any, window_samples: int) -> Windowing:
    """Return the windowing. Every window is padded to the full length.

    Raises:
        UserError: If the window exceeds the checkpoint's positions.
    """
    if num_fbank_frames(window_samples) > hf_config.max_length:
        samples = FRAME_LENGTH + (hf_config.max_length - 1) * HOP_SAMPLES
        longest = samples // FRAME_SAMPLES * FRAME_SAMPLES / SAMPLE_RATE
        limit = f"must not exceed {longest:g} s ({hf_config.max_length} mel frames)"
        raise encoder_error(config, f"window_sec = {config.window_sec}", limit)
    return Windowing(window_samples, window_samples)


def _check(config: EncoderConfig, hf_config: Any) -> None:
    """Check that a transformers config describes a network with frames of 100 ms.

    Raises:
        UserError: If the config has a different stride.
    """
    if hf_config.time_stride != TIME_STRIDE:
        found = f"config.time_stride = {hf_config.time_stride}"
        raise encoder_error(config, found, f"only {TIME_STRIDE} is supported: use another checkpoint")


def _check_extractor(config: EncoderConfig, extractor: Mapping[str, Any]) -> None:
    """Check the values with which spectrograms are normalized.

    Raises:
        UserError: If a value is of the wrong type, or `std` is not positive.
    """
    for key, value in extractor.items():
        is_number = type(value) in (int, float) and math.isfinite(value)
        if key == "do_normalize" and type(value) is not bool:
            raise encoder_error(config, f"config.do_normalize = {value!r}", "set it to true or false")
        if key == "mean" and not is_number:
            raise encoder_error(config, f"config.mean = {value!r}", "set it to a number")
        if key == "std" and not (is_number and value > 0):
            raise encoder_error(config, f"config.std = {value!r}", "set it to a positive number")


def _features(hf_config: Any) -> dict[str, Any]:
    """Return the fields of preprocessor_config.json that `AST.features` requires."""
    return {
        "feature_extractor_type": "ASTFeatureExtractor",
        "max_length": hf_config.max_length,
        "num_mel_bins": hf_config.num_mel_bins,
        "sampling_rate": SAMPLE_RATE,
    }


def _flops(hf: Any, samples: int) -> float:
    """Return the forward FLOPs of one window: mel filters, patches and Transformer layers."""
    bands, steps = patches(hf)
    mel = 2.0 * (FFT_SAMPLES // 2 + 1) * hf.num_mel_bins * num_fbank_frames(samples)
    embedding = 2.0 * bands * steps * hf.patch_size**2 * hf.hidden_size
    layer = layer_flops(bands * steps + NUM_CLASS_TOKENS, hf.hidden_size, hf.intermediate_size)
    return mel + embedding + hf.num_hidden_layers * layer


AUDIO_SPECTROGRAM_TRANSFORMER = EncoderFamily(
    config_class=ASTConfig,
    network=AveragedAST,
    wrapper=AST,
    windowing=_windowing,
    flops=_flops,
    frame_samples=FRAME_SAMPLES,
    defaults={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    check=_check,
    normalizes=None,
    features=_features,
    extractor_fields={"do_normalize": True, "mean": -4.2677393, "std": 4.5689974},
    check_extractor=_check_extractor,
    feature_extractor=ASTFeatureExtractor,
    # Checkpoints have the names of earlier versions of transformers. transformers renames them only for its own class.
    key_mapping={
        r"encoder\.layer\.": "layers.",
        r"attention\.query": "q_proj",
        r"attention\.key": "k_proj",
        r"attention\.value": "v_proj",
        r"attention\.output\.dense": "attention.o_proj",
        r"intermediate\.dense": "mlp.fc1",
        r"output\.dense": "mlp.fc2",
    },
)
