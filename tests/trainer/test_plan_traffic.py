"""Tests of the planned memory traffic of single operations, of the update of weights, and of encoder calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.parallel.topology import build_topology
from trainer.plan.accelerator import KNOWN
from trainer.plan.planner import Planner
from trainer.plan.states import States
from trainer.plan.step_time import update_bytes
from trainer.plan.trace import trace
from trainer.plan.workload import typical_workload

ROWS, COLUMNS = 100, 64
SIZE = ROWS * COLUMNS * 4


def moved(operation: Callable[[Tensor], Tensor], ridge: float = 200.0, device: str = "cpu") -> tuple[int, int]:
    """Return the bytes that an operation on a trainable tensor [100, 64] moves, forward and backward."""
    with torch.device("meta"):
        x = torch.empty(ROWS, COLUMNS, requires_grad=True)
        found = trace(lambda: operation(x), [x], device, ridge)
    return found.moved_forward, found.moved_backward


def test_element_wise_operations_read_their_inputs_and_write_their_output() -> None:
    assert moved(lambda x: x * x.detach()) == (3 * SIZE, 3 * SIZE)
    assert moved(functional.gelu) == (2 * SIZE, 3 * SIZE)
    assert moved(lambda x: x.t().unflatten(0, (8, 8))) == (0, 0)
    assert moved(lambda x: x.t().contiguous())[0] == 2 * SIZE
    assert moved(lambda x: x + torch.empty(1).expand(ROWS, COLUMNS))[0] == 2 * SIZE + 4
    assert moved(lambda x: torch.empty_like(x).copy_(x.detach()) + x)[0] == 2 * SIZE + 3 * SIZE


def test_matmuls_move_nothing_besides_what_their_rate_contains() -> None:
    weight = torch.empty(COLUMNS, COLUMNS, device="meta")
    assert moved(lambda x: x @ weight) == (0, 0)


def test_a_convolution_counts_if_memory_bounds_it() -> None:
    """Check 100 input channels with 3 taps, which take 600 FLOPs per output value of 4 bytes."""
    once = SIZE + 32 * ROWS * 3 * 4 + 32 * (COLUMNS - 2) * 4

    def convolve(x: Tensor) -> Tensor:
        return functional.conv1d(x, torch.empty(32, ROWS, 3, requires_grad=True))

    assert moved(convolve, ridge=1000.0) == (once, 2 * once)
    assert moved(convolve, ridge=10.0) == (0, 0)


def test_a_fused_norm_reads_its_input_once() -> None:
    weight = torch.empty(COLUMNS, device="meta")

    def normalize(x: Tensor) -> Tensor:
        return functional.rms_norm(x, (COLUMNS,), weight)

    assert moved(normalize, device="cuda") == (2 * SIZE, 3 * SIZE)
    assert moved(normalize, device="cpu")[0] > 2 * SIZE


def test_cuda_stores_no_attention_scores_even_for_a_trained_bias() -> None:
    heads, frames, width = 2, 256, 4
    with torch.device("meta"):
        x = torch.empty(1, heads, frames, width, requires_grad=True)
        bias = torch.empty(1, heads, frames, frames, requires_grad=True)
        found = {
            device: trace(lambda: functional.scaled_dot_product_attention(x, x, x, bias), [x, bias], device)
            for device in ("cpu", "cuda")
        }
    scores = heads * frames**2 * 4
    assert scores <= found["cuda"].kept < 1.1 * scores
    assert found["cuda"].backward < found["cpu"].backward
    assert found["cuda"].moved_forward < found["cpu"].moved_forward


def test_the_update_moves_what_its_operations_do() -> None:
    """Check the fp64 norm, clipping, the fused AdamW, the copy to bf16, and the zeroed gradients of the next step."""
    count = ROWS * COLUMNS
    with torch.device("meta"):
        grad = torch.empty(count)
        norm = trace(lambda: grad.double().square().sum(), [grad])
        clip = trace(lambda: grad.mul_(0.5), [grad])
        copy = trace(lambda: torch.empty(count, dtype=torch.bfloat16).copy_(grad), [grad])
    adam = 4 * 4 + 3 * 4  # reads the weight, the gradient and two moments, and writes all but the gradient
    gradients = 3 * count * 4  # a rank has gradients of three times as many weights as it updates
    each = (norm.moved_forward + clip.moved_forward + copy.moved_forward) / count + adam
    found = update_bytes(States(optimizer=count * 12, gradients=gradients), 2)
    assert found == pytest.approx(each * count + gradients, rel=0.001)
    fp32 = update_bytes(States(optimizer=count * 8, gradients=gradients), 4)
    assert fp32 == pytest.approx(found + 2 * count, rel=0.001)


@pytest.mark.slow
def test_the_update_holds_the_squares_of_one_gradient_and_fp32_copies_of_bf16_gradients() -> None:
    recipe = load_recipe("debug", ["train.precision=bf16"])
    planner = Planner(recipe, KNOWN["h100"])
    workload = typical_workload(recipe, build_topology(recipe.parallel, 2))
    reduced = dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, grad_reduce_dtype="bf16"))
    plain, halved = planner.plan(recipe, workload).worst, planner.plan(reduced, workload).worst
    with torch.device("meta"):
        grad = torch.empty(1000)
        squares = trace(lambda: grad.double().square().sum(), [grad]).forward
    assert plain.states.norm > 0 and plain.states.norm % (squares // 1000) == 0
    assert plain.states.gradient_copies == 0
    llm = planner.parts.llm.learned
    assert halved.states.gradient_copies == pytest.approx(4 * llm / num_sharers(reduced), rel=0.01)
    more = halved.states.gradient_copies
    assert halved.phases["update"][2] == plain.phases["update"][2] + more
    assert halved.phases["encode"][2] == plain.phases["encode"][2] + more
    assert halved.phases["llm"][2] == plain.phases["llm"][2]


def num_sharers(recipe: Recipe) -> int:
    """Return the number of ranks among which the LLM's weights are divided."""
    topology = build_topology(recipe.parallel, recipe.parallel.num_ranks)
    return topology.dp * topology.tp * topology.pp


@pytest.mark.slow
def test_encoder_calls_move_as_much_as_the_trace_of_their_shape() -> None:
    recipe = load_recipe("debug")
    tracer = Planner(recipe, KNOWN["h100"]).tracer(recipe)
    for name in [e.name for e in recipe.model.experts][:2]:
        clips = (160_000, 158_000, 155_000)
        traced, fitted = tracer.traced(name, clips), tracer.calls(name)
        assert fitted.moved(clips) == pytest.approx((traced.moved_forward, traced.moved_backward), rel=0.2)
        assert fitted.kernels == pytest.approx((traced.kernels_forward, traced.kernels_backward), rel=0.2)


@pytest.mark.slow
def test_a_faster_memory_shortens_the_encoders() -> None:
    recipe = load_recipe("debug", ["data.global_batch_samples=64"])
    topology = build_topology(recipe.parallel, 2)
    workload = typical_workload(recipe, topology)
    device = KNOWN["h100"].without_fixed_costs()
    slow, fast = (
        Planner(recipe, dataclasses.replace(device, memory_tb_s=rate)).plan(workload=workload, recipe=recipe)
        for rate in (3.35, 6.7)
    )
    planner = Planner(recipe, device)
    topology, work, _ = planner.place(recipe, workload)
    expected = sum(cost.moved for cost in planner.encoder_costs(recipe, work)) / (3.35e12 * 0.8)
    saved = slow.time.encoders - fast.time.encoders
    assert expected > 0 and saved == pytest.approx(expected / 2, rel=0.2)
