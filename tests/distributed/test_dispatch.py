"""Tests of random routings on four ranks: no rank hangs, no clip is lost or duplicated, and gradients are correct."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.batch import Ragged
from model.lengths import WHOLE, num_frames
from tests.distributed.harness import run_ranks
from trainer.engine.expert_parallel import EncoderDispatch
from trainer.parallel.exchange import gather_ragged
from trainer.parallel.groups import Groups, connect
from trainer.parallel.topology import Topology

NUM_ROUTINGS = 200
DIM = 3


class ToyEncoder(nn.Module):
    """An encoder [ΣT] → [ΣF, DIM] that multiplies the first sample of every frame by its weight [DIM]."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, DIM + 1) + index)

    def forward(self, clips: Ragged) -> Ragged:
        frames = [clip[::320, None] * self.weight for clip in clips.split()]
        return Ragged(torch.cat(frames), tuple(num_frames(n) for n in clips.lengths))


def body(num_routings: int) -> int:
    """Check random routings, and return their number.

    All ranks draw the same routings, because Hypothesis is derandomized and every check has the same outcome on all of
    them.
    """
    rank, world, device = connect(timeout_sec=60)
    assert dist.group.WORLD is not None
    tried = 0

    @settings(max_examples=num_routings, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def check(data: st.DataObject) -> None:
        nonlocal tried
        tried += 1
        ep, num_encoders = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 5))
        places = data.draw(st.lists(st.integers(0, ep - 1), min_size=num_encoders, max_size=num_encoders))
        sizes = st.lists(st.integers(1, 3000), min_size=1, max_size=4)
        per_rank = data.draw(st.lists(sizes, min_size=world, max_size=world))
        routing = data.draw(st.sampled_from(["random", "one encoder", "all", "none"]))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        clips = [[torch.randn(n, generator=generator) for n in own] for own in per_rank]
        wanted = [wanted_by(routing, len(own), num_encoders, generator) for own in per_rank]
        names = [f"e{k}" for k in range(num_encoders)]
        encoders = [ToyEncoder(k) for k in range(num_encoders)]
        groups = Groups(Topology(world, 1, 1, ep), rank, device, dist.group.WORLD, dist.group.WORLD)
        dispatch = EncoderDispatch(
            {n: e for n, e, p in zip(names, encoders, places, strict=True) if p == rank % ep},
            names,
            [lambda samples: samples * 1.0] * num_encoders,
            [WHOLE] * num_encoders,
            places,
            ep,
            groups,
            budget_samples=data.draw(st.sampled_from([1000, 5000, 100_000])),
            empty=torch.zeros(0, DIM),
            calls_are_collective=data.draw(st.booleans()),
            debug_plan=True,
        )
        found = dispatch(names, Ragged.of(clips[rank]), wanted[rank])
        for k, features in enumerate(found):
            mine = [c for c, w in zip(clips[rank], wanted[rank][:, k].tolist(), strict=True) if w]
            expected = [ToyEncoder(k)(Ragged.of([c])).values for c in mine]
            assert features.lengths == tuple(e.shape[0] for e in expected)
            if expected:
                torch.testing.assert_close(features.values, torch.cat(expected))
        sum(f.values.square().sum() for f in found).backward()
        for k, encoder in enumerate(encoders):
            gradient = torch.zeros_like(encoder.weight) if encoder.weight.grad is None else encoder.weight.grad
            assert places[k] == rank % ep or not gradient.any()
            dist.all_reduce(gradient)
            oracle = ToyEncoder(k)
            for own, flags in zip(clips, wanted, strict=True):
                for clip, w in zip(own, flags[:, k].tolist(), strict=True):
                    if w:
                        oracle(Ragged.of([clip])).values.square().sum().backward()
            reference = torch.zeros_like(gradient) if oracle.weight.grad is None else oracle.weight.grad
            assert gradient.isfinite().all()
            torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-4)

    check()
    dist.destroy_process_group()
    return tried


def wanted_by(routing: str, num_clips: int, num_encoders: int, generator: torch.Generator) -> Tensor:
    flags = torch.rand(num_clips, num_encoders, generator=generator) < 0.4
    if routing in ("all", "none"):
        flags = torch.full_like(flags, routing == "all")
    if routing == "one encoder":
        flags = torch.zeros_like(flags)
        flags[:, -1] = True
    return flags


@pytest.mark.timeout(180)
def test_random_routings() -> None:
    tried = run_ranks(4, body, {"num_routings": NUM_ROUTINGS}, timeout_sec=150)
    assert min(tried) >= NUM_ROUTINGS and len(set(tried)) == 1


def gather_many(num_values: list[int]) -> list[list[int]]:
    """Gather one array per rank. The array of rank r contains `num_values[r]` consecutive numbers from r on."""
    rank, _, _ = connect(timeout_sec=30)
    found, sizes = gather_ragged(np.arange(rank, rank + num_values[rank]), dist.group.WORLD)
    dist.destroy_process_group()
    return [row[:n].tolist() for row, n in zip(found, sizes, strict=True)]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("num_values", [[0, 3, 64], [65, 0, 300]])
def test_arrays_of_any_length_are_gathered(num_values: list[int]) -> None:
    expected = [list(range(rank, rank + n)) for rank, n in enumerate(num_values)]
    assert run_ranks(3, gather_many, {"num_values": num_values}, timeout_sec=50) == [expected] * 3


def planners_disagree() -> str:
    """Dispatch with a different cost function on rank 2, and return the message of the error."""
    rank, world, device = connect(timeout_sec=30)
    assert dist.group.WORLD is not None
    groups = Groups(Topology(world, 1, 1), rank, device, dist.group.WORLD, dist.group.WORLD)
    cost = (lambda samples: samples * 1.0) if rank != 2 else (lambda samples: (samples < 5000) * 1.0)
    dispatch = EncoderDispatch({"e": ToyEncoder(0)}, ["e"], [cost], [WHOLE], [0], 1, groups, budget_samples=10**6,
                               empty=torch.zeros(0, DIM), debug_plan=True)  # fmt: skip
    clips = Ragged.of([torch.ones(n) for n in ((9000, 3000, 2000, 1000) if rank == 0 else (1000,))])
    try:
        dispatch(["e"], clips, torch.ones(len(clips), 1, dtype=torch.bool))
    except RuntimeError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return "no error"


@pytest.mark.timeout(60)
def test_ranks_with_a_different_plan_are_named() -> None:
    error = "encoders: the plans of ranks [2] differ from that of rank 0, so their input or topology differs, too"
    assert run_ranks(4, planners_disagree, timeout_sec=50) == [error] * 4
