"""The variants (arms) of `bench.dispatch`, which send clips to the ranks of encoders and features back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.batch import Ragged
from model.lengths import FRAME_SAMPLES, WHOLE, num_frames, num_samples

WORLD, CLIPS_PER_RANK, DIM = 4, 16, 768
SHORTEST_SEC, LONGEST_SEC = 1.0, 12.0


class FeatureBank(nn.Module):
    """A substitute for an encoder that computes nothing and returns a view of stored features."""

    def __init__(self, max_frames: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.randn(max_frames, DIM))

    def forward(self, clips: Ragged) -> Ragged:
        """Return features [ΣF, 768] for samples [ΣT]."""
        frames = tuple(num_frames(n) for n in clips.lengths)
        return Ragged(self.features[: sum(frames)], frames)


@dataclass(frozen=True)
class Work:
    """The clips of one rank, and the rank whose encoder each clip needs."""

    clips: Ragged
    chosen: Tensor
    """The rank whose encoder each clip needs, [B] int64."""

    @staticmethod
    def draw(rank: int) -> Work:
        """Return random clips, each assigned to a random encoder. Calls with the same rank return the same result."""
        rng = np.random.default_rng(rank)
        lengths = [num_samples(s) for s in rng.uniform(SHORTEST_SEC, LONGEST_SEC, CLIPS_PER_RANK)]
        clips = Ragged.of([torch.from_numpy(rng.standard_normal(n).astype(np.float32)) for n in lengths])
        return Work(clips, torch.from_numpy(rng.integers(0, WORLD, CLIPS_PER_RANK)))

    @property
    def wanted(self) -> Tensor:
        """`chosen` as a one-hot mask over the encoders, [B, W] bool."""
        return nn.functional.one_hot(self.chosen, WORLD).bool()

    def samples_to(self) -> list[int]:
        """Return the number of samples that this rank sends to each rank, [W]."""
        return self._sums(self.clips.lengths)

    def frames_to(self) -> list[int]:
        """Return the number of feature frames that this rank receives from each rank, [W]."""
        return self._sums([num_frames(n) for n in self.clips.lengths])

    def _sums(self, sizes: Any) -> list[int]:
        return np.bincount(self.chosen, weights=sizes, minlength=WORLD).astype(int).tolist()

    def frames(self) -> tuple[Tensor, Tensor]:
        """Return the clips as frames [ΣF, 320], and the index of each frame's encoder [ΣF].

        The last frame of each clip is zero-padded.
        """
        counts = [num_frames(n) for n in self.clips.lengths]
        rows = torch.zeros(sum(counts), FRAME_SAMPLES)
        for clip, part in zip(self.clips.split(), rows.split(counts), strict=True):
            part.view(-1)[: len(clip)] = clip
        return rows, self.chosen.repeat_interleave(torch.tensor(counts))


def build_ours(work: Work) -> Callable[[], list[Tensor]]:
    """Return the arm that uses the trainer's exchange."""
    from trainer.engine.expert_parallel import EncoderDispatch
    from trainer.parallel.groups import Groups
    from trainer.parallel.topology import Topology

    rank = dist.get_rank()
    assert dist.group.WORLD is not None
    groups = Groups(Topology(WORLD, 1, 1, WORLD), rank, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)
    names = [f"encoder{k}" for k in range(WORLD)]
    bank = FeatureBank(WORLD * CLIPS_PER_RANK * num_frames(num_samples(LONGEST_SEC)))
    dispatch = EncoderDispatch(
        {names[rank]: bank},
        names,
        [lambda samples: samples * 1.0] * WORLD,
        [WHOLE] * WORLD,
        range(WORLD),
        WORLD,
        groups,
        budget_samples=num_samples(240),
        empty=torch.zeros(0, DIM),
    )
    return lambda: [features.values for features in dispatch(names, work.clips, work.wanted)]


def build_bare(work: Work) -> Callable[[], list[Tensor]]:
    """Return the arm that sends only the bytes that must leave each rank."""
    rank = dist.get_rank()

    def to_others(sizes: list[int]) -> tuple[list[int], list[int]]:
        sizes[rank] = 0
        table = [torch.zeros(WORLD, dtype=torch.int64) for _ in range(WORLD)]
        dist.all_gather(table, torch.tensor(sizes))
        return sizes, [int(row[rank]) for row in table]

    samples_out, samples_in = to_others(work.samples_to())
    frames_in, frames_out = to_others(work.frames_to())
    clips, arrived = torch.randn(sum(samples_out)), torch.empty(sum(samples_in))
    features, returned = torch.randn(sum(frames_out), DIM), torch.empty(sum(frames_in), DIM)

    def run() -> list[Tensor]:
        dist.all_to_all_single(arrived, clips, samples_in, samples_out)
        dist.all_to_all_single(returned, features, frames_in, frames_out)
        return [returned]

    return run


