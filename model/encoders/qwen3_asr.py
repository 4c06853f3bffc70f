"""The audio encoder of Qwen3-ASR (Qwen3-Omni, arXiv 2509.17765): convolutions on chunks of 1 s, attention within 8 s.

The mel frames of a window are divided into chunks. Three convolutions convert a chunk of 1 s to 13 frames. The last
frame covers 40 ms, and the others 80 ms. A frame attends to all frames in its span of 8 chunks.

Shapes: B windows, T audio samples, N mel bins, M mel frames (10 ms), K chunks of all windows, E frames of the encoder,
F frames of 20 ms, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Qwen3ASREncoder, Qwen3ASREncoderConfig, Qwen3ASRFeatureExtractor

from model.batch import Ragged
from model.config import EncoderConfig
from model.encoders.base import AudioEncoder, DrawnAsTransformers, call_layer, layer_flops, length_mask
from model.encoders.family import EncoderFamily, ResolvedEncoder, encoder_error
from model.encoders.log_mel import FFT_SAMPLES, HOP_SAMPLES, mel_filters
from model.lengths import SAMPLE_RATE, Windowing, num_frames
from model.transfer import to_device

LEAST_SAMPLES = 8000
"""The length to which shorter clips are padded with silence, as in transformers' extractor."""
STRIDE = 4
"""The number of frames of 20 ms that a frame of the encoder covers."""


def convolved(length: int) -> int:
    """Return the number of frames that the three convolutions give for a chunk of `length` mel frames."""
    for _ in range(3):
        length = (length - 1) // 2 + 1
    return length


class RaggedQwen3ASREncoder(DrawnAsTransformers, Qwen3ASREncoder):
    """transformers' `Qwen3ASREncoder`, with the same parameters, for windows of unequal length."""

    def forward(  # type: ignore[override]
        self, mel: Tensor, lengths: Sequence[int], recompute: bool = False
    ) -> Tensor:
        """Encode mel spectrograms.

        Args:
            mel: [B, N, padded M], zero after each window's M frames. The padded M is a multiple of the length of a
                chunk.
            lengths: The number M of mel frames of each window.
            recompute: True to recompute every layer in the backward pass.

        Returns:
            [ΣE, D].
        """
        size = 2 * self.n_window
        chunks = [[min(size, m - start) for start in range(0, m, size)] for m in lengths]
        whole = mel.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)
        per_window = mel.shape[2] // size
        used = [b * per_window + c for b, own in enumerate(chunks) for c in range(len(own))]
        hidden = whole[to_device(used, mel.device)][:, None]
        for convolution in (self.conv2d1, self.conv2d2, self.conv2d3):
            hidden = F.gelu(convolution(hidden))
        hidden = self.conv_out(hidden.permute(0, 3, 1, 2).flatten(2))  # [K, frames of a whole chunk, D]
        hidden = hidden + self.positional_embedding(hidden.shape[1]).to(hidden.dtype)
        counts = [convolved(n) for own in chunks for n in own]
        rows = [k * hidden.shape[1] + j for k, count in enumerate(counts) for j in range(count)]
        hidden = hidden.flatten(0, 1)[to_device(rows, mel.device)]
        # The tensor is on the CPU, since transformers' attention reads its values.
        bounds = torch.tensor([0, *np.cumsum(self._spans(chunks))], dtype=torch.int32, device="cpu")
        for layer in self.layers:
            (hidden,) = call_layer(layer, hidden, bounds, recompute=recompute)
        normed: Tensor = self.ln_post(hidden)
        return normed

    def _spans(self, chunks: Sequence[Sequence[int]]) -> list[int]:
        """Return the size of each group of frames that attend to each other.

        Args:
            chunks: The number of mel frames in each chunk of each window.
        """
        per_span = self.n_window_infer // (2 * self.n_window)
        return [
            sum(map(convolved, own[first : first + per_span]))
            for own in chunks
            for first in range(0, len(own), per_span)
        ]


