"""The mixture of the primary's features and those of the chosen experts into one aligned stream.

All encoders return 50 frames per second (`model/lengths.py`), so frames are aligned by their index.
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
    """A whole encoder, and the projection of its features to the width that all experts share."""

    def __init__(self, encoder: nn.Module, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Linear(dim, expert_dim)

    def forward(self, clips: Ragged) -> Ragged:
        """Return the projected features [ΣF, De] of clips [ΣT]."""
        features = self.encoder(clips)
        return Ragged(self.projection(features.values), features.lengths)


def frame_rows(lengths: Sequence[int], wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the rows of the frames of the `wanted` [B] clips, where the frames of all clips are stored end to end.

    Args:
        lengths: The number of frames of each of the B clips.
        wanted: True for the wanted clips.
    """
    return np.flatnonzero(np.repeat(wanted, lengths))


def per_frame(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return each clip's row of `values` [B, n] once for each of its frames, [ΣF, n].

    The gradient is a sum over the frames of each clip. With `repeat_interleave` its order would not be fixed on a GPU.
    """
    return torch.cat([row.expand(n, -1) for row, n in zip(values.split(1), lengths, strict=True)])


def mix(primary: Ragged | None, experts: Sequence[Ragged], routing: Routing | None, lengths: tuple[int, ...]) -> Ragged:
    """Join the streams along channels: the primary's, then Σ_k w[b,g,k]·E_k for each gate g.

    Args:
        primary: The primary's features [ΣF, Dp]; None in mode `all_routed`.
        experts: For each expert, the features [ΣF, De] of the clips for which `routing.active` is true, in order.
        routing: The decisions for all B clips; None if there are no experts.
        lengths: The number of frames of each of the B clips.

    Returns:
        The joined streams [ΣF, Dp + G·De].
    """
    streams = [] if primary is None else [primary.values]
    if routing is not None:
        active, like = routing.active.numpy(), experts[0].values
        for k, features in enumerate(experts):
            expected = tuple(n for n, wanted in zip(lengths, active[:, k], strict=True) if wanted)
            assert features.lengths == expected, "an expert returned features of other clips than those it was sent"
        # One transfer serves all experts. `index_add_` has no race because no row occurs twice within an expert.
        found = [frame_rows(lengths, wanted) for wanted in active.T]
        rows_of = to_device(np.concatenate(found), like.device).split([len(rows) for rows in found])
        num_gates, num_experts = routing.weights.shape[1:]
        weights = per_frame(routing.weights.flatten(1), lengths)
        weights_of = [weights.index_select(0, rows).unflatten(1, (num_gates, num_experts)) for rows in rows_of]
        for gate in range(num_gates):
            stream = like.new_zeros(
                sum(lengths), like.shape[1], dtype=weights.dtype
            )  # fp32: the sum of several experts
            for k, (rows, features) in enumerate(zip(rows_of, experts, strict=True)):
                stream.index_add_(0, rows, weights_of[k][:, gate, k, None] * features.values)
            streams.append(stream.to(like.dtype))
    return Ragged(torch.cat(streams, dim=-1), lengths)
