"""Packed sequences and the KV cache.

A packed sequence, or *pack*, is a concatenation of several token sequences (*segments*) that do not attend to each
other. A pack has one row per token, including padding.

Shapes: t rows of a pack, S segments, L tokens of the longest segment of a bucket, G key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

from model.llm.context import ContextPart, Continued, crosses_chunks, pieces
from model.llm.jitter import TokenNoise
from model.llm.rotary import Rotary
from model.transfer import to_device

PADDING = -1
"""The value of `PackedSequences.sequences` for a segment of padding."""


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length that form one right-padded batch for attention."""

    num_segments: int
    """The number of segments."""
    max_length: int
    """The length of the longest segment in tokens."""
    rows: Tensor
    """[n] int64, the rows of the pack that belong to these segments."""
    places: Tensor
    """[n] int64, the index of each row in the flattened padded batch [num_segments * max_length]."""

    def pad(self, x: Tensor) -> Tensor:
        """Return this bucket's rows of `x` [t, heads, D] as a padded batch [num_segments, heads, max_length, D]."""
        batch = x.new_zeros(self.num_segments * self.max_length, *x.shape[1:])
        batch = batch.index_copy(0, self.places, x.index_select(0, self.rows))
        return batch.unflatten(0, (self.num_segments, self.max_length)).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """Return the rows [n, heads, D] of a padded batch, in the order of `rows`; the inverse of `pad`."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.places)


@dataclass(frozen=True)
class CachedSegments:
    """The B segments of a pack that continue cached sequences."""

    bucket: Bucket
    """The segments as one padded batch."""
    sequences: Tensor
    """[B], the index in the cache of the sequence that each segment continues."""
    starts: Tensor
    """[B], the position of each segment's first token."""
    lengths: Tensor
    """[B], the number of tokens of each segment."""
    num_keys: int
    """The number of tokens of the longest sequence, including the tokens of the pack."""
    row_sequences: Tensor
    """[n], the index in the cache of the sequence to which each row of `bucket.rows` belongs."""
    row_positions: Tensor
    """[n], the position of each row of `bucket.rows` in its sequence."""


