"""Packed sequences: several token sequences laid end to end, none of which sees another; and the cache for decoding.

Shapes: t rows of a pack, S segments, L tokens of the longest segment of a bucket, G key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

from model.transfer import to_device

PADDING = -1
"""Sequence index of a segment that only fills up rows (`KVCache.extend`)."""


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length, to be attended to as one right-padded batch."""

    num_segments: int
    max_length: int
    rows: Tensor
    """`[n]` rows of the pack that belong to these segments."""
    places: Tensor
    """`[n]` where each row lies in the padded batch `[num_segments * max_length]`."""

    def pad(self, x: Tensor) -> Tensor:
        """Rows of the pack `[t, heads, D]` → `[num_segments, heads, max_length, D]`, zeros on the right."""
        batch = x.new_zeros(self.num_segments * self.max_length, *x.shape[1:])
        batch = batch.index_copy(0, self.places, x.index_select(0, self.rows))
        return batch.unflatten(0, (self.num_segments, self.max_length)).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse: → `[n, heads, D]`, in the order of `rows`."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.places)


@dataclass(frozen=True)
class CachedSegments:
    """The B segments of a pack that continue cached sequences."""

    bucket: Bucket
    sequences: Tensor
    """`[B]` the cache's sequence of each."""
    starts: Tensor
    """`[B]` position of each one's first token."""
    num_keys: int
    """Tokens of the longest sequence, these included."""
    row_sequences: Tensor
    """`[n]` for every row of `bucket.rows` its sequence."""
    row_positions: Tensor
    """`[n]` for every row of `bucket.rows` its position."""


