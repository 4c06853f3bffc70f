"""Expert parallelism for encoders: clips are sent to a rank that holds the encoder, and features are sent back.

The method follows that of sparsely gated experts (Shazeer et al. 2017, arXiv 1701.06538; DeepSpeed-MoE, arXiv
2201.05596). Here, however, an expert is a whole encoder, the shapes of experts differ, the inputs are waveforms of
unequal length, and experts have no capacity limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.batch import Ragged
from model.lengths import Windowing, num_frames
from model.transfer import to_device
from trainer.engine.clock import DeviceClock, Lap
from trainer.parallel.dispatch import (
    CALL_COST_SAMPLES,
    ClipCost,
    ClipLengths,
    ClipTable,
    Dispatch,
    DispatchPlan,
    dispatch_of,
    group_by_length,
    plan_dispatch,
)
from trainer.parallel.exchange import Parcels, check_same_plan, deliver, gather_padded, gather_ragged, take_spans
from trainer.parallel.groups import Groups


@dataclass(frozen=True)
class EncoderCost:
    """The cost of one encoder's forward passes on one rank."""

    compute_sec: float = 0.0
    """The time spent in calls of the encoder."""
    wait_sec: float = 0.0
    """The time spent in exchanges, including the wait for the slowest rank. The exchange time of each call of
    `EncoderDispatch` is divided evenly among the encoders."""
    sent_bytes: int = 0
    """The size of the clips and features that were sent to other ranks."""
    received_bytes: int = 0
    """The size of the clips and features that were received from other ranks."""

    def __add__(self, other: EncoderCost) -> EncoderCost:
        return EncoderCost(
            self.compute_sec + other.compute_sec,
            self.wait_sec + other.wait_sec,
            self.sent_bytes + other.sent_bytes,
            self.received_bytes + other.received_bytes,
        )


