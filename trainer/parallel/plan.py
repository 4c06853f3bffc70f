"""Routes, which specify the rows that each rank sends and receives in an exchange.

Plans are pure functions of a few integers that every rank knows, so every rank computes the same plan. Planning uses
NumPy only and involves neither a device nor communication. The module `balance` divides work evenly among ranks,
`packs` determines the positions of samples in packed sequences, and `dispatch` assigns clips to encoder ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Segments:
    """The spans of rows to be moved.

    For each span, `length` rows that begin at row `src_row` of rank `src` are moved to row `dst_row` of rank `dst`. All
    arrays are [number of spans].
    """

    src: Ints
    src_row: Ints
    dst: Ints
    dst_row: Ints
    length: Ints


@dataclass(frozen=True)
class Route:
    """One rank's part of an exchange over `world` ranks."""

    send_rows: Ints
    """The indices of the rows to send, ordered by destination rank."""
    send_counts: Ints
    """The number of rows to send to each rank, [world]."""
    recv_rows: Ints
    """The index in the result of each received row, ordered by source rank."""
    recv_counts: Ints
    """The number of rows to receive from each rank, [world]."""
    num_out: int
    """The number of rows of the result."""

    def restricted(self, keep_sent: NDArray[np.bool_], keep_received: NDArray[np.bool_]) -> Route:
        """Return the route restricted to some of the rows.

        The source and destination of a row must agree on whether it is kept.

        Args:
            keep_sent: A flag for each of this rank's rows before the exchange.
            keep_received: A flag for each row of the result.
        """
        sent, received = keep_sent[self.send_rows], keep_received[self.recv_rows]
        return Route(
            self.send_rows[sent],
            _count_true(sent, self.send_counts),
            self.recv_rows[received],
            _count_true(received, self.recv_counts),
            self.num_out,
        )

    def renumbered(self, names: Ints) -> Route:
        """Return the same route for rows in a different order, in which this rank's row r is at index `names[r]`."""
        return replace(self, send_rows=names[self.send_rows])


def route(segments: Segments, rank: int, world: int, num_out: int) -> Route:
    """Return one rank's route for moving `segments`.

    Args:
        segments: The spans of all ranks.
        rank: The rank whose route is returned.
        world: The number of ranks.
        num_out: The number of rows of this rank's result.
    """
    sent, received = np.flatnonzero(segments.src == rank), np.flatnonzero(segments.dst == rank)
    # The sorts are stable, so that sender and receiver list the rows between them in the same order.
    sent = sent[np.argsort(segments.dst[sent], kind="stable")]
    received = received[np.argsort(segments.src[received], kind="stable")]
    length = segments.length

    def counts(peer: Ints, which: Ints) -> Ints:
        return np.bincount(peer[which], weights=length[which], minlength=world).astype(np.int64)

    return Route(
        rows_of_spans(segments.src_row[sent], length[sent]),
        counts(segments.dst, sent),
        rows_of_spans(segments.dst_row[received], length[received]),
        counts(segments.src, received),
        num_out,
    )


def rows_of_spans(starts: Ints, lengths: Ints) -> Ints:
    """Return the concatenated rows start, start + 1, …, start + length - 1 of all spans."""
    total = int(lengths.sum())
    first = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return first + np.arange(total, dtype=np.int64)


def _count_true(flags: NDArray[np.bool_], group_sizes: Ints) -> Ints:
    ends = np.cumsum(group_sizes)
    sums = np.concatenate([[0], np.cumsum(flags)])
    return (sums[ends] - sums[ends - group_sizes]).astype(np.int64)
