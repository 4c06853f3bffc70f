"""Plans: pure functions of small integers that every rank knows. Same inputs, same plan, on every rank.

A `Route` is one rank's part of a ragged all-to-all: which of its rows go to whom, and where arriving rows are put.
`balance` gives all ranks equal work, `packs` says where samples lie in the LLM, `dispatch` who encodes which clip.

Everything is NumPy: planning never touches a device and never communicates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Segments:
    """Runs of rows to be moved: `length` rows from `src_row` of rank `src` to `dst_row` of rank `dst`, each [runs]."""

    src: Ints
    src_row: Ints
    dst: Ints
    dst_row: Ints
    length: Ints


@dataclass(frozen=True)
class Route:
    """One rank's part of an exchange over `world` ranks."""

    send_rows: Ints
    """Own rows to send, by destination rank."""
    send_counts: Ints
    """[world] how many of them go to each rank."""
    recv_rows: Ints
    """Where arriving rows (by source rank) are put."""
    recv_counts: Ints
    """[world] how many arrive from each rank."""
    num_out: int
    """Rows after the exchange."""

    def restricted(self, keep_sent: NDArray[np.bool_], keep_received: NDArray[np.bool_]) -> Route:
        """Only rows whose flag is set; the two flags of a row, at its source and its destination, must agree.

        Args:
            keep_sent: per own row before the exchange.
            keep_received: per row after it.
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
        """The same movement where own row r is now called `names[r]`."""
        return replace(self, send_rows=names[self.send_rows])


def route(segments: Segments, rank: int, world: int, num_out: int) -> Route:
    """`rank`'s part of moving `segments`; `num_out` rows exist after the exchange on this rank."""
    sent, received = np.flatnonzero(segments.src == rank), np.flatnonzero(segments.dst == rank)
    # Stable sorts: sender and receiver list the rows of a pair of ranks in the same order.
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
    """start, start+1, …, start+length-1 for each pair, end to end."""
    total = int(lengths.sum())
    first = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return first + np.arange(total, dtype=np.int64)


def _count_true(flags: NDArray[np.bool_], group_sizes: Ints) -> Ints:
    ends = np.cumsum(group_sizes)
    sums = np.concatenate([[0], np.cumsum(flags)])
    return (sums[ends] - sums[ends - group_sizes]).astype(np.int64)