class EncoderDispatch:
    """An implementation of `model.audio_tower.EncodeClips` that runs several encoders across all ranks.

    Collective: every rank of the world must create and call it.

    Args:
        held: The encoders that this rank holds, by name.
        names: The names of all encoders, in the same order on every rank.
        costs: For each encoder, a function that returns the cost of clips; see `trainer.engine.placement.clip_cost`.
        windowings: The windowing of each encoder.
        places: For each encoder, the index within the expert-parallel group of the rank that holds it.
        ep: The size of the expert-parallel group.
        groups: The process groups of this rank.
        budget_samples: The largest number of padded audio samples in one encoder call, which encodes a batch of clips.
        empty: A tensor [0, D] in the dtype and on the device of the features, for ranks without an encoder.
        before_backward: A function that every rank calls once per backward pass, before it sends the gradients of the
            features back.
        calls_are_collective: True if all ranks of an encoder must call it the same number of times. Ranks with fewer
            batches of clips then encode dummy clips.
        recompute_calls: True to discard the activations of every encoder call, and to run the call again in the
            backward pass.
        every_clip: True if every encoder encodes every clip. Ranks then need not exchange which encoders their clips
            need.
        debug_plan: True to compare the plans of all ranks before clips are sent.
    """

    def __init__(
        self,
        held: Mapping[str, nn.Module],
        names: Sequence[str],
        costs: Sequence[ClipCost],
        windowings: Sequence[Windowing],
        places: Sequence[int],
        ep: int,
        groups: Groups,
        *,
        budget_samples: int,
        empty: Tensor,
        before_backward: Callable[[], None] | None = None,
        calls_are_collective: bool = False,
        recompute_calls: bool = False,
        every_clip: bool = False,
        debug_plan: bool = False,
    ) -> None:
        self.held, self.names, self.costs, self.places, self.ep = held, tuple(names), costs, places, ep
        self.windowings = tuple(windowings)
        self.groups, self.budget_samples, self.empty = groups, budget_samples, empty
        self.before_backward = before_backward
        self.every_clip, self.debug_plan = every_clip, debug_plan
        self.calls_are_collective, self.recompute_calls = calls_are_collective, recompute_calls
        self._clock = DeviceClock(groups.device)
        self._moved = dict.fromkeys(self.names, EncoderCost())
        self._waits: list[Lap] = []
        self._computed: list[tuple[str, Lap]] = []
        self.agree_on_learning()

    def agree_on_learning(self) -> None:
        """Determine whether any rank trains an encoder.

        Collective: every rank of the world must call it.

        This method must be called again whenever `requires_grad` of a parameter changes.
        """
        learns = torch.tensor([int(any(p.requires_grad for e in self.held.values() for p in e.parameters()))])
        dist.all_reduce(learns, op=dist.ReduceOp.MAX, group=self.groups.world)
        self._learns = bool(learns)

    def __call__(
        self, names: Sequence[str], clips: Ragged, wanted: Tensor, everyone: ClipLengths | None = None
    ) -> list[Ragged]:
        """Encode clips on the ranks that hold their encoders.

        Collective: every rank of the world must call it.

        Args:
            names: The names of the K encoders. They must equal the names that the constructor received.
            clips: The waveforms [ΣT] of this rank's B clips.
            wanted: [B, K] bool, true where the encoder must encode the clip.
            everyone: The lengths of the clips of all ranks; None to gather them.

        Returns:
            For each encoder, the features [ΣF, D] of the clips that it must encode, in the order of `clips`.
        """
        assert tuple(names) == self.names, names
        rank, world = self.groups.rank, self.groups.topology.world
        everyone = everyone or gather_lengths(clips, self.groups)
        plan = plan_dispatch(self._table(wanted, everyone), self.costs, self.places, self.ep, world)
        if self.debug_plan:
            check_same_plan("encoders", (plan.clip, plan.encoder, plan.encoder_rank), self.groups.world)
        part = dispatch_of(plan, rank)
        self._count_bytes(plan, clips.values.element_size(), width=self.empty.shape[1] * self.empty.element_size())

        batches = [
            self._batches([part.recv_lengths[i] for i in work], windowing)
            for work, windowing in zip(part.work, self.windowings, strict=True)
        ]
        num_calls = [len(b) if n in self.held else 1 for n, b in zip(self.names, batches, strict=True)]
        # The ranks agree on the number of calls while clips are sent.
        agreed = None
        if self.calls_are_collective and world > self.ep:
            most = to_device(num_calls, self.groups.device)
            agreed = dist.all_reduce(most, dist.ReduceOp.MAX, group=self.groups.world, async_op=True)
        arrived = self._send_clips(clips, part)
        if agreed is not None:
            agreed.wait()
            num_calls = most.tolist()
        computed = [
            self._compute(name, [arrived[i] for i in work], batch, calls)
            for name, work, batch, calls in zip(self.names, part.work, batches, num_calls, strict=True)
            if name in self.held
        ]
        return self._return_features(computed, part)

    def _table(self, wanted: Tensor, everyone: ClipLengths) -> ClipTable:
        """Gather the encoders that each clip of every rank needs, as one bit per encoder.

        Collective: every rank of the world must call it.
        """
        num_encoders = len(self.names)
        if self.every_clip:
            flags = np.ones((len(everyone.samples), num_encoders), dtype=bool)
            return ClipTable(everyone.source_rank, everyone.samples, flags)
        counts = np.bincount(everyone.source_rank, minlength=self.groups.topology.world)
        mine = wanted.cpu().numpy() @ (1 << np.arange(num_encoders, dtype=np.int64))
        assert len(mine) == counts[self.groups.rank], (len(mine), counts[self.groups.rank])
        found = gather_padded(mine, int(counts.max()), self.groups.world)
        bits = take_spans(found, np.zeros_like(counts), counts)
        flags = (bits[:, None] >> np.arange(num_encoders) & 1).astype(bool)
        return ClipTable(everyone.source_rank, everyone.samples, flags)

    def _batches(self, lengths: list[int], windowing: Windowing) -> list[list[int]]:
        """Divide clips into encoder calls. Each call is a list of indices into `lengths`.

        If calls are collective, the list has at least one call, which may be empty.
        """
        call_cost = CALL_COST_SAMPLES[self.groups.device.type]
        groups = group_by_length(lengths, self.budget_samples, call_cost, windowing)
        return groups if self.calls_are_collective else [members for members in groups if members]

    def _send_clips(self, clips: Ragged, part: Dispatch) -> list[Tensor]:
        """Send clips to the ranks that encode them, and return the clips that this rank must encode.

        Collective: every rank of the world must call it.
        """
        own = clips.split()
        each = tuple(range(i, i + 1) for i in range(len(part.recv_lengths)))
        parcels = Parcels(part.send_to, part.recv_from, part.recv_lengths, each)
        *arrived, _ = self._travel([own[i] for i in part.send_clips], parcels, clips.values[:0])
        return arrived

    def _return_features(self, computed: list[list[Tensor]], part: Dispatch) -> list[Ragged]:
        """Send features back to the source ranks, and return the features of this rank's clips for each encoder.

        Collective: every rank of the world must call it.

        Args:
            computed: The results of `_compute` for each encoder that this rank holds.
            part: This rank's part of the plan.
        """
        rows = [sequence for found in computed for sequence in found[:-1]]
        anchor = torch.cat([self.empty, *(found[-1] for found in computed)])
        # If any rank trains an encoder, all ranks must take part in the exchange of the backward pass.
        if self._learns and torch.is_grad_enabled() and not anchor.requires_grad:
            anchor.requires_grad_()
        pieces_of = [_pieces(results, part.result_from, self.groups.rank) for results in part.results]
        spans = sorted((span for pieces in pieces_of for span in pieces), key=lambda span: span.start)
        parcels = Parcels(part.return_to, part.result_from, part.result_lengths, tuple(spans))
        *arrived, tie = self._travel([rows[i] for i in part.return_order], parcels, anchor, self.before_backward)
        by_span = dict(zip(spans, arrived, strict=True))
        return [
            Ragged(_joined([by_span[span] for span in pieces], tie), tuple(part.result_lengths[i] for i in results))
            for pieces, results in zip(pieces_of, part.results, strict=True)
        ]

    def _travel(
        self,
        sequences: list[Tensor],
        parcels: Parcels,
        anchor: Tensor,
        before_backward: Callable[[], None] | None = None,
    ) -> tuple[Tensor, ...]:
        begin = self._clock.now()
        arrived = deliver(sequences, parcels, anchor, self.groups.world, before_backward)
        self._waits.append((begin, self._clock.now()))
        return arrived

    def _compute(self, name: str, clips: list[Tensor], batches: list[list[int]], num_calls: int) -> list[Tensor]:
        """Return the features that one encoder computes for each of `clips`, followed by a tensor without rows.

        The last tensor connects calls with a dummy clip to the graph, so that they contribute gradients of zero.

        Args:
            name: The name of the encoder.
            clips: The clips to encode.
            batches: Indices into `clips` for each call.
            num_calls: The number of calls. Those in excess of `batches` encode a dummy clip.
        """
        begin = self._clock.now()
        found: list[Tensor] = [self.empty] * len(clips)
        none: list[Tensor] = []
        for members in batches + [[]] * (num_calls - len(batches)):
            if members:
                features = self._call(self.held[name], Ragged.of([clips[i] for i in members]))
                for i, sequence in zip(members, features.split(), strict=True):
                    found[i] = sequence.to(self.empty.dtype)
            else:
                dummy = Ragged.of([to_device(dummy_clip(), self.empty.device)])
                none.append(self._call(self.held[name], dummy).values[:0])
        self._computed.append((name, (begin, self._clock.now())))
        return [*found, torch.cat([self.empty, *(rows.to(self.empty.dtype) for rows in none)])]

    def _call(self, encoder: nn.Module, clips: Ragged) -> Ragged:
        """Return the features of clips. If calls are recomputed, only the clips are kept for the backward pass."""
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters())
        if not (self.recompute_calls and trains):
            features: Ragged = encoder(clips)
            return features
        lengths: tuple[int, ...] = ()

        def run(waveforms: Tensor, _: Tensor) -> Tensor:
            nonlocal lengths
            features: Ragged = encoder(Ragged(waveforms, clips.lengths))
            lengths = features.lengths
            return features.values

        # Reentrant checkpointing frees each call's activations before the next call is recomputed, unlike the
        # non-reentrant kind. It needs an input that requires a gradient, and waveforms do not require one.
        through = torch.zeros((), device=clips.values.device, requires_grad=True)
        values = checkpoint(run, clips.values, through, use_reentrant=True)
        return Ragged(values, lengths)

    def _count_bytes(self, plan: DispatchPlan, sample_bytes: int, width: int) -> None:
        """Add up the bytes of clips and features that this rank exchanges with other ranks.

        A clip that is sent once for several encoders is counted for the first one.
        """
        rank, clips = self.groups.rank, plan.clips
        source_rank = clips.source_rank[plan.clip]
        mine = np.flatnonzero((source_rank == rank) != (plan.encoder_rank == rank))
        clip, encoder, leaves = plan.clip[mine], plan.encoder[mine], source_rank[mine] == rank
        _, first = np.unique(plan.encoder_rank[mine] * len(clips.source_rank) + clip, return_index=True)
        waveform = np.zeros(len(mine), dtype=np.int64)
        waveform[first] = clips.samples[clip[first]] * sample_bytes
        features = num_frames(clips.samples[clip]) * width
        for k, name in enumerate(self.names):
            out, back = leaves & (encoder == k), ~leaves & (encoder == k)
            self._moved[name] += EncoderCost(
                sent_bytes=int(waveform[out].sum() + features[back].sum()),
                received_bytes=int(waveform[back].sum() + features[out].sum()),
            )

    def take_costs(self) -> dict[str, EncoderCost]:
        """Return the cost of every encoder on this rank since the last call of this method."""
        each_sec = sum(map(self._clock.seconds, self._waits)) / len(self.names)
        found = {name: cost + EncoderCost(wait_sec=each_sec) for name, cost in self._moved.items()}
        for name, lap in self._computed:
            found[name] += EncoderCost(compute_sec=self._clock.seconds(lap))
        self._moved = dict.fromkeys(self.names, EncoderCost())
        self._waits, self._computed = [], []
        return found


