"""Division of the frames of each clip into groups of equal size, the last of which is padded.

Shapes: B clips, F frames, D width, G groups of k frames each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.batch import Ragged
from model.lengths import TokenRate


def group_size(rate: TokenRate) -> int:
    """Return the number k of frames of a group."""
    return math.prod(rate.strides)


def count_groups(frames: Sequence[int], size: int) -> tuple[int, ...]:
    """Return the number of groups of each clip."""
    return tuple(-(-n // size) for n in frames)


def grouped(features: Ragged, size: int) -> Tensor:
    """Return the groups of all clips, [ΣG, k, D], with zeros after the last frame of a clip.

    Args:
        features: The features [ΣF, D].
        size: The number k of frames of a group.
    """
    parts = []
    for clip in features.split():
        missing = -clip.shape[0] % size
        whole = torch.cat([clip, clip.new_zeros(missing, clip.shape[1])]) if missing else clip
        parts.append(whole.view(-1, size, clip.shape[1]))
    return torch.cat(parts)


def real_frames(frames: Sequence[int], size: int, device: torch.device) -> Tensor:
    """Return which frames of the result of `grouped` are real and not padding, [ΣG, k] bool."""
    parts = [torch.arange(groups * size) < n for n, groups in zip(frames, count_groups(frames, size), strict=True)]
    return torch.cat(parts).view(-1, size).to(device, non_blocking=True)