@dataclass
class PackedSequences(PackedSeqParams):
    """The segments of a pack of t rows, passed to Megatron as `packed_seq_params`.

    t must be a multiple of the tensor-parallel size. Rows of padding form a segment whose labels are ignored.
    `KVCache.extend` sets the fields for decoding.
    """

    lengths: tuple[int, ...] = ()
    """The lengths of the segments in order. Their sum is t."""
    starts: tuple[int, ...] = ()
    """The position of each segment's first token; empty if all are 0."""
    sequences: tuple[int, ...] = ()
    """The index in `cache` of each segment's sequence, or PADDING; empty without a cache."""
    cache: KVCache | None = None
    """The cache that the segments continue; None in training."""
    num_samples: int = 0
    """The number of segments that are samples, used only with `observe`. The segments after them are padding."""
    continued: tuple[Continued, ...] = ()
    """The segments that begin in an earlier chunk of the pack, in order (`of_part`)."""
    gathers_keys: bool = False
    """True if `continued` is not empty on at least one of the context-parallel ranks (`of_part`)."""
    observe: Callable[..., Tensor] | None = None
    """A function that the router of every layer with experts calls in training. Its arguments are the number of the
    layer, the router's choices, this pack and the tensor-parallel group. It returns a scalar loss, whose gradient is
    added to the gradient of the router's output."""
    noise: Tensor | None = None
    """The number [S] int64 that identifies each segment's sample in a training step, from which the jitter of routers
    is computed; None without jitter. The value of padding is ignored."""
    output_rows: Tensor | None = None
    """The rows [n] whose logits are computed, in order; None for all rows. It must be None with tensor parallelism,
    which distributes the rows over ranks."""

    def __post_init__(self) -> None:
        assert self.lengths and all(n > 0 for n in self.lengths), self.lengths
        self.qkv_format = "thd"
        self.starts = self.starts or (0,) * len(self.lengths)
        assert len(self.starts) == len(self.lengths)
        assert (self.cache is None) == (not self.sequences)
        self._rotations: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._query_factors: Tensor | None = None
        self._window_masks: dict[tuple[int, int], Tensor] = {}
        self._layout: Tensor | None = None
        self._buckets: tuple[Bucket, ...] | None = None
        self._segment_ends: Tensor | None = None
        self._cached_segments: CachedSegments | None = None
        self._row_samples: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of_part(cls, lengths: tuple[int, ...], part: ContextPart) -> PackedSequences:
        """Return the rows of a pack on one of several context-parallel ranks, as a separate pack.

        The segments of the new pack are pieces of the given pack's segments (`model.llm.context`).

        Args:
            lengths: The lengths of the segments of the whole pack.
            part: The rank's part.
        """
        own = pieces(lengths, part)
        rows = np.cumsum([0, *(piece.length for piece in own)]).tolist()
        return cls(
            lengths=tuple(piece.length for piece in own),
            starts=tuple(piece.start for piece in own),
            continued=tuple(Continued(row, piece) for row, piece in zip(rows, own, strict=False) if piece.start),
            gathers_keys=crosses_chunks(lengths, part),
        )

    @property
    def num_tokens(self) -> int:
        """The number of rows of the pack, t."""
        return sum(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The first row of each segment."""
        return tuple(sum(self.lengths[:i]) for i in range(len(self.lengths)))

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """[t], the position of each row in its sequence."""
        return _spans(self.starts, self.lengths)

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The indices of the segments in each bucket.

        To limit padding, a bucket contains segments whose lengths round up to the same power of 2. The segments in
        `continued` are first, each in a separate bucket.
        """
        alone = [self.offsets.index(own.row) for own in self.continued]
        found: dict[int, list[int]] = {}
        for i, length in enumerate(self.lengths):
            if i not in alone:
                found.setdefault((length - 1).bit_length(), []).append(i)
        return (*((i,) for i in alone), *map(tuple, found.values()))

    def layout(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return four index tensors [t] on the device, which are computed on the host and copied in one transfer.

        Returns:
            The position of each row in its sequence, the fields `rows` and `places` of all buckets (each concatenated),
            and the index of each row of the pack in the concatenated `rows`.
        """
        if self._layout is None:
            parts = [self._rows_and_places(members) for members in self.groups]
            rows, places = (np.concatenate(column) for column in zip(*parts, strict=True))
            inverse = np.empty_like(rows)
            inverse[rows] = np.arange(len(rows))
            self._layout = to_device(np.stack([self.positions, rows, places, inverse]), device)
        positions, rows_there, places_there, inverse_there = self._layout.unbind()
        return positions, rows_there, places_there, inverse_there

    def rotation(self, rotary: Rotary, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines [t, 1, R] of a rotary embedding, computed once per pack for all layers.

        Args:
            rotary: The embedding, on the device of `like`.
            like: A tensor with the device of the result and, unless `rotary.in_fp32`, its dtype.
        """
        dtype = torch.float32 if rotary.in_fp32 else like.dtype
        key = (rotary.key, dtype)
        if key not in self._rotations:
            angles = torch.outer(self.layout(like.device)[0].float(), rotary.inv_freq).repeat(1, 2)[:, None, :]
            cos, sin = angles.cos() * rotary.scaling, angles.sin() * rotary.scaling
            self._rotations[key] = (cos.to(dtype), sin.to(dtype))
        return self._rotations[key]

    def query_factors(self, beta: float, length: int, like: Tensor) -> Tensor:
        """Return the factors 1 + beta · log(1 + ⌊position / length⌋) [t, 1, 1] of the queries, as in Llama 4."""
        if self._query_factors is None or self._query_factors.dtype != like.dtype:
            spans = torch.div(self.layout(like.device)[0], length, rounding_mode="floor")
            self._query_factors = (1 + beta * torch.log(1 + spans.float())).to(like)[:, None, None]
        return self._query_factors

    def window_mask(self, length: int, window: int, device: torch.device) -> Tensor:
        """Return a bool mask [length, length] in which a row attends to itself and the `window` - 1 rows before it."""
        if (length, window) not in self._window_masks:
            rows = torch.arange(length, device=device)
            distances = rows[:, None] - rows
            self._window_masks[length, window] = (distances >= 0) & (distances < window)
        return self._window_masks[length, window]

    def buckets(self, device: torch.device) -> tuple[Bucket, ...]:
        """Return the buckets of `groups`, without those of the segments in `continued`."""
        if self._buckets is None:
            _, rows, places, _ = self.layout(device)
            lengths = [[self.lengths[i] for i in members] for members in self.groups]
            sizes = [sum(members) for members in lengths]
            found = [
                Bucket(len(members), max(members), own_rows, own_places)
                for members, own_rows, own_places in zip(lengths, rows.split(sizes), places.split(sizes), strict=True)
            ]
            self._buckets = tuple(found[len(self.continued) :])
        return self._buckets

    def segment_ends(self, device: torch.device) -> Tensor:
        """Return 0 followed by the end of each segment (the row after its last row), [S + 1] int32."""
        if self._segment_ends is None:
            self._segment_ends = to_device(np.cumsum((0, *self.lengths), dtype=np.int32), device)
        return self._segment_ends

    def row_samples(self, device: torch.device) -> Tensor:
        """Return the index of each row's segment, [t] int64."""
        return self._samples(device)[0]

    def token_noise(self, device: torch.device) -> TokenNoise:
        """Return the numbers that identify all t rows, computed from `noise`, which must be set."""
        assert self.noise is not None
        return TokenNoise(self.noise.index_select(0, self.row_samples(device)), self.layout(device)[0])

    def sample_lengths(self, device: torch.device) -> Tensor:
        """Return the lengths of the segments that are samples, [num_samples] int64."""
        return self._samples(device)[1][: self.num_samples]

    def _samples(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._row_samples is None:
            rows = np.repeat(np.arange(len(self.lengths)), self.lengths)
            both = to_device(np.concatenate([rows, self.lengths]), device)
            self._row_samples = both[: len(rows)], both[len(rows) :]
        return self._row_samples

    def unbucket(self, device: torch.device) -> Tensor:
        """Return the index of each row of the pack in the concatenation of the buckets' rows, [t] int64."""
        return self.layout(device)[3]

    def cached_segments(self, device: torch.device) -> CachedSegments:
        """Return the segments that are not padding. The pack must have a cache."""
        if self._cached_segments is None:
            real = [i for i, sequence in enumerate(self.sequences) if sequence != PADDING]
            rows, places = self._rows_and_places(real)
            lengths = [self.lengths[i] for i in real]
            row_sequences = np.repeat([self.sequences[i] for i in real], lengths)
            by_row = to_device(np.stack([rows, places, row_sequences, self.positions[rows]]), device)
            firsts = [self.starts[i] for i in real]
            by_segment = to_device([[self.sequences[i] for i in real], firsts, lengths], device)
            self._cached_segments = CachedSegments(
                bucket=Bucket(len(real), max(lengths), by_row[0], by_row[1]),
                sequences=by_segment[0],
                starts=by_segment[1],
                lengths=by_segment[2],
                num_keys=max(self.starts[i] + self.lengths[i] for i in real),
                row_sequences=by_row[2],
                row_positions=by_row[3],
            )
        return self._cached_segments

    def _rows_and_places(self, segments: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the fields `rows` and `places` of a `Bucket` with the segments of the given indices."""
        lengths = [self.lengths[i] for i in segments]
        return (
            _spans([self.offsets[i] for i in segments], lengths),
            _spans(range(0, len(lengths) * max(lengths), max(lengths)), lengths),
        )


def _spans(starts: Sequence[int], lengths: Sequence[int]) -> NDArray[np.int64]:
    """Return the numbers start, start + 1, …, start + length - 1 of each span, concatenated."""
    return np.concatenate([np.arange(s, s + n, dtype=np.int64) for s, n in zip(starts, lengths, strict=True)])


class KVCache:
    """The keys and values, or the states, of `num_sequences` sequences in every layer of a pipeline stage.

    `extend` reserves the positions for one forward pass. Each layer then writes its keys and values with `store`, or
    writes to the tensors that `states` returns.

    Args:
        num_sequences: The number of sequences.
        max_tokens: The maximum number of tokens of a sequence.
    """

    def __init__(self, num_sequences: int, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = [0] * num_sequences
        """The number of tokens of each sequence."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(
        self, lengths: Sequence[int], sequences: Sequence[int] | None = None, num_padding: int = 0
    ) -> PackedSequences:
        """Reserve positions for new tokens, and return the pack that appends these tokens to their sequences.

        Args:
            lengths: The number of tokens to append to each sequence.
            sequences: The indices of the sequences; None for all sequences in order.
            num_padding: The number of rows of padding after the tokens. They are not stored.
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

    def states(
        self, layer: int, recent: tuple[int, ...], state: tuple[int, ...], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the recent inputs and the state of every sequence in a layer with linear attention, initially zeros.

        The layer writes to these tensors.

        Args:
            layer: The number of the layer.
            recent: The shape of a sequence's recent inputs.
            state: The shape of a sequence's state.
            like: A tensor with the device of the result and the dtype of the recent inputs. The state is in fp32.
        """
        assert not torch.is_grad_enabled(), "a cache is for inference: use torch.no_grad()"
        if layer not in self._layers:
            count = len(self.num_tokens)
            states = like.new_zeros((count, *state), dtype=torch.float32)
            self._layers[layer] = (like.new_zeros((count, *recent)), states)
        return self._layers[layer]

    def store(self, layer: int, key: Tensor, value: Tensor, packed: PackedSequences) -> tuple[Tensor, Tensor]:
        """Store a pack's `key` and `value` [t, G, D], and return the layer's caches [sequences, max_tokens, G, D]."""
        assert not torch.is_grad_enabled(), "a cache is for inference: use torch.no_grad()"
        if layer not in self._layers:
            shape = (len(self.num_tokens), self.max_tokens, *key.shape[1:])
            self._layers[layer] = (key.new_zeros(shape), key.new_zeros(shape))
        keys, values = self._layers[layer]
        segments = packed.cached_segments(key.device)
        keys[segments.row_sequences, segments.row_positions] = key[segments.bucket.rows]
        values[segments.row_sequences, segments.row_positions] = value[segments.bucket.rows]
        return keys, values