@dataclass
class PackedSequences(PackedSeqParams):
    """What attention must know of one pack `[t]`; passed to Megatron as `packed_seq_params`.

    `lengths` are the segments' lengths, in order; they sum to t. Rows that only fill the pack up (t must be a multiple
    of the tensor-parallel size) are a segment like any other: ignore their labels. The remaining fields serve decoding
    and are set by `KVCache.extend`.
    """

    lengths: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    """Position of every segment's first token; empty: all 0."""
    sequences: tuple[int, ...] = ()
    """For every segment its sequence in `cache`, or PADDING."""
    cache: KVCache | None = None

    def __post_init__(self) -> None:
        assert self.lengths and all(n > 0 for n in self.lengths), self.lengths
        self.qkv_format = "thd"
        self.starts = self.starts or (0,) * len(self.lengths)
        assert len(self.starts) == len(self.lengths)
        assert (self.cache is None) == (not self.sequences)
        self._rotation: tuple[Tensor, Tensor] | None = None
        self._layout: Tensor | None = None
        self._buckets: tuple[Bucket, ...] | None = None
        self._segment_ends: Tensor | None = None
        self._cached_segments: CachedSegments | None = None

    @property
    def num_tokens(self) -> int:
        """Rows of the pack, t."""
        return sum(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First row of every segment."""
        return tuple(sum(self.lengths[:i]) for i in range(len(self.lengths)))

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """`[t]` position of every row within its sequence."""
        return _runs(self.starts, self.lengths)

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Segments of every bucket: those whose length has the same next power of two, so that a long one does not
        inflate short ones."""
        found: dict[int, list[int]] = {}
        for i, length in enumerate(self.lengths):
            found.setdefault((length - 1).bit_length(), []).append(i)
        return tuple(map(tuple, found.values()))

    def layout(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Positions, the buckets' rows, their places, and of every row its place among the buckets' rows; `[t]` each.

        Worked out on the host and moved at once: each transfer costs more than it carries.
        """
        if self._layout is None:
            parts = [self._rows_and_places(members) for members in self.groups]
            rows, places = (np.concatenate(column) for column in zip(*parts, strict=True))
            inverse = np.empty_like(rows)
            inverse[rows] = np.arange(len(rows))
            self._layout = to_device(np.stack([self.positions, rows, places, inverse]), device)
        positions, rows_there, places_there, inverse_there = self._layout.unbind()
        return positions, rows_there, places_there, inverse_there

    def rotation(self, inv_freq: Tensor, scaling: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[t, 1, D]` of the rotary embedding, in the dtype and on the device of `like`.

        `inv_freq` `[D/2]` fp32, on the same device. Computed once per pack: all layers of a model share them.
        """
        if self._rotation is None or self._rotation[0].dtype != like.dtype:
            angles = torch.outer(self.layout(like.device)[0].float(), inv_freq).repeat(1, 2)[:, None, :]
            self._rotation = ((angles.cos() * scaling).to(like), (angles.sin() * scaling).to(like))
        return self._rotation

    def buckets(self, device: torch.device) -> tuple[Bucket, ...]:
        """Segments of similar length; see `groups`."""
        if self._buckets is None:
            _, rows, places, _ = self.layout(device)
            lengths = [[self.lengths[i] for i in members] for members in self.groups]
            sizes = [sum(members) for members in lengths]
            self._buckets = tuple(
                Bucket(len(members), max(members), own_rows, own_places)
                for members, own_rows, own_places in zip(lengths, rows.split(sizes), places.split(sizes), strict=True)
            )
        return self._buckets

    def segment_ends(self, device: torch.device) -> Tensor:
        """`[S + 1]` int32: 0, then the row after each segment."""
        if self._segment_ends is None:
            self._segment_ends = to_device(np.cumsum((0, *self.lengths), dtype=np.int32), device)
        return self._segment_ends

    def unbucket(self, device: torch.device) -> Tensor:
        """`[t]`: for every row of the pack its place among the buckets' rows laid end to end."""
        return self.layout(device)[3]

    def cached_segments(self, device: torch.device) -> CachedSegments:
        """The segments that are not padding."""
        if self._cached_segments is None:
            real = [i for i, sequence in enumerate(self.sequences) if sequence != PADDING]
            rows, places = self._rows_and_places(real)
            lengths = [self.lengths[i] for i in real]
            row_sequences = np.repeat([self.sequences[i] for i in real], lengths)
            by_row = to_device(np.stack([rows, places, row_sequences, self.positions[rows]]), device)
            by_segment = to_device([[self.sequences[i] for i in real], [self.starts[i] for i in real]], device)
            self._cached_segments = CachedSegments(
                bucket=Bucket(len(real), max(lengths), by_row[0], by_row[1]),
                sequences=by_segment[0],
                starts=by_segment[1],
                num_keys=max(self.starts[i] + self.lengths[i] for i in real),
                row_sequences=by_row[2],
                row_positions=by_row[3],
            )
        return self._cached_segments

    def _rows_and_places(self, segments: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `Bucket`."""
        lengths = [self.lengths[i] for i in segments]
        return (
            _runs([self.offsets[i] for i in segments], lengths),
            _runs(range(0, len(lengths) * max(lengths), max(lengths)), lengths),
        )


def _runs(starts: Sequence[int], lengths: Sequence[int]) -> NDArray[np.int64]:
    """start, start + 1, … of every run, end to end."""
    return np.concatenate([np.arange(s, s + n, dtype=np.int64) for s, n in zip(starts, lengths, strict=True)])


class KVCache:
    """Keys and values of `num_sequences` sequences, for every layer that stores into it.

    Each pipeline stage has its own. `extend` reserves the places of one forward pass; the layers fill them.
    """

    def __init__(self, num_sequences: int, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = [0] * num_sequences
        """Tokens that each sequence holds."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(
        self, lengths: Sequence[int], sequences: Sequence[int] | None = None, num_padding: int = 0
    ) -> PackedSequences:
        """The pack that appends `lengths[i]` tokens to `sequences[i]` (default: to all, in order).

        `num_padding` rows after them fill the pack up; what they hold is ignored and is not stored.
        """
        which = tuple(range(len(self.num_tokens))) if sequences is None else tuple(sequences)
        assert len(which) == len(lengths) and len(set(which)) == len(which), (which, lengths)
        starts = tuple(self.num_tokens[s] for s in which)
        for sequence, length in zip(which, lengths, strict=True):
            self.num_tokens[sequence] += length
            assert self.num_tokens[sequence] <= self.max_tokens, (sequence, self.num_tokens[sequence], self.max_tokens)
        padding = (num_padding,) if num_padding else ()
        return PackedSequences(
            lengths=(*lengths, *padding),
            starts=(*starts, *(0 for _ in padding)),
            sequences=(*which, *(PADDING for _ in padding)),
            cache=self,
        )

    def store(self, layer: int, key: Tensor, value: Tensor, packed: PackedSequences) -> tuple[Tensor, Tensor]:
        """Write `key` and `value` `[t, G, D]` of a pack; returns the layer's cache `[sequences, tokens, G, D]`."""
        assert not torch.is_grad_enabled(), "a cache is for inference: use torch.no_grad()"
        if layer not in self._layers:
            shape = (len(self.num_tokens), self.max_tokens, *key.shape[1:])
            self._layers[layer] = (key.new_zeros(shape), key.new_zeros(shape))
        keys, values = self._layers[layer]
        segments = packed.cached_segments(key.device)
        keys[segments.row_sequences, segments.row_positions] = key[segments.bucket.rows]
        values[segments.row_sequences, segments.row_positions] = value[segments.bucket.rows]
        return keys, values
