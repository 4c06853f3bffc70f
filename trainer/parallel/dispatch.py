"""Which rank encodes which clip, and what each rank sends and receives for it: pure arithmetic.

A clip that is wanted of an encoder travels to one holder of that encoder, once per rank however many encoders want it
there; its features travel back. Nothing is padded, and there is no capacity that could drop a clip.

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
"""From the lengths of clips (audio samples) to what encoding each costs, in any unit that all encoders share."""


@dataclass(frozen=True)
class ClipTable:
    """The clips of all ranks, by rank, in the order in which each rank holds them."""

    source_rank: Ints
    """[N] rank that has the clip, ascending."""
    samples: Ints
    """[N] audio samples."""
    wanted: NDArray[np.bool_]
    """[N, K] encoders that must see the clip."""


@dataclass(frozen=True)
class DispatchPlan:
    """Where every wanted (clip, encoder) pair is computed: by place of the encoder, then encoder, then clip."""

    clips: ClipTable
    clip: Ints
    encoder: Ints
    encoder_rank: Ints
    """Rank that computes the pair."""
    cost: Floats


def plan_dispatch(
    clips: ClipTable, costs: Sequence[ClipCost], places: Sequence[int], ep: int, world: int
) -> DispatchPlan:
    """Give all holders of an encoder the same work, and each of them clips of like length.

    An encoder by itself, not all encoders of a rank together: where ZeRO-3 gathers, no rank begins the next one's calls
    early. What an encoder cannot share evenly, having few clips, goes to those that have least so far.

    Args:
        clips: of all ranks.
        costs: per encoder.
        places: per encoder, its place in every expert-parallel group.
        ep: size of these groups (blocks of neighbouring ranks); 1: every rank holds every encoder.
        world: ranks.
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
    """Which of its holders computes each of an encoder's clips; `loads` is what they have, and changes in place."""
    bins = spread_alike(cost, len(loads))
    mine = np.bincount(bins, weights=cost, minlength=len(loads))
    holder_of = np.arange(len(loads))
    if loads.any():  # where clips are fewer than holders, they are not the same holders for every encoder
        holder_of[np.argsort(-mine, kind="stable")] = np.argsort(loads, kind="stable")
    loads[holder_of] += mine
    return holder_of[bins]


@dataclass(frozen=True)
class Dispatch:
    """One rank's part of a `DispatchPlan`. What goes to a rank, and what comes from it, is listed in the same order at
    both ends; a rank's own share is listed as well."""

    send_clips: tuple[int, ...]
    """Own clips to send, by destination; a clip wanted on several ranks is listed once for each."""
    send_to: tuple[int, ...]
    """Rank that each goes to."""
    recv_lengths: tuple[int, ...]
    """Audio samples of every arriving clip, in the order of `ClipTable`."""
    recv_from: tuple[int, ...]
    """Rank that each comes from."""
    work: tuple[tuple[int, ...], ...]
    """Per encoder the arriving clips that it must see."""
    return_order: tuple[int, ...]
    """Results to send, as positions in the results laid end to end, encoder after encoder."""
    return_to: tuple[int, ...]
    """Rank that each goes to, ascending."""
    result_lengths: tuple[int, ...]
    """Frames of every arriving feature sequence, by the rank that computed it, then encoder, then clip."""
    result_from: tuple[int, ...]
    """Rank that each comes from."""
    results: tuple[tuple[int, ...], ...]
    """Per encoder the arriving feature sequences, in the order of this rank's clips."""


def dispatch_of(plan: DispatchPlan, rank: int) -> Dispatch:
    """`rank`'s part of `plan`."""
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
"""What one more encoder call costs on a device, as audio: every call passes ZeRO-3's hooks of every module. Measured on
a CPU with encoders of 1.5 to 2.2 M parameters (1.2 to 2 s; larger ones are slower per second of audio)."""


def group_by_length(
    lengths: Sequence[int], budget: int, call_cost: int, windowing: Windowing = WHOLE
) -> list[list[int]]:
    """Split clips into padded batches with the least padding.

    The clips, sorted by length, are cut where Σ (computed samples + call_cost) is smallest (dynamic programming,
    exact).

    Args:
        lengths: of the clips, in samples.
        budget: most samples that a batch may compute, padding included; a single costlier clip is a batch of its own.
        call_cost: of one more batch, in samples.
        windowing: what the encoder makes of clips.

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
