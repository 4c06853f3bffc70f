"""Learned queries that attend to windows of frames, as in a window-level Q-Former.

SALMONN (arXiv 2310.13289) has one query per window of 0.33 s (17 frames), which corresponds to `strides: [17]` with
`num_queries: 1`. Uni-MoE (arXiv 2405.11273) has 50 queries per 30 s, which correspond to `strides: [1500]` with
`num_queries: 50`. With `strides: [30]` and one query, 30 s also become 50 audio tokens, but a short clip becomes only a
few. Unlike in BLIP-2's Q-Former, layers normalize their input instead of their output, and the frames of a window have
position vectors.

Shapes: F frames, D width of the features, C hidden width, G windows of k frames, N queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.batch import Ragged
from model.config import AdapterConfig
from model.connectors.base import Adapter, check_default_shape
from model.connectors.groups import count_groups, group_size, grouped, real_frames
from model.errors import UserError

_EXPANSION = 4
"""The width of a perceptron's hidden layer, as a multiple of C."""


class LearnedVectors(nn.Module):
    """A module that adds a table of learned vectors [N, C] to its input [G, N, C].

    The table is in a separate module, because ZeRO-3 gathers parameters around the calls of modules.
    """

    def __init__(self, count: int, dim: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(std * torch.randn(count, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of `x` [G, N, C] and the learned vectors."""
        return x + self.weight


class Attention(nn.Module):
    """Multi-head attention of queries to another sequence, or to themselves."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """Return the result [G, N, C] for queries [G, N, C], keys [G, k, C] and a mask [G, k] of the real keys."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, keys))
        )
        visible = None if mask is None else mask[:, None, None]
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class QueryLayer(nn.Module):
    """Self-attention of the queries of a window, attention to its frames, and a perceptron."""

    def __init__(self, dim: int, num_heads: int, num_queries: int) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(dim) if num_queries > 1 else None
        self.self_attention = Attention(dim, num_heads) if num_queries > 1 else None
        self.norm, self.attention = nn.LayerNorm(dim), Attention(dim, num_heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, _EXPANSION * dim), nn.Linear(_EXPANSION * dim, dim)

    def forward(self, x: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        """Return the queries [G, N, C] after the layer, given frames [G, k, C] and a mask [G, k] of the real frames."""
        if self.self_attention is not None and self.self_norm is not None:
            own = self.self_norm(x)
            x = x + self.self_attention(own, own, None)
        x = x + self.attention(self.norm(x), frames, mask)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))  # type: ignore[no-any-return]


class Queries(Adapter):
    """N learned queries for every window of k frames, where k is the product of the strides."""

    def __init__(self, config: AdapterConfig, input_dim: int) -> None:
        super().__init__(config, input_dim)
        check_default_shape(config)
        dim = config.hidden_size
        if dim % config.num_heads:
            raise UserError(f"model.adapter.num_heads = {config.num_heads}: must divide hidden_size = {dim}")
        self.size, self.num_queries, self.dim = group_size(config.rate), config.num_queries, dim
        self.linear, self.norm = nn.Linear(input_dim, dim), nn.LayerNorm(dim)
        self.positions = LearnedVectors(self.size, dim, std=0.1)
        self.queries = LearnedVectors(config.num_queries, dim, std=1.0)
        self.layers = nn.ModuleList(
            QueryLayer(dim, config.num_heads, config.num_queries) for _ in range(config.num_layers)
        )
        self.last_norm = nn.LayerNorm(dim)

    def forward(self, features: Ragged) -> Ragged:
        """Implement `Adapter.forward`."""
        frames = self.positions(self.norm(self.linear(grouped(features, self.rate))))
        mask = real_frames(features.lengths, self.rate, frames.device)
        x = self.queries(frames.new_zeros(len(frames), self.num_queries, self.dim))
        for layer in self.layers:
            x = layer(x, frames, mask)
        counts = count_groups(features.lengths, self.rate)
        return Ragged(self.last_norm(x).flatten(0, 1), tuple(n * self.num_queries for n in counts))

    def kept_elements(self, frames: Sequence[int], device: str) -> int:
        """Implement `Adapter.kept_elements`.

        Every layer saves the keys and values of its frames and, for every query, about 16 vectors and the perceptron's
        two hidden vectors.
        """
        windows = sum(count_groups(frames, self.rate))
        per_layer = windows * (2 * self.size + self.num_queries * (16 + 2 * _EXPANSION)) * self.dim
        embedded = windows * self.size * (self.linear.in_features + 3 * self.dim)
        return embedded + len(self.layers) * per_layer
