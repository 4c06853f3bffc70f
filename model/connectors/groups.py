"""Division of the frames of each clip into groups of equal size, the last of which may be padded.

With blocks (`TokenRate.block_frames`), the last group of every block may be padded.

Shapes: B clips, F frames, D width, G groups of k frames each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.batch import Ragged
from model.lengths import TokenRate
from model.transfer import to_device


def group_size(rate: TokenRate) -> int:
    """Return the number k of frames of a group."""
    return math.prod(rate.strides)


def count_groups(frames: Sequence[int], rate: TokenRate) -> tuple[int, ...]:
    """Return the number of groups of each clip."""
    return tuple(rate.tokens_of_frames(n) // rate.tokens_per_group for n in frames)


def _places(num_frames: int, rate: TokenRate) -> Tensor:
    """Return the place [F] of each frame of a clip among the G · k places of its groups. `rate` must have blocks."""
    size, block = group_size(rate), rate.block_frames
    frames = torch.arange(num_frames)
    return frames // block * (-(-block // size) * size) + frames % block


def grouped(features: Ragged, rate: TokenRate) -> Tensor:
    """Return the groups of all clips, [ΣG, k, D], with zeros after the last frame of a clip or block.

    Args:
        features: The features [ΣF, D].
        rate: The rule that determines the number k of frames of a group, and the number of groups.
    """
    parts, size = [], group_size(rate)
    for clip, groups in zip(features.split(), count_groups(features.lengths, rate), strict=True):
        missing = groups * size - clip.shape[0]
        if rate.block_frames:
            places = to_device(_places(len(clip), rate), clip.device)
            whole = clip.new_zeros(groups * size, clip.shape[1]).index_copy(0, places, clip)
        else:
            whole = torch.cat([clip, clip.new_zeros(missing, clip.shape[1])]) if missing > 0 else clip[: groups * size]
        parts.append(whole.view(-1, size, clip.shape[1]))
    return torch.cat(parts)


def real_frames(frames: Sequence[int], rate: TokenRate, device: torch.device) -> Tensor:
    """Return a mask [ΣG, k] bool of the frames in the result of `grouped` that are not padding."""
    size = group_size(rate)
    places = [torch.arange(groups * size) for groups in count_groups(frames, rate)]
    if rate.block_frames:
        parts = [torch.isin(own, _places(n, rate)) for n, own in zip(frames, places, strict=True)]
    else:
        parts = [own < n for n, own in zip(frames, places, strict=True)]
    return to_device(torch.cat(parts).view(-1, size), device)
