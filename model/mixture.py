"""Primary and chosen experts → one aligned feature stream.

All encoders report 50 frames a second (`model/lengths.py`), so alignment is by frame index.
Shapes: B clips, F frames, G gates, K experts, Dp primary width, De expert width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.batch import Ragged
from model.router import Routing


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


def frame_rows(lengths: Sequence[int], clips: Sequence[int], device: torch.device) -> Tensor:
    """Rows that the frames of `clips` take where all clips' frames (`lengths`) lie end to end: [ΣF of clips] int64."""
    ends = torch.tensor(lengths, device=device).cumsum(0).tolist()
    rows = [torch.arange(ends[i] - lengths[i], ends[i], device=device) for i in clips]
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64, device=device)


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
        weights, active = routing.weights, routing.active.cpu()
        like = experts[0].values
        for gate in range(weights.shape[1]):
            stream = like.new_zeros(sum(lengths), like.shape[1])
            for k, features in enumerate(experts):
                clips = active[:, k].nonzero().flatten().tolist()
                assert features.lengths == tuple(lengths[i] for i in clips), "an expert answered for other clips"
                frames = torch.tensor(features.lengths, device=like.device, dtype=torch.int64)
                weight = weights[clips, gate, k].to(like.dtype).repeat_interleave(frames)
                stream = stream.index_add(0, frame_rows(lengths, clips, like.device), weight[:, None] * features.values)
            streams.append(stream)
    return Ragged(torch.cat(streams, dim=-1), lengths)