def build_messages(work: Work) -> Callable[[], list[Tensor]]:
    """Return the arm that sends the same bytes as the bare exchange in one message per clip, with known lengths."""
    from trainer.parallel.exchange import Parcels, deliver

    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    chosen = work.chosen.tolist()
    order = sorted(range(len(chosen)), key=lambda i: chosen[i])
    leaving = tuple(chosen[i] for i in order)
    works = [Work.draw(r) for r in range(WORLD)]
    clips = [(r, n, c) for r, w in enumerate(works) for n, c in zip(w.clips.lengths, w.chosen.tolist(), strict=True)]
    coming = [(r, n) for r, n, c in clips if c == rank]
    sources, lengths = tuple(r for r, _ in coming), tuple(n for _, n in coming)
    frames_in = tuple(map(num_frames, lengths))
    frames_out = tuple(num_frames(work.clips.lengths[i]) for i in order)
    out = Parcels(leaving, sources, lengths, tuple(range(i, i + 1) for i in range(len(coming))))
    back = Parcels(sources, leaving, frames_out, tuple(range(i, i + 1) for i in range(len(order))))
    own, none = work.clips.split(), work.clips.values[:0]
    features, empty = torch.randn(sum(frames_in), DIM).split(frames_in), torch.empty(0, DIM)

    def run() -> list[Tensor]:
        deliver([own[i] for i in order], out, none, group)
        return list(deliver(features, back, empty, group))

    return run


def build_lengths(work: Work) -> Callable[[], list[Tensor]]:
    """Return the arm that all-gathers clip lengths and encoder choices, which every dispatch plan requires."""
    from trainer.parallel.exchange import gather_ragged

    mine = np.stack([np.array(work.clips.lengths), work.chosen.numpy()], axis=1).ravel()

    def run() -> list[Tensor]:
        return [torch.from_numpy(found) for found in gather_ragged(mine, dist.group.WORLD)[0]]

    return run


def build_autoep(work: Work) -> Callable[[], list[Tensor]]:
    """Return the arm that uses AutoEP's plan and exchange. Rows are sorted by expert, as in AutoEP's layer."""
    from deepspeed.module_inject.auto_ep_layer import _AllToAllV, compute_split_plan

    group, bank = dist.group.WORLD, torch.randn(WORLD * CLIPS_PER_RANK * num_frames(num_samples(LONGEST_SEC)), DIM)

    def run() -> list[Tensor]:
        rows, expert = work.frames()
        order = expert.argsort(stable=True)
        plan = compute_split_plan(expert[:, None], WORLD, WORLD, 1, group)
        arrived = _AllToAllV.apply(group, rows.index_select(0, order), plan.input_splits, plan.output_splits)
        returned = _AllToAllV.apply(group, bank[: len(arrived)], plan.output_splits, plan.input_splits)
        return [torch.empty_like(returned).index_copy_(0, order, returned)]

    return run


def build_moe_layer(work: Work) -> Callable[[], list[Tensor]]:
    """Return the arm that uses DeepSpeed's MoE layer.

    The gate reads the chosen expert from otherwise unused columns of the input rows.
    """
    from deepspeed.moe.experts import Experts
    from deepspeed.moe.sharded_moe import MOELayer, TopKGate

    gate = TopKGate(DIM, WORLD, k=1, min_capacity=0, drop_tokens=False, use_rts=False)
    with torch.no_grad():
        gate.wg.weight.zero_()[:, -WORLD:].copy_(1e3 * torch.eye(WORLD))
    layer = MOELayer(gate, Experts(nn.Identity()), "bench", WORLD, 1)
    layer._set_ep_group(dist.group.WORLD)

    def run() -> list[Tensor]:
        frames, expert = work.frames()
        rows = torch.zeros(len(frames), DIM)
        rows[:, :FRAME_SAMPLES] = frames
        rows[:, -WORLD:] = nn.functional.one_hot(expert, WORLD)
        with torch.no_grad():
            return [layer(rows, None)]

    return run


ARMS: dict[str, Callable[[Work], Callable[[], list[Tensor]]]] = {
    "ours": build_ours,
    "bare": build_bare,
    "messages": build_messages,
    "lengths": build_lengths,
    "AutoEP": build_autoep,
    "MOELayer": build_moe_layer,
}
