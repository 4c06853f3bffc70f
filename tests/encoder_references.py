"""The features that transformers computes for one clip, from the published model of each kind of encoder.

Each function `of_*` is, or returns, a value of `tests.encoder_table.Case.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.batch import Ragged
from model.encoders.base import at_mixture_rate
from model.lengths import num_frames


def of_waveform(base: str) -> Callable[[Any, Any, Tensor], Tensor]:
    """Return `Case.reference` for models that read waveforms. `base` is the attribute that holds the encoder."""

    def reference(published: Any, extractor: Any, wave: Tensor) -> Tensor:
        values = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt")["input_values"]
        found: Tensor = getattr(published, base)(values).last_hidden_state[0]
        return found

    return reference


def of_mel(base: str) -> Callable[[Any, Any, Tensor], Tensor]:
    """Return `Case.reference` for models that read a masked spectrogram. `base` is the attribute with the encoder."""

    def reference(published: Any, extractor: Any, wave: Tensor) -> Tensor:
        inputs = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt")
        found: Tensor = getattr(published, base)(**inputs).last_hidden_state[0]
        return found[: int(inputs["attention_mask"].sum())]

    return reference


def of_tower(published: Any, extractor: Any, wave: Tensor) -> Tensor:
    """Return the frames that the audio tower computes when it is called as in the speech LLM."""
    inputs = extractor(wave.numpy(), sampling_rate=16_000, return_attention_mask=True, return_tensors="pt")
    encoder, mask = published.model.audio_tower, inputs["attention_mask"]
    name = type(encoder).__name__
    if name.startswith("Voxtral"):
        frames = -(-len(wave) // 320)
        found: Tensor = encoder(inputs["input_features"]).last_hidden_state[0, :frames]
        return found
    convolved = (int(mask.sum()) - 1) // 2 + 1
    if name.startswith("Qwen2"):
        keys = torch.where(torch.arange(mask.shape[1] // 2) < convolved, 0.0, -torch.inf)
        fields = {"attention_mask": keys.expand(1, 1, len(keys), -1)}
    else:
        fields = {"input_features_mask": mask}
    pooled: Tensor = encoder(inputs["input_features"], **fields).last_hidden_state[0, : convolved // 2]
    return pooled


def of_chunks(published: Any, extractor: Any, wave: Tensor) -> Tensor:
    """Return the frames of Qwen3-ASR's encoder, interpolated to 50 Hz.

    The encoder's own frames cover 80 ms. The last frame of a chunk may cover less.
    """
    options = {"return_tensors": "pt", "return_attention_mask": True, "padding": True}
    inputs = extractor([wave.numpy()], sampling_rate=16_000, **options)
    mask = inputs["attention_mask"]
    frames = published.model.audio_tower(inputs["input_features"], mask).last_hidden_state.detach().numpy()
    starts, ends = chunk_bounds(2 * published.config.audio_config.n_window, int(mask.sum()))
    centres = np.array([(a + b) / 4 - 0.5 for a, b in zip(starts, ends, strict=True)])
    wanted = np.arange(num_frames(len(wave)))
    return torch.from_numpy(np.stack([np.interp(wanted, centres, column) for column in frames.T], axis=1)).float()


def chunk_bounds(own: int, mel_frames: int) -> tuple[list[int], list[int]]:
    """Return, for each frame of Qwen3-ASR's encoder, its first mel frame and the mel frame after its last one.

    Args:
        own: The number of mel frames of a chunk.
        mel_frames: The number of mel frames of a clip.
    """
    starts = [first + j for first in range(0, mel_frames, own) for j in range(0, min(own, mel_frames - first), 8)]
    return starts, [min(start + 8, start // own * own + own, mel_frames + mel_frames % 2) for start in starts]


def of_repeated_chunks(published: Any, extractor: Any, wave: Tensor) -> Tensor:
    """Return the frames of Qwen3-ASR's encoder before its last norm, repeated once for every 20 ms that they cover."""
    inputs = extractor([wave.numpy()], sampling_rate=16_000, padding=True, return_attention_mask=True)
    tower, mask = published.model.audio_tower, inputs["attention_mask"]
    norm, tower.ln_post = tower.ln_post, torch.nn.Identity()
    frames = tower(inputs["input_features"], mask).last_hidden_state.detach()
    tower.ln_post = norm
    starts, ends = chunk_bounds(2 * published.config.audio_config.n_window, int(mask.sum()))
    units = torch.tensor([(end - start) // 2 for start, end in zip(starts, ends, strict=True)])
    return frames.repeat_interleave(units, dim=0)[: num_frames(len(wave))]


def of_parakeet(published: Any, extractor: Any, wave: Tensor) -> Tensor:
    """Return the frames of the encoder. The last frame may begin after the end of the clip."""
    inputs = extractor([wave.numpy()], sampling_rate=16_000, return_tensors="pt")
    found = published.encoder(**inputs)
    frames: Tensor = found.last_hidden_state[0, : int(found.attention_mask.sum())]
    return frames


def of_patches(published: Any, extractor: Any, wave: Tensor) -> Tensor:
    """Return, for each time step within the clip, the mean of the patches of all frequency bands."""
    values = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt")["input_values"]
    tokens = published.audio_spectrogram_transformer(values).last_hidden_state[0, 2:]
    steps = (published.config.max_length - 16) // 10 + 1
    return torch.stack([tokens[t::steps].mean(0) for t in range(min(steps, -(-len(wave) // 1600)))])


def of_lasr(published: Any, extractor: Any, wave: Tensor) -> Tensor:
    """Return the frames of LASR's encoder, interpolated from 25 Hz to 50 Hz."""
    inputs = extractor([wave.numpy()], sampling_rate=16_000, return_tensors="pt")
    frames = published(**inputs).last_hidden_state[0]
    return at_mixture_rate(Ragged(frames, (len(frames),)), 640, (num_frames(len(wave)),)).values
