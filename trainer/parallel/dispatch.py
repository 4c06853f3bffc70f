"""The plan that assigns clips to encoder ranks, and the clips and features that each rank sends and receives.

A clip is sent to one encoder rank of each encoder that must encode it. It is sent to a rank only once, even if several
encoders of the rank need it. The features are sent back. Nothing is padded, and no capacity limit drops clips.

Shapes: N clips of all ranks, K encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from model.lengths import WHOLE, Windowing, num_frames, num_samples
from trainer.parallel.balance import Floats, spread_alike
from trainer.parallel.plan import Ints

ClipCost = Callable[[Ints], Floats]
"""A function from the lengths of clips (in audio samples) to the cost of encoding each of them.

The unit of the cost is the same for all encoders.
"""


@dataclass(frozen=True)
class ClipLengths:
    """The lengths of the clips of all ranks, ordered by source rank and then by index on that rank."""

    source_rank: Ints
    """The rank that loaded each clip, [N], in ascending order."""
    samples: Ints
    """The length of each clip in audio samples, [N]."""

    def with_dummies(self, world: int, dummy_samples: int) -> ClipLengths:
        """Return the lengths with a clip of `dummy_samples` audio samples added on every rank without a clip."""
        without = np.flatnonzero(np.bincount(self.source_rank, minlength=world) == 0)
        places = np.searchsorted(self.source_rank, without)
        return ClipLengths(np.insert(self.source_rank, places, without), np.insert(self.samples, places, dummy_samples))


@dataclass(frozen=True)
class ClipTable:
    """The clips of all ranks, with the encoders that each clip needs, in the order of `ClipLengths`."""

    source_rank: Ints
    """The rank that loaded each clip, [N], in ascending order."""
    samples: Ints
    """The length of each clip in audio samples, [N]."""
    wanted: NDArray[np.bool_]
    """True where the encoder must encode the clip, [N, K]."""


@dataclass(frozen=True)
class DispatchPlan:
    """The assignment of pairs of a clip and an encoder to ranks.

    The pairs are ordered by the place of the encoder, then by encoder, then by clip.
    """

    clips: ClipTable
    """The clips of all ranks."""
    clip: Ints
    """The clip of each pair, an index into `clips`."""
    encoder: Ints
    """The encoder of each pair."""
    encoder_rank: Ints
    """The rank that computes each pair."""
    cost: Floats
    """The cost of each pair."""


def plan_dispatch(
    clips: ClipTable, costs: Sequence[ClipCost], places: Sequence[int], ep: int, world: int
) -> DispatchPlan:
    """Assign each clip to a rank for every encoder that must encode it.

    The ranks of an encoder get equal work, and each of them gets clips of similar length. The work is balanced for each
    encoder separately rather than in total, because of the case in which weights are gathered per module. All ranks of
    an encoder then gather its weights together, so no rank can begin the calls of the next encoder early. If the clips
    of an encoder cannot be divided evenly, the ranks with the least work so far get more of them.

    Args:
        clips: The clips of all ranks.
        costs: The cost function of each encoder.
        places: The place of each encoder in every expert-parallel group.
        ep: The size of an expert-parallel group, which consists of consecutive ranks. With 1, every rank holds every
            encoder.
        world: The number of ranks.
    """
    by_place = sorted(range(len(places)), key=lambda k: places[k])
    by_encoder = np.ascontiguousarray(clips.wanted.T)
    wanted = [np.flatnonzero(by_encoder[k]) for k in by_place]
    clip, encoder = np.concatenate(wanted), np.repeat(by_place, [len(which) for which in wanted])
    cost_of = [costs[k](clips.samples[which]) for k, which in zip(by_place, wanted, strict=True)]
    loads = np.zeros((ep, world // ep))
    encoder_ranks = [_encoder_ranks(c, loads[places[k]]) for k, c in zip(by_place, cost_of, strict=True)]
    for k, ranks in zip(by_place, encoder_ranks, strict=True):
        ranks *= ep
        ranks += places[k]
    return DispatchPlan(clips, clip, encoder, np.concatenate(encoder_ranks), np.concatenate(cost_of))


def _encoder_ranks(cost: Floats, loads: Floats) -> Ints:
    """Return the index of the encoder rank for each clip that one encoder must encode.

    Args:
        cost: The cost of each clip.
        loads: The work of each encoder rank so far, which is updated in place.
    """
    bins = spread_alike(cost, len(loads))
    mine = np.bincount(bins, weights=cost, minlength=len(loads))
    if not loads.any():
        loads += mine
        return bins
    holder_of = np.empty_like(bins, shape=len(loads))  # The ranks with the least work so far get the most work.
    holder_of[np.argsort(-mine, kind="stable")] = np.argsort(loads, kind="stable")
    loads[holder_of] += mine
    return holder_of[bins]


@dataclass(frozen=True)
class Dispatch:
    """One rank's part of a `DispatchPlan`.

    The sender and the receiver list the messages between them in the same order. Clips and features that stay on the
    rank are included.
    """

    send_clips: tuple[int, ...]
    """The clips to send, ordered by destination. A clip that is sent to several ranks is listed once for each."""
    send_to: tuple[int, ...]
    """The destination rank of each clip in `send_clips`."""
    recv_lengths: tuple[int, ...]
    """The number of audio samples of every received clip, in the order of `ClipTable`."""
    recv_from: tuple[int, ...]
    """The source rank of each received clip."""
    work: tuple[tuple[int, ...], ...]
    """For each encoder, the indices of the received clips that it must encode."""
    return_order: tuple[int, ...]
    """The computed feature sequences to send back, as indices into the concatenated results of all encoders."""
    return_to: tuple[int, ...]
    """The destination rank of each feature sequence in `return_order`, in ascending order."""
    result_lengths: tuple[int, ...]
    """The number of frames of each received feature sequence, ordered by encoder rank, then encoder, then clip."""
    result_from: tuple[int, ...]
    """The rank that computed each received feature sequence."""
    results: tuple[tuple[int, ...], ...]
    """For each encoder, the indices of its received feature sequences, in the order of this rank's clips."""


