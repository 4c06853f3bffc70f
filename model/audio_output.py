"""The output of the audio tower, which the LLM and the losses read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from model.batch import Ragged
from model.router import Routing


@dataclass(frozen=True)
class AudioOutput:
    """The output of `AudioTower` for B clips, each of which has S audio tokens."""

    embeddings: Ragged
    """The audio embeddings [ΣS, H] that the LLM reads, in the order of the clips."""
    routing: Routing | None
    """The decisions of the router; None if the model has no experts."""
    features: Ragged
    """The output [ΣS, D] of the adapter, which the projector turns into embeddings."""
    heads: Mapping[str, Ragged] = field(default_factory=dict)
    """The output [ΣS, ...] of each loss head, by the name of the loss."""

    def without_clips(self) -> AudioOutput:
        """Return an output for zero clips that is still connected to the autograd graph."""
        return AudioOutput(
            _without_rows(self.embeddings),
            None if self.routing is None else self.routing.head(0),
            _without_rows(self.features),
            {name: _without_rows(output) for name, output in self.heads.items()},
        )


def _without_rows(sequences: Ragged) -> Ragged:
    return Ragged(sequences.values[:0], ())
