"""Packed sequences, which are the inputs of the LLM. Each contains the rows of several samples, one after another.

Shapes: M micro-batches, t rows of a pack on one rank, H hidden width. With context parallelism, a rank holds only a
part of the rows of each pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.llm.context import ContextPart
from model.llm.packing import PackedSequences
from model.transfer import to_device
from trainer.parallel.balance import Floats
from trainer.parallel.plan import Ints

_Number = TypeVar("_Number", bound=np.number[Any])


@dataclass(frozen=True)
class Packs:
    """The packed sequences of one replica in a step, or the part of them that one rank holds."""

    lengths: tuple[tuple[int, ...], ...]
    """For each of the M packs, the lengths of its segments. Their sum is t times the context-parallel size."""
    token_ids: Tensor
    """[M·t] int64 token ids; set only on the first and the last stage."""
    labels: Tensor
    """[M·t] int64 labels, IGNORE where there is no label; set only on the first and the last stage."""
    samples: tuple[tuple[int, ...], ...]
    """For each of the M packs, the index in the global batch of the sample of every segment.

    Padding is the last segment of a pack and has no index.
    """
    audio: Tensor
    """[M·t/TP, H] audio embeddings in this rank's slice of every pack; set only on the first stage."""
    audio_mask: Tensor
    """[M·t/TP] bool, true where a row of the slice is audio."""
    num_samples: int
    """The number of samples in the global batch."""
    is_audio: Tensor | None = None
    """[M·t] bool, true where a row is audio; set only on the first and the last stage. None if no row is audio."""
    part: ContextPart = ContextPart()
    """The part of every pack that this rank holds."""
    noise: Ints | None = None
    """The number [num_samples] that identifies each sample in the step, from which the jitter of the LLM's routers is
    computed; None without jitter."""

    @property
    def pack_tokens(self) -> int:
        """The number of rows t of every pack on this rank."""
        return sum(self.lengths[0]) // self.part.size

    def sequences(self, microbatch: int) -> PackedSequences:
        """Return the segments of one pack, in the form that attention needs."""
        if self.part.size > 1:
            return PackedSequences.of_part(self.lengths[microbatch], self.part)
        noise = None
        if self.noise is not None:
            noise = to_device(self._by_segment(microbatch, self.noise), self.token_ids.device)
        num_samples = len(self.samples[microbatch])
        return PackedSequences(lengths=self.lengths[microbatch], num_samples=num_samples, noise=noise)

    def rows(self, microbatch: int) -> slice:
        """Return the range that one pack occupies in the rows of all packs."""
        return slice(microbatch * self.pack_tokens, (microbatch + 1) * self.pack_tokens)

    def row_weights(self, microbatch: int, sample_weights: Floats) -> Tensor:
        """Return the weight of every row of one pack, [t] in fp32. The rows of padding have the weight 0.

        Args:
            microbatch: The index of the pack.
            sample_weights: The weight of each sample of the global batch, [num_samples].
        """
        by_segment = self._by_segment(microbatch, sample_weights.astype(np.float32))
        rows = np.repeat(by_segment, self.lengths[microbatch])
        if self.part.size > 1:
            rows = rows[self.part.rows(len(rows))]
        return to_device(rows, self.labels.device)

    def sum_by_sample(self, token_losses: Sequence[Tensor], device: torch.device) -> Tensor:
        """Return the sum of the token losses of each sample, [num_samples] in fp32.

        The rows of a sample are always added in the same order.

        Args:
            token_losses: The losses [t] of the rows of every pack; empty for zeros.
            device: The device of the result.
        """
        sums = torch.zeros(self.num_samples, device=device)
        places = [place for one in self.samples for place in one]
        if not token_losses or not places:
            return sums
        token_losses = [self._whole(losses) for losses in token_losses]
        # Padding is dropped before the sum because it has no sample.
        parts = [t[: sum(n[: len(s)])] for t, n, s in zip(token_losses, self.lengths, self.samples, strict=True)]
        lengths = [n for one, s in zip(self.lengths, self.samples, strict=True) for n in one[: len(s)]]
        sizes, rows = to_device([lengths, places], device)
        # `unsafe` skips a check of the lengths that would make the host wait for the device.
        return sums.index_copy_(0, rows, torch.segment_reduce(torch.cat(parts), "sum", lengths=sizes, unsafe=True))

    def _by_segment(self, microbatch: int, values: NDArray[_Number]) -> NDArray[_Number]:
        """Return the values of the samples of a pack's segments, given those of all samples; 0 for padding."""
        samples = self.samples[microbatch]
        found = np.zeros(len(self.lengths[microbatch]), dtype=values.dtype)
        found[: len(samples)] = values[list(samples)]
        return found

    def _whole(self, values: Tensor) -> Tensor:
        """Extend `values` [t] of this rank's rows to all rows of a pack, with zeros for the rows of other ranks."""
        if self.part.size == 1:
            return values
        num_rows = len(values) * self.part.size
        rows = to_device(self.part.rows(num_rows), values.device)
        return values.new_zeros(num_rows).index_copy(0, rows, values)
