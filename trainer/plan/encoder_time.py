"""Computation time of the encoders on the busiest rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.lengths import FRAME_SAMPLES
from trainer.plan.encoder_memory import EncoderTracer
from trainer.plan.flops import are_trained
from trainer.plan.layer_time import RankRates
from trainer.plan.sizes import PartSizes, SizedModel
from trainer.plan.states import FP32_BYTES
from trainer.plan.workload import EncoderWork

_ATTENTION_BACKWARD = 2.5
"""The FLOPs of the backward pass of fused attention, which computes the scores again, relative to the forward pass."""


@dataclass(frozen=True)
class EncoderCost:
    """The costs of all encoder calls of a step on the busiest rank, forward and backward, including recomputation."""

    flops: float
    """The FLOPs of matmuls and convolutions, and of attention without a fused kernel."""
    attention: float
    """The FLOPs of fused attention. Its backward pass takes 2.5 times the FLOPs of its forward pass."""
    moved: float
    """The bytes that all other operations, and convolutions that are bound by memory, read and write."""
    kernels: int
    """The number of kernels that the calls launch."""
    frames: float
    """The number of frames in the largest call, which is the number of rows of its matmuls."""


def encoder_costs(
    model: SizedModel,
    parts: PartSizes,
    tracer: EncoderTracer,
    work: Sequence[EncoderWork],
    *,
    recompute_layers: bool,
    recompute_calls: bool,
) -> tuple[EncoderCost, ...]:
    """Return the costs of the primary encoder and of the encoder experts, on the busiest rank of each.

    The gradients of the weights are summed over an encoder's calls in the dtype of the weights. Calls that run again
    add theirs to the accumulated fp32 gradients.

    Args:
        model: The model that the recipe describes.
        parts: The sizes of the model's parts.
        tracer: The tracer of the encoders. Its traces contain the recomputation of layers.
        work: The encoders' work.
        recompute_layers: The value of `train.recompute_encoders`.
        recompute_calls: The value of `train.recompute_encoder_calls`.
    """
    found, size = [], next(tracer.tower.parameters()).itemsize
    for one in work:
        rank = int(one.cost.argmax())
        trains = are_trained(model, parts, one)
        passes = 3 + recompute_layers + recompute_calls if trains else 1
        calls = [(name, call) for name, some in zip(one.names, one.calls[rank], strict=True) for call in some]
        again = recompute_calls and trains
        moved, attention, extra, kernels = 0.0, 0.0, 0.0, 0
        for name, call in calls:
            cost = tracer.calls(name)
            forward, backward = cost.moved(call)
            moved += (1 + again) * forward + backward
            moved += tracer.learned(name) * (size + 2 * FP32_BYTES if again else 3 * size)
            kernels += (1 + again) * cost.kernels[0] + cost.kernels[1]
            once, repeated = cost.attention_flops(call)
            attention += (1 + again + _ATTENTION_BACKWARD * trains) * once + repeated
            extra += (_ATTENTION_BACKWARD - 2) * trains * once
        frames = max((sum(call) / FRAME_SAMPLES for _, call in calls), default=1.0)
        # The FLOPs of the work contain those of attention, and count its backward pass as two forward passes.
        products = max(0.0, float(one.cost[rank]) * passes - (attention - extra))
        found.append(EncoderCost(products, attention, moved, kernels, max(1.0, frames)))
    return tuple(found)


def encoder_seconds(cost: EncoderCost, width: float, rates: RankRates) -> float:
    """Return the seconds that the calls take.

    The matmuls of an encoder are assumed to have the shape of the average weight, and as many rows as the largest call
    has frames. Kernel launches are added, as for the LLM.

    Args:
        cost: The costs of the calls.
        width: The square root of the mean number of elements of the encoders' weights.
        rates: The rates of the rank.
    """
    share = rates.accelerator.matrix_share(cost.frames, width, width)
    attention = cost.attention / (rates.peak * rates.accelerator.attention_efficiency)
    return cost.flops / (rates.peak * share) + attention + rates.memory(cost.moved) + rates.starts(cost.kernels)