class Qwen3ASR(AudioEncoder):
    """Qwen3-ASR's encoder as an `AudioEncoder`. The parameters under `encoder.` have transformers' names.

    The frames of the network are not evenly spaced, so this class interpolates them to 50 Hz.

    Args:
        encoder: The network.
        resolved: The encoder's settings.
    """

    def __init__(self, encoder: PreTrainedModel, resolved: ResolvedEncoder) -> None:
        config: Any = resolved.hf_config
        super().__init__(config.d_model, resolved.windowing, resolved.frame_samples)
        self.encoder = encoder
        self.num_mels, self.chunk = config.num_mel_bins, 2 * config.n_window

    def encode(self, windows: Ragged) -> Tensor:
        """Implement `AudioEncoder.encode`."""
        mel, lengths = clip_log_mel(windows, self.num_mels)
        mel = F.pad(mel, (0, -mel.shape[2] % self.chunk))
        hidden = self.encoder(mel.to(self.dtype), lengths, recompute=self.recompute)
        return self.at_mixture_rate(hidden, windows.lengths, lengths)

    def at_mixture_rate(self, hidden: Tensor, samples: Sequence[int], mel_lengths: Sequence[int]) -> Tensor:
        """Return the frames of all windows interpolated to 50 Hz, [ΣF, D].

        Args:
            hidden: The encoder's frames [ΣE, D].
            samples: The number T of audio samples of each window.
            mel_lengths: The number M of mel frames of each window.
        """
        before, weights, first = [], [], 0
        for length, mel_frames in zip(samples, mel_lengths, strict=True):
            centres = frame_centres(mel_frames, self.chunk)
            wanted = np.arange(num_frames(length)).clip(centres[0], centres[-1])
            left = np.searchsorted(centres, wanted, side="right").clip(1, len(centres) - 1) - 1
            right = np.minimum(left + 1, len(centres) - 1)
            before.append(first + np.stack((left, right)))
            weights.append((wanted - centres[left]) / np.maximum(centres[right] - centres[left], 1.0))
            first += len(centres)
        rows = to_device(np.concatenate(before, axis=1), hidden.device)
        weight = to_device(np.concatenate(weights).astype(np.float32), hidden.device).to(hidden.dtype)
        # On a GPU, the gradient of an embedding look-up is summed in a fixed order, unlike the gradient of indexing.
        left_frames, right_frames = F.embedding(rows, hidden)
        return torch.lerp(left_frames, right_frames, weight[:, None])


