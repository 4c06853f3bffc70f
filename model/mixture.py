"""The combination of the primary encoder's features with those of the chosen encoder experts.

All encoders return 50 frames per second (`model/lengths.py`), so frames with the same index cover the same 20 ms.
Shapes: B clips, F frames, G gates, K experts, Dp primary width, De expert width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.batch import Ragged
from model.router import Routing
from model.transfer import to_device


class Expert(nn.Module):
    """An encoder, followed by a projection of its features to the expert width, which is the same for all experts."""

    def __init__(self, encoder: nn.Module, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Linear(dim, expert_dim)

    def forward(self, clips: Ragged) -> Ragged:
        """Return the projected features [ΣF, De] of `clips` [ΣT]."""
        features = self.encoder(clips)
        return Ragged(self.projection(features.values), features.lengths)


def frame_rows(lengths: Sequence[int], wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the indices of the wanted clips' frames within the concatenated frames of all clips.

    Args:
        lengths: The number of frames of each of the B clips.
        wanted: [B] bool, true for the wanted clips.
    """
    return np.flatnonzero(np.repeat(wanted, lengths))


def per_frame(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Repeat each clip's row of `values` [B, n] for each of the clip's frames, giving [ΣF, n].

    The gradient is the sum over the frames of each clip. On a GPU, the backward pass of `repeat_interleave` would add
    the frames in an undetermined order.
    """
    return torch.cat([row.expand(n, -1) for row, n in zip(values.split(1), lengths, strict=True)])


def mix(primary: Ragged | None, experts: Sequence[Ragged], routing: Routing | None, lengths: tuple[int, ...]) -> Ragged:
    """Concatenate the primary encoder's features and, for each gate g, the stream Σ_k w[b,g,k]·E_k along the channels.

    Args:
        primary: The primary encoder's features [ΣF, Dp]; None in mode `all_routed`.
        experts: For each expert, the features [ΣF, De] of the clips for which `routing.active` is true, in order.
        routing: The decisions for all B clips; None if there are no experts.
        lengths: The number of frames of each of the B clips.

    Returns:
        The concatenated streams [ΣF, Dp + G·De].
    """
    streams = [] if primary is None else [primary.values]
    if routing is not None:
        active, like = routing.active.numpy(), experts[0].values
        for k, features in enumerate(experts):
            expected = tuple(n for n, wanted in zip(lengths, active[:, k], strict=True) if wanted)
            assert features.lengths == expected, "the lengths of an expert's features differ from those of its clips"
        # One transfer serves all experts. `index_add_` is deterministic because no row occurs twice within an expert.
        found = [frame_rows(lengths, wanted) for wanted in active.T]
        rows_of = to_device(np.concatenate(found), like.device).split([len(rows) for rows in found])
        num_gates, num_experts = routing.weights.shape[1:]
        weights = per_frame(routing.weights.flatten(1), lengths)
        weights_of = [weights.index_select(0, rows).unflatten(1, (num_gates, num_experts)) for rows in rows_of]
        for gate in range(num_gates):
            # `weights` are in fp32, so the experts' features are summed in fp32.
            stream = like.new_zeros(sum(lengths), like.shape[1], dtype=weights.dtype)
            for k, (rows, features) in enumerate(zip(rows_of, experts, strict=True)):
                stream.index_add_(0, rows, weights_of[k][:, gate, k, None] * features.values)
            streams.append(stream.to(like.dtype))
    return Ragged(torch.cat(streams, dim=-1), lengths)
