"""Primary and chosen experts → one aligned feature stream.

All encoders report 50 frames a second (`model/lengths.py`), so alignment is by frame index.
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
    """A whole encoder and the projection of its features to the width all experts share."""

    def __init__(self, encoder: nn.Module, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Linear(dim, expert_dim)

    def forward(self, clips: Ragged) -> Ragged:
        """[ΣT] → [ΣF, De]"""
        features = self.encoder(clips)
        return Ragged(self.projection(features.values), features.lengths)


def frame_rows(lengths: Sequence[int], wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rows that the frames of the `wanted` [B] clips take where all clips' frames (`lengths`) lie end to end: [ΣF]."""
    return np.flatnonzero(np.repeat(wanted, lengths))


def per_frame(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """[ΣF, n]: each clip's row of `values` [B, n], once for each of its frames.

    Its gradient is a sum over each clip's frames. That of `repeat_interleave` adds in any order on a GPU.
    """
    return torch.cat([row.expand(n, -1) for row, n in zip(values.split(1), lengths, strict=True)])


def mix(primary: Ragged | None, experts: Sequence[Ragged], routing: Routing | None, lengths: tuple[int, ...]) -> Ragged:
    """Join the streams along channels: primary, then Σ_k w[b,g,k]·E_k for each gate g.

    Args:
        primary: [ΣF, Dp], or None in mode `all_routed`.
        experts: per expert the features [ΣF, De] of the clips that `routing.active` names, in clip order.
        routing: of all B clips; None: there are no experts.
        lengths: frames of each of the B clips.

    Returns:
        [ΣF, Dp + G·De]
    """
    streams = [] if primary is None else [primary.values]
    if routing is not None:
        runs, like = routing.active.numpy(), experts[0].values
        for k, features in enumerate(experts):
            expected = tuple(n for n, wanted in zip(lengths, runs[:, k], strict=True) if wanted)
            assert features.lengths == expected, "an expert answered for other clips"
        # One transfer for all experts. No row comes twice in one expert's, so `index_add_` has nothing to race for.
        found = [frame_rows(lengths, wanted) for wanted in runs.T]
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