def frame_centres(mel_frames: int, chunk: int) -> np.ndarray:
    """Return the centers of the frames of a window, [E], in units of 20 ms, where 0 is the center of the first 20 ms.

    Args:
        mel_frames: The number M of mel frames of the window.
        chunk: The number of mel frames of a chunk.
    """
    centres = []
    for start in range(0, mel_frames, chunk):
        units = -(-min(chunk, mel_frames - start) // 2)
        for begin in range(0, units, STRIDE):
            centres.append(start / 2 + (begin + min(begin + STRIDE, units) - 1) / 2)
    return np.array(centres)


@torch.no_grad()
def clip_log_mel(audio: Ragged, num_mels: int) -> tuple[Tensor, tuple[int, ...]]:
    """Return the log-mel spectrograms of clips, as transformers' `Qwen3ASRFeatureExtractor` computes them for one clip.

    Unlike in `padded_log_mel`, the waveform is reflected at the end of each clip, and the last, incomplete mel frame is
    dropped. No gradient flows to the waveforms.

    Args:
        audio: The waveforms [ΣT]. Waveforms shorter than `LEAST_SAMPLES` are padded with silence.
        num_mels: The number N of mel bins.

    Returns:
        [B, N, max M] in fp32, zero after each clip's M frames, and the number M for each clip.
    """
    half, waves = FFT_SAMPLES // 2, []
    for wave in audio.split():
        wave = F.pad(wave.float(), (0, max(0, LEAST_SAMPLES - len(wave))))
        waves.append(F.pad(wave[None], (half, half), mode="reflect")[0])
    lengths = tuple((len(wave) - 2 * half) // HOP_SAMPLES for wave in waves)
    window = torch.hann_window(FFT_SAMPLES, device=audio.values.device)
    padded = Ragged.of(waves).padded()
    spectrum = torch.stft(padded, FFT_SAMPLES, HOP_SAMPLES, window=window, center=False, return_complex=True)
    power = (spectrum.real.square() + spectrum.imag.square())[:, :, : max(lengths)]
    log_spec = (mel_filters(num_mels, FFT_SAMPLES, padded.device) @ power).clamp(min=1e-10).log10()
    mask = length_mask(lengths, log_spec.shape[2], padded.device)
    # The floor is relative to the loudest bin within the clip.
    inside = log_spec if mask is None else log_spec.masked_fill(~mask[:, None], -torch.inf)
    log_spec = (torch.maximum(log_spec, inside.amax(dim=(1, 2), keepdim=True) - 8.0) + 4.0) / 4.0
    return log_spec if mask is None else log_spec.masked_fill(~mask[:, None], 0.0), lengths


def _windowing(_config: EncoderConfig, _hf_config: Any, window_samples: int) -> Windowing:
    """Return the windowing. Windows are computed at their own length, but at least at `LEAST_SAMPLES`."""
    return Windowing(window_samples, LEAST_SAMPLES)


def _check(config: EncoderConfig, hf_config: Any) -> None:
    """Check that a span of attention consists of whole chunks, and that the network supports the length of a chunk.

    Raises:
        UserError: If a value of the config is not supported.
    """
    chunk = 2 * hf_config.n_window
    if hf_config.n_window_infer % chunk or hf_config.n_window % 2:
        raise encoder_error(
            config,
            f"config.n_window = {hf_config.n_window}, n_window_infer = {hf_config.n_window_infer}",
            "n_window must be even, and n_window_infer a multiple of 2 · n_window",
        )
    if hf_config.max_position_embeddings < convolved(chunk):
        what = f"config.max_position_embeddings = {hf_config.max_position_embeddings}"
        raise encoder_error(config, what, f"must be at least {convolved(chunk)}, the number of frames of a chunk")
    if hf_config.scale_embedding:
        raise encoder_error(config, "config.scale_embedding = true", "only false is supported")


def _flops(hf: Any, samples: int) -> float:
    """Return the forward FLOPs of one window: mel filters, convolutions and Transformer layers."""
    chunk, mel_frames = 2 * hf.n_window, max(LEAST_SAMPLES, samples) // HOP_SAMPLES
    chunks = [min(chunk, mel_frames - start) for start in range(0, mel_frames, chunk)]
    time, bins, width, convolutions = chunk, hf.num_mel_bins, 1, 0.0
    for _ in range(3):
        time, bins = -(-time // 2), -(-bins // 2)
        convolutions += 18.0 * time * bins * width * hf.downsample_hidden_size
        width = hf.downsample_hidden_size
    projection = 2.0 * time * bins * width * hf.d_model
    per_span = hf.n_window_infer // chunk
    spans = [sum(map(convolved, chunks[i : i + per_span])) for i in range(0, len(chunks), per_span)]
    layers = hf.encoder_layers * sum(layer_flops(n, hf.d_model, hf.encoder_ffn_dim) for n in spans)
    mel = 2.0 * (FFT_SAMPLES // 2 + 1) * hf.num_mel_bins * mel_frames
    return mel + len(chunks) * (convolutions + projection) + layers


def _features(hf_config: Any) -> dict[str, Any]:
    """Return the fields of preprocessor_config.json that `clip_log_mel` requires."""
    return {"feature_size": hf_config.num_mel_bins, "sampling_rate": SAMPLE_RATE, "min_length": LEAST_SAMPLES}


QWEN3_ASR = EncoderFamily(
    config_class=Qwen3ASREncoderConfig,
    network=RaggedQwen3ASREncoder,
    wrapper=Qwen3ASR,
    windowing=_windowing,
    flops=_flops,
    check=_check,
    defaults={"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
    normalizes=None,
    features=_features,
    feature_extractor=Qwen3ASRFeatureExtractor,
    containers={"qwen3_asr": "audio_config"},
    key_mapping={r"^(model\.)?audio_tower\.": ""},
)
