"""What every audio encoder promises, and what families share: windows, masks, normalisation, joining, recomputation.

Shapes: B windows of one call, T audio samples (16 kHz), F frames (20 ms), D width.

DeepSpeed ZeRO-3 gathers a module's parameters around that module's own `forward`, on all ranks together. So no code
here reads a child's parameter from outside the child, and one call of an encoder calls each of its modules exactly
once, whatever the number and length of the clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.batch import Ragged
from model.lengths import Windowing, num_frames
from model.transfer import to_device


class AudioEncoder(nn.Module):
    """Waveforms in, one feature vector per 20 ms out; a clip's features do not depend on its batch companions."""

    dim: int
    """Width of a feature vector."""
    windowing: Windowing
    """Longer clips are encoded in consecutive windows of a multiple of 320 samples and joined."""

    def __init__(self, dim: int, windowing: Windowing) -> None:
        super().__init__()
        assert windowing.window_samples > 0 and windowing.window_samples % 320 == 0, windowing
        self.dim = dim
        self.windowing = windowing
        self.recompute = False

    def forward(self, audio: Ragged) -> Ragged:
        """Encode clips `[ΣT]` to `[ΣF, D]`, F = `num_frames(T)` for each clip, in the parameters' dtype.

        At least one clip, none empty. All windows run as one padded batch: callers pass clips of similar length.
        """
        assert audio.lengths and min(audio.lengths) > 0, audio.lengths
        # Windows of a clip lie end to end in the waveform as in the features: cutting and joining move nothing.
        size = self.windowing.window_samples
        windows = Ragged(audio.values, tuple(t for n in audio.lengths for t in window_lengths(n, size)))
        return Ragged(self.encode(windows), tuple(num_frames(t) for t in audio.lengths))

    def encode(self, windows: Ragged) -> Tensor:
        """Encode windows `[ΣT]`, none longer than `windowing.window_samples`, to `[ΣF, D]`."""
        raise NotImplementedError

    def set_recompute(self, enabled: bool) -> None:
        """Trade compute for memory: keep only each layer's input and run the layer again in the backward pass."""
        self.recompute = enabled

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype (visible under ZeRO-3 too)."""
        return next(self.parameters()).dtype


class DrawnAsTransformers:
    """Mixed into a transformers model of ours: its random weights are drawn as for transformers' own classes.

    Otherwise transformers (5.23) passes over every module without direct parameters, and Whisper's encoder, whose
    positions never learn, keeps random ones in place of its sinusoids.
    """

    # Checkpoints also contain decoders and heads, which an encoder does not use: they are not reported. What is
    # missing is refused in `registry`.
    _keys_to_ignore_on_load_unexpected: set[str] | list[str] | None = [r".*"]

    @classmethod
    def is_custom_code(cls) -> bool:
        """See `PreTrainedModel.is_custom_code`, which only initialisation asks."""
        return False


def window_lengths(samples: int, window_samples: int) -> tuple[int, ...]:
    """Lengths of the consecutive windows of a clip; only the last may be shorter."""
    full, rest = divmod(samples, window_samples)
    return (window_samples,) * full + ((rest,) if rest else ())


def length_mask(lengths: Sequence[int], size: int, device: torch.device) -> Tensor | None:
    """Bool `[B, size]`, true inside each length; None if every length fills `size`, so that nothing needs a mask."""
    if min(lengths) == size:
        return None
    return torch.arange(size, device=device) < to_device(lengths, device)[:, None]


@torch.no_grad()
def normalized(waves: Tensor, lengths: Sequence[int]) -> Tensor:
    """Zero mean and unit variance over each clip's real length, as transformers does for `do_normalize`.

    `waves[B, T]` fp32 is zero past each length, and so is the result.
    """
    num_samples = to_device(lengths, waves.device)[:, None]
    centered = waves - waves.sum(1, keepdim=True) / num_samples
    mask = length_mask(lengths, waves.shape[1], waves.device)
    if mask is not None:
        centered = centered.masked_fill(~mask, 0.0)
    variance = centered.square().sum(1, keepdim=True) / num_samples
    return centered / (variance + 1e-7).sqrt()


def call_layer(layer: nn.Module, *args: Any, recompute: bool) -> Any:
    """Call `layer(*args)`, recomputing it in the backward pass if asked and if a gradient flows into `args`.

    Without such a gradient (the first convolution, the first layer above a frozen part) the layer just runs: reentrant
    checkpointing would lose its parameters' gradients. The other kind breaks under ZeRO-3.
    """
    flows = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    return checkpoint(layer, *args, use_reentrant=True) if recompute and flows else layer(*args)


def join_frames(hidden: Tensor, valid: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Lay the valid frames of `hidden[B, F, D]` end to end, repeating each last one up to the wanted count.

    Returns `[Σ wanted, D]`. A `wanted` below `valid` drops frames past the clip's end.
    """
    parts = []
    for row, have, want in zip(hidden.unbind(0), valid, wanted, strict=True):
        parts.append(row[: min(have, want)])
        if want > have:
            parts.append(row[have - 1 : have].expand(want - have, -1))
    return torch.cat(parts)