def dispatch_of(plan: DispatchPlan, rank: int) -> Dispatch:
    """Return the part of `plan` that `rank` carries out."""
    clips, source_rank = plan.clips, plan.clips.source_rank[plan.clip]
    num_clips, num_encoders = clips.wanted.shape
    own, here = np.flatnonzero(source_rank == rank), np.flatnonzero(plan.encoder_rank == rank)

    sent = np.unique(plan.encoder_rank[own] * num_clips + plan.clip[own])
    send_to, send_clip = sent // max(1, num_clips), sent % max(1, num_clips)
    arriving = np.unique(plan.clip[here])
    place = np.searchsorted(arriving, plan.clip[here])
    work = tuple(tuple(place[plan.encoder[here] == k].tolist()) for k in range(num_encoders))

    computed = np.lexsort((plan.clip[here], plan.encoder[here]))
    back = np.lexsort((plan.clip[here], plan.encoder[here], source_rank[here]))
    position = np.empty_like(computed)
    position[computed] = np.arange(len(computed))

    got = own[np.lexsort((plan.clip[own], plan.encoder[own], plan.encoder_rank[own]))]
    by_clip = [np.flatnonzero(plan.encoder[got] == k) for k in range(num_encoders)]
    return Dispatch(
        send_clips=tuple((send_clip - np.searchsorted(clips.source_rank, rank)).tolist()),
        send_to=tuple(send_to.tolist()),
        recv_lengths=tuple(clips.samples[arriving].tolist()),
        recv_from=tuple(clips.source_rank[arriving].tolist()),
        work=work,
        return_order=tuple(position[back].tolist()),
        return_to=tuple(source_rank[here][back].tolist()),
        result_lengths=tuple(num_frames(clips.samples[plan.clip[got]]).tolist()),
        result_from=tuple(plan.encoder_rank[got].tolist()),
        results=tuple(tuple(which[np.argsort(plan.clip[got[which]])].tolist()) for which in by_clip),
    )


CALL_COST_SAMPLES = {"cpu": num_samples(1), "cuda": num_samples(10)}
"""The overhead of an encoder call on each type of device, as the number of audio samples that can be encoded in the
same time.

The overhead comes from ZeRO-3's hooks on all modules. On a CPU, it was measured to equal 1.2 to 2 s of audio for
encoders of 1.5 to 2.2 M parameters. For larger encoders, it equals less audio. The value for CUDA is an estimate.
"""


def group_by_length(
    lengths: Sequence[int], budget: int, call_cost: int, windowing: Windowing = WHOLE
) -> list[list[int]]:
    """Split clips into padded batches with the lowest total cost.

    The clips are sorted by length. Dynamic programming then finds the cuts with the smallest Σ (computed samples +
    call_cost) over the batches.

    Args:
        lengths: The lengths of the clips, in samples.
        budget: The largest number of samples in a batch, including padding. A longer clip is a separate batch.
        call_cost: The cost of each batch in addition to its samples, in samples.
        windowing: The windowing of the encoder.

    Returns:
        Groups of indices into `lengths`; one empty group if there are no clips.
    """
    widths = [windowing.padded_samples(n) for n in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (-widths[i], -lengths[i], i))
    before = [0, *accumulate(windowing.num_windows(lengths[i]) for i in order)]
    best = [0.0] + [float("inf")] * len(order)
    cut = [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        for start in range(end - 1, -1, -1):
            padded = (before[end] - before[start]) * widths[order[start]]
            if padded > budget and end - start > 1:
                break
            if best[start] + padded + call_cost < best[end]:
                best[end], cut[end] = best[start] + padded + call_cost, start
    groups, end = [], len(order)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    return groups[::-1] or [[]]
