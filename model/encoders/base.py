"""The interface of audio encoders, and code that families share, for windows, masks, frame rates and recomputation.

A *call* is one forward pass of an encoder on a padded batch of windows. A *window* is a clip or a part of a long clip.

Shapes: B windows of one call, T audio samples (16 kHz), F frames of 20 ms, E frames at the encoder's own rate, D width.

DeepSpeed ZeRO-3 may gather a module's parameters around that module's own `forward`, on all ranks together. Therefore
no code here reads a child's parameter from outside the child, and one call of an encoder calls each of its modules
exactly once, regardless of the number and length of the clips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.batch import Ragged
from model.lengths import FRAME_SAMPLES, Windowing, num_frames
from model.transfer import to_device


class AudioEncoder(nn.Module):
    """A module that converts waveforms to one feature vector per 20 ms.

    The features of a clip do not depend on the other clips in the call.

    Args:
        dim: The width of a feature vector.
        windowing: The rule by which clips are cut and padded. The window must be a multiple of both 320 samples and
            `frame_samples`.
        frame_samples: The number of audio samples between two frames that `encode` returns.
    """

    dim: int
    windowing: Windowing
    frame_samples: int

    def __init__(self, dim: int, windowing: Windowing, frame_samples: int = FRAME_SAMPLES) -> None:
        super().__init__()
        assert windowing.window_samples > 0, windowing
        assert windowing.window_samples % math.lcm(FRAME_SAMPLES, frame_samples) == 0, (windowing, frame_samples)
        self.dim = dim
        self.windowing = windowing
        self.frame_samples = frame_samples
        self.recompute = False

    def forward(self, audio: Ragged) -> Ragged:
        """Encode clips.

        All windows are computed as one padded batch, so the clips in a call should have similar lengths.

        Args:
            audio: The waveforms [ΣT], at least one clip, none of them empty.

        Returns:
            Features [ΣF, D] in the parameters' dtype, with F = `num_frames(T)` for each clip.
        """
        assert audio.lengths and min(audio.lengths) > 0, audio.lengths
        # A clip's windows are consecutive in the waveform and in the features, so cutting and joining need no copy.
        size = self.windowing.window_samples
        windows = Ragged(audio.values, tuple(t for n in audio.lengths for t in window_lengths(n, size)))
        frames = Ragged(self.encode(windows), tuple(self.num_own_frames(t) for t in audio.lengths))
        return at_mixture_rate(frames, self.frame_samples, tuple(num_frames(t) for t in audio.lengths))

    def encode(self, windows: Ragged) -> Tensor:
        """Encode windows at the encoder's own frame rate.

        Args:
            windows: The waveforms [ΣT], none longer than `windowing.window_samples`.

        Returns:
            Features [ΣE, D], with E = `num_own_frames(T)` for each window.
        """
        raise NotImplementedError

    def num_own_frames(self, samples: int) -> int:
        """Return the number of frames at the encoder's own rate that cover `samples`.

        The last frame may be incomplete.
        """
        return -(-samples // self.frame_samples)

    def set_recompute(self, enabled: bool) -> None:
        """Choose whether to save only the input of each layer, and to recompute the layer in the backward pass."""
        self.recompute = enabled

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters. It is also correct if ZeRO-3 has partitioned them."""
        return next(self.parameters()).dtype


def at_mixture_rate(frames: Ragged, frame_samples: int, lengths: tuple[int, ...]) -> Ragged:
    """Bring frames to the mixture's rate of 50 Hz by linear interpolation in time.

    Each clip is interpolated separately, so the result for a clip does not depend on the other clips. Frames at 50 Hz
    are returned unchanged.

    Args:
        frames: [ΣE, D] at one frame per `frame_samples` audio samples.
        frame_samples: The number of audio samples between two frames.
        lengths: The number of frames at 50 Hz that each clip must have.

    Returns:
        [ΣF, D], with F as in `lengths`.
    """
    if frame_samples == FRAME_SAMPLES:
        assert frames.lengths == lengths, (frames.lengths, lengths)
        return frames
    before, weights, first = [], [], 0
    for have, want in zip(frames.lengths, lengths, strict=True):
        # The centers of the wanted frames, in units of input frames. Beyond the outermost centers, the outermost frames
        # are repeated.
        centres = (np.arange(want) + 0.5) * (FRAME_SAMPLES / frame_samples) - 0.5
        centres = centres.clip(0, have - 1)
        whole = np.minimum(np.floor(centres).astype(np.int64), max(have - 2, 0))
        before.append(first + np.stack((whole, np.minimum(whole + 1, have - 1))))
        weights.append((centres - whole).astype(np.float32))
        first += have
    values = frames.values
    rows = to_device(np.concatenate(before, axis=1), values.device)
    weight = to_device(np.concatenate(weights), values.device).to(values.dtype)
    # On a GPU, the gradient of an embedding look-up is summed in a fixed order, unlike that of `index_select`.
    left, right = F.embedding(rows, values)
    return Ragged(torch.lerp(left, right, weight[:, None]), lengths)