def gather_lengths(clips: Ragged, groups: Groups) -> ClipLengths:
    """Return the lengths of the clips of all ranks.

    Collective: every rank of the world must call it.
    """
    found, counts = gather_ragged(np.array(clips.lengths, dtype=np.int64), groups.world)
    samples = take_spans(found, np.zeros_like(counts), counts)
    return ClipLengths(np.repeat(np.arange(len(counts)), counts), samples)


def _pieces(results: Sequence[int], source: Sequence[int], rank: int) -> list[range]:
    """Group received sequences into ranges that are contiguous in memory.

    Each sequence that this rank computed is a separate range.

    Args:
        results: The numbers of the sequences, in ascending order.
        source: The rank that sent each sequence.
        rank: This rank.
    """
    found: list[range] = []
    for i in results:
        if found and found[-1].stop == i and rank not in (source[i], source[i - 1]):
            found[-1] = range(found[-1].start, i + 1)
        else:
            found.append(range(i, i + 1))
    return found


def _joined(pieces: list[Tensor], none: Tensor) -> Tensor:
    """Concatenate pieces into one tensor [ΣF, D].

    A single piece is returned without a copy. If there are no pieces, `none` [0, D] is returned.
    """
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0] if pieces else none


def dummy_clip() -> Tensor:
    """Return 0.1 s of a faint tone, which is the input of an encoder call without clips.

    Silence cannot be used, because its normalization would divide by zero.
    """
    return 0.01 * torch.sin(torch.arange(1600) * 0.1)
