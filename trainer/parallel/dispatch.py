"""The plan of which rank encodes which clip, and of what each rank sends and receives for it.

A clip is sent to one encoder rank of each encoder that must encode it, and to each rank only once even if several of
its encoders need it. The features are sent back. Nothing is padded, and there is no capacity that could drop a clip.

Shapes: N clips of all ranks, K encoders, W ranks.
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
"""A function from the lengths of clips (audio samples) to the cost of encoding each, in a unit that encoders share."""


@dataclass(frozen=True)
class ClipTable:
    """The clips of all ranks, ordered by rank and then as each rank holds them."""

    source_rank: Ints
    """[N], the rank that has the clip, ascending."""
    samples: Ints
    """[N], the length of the clip in audio samples."""
    wanted: NDArray[np.bool_]
    """[N, K], true where the encoder must encode the clip."""


@dataclass(frozen=True)
class DispatchPlan:
    """The ranks that encode clips.

    The pairs of a clip and an encoder are ordered by the place of the encoder, then by encoder, then by clip.
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
    """Plan which rank encodes which clip: encoder ranks get equal work, and each gets clips of similar length.

    The work of each encoder is balanced on its own rather than the total of a rank: ZeRO-3 gathers weights on all
    encoder ranks together, so no rank can begin the calls of the next encoder early. If an encoder has too few clips to
    share them evenly, they go to the ranks with the least work so far.

    Args:
        clips: the clips of all ranks.
        costs: the cost of clips for each encoder.
        places: the place of each encoder in every expert-parallel group.
        ep: the size of these groups of neighbouring ranks; with 1, every rank holds every encoder.
        world: the number of ranks.
    """
    by_place = sorted(range(len(places)), key=lambda k: places[k])
    by_encoder = np.ascontiguousarray(clips.wanted.T)
    wanted = [np.flatnonzero(by_encoder[k]) for k in by_place]
    clip, encoder = np.concatenate(wanted), np.repeat(by_place, [len(which) for which in wanted])
    cost_of = [costs[k](clips.samples[which]) for k, which in zip(by_place, wanted, strict=True)]
    loads = np.zeros((ep, world // ep))
    encoder_ranks = [
        _encoder_ranks(c, loads[places[k]]) * ep + places[k] for k, c in zip(by_place, cost_of, strict=True)
    ]
    return DispatchPlan(clips, clip, encoder, np.concatenate(encoder_ranks), np.concatenate(cost_of))


def _encoder_ranks(cost: Floats, loads: Floats) -> Ints:
    """Return which encoder rank computes each clip of an encoder; `loads`, their work so far, changes in place."""
    bins = spread_alike(cost, len(loads))
    mine = np.bincount(bins, weights=cost, minlength=len(loads))
    holder_of = np.arange(len(loads))
    if loads.any():  # with fewer clips than encoder ranks, other ranks are chosen for each encoder
        holder_of[np.argsort(-mine, kind="stable")] = np.argsort(loads, kind="stable")
    loads[holder_of] += mine
    return holder_of[bins]


@dataclass(frozen=True)
class Dispatch:
    """One rank's part of a `DispatchPlan`.

    Sender and receiver list their messages in the same order. What stays on a rank is listed, too.
    """

    send_clips: tuple[int, ...]
    """The clips to send, by destination; a clip that goes to several ranks is listed once for each."""
    send_to: tuple[int, ...]
    """The rank that each goes to."""
    recv_lengths: tuple[int, ...]
    """The audio samples of every received clip, in the order of `ClipTable`."""
    recv_from: tuple[int, ...]
    """The rank that each comes from."""
    work: tuple[tuple[int, ...], ...]
    """The received clips that each encoder must encode."""
    return_order: tuple[int, ...]
    """The results to send, as indices into the results of all encoders, encoder after encoder."""
    return_to: tuple[int, ...]
    """The rank that each goes to, ascending."""
    result_lengths: tuple[int, ...]
    """The frames of every received feature sequence, ordered by the rank that computed it, then by encoder and clip."""
    result_from: tuple[int, ...]
    """The rank that each comes from."""
    results: tuple[tuple[int, ...], ...]
    """The received feature sequences of each encoder, in the order of this rank's clips."""


def dispatch_of(plan: DispatchPlan, rank: int) -> Dispatch:
    """Return the part of a plan that concerns one rank."""
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
"""The cost of one more encoder call on each type of device, in audio samples of equal cost: a call runs ZeRO-3's hooks
of all modules. On a CPU, 1.2 to 2 s were measured for encoders of 1.5 to 2.2 M parameters; larger ones need more time
per second of audio. The value for CUDA is an estimate."""


def group_by_length(
    lengths: Sequence[int], budget: int, call_cost: int, windowing: Windowing = WHOLE
) -> list[list[int]]:
    """Split clips into padded batches of the lowest total cost.

    The clips are sorted by length and cut where Σ (computed samples + call_cost) is smallest. The solution is exact, by
    dynamic programming.

    Args:
        lengths: the lengths of the clips, in samples.
        budget: the largest number of samples in a batch, including padding; a longer clip is a batch of its own.
        call_cost: the cost of one more batch, in samples.
        windowing: how the encoder cuts and pads clips.

    Returns:
        Groups of indices into `lengths`; without clips, one empty group.
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
