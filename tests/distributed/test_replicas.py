"""Tests that a difference of one bit between the weights of LLM replicas is detected, and that ranks are reported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.batch import Batch
from tests.distributed.harness import run_ranks
from trainer import parity, parity_cases
from trainer.engine.replicas import differing_ranks, weight_digest
from trainer.parallel.groups import build_groups, connect
from trainer.parallel.topology import Topology
from trainer.parity_cases import DS_CONFIG
from trainer.training.replicas import CorruptionError, check_replicas

CPU = torch.device("cpu")


def body(tp: int, pp: int, faulty: int) -> dict[str, Any]:
    rank, world, device = connect()
    groups = build_groups(Topology(world, tp, pp), rank, device, parity_cases.SEED)
    step = parity.build_step(parity_cases.tiny_model(), groups, DS_CONFIG, 1)
    check_replicas(3, step.llm, groups, lambda *event: pytest.fail(f"equal replicas are reported: {event}"))
    if rank == faulty:
        weights = max((p for _, p in step.llm.parameters()), key=torch.Tensor.numel)
        weights.data.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)  # the lowest bit of the last element
    events: list[Any] = []
    try:
        check_replicas(4, step.llm, groups, lambda *event: events.append(event))
    except CorruptionError as error:
        return {"events": events, "error": str(error)}
    return {"events": events, "error": None}


@pytest.mark.parametrize(
    ("world", "tp", "faulty", "named"),
    # If two of three replicas agree, the third is at fault. Of two replicas, either may be, so both are named. With
    # TP 2, ranks 1 and 3 hold the same weights.
    [(3, 1, 1, [1]), (2, 1, 1, [0, 1]), (4, 2, 3, [1, 3])],
)
def test_one_changed_bit_ends_the_run_on_all_ranks(world: int, tp: int, faulty: int, named: list[int]) -> None:
    for found in run_ranks(world, body, {"tp": tp, "pp": 1, "faulty": faulty}):
        ((name, step, fields),) = found["events"]
        assert (name, step, fields["ranks"]) == ("corrupted", 4, named) and len(fields["nodes"]) == 1
        assert fields["certain"] == (world == 3)
        assert all(f"{rank} on " in found["error"] for rank in named) and "nothing is saved" in found["error"]


def overlapped() -> dict[str, bool]:
    """Update two replicas, and compare their weights before the next forward pass would gather the updated ones."""
    rank, world, device = connect()
    groups = build_groups(Topology(world, 1, 1), rank, device, parity_cases.SEED)
    step = parity.build_step(parity_cases.tiny_model(), groups, DS_CONFIG, 1, mode=parity.Mode(overlap="both"))
    samples = parity_cases.make_samples("mixed", world, step.model.adapter.rate)[rank]
    step(0, Batch(tuple(samples)))
    before = int(weight_digest((p for _, p in step.llm.parameters()), CPU))
    check_replicas(1, step.llm, groups, lambda *event: pytest.fail(f"equal replicas are reported: {event}"))
    return {"gathered": before != int(weight_digest((p for _, p in step.llm.parameters()), CPU))}


def test_weights_that_are_gathered_later_are_completed_before_the_comparison() -> None:
    assert all(found["gathered"] for found in run_ranks(2, overlapped))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_changed_bit_changes_the_digest(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, generator=generator).to(dtype) for n in (3, 1 << 20, (1 << 20) + 5)]
    before, kind = int(weight_digest(weights, CPU)), torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert int(weight_digest(weights, CPU)) == before
    for which, place in ((0, 0), (1, -1), (2, 1 << 20), (2, 7)):
        for bit in range(8 * dtype.itemsize - 1):
            bits = weights[which].view(kind)
            bits[place] ^= 1 << bit
            assert int(weight_digest(weights, CPU)) != before
            bits[place] ^= 1 << bit
    swapped = [weights[0].flip(0), *weights[1:]]
    assert int(weight_digest(swapped, CPU)) != before


def test_the_minority_is_named() -> None:
    topology = Topology(8, 2, 1)
    same = np.array([1, 2] * 4)
    assert differing_ranks(same, topology) == ([], True)
    assert differing_ranks(np.array([1, 2, 1, 2, 1, 7, 1, 2]), topology) == ([5], True)
    assert differing_ranks(np.array([1, 2, 1, 2, 9, 7, 1, 2]), topology) == ([4, 5], True)
    assert differing_ranks(np.array([1, 2, 9, 2, 9, 2, 1, 2]), topology) == ([0, 2, 4, 6], False)
