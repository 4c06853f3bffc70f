"""Strided convolutions whose outputs are concatenated in groups, so that CTC has more outputs than the LLM has tokens.

CTC learns faster if speech has about twice as many outputs as symbols (see `docs/connectors.md`). At this rate, the LLM
would read many audio tokens that contain nothing but a blank.

Shapes: B clips, F frames, S audio tokens, D width, k outputs of the convolutions per audio token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from model.batch import Ragged
from model.config import AdapterConfig
from model.connectors.base import Adapter
from model.connectors.convolutions import Convolutions
from model.connectors.groups import count_groups, grouped
from model.lengths import TokenRate


class StackedConvolutions(Adapter):
    """`Convolutions` with all strides but the last, which is the number k of their outputs per audio token.

    The output [ΣS, k · D] consists of k equal parts. CTC applies the same head to each part.
    """

    def __init__(self, config: AdapterConfig, input_dim: int) -> None:
        super().__init__(config, input_dim)
        self.convolutions = Convolutions(replace(config, kind="convolutions", strides=config.strides[:-1]), input_dim)
        self.groups = TokenRate(config.strides[-1:])
        self.dim = self.num_parts(config) * self.convolutions.dim

    @classmethod
    def num_parts(cls, config: AdapterConfig) -> int:
        """Implement `Adapter.num_parts`."""
        return config.strides[-1]

    def forward(self, features: Ragged) -> Ragged:
        """Implement `Adapter.forward`."""
        outputs = self.convolutions(features)
        return Ragged(grouped(outputs, self.groups).flatten(1), count_groups(outputs.lengths, self.groups))

    def kept_elements(self, frames: Sequence[int], device: str) -> int:
        """Implement `Adapter.kept_elements`: what the convolutions save; concatenation saves nothing."""
        return self.convolutions.kept_elements(frames, device)
