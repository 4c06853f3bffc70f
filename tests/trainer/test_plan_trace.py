"""Tests of the planned bytes that a forward pass keeps for autograd, and of the pipeline schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.plan.llm_memory import StageMemory, in_flight
from trainer.plan.trace import Traced, extrapolated, trace


def test_an_mlp_keeps_what_its_backward_reads() -> None:
    with torch.device("meta"):
        mlp = nn.Sequential(nn.Linear(8, 32, bias=False), nn.GELU(), nn.Linear(32, 8, bias=False))
        x = torch.empty(100, 8, requires_grad=True)
        found = trace(lambda: mlp(x), [*mlp.parameters(), x])
    hidden, out = 100 * 32 * 4, 100 * 8 * 4
    assert found.kept == 2 * hidden + out  # GELU's input and output, and the model's output
    assert found.forward == found.kept
    # The peak adds the gradients of the output, the hidden layer and both weights.
    assert found.kept + hidden < found.backward <= found.kept + out + 2 * hidden + 2 * 8 * 32 * 4


def test_views_and_in_place_results_of_existing_tensors_take_no_memory() -> None:
    with torch.device("meta"):
        weight = torch.empty(64, 64, requires_grad=True)
        found = trace(lambda: weight.t()[:, :8].sum(), [weight])
    assert found.kept == 4


def test_freed_tensors_are_counted_in_the_peak_only() -> None:
    with torch.device("meta"):
        x = torch.empty(1000)
        found = trace(lambda: (x * 2).sum() + (x * 3).sum(), [x])
    assert found.kept == 4 and 4000 <= found.forward < 4100


def test_further_layers_add_as_much_as_the_second() -> None:
    assert extrapolated([Traced(10, 20, 30), Traced(15, 24, 30)], 5) == Traced(30, 36, 30)
    assert extrapolated([Traced(10, 20, 30)], 1) == Traced(10, 20, 30)


@pytest.mark.parametrize(("stage", "pp", "microbatches", "expected"), [(0, 4, 8, 4), (3, 4, 8, 1), (0, 4, 2, 2)])
def test_1f1b_keeps_one_micro_batch_per_following_stage(stage: int, pp: int, microbatches: int, expected: int) -> None:
    assert in_flight(stage, pp, microbatches) == expected


def test_only_the_newest_micro_batch_needs_temporary_memory() -> None:
    memory = StageMemory(Traced(10, 12, 17), layers=8, buffer=5, boundary=1, audio=3)
    assert memory.peak(1) == 17 + 2 * (3 + 1)
    assert memory.peak(4) == 30 + 17 + 2 * (3 + 1)


def test_recomputation_keeps_no_attention_scores() -> None:
    heads, steps, width = 2, 1000, 4

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    with torch.device("meta"):
        x = torch.empty(1, heads, steps, width, requires_grad=True)
        found = trace(lambda: checkpoint(Block(), x, use_reentrant=False), [x])
    assert found.backward < 4 * heads * steps**2