class DrawnAsTransformers:
    """A mixin for subclasses of transformers' models, which makes them draw random weights as the original classes do.

    Without this mixin, transformers (5.23) skips every module that has no direct parameters. Whisper's encoder, whose
    positions are never trained, would then keep random positions in place of its sinusoids.
    """

    # Checkpoints also contain decoders and heads, which an encoder does not use, so they are not reported. `registry`
    # raises an error if weights are missing.
    _keys_to_ignore_on_load_unexpected: set[str] | list[str] | None = [r".*"]

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False. transformers calls this method only when it initializes weights."""
        return False


def window_lengths(samples: int, window_samples: int) -> tuple[int, ...]:
    """Return the lengths of the consecutive windows of a clip; only the last may be shorter."""
    full, rest = divmod(samples, window_samples)
    return (window_samples,) * full + ((rest,) if rest else ())


def length_mask(lengths: Sequence[int], size: int, device: torch.device) -> Tensor | None:
    """Return a bool mask [B, size] that is true at the first `lengths[b]` places of row b; None if all lengths are
    `size`."""
    if min(lengths) == size:
        return None
    return torch.arange(size, device=device) < to_device(lengths, device)[:, None]


@torch.no_grad()
def normalized(waves: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return waveforms with zero mean and unit variance over each clip's real length.

    transformers' feature extractors do the same for `do_normalize`.

    Args:
        waves: [B, T] in fp32, zero after the end of each clip.
        lengths: The real length of each clip, in samples.

    Returns:
        [B, T], zero after the end of each clip.
    """
    num_samples = to_device(lengths, waves.device)[:, None]
    centered = waves - waves.sum(1, keepdim=True) / num_samples
    mask = length_mask(lengths, waves.shape[1], waves.device)
    if mask is not None:
        centered = centered.masked_fill(~mask, 0.0)
    variance = centered.square().sum(1, keepdim=True) / num_samples
    return centered / (variance + 1e-7).sqrt()


def call_layer(layer: nn.Module, *args: Any, recompute: bool) -> Any:
    """Call `layer(*args)`.

    If `recompute` is set and a gradient flows into `args`, the backward pass recomputes the layer.

    Without such a gradient (in the first convolution, or the first layer above a frozen part), the layer is called
    without checkpointing, since reentrant checkpointing would lose the gradients of its parameters. Non-reentrant
    checkpointing fails under ZeRO-3.
    """
    flows = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    return checkpoint(layer, *args, use_reentrant=True) if recompute and flows else layer(*args)


def join_frames(hidden: Tensor, valid: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Concatenate the valid frames of all windows, repeating each window's last frame up to the wanted count.

    Args:
        hidden: The padded frames [B, F, D].
        valid: The number of valid frames of each window.
        wanted: The number of frames to return for each window. If it is below `valid`, the last frames are dropped.

    Returns:
        [Σ wanted, D].
    """
    parts = []
    for row, have, want in zip(hidden.unbind(0), valid, wanted, strict=True):
        parts.append(row[: min(have, want)])
        if want > have:
            parts.append(row[have - 1 : have].expand(want - have, -1))
    return torch.cat(parts)


def layer_flops(frames: int, width: int, ffn_width: int) -> float:
    """Return the forward FLOPs of one Transformer layer, for projections, attention and the feed-forward network."""
    return 8.0 * frames * width**2 + 4.0 * frames**2 * width + 4.0 * frames * width * ffn_width
