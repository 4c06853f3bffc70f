"""The expected duration of a step, which is the sum of its phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.llm.stages import stage_chunks
from trainer.config.schema import Recipe
from trainer.parallel.packs import PackPlan
from trainer.parallel.topology import Topology
from trainer.plan.accelerator import Accelerator
from trainer.plan.communication import ALL_TO_ALL, CONTEXT, GRADIENT_BYTES, Traffic
from trainer.plan.encoder_time import EncoderCost, encoder_seconds
from trainer.plan.experts import as_dense
from trainer.plan.flops import Flops
from trainer.plan.layer_time import (
    RankRates,
    Seconds,
    attention_seconds,
    head_seconds,
    layer_seconds,
    mlp_seconds,
    recomputed_seconds,
)
from trainer.plan.mechanisms import AS_BUILT, Mechanisms
from trainer.plan.ranks import DTYPES
from trainer.plan.sizes import PartSizes, SizedModel
from trainer.plan.states import FP32_BYTES, States

_NORM_BYTES = 36
"""The bytes read and written per gradient for the norm: an fp64 copy (12), the squares (16), and their sum (8)."""
_CLIP_BYTES = 8
"""The bytes read and written per gradient to scale it."""
_ADAM_BYTES = 28
"""The bytes read and written per weight by the fused AdamW: four fp32 values are read, and all but the gradient are
written."""


@dataclass(frozen=True)
class StepTime:
    """The expected seconds of a step and of its phases, and derived rates."""

    encoders: float
    """The seconds of the encoders' forward and backward passes on the slowest rank."""
    llm: float
    """The seconds of all micro-batches' forward and backward passes through the pipeline, including the bubble."""
    exchange: float
    """The seconds of the exchange of clips, features and embeddings, and of gradients and weights between replicas."""
    update: float
    """The seconds of the optimizer's update."""
    bubble: float
    """The fraction of the pipeline's time in which a stage is idle."""
    mfu: float
    """The model FLOPs utilization: model FLOPs / (time · ranks · peak rate), without recomputation."""
    mfu_full_attention: float
    """The model FLOPs utilization with attention counted as if it were not causal, as NVIDIA does."""
    parts: dict[str, float]
    """The seconds of each part of the step, by name. Their sum is `total`."""

    @property
    def total(self) -> float:
        """The expected seconds of a step."""
        return self.encoders + self.llm + self.exchange + self.update


@dataclass(frozen=True)
class _Llm:
    """The seconds of the LLM's parts in a step."""

    products: float
    recomputation: float
    tensor: float
    experts: float
    context: float
    bubble: float
    stages: float
    gradients: float
    """The exchange of gradients and weights between replicas, except the part that overlaps with computation."""

    @property
    def pipeline(self) -> float:
        """The seconds of the whole pipeline, including the bubble."""
        exchanges = self.tensor + self.experts + self.context + self.stages
        return self.products + self.recomputation + exchanges + self.bubble


def step_time(
    recipe: Recipe,
    model: SizedModel,
    parts: PartSizes,
    topology: Topology,
    accelerator: Accelerator,
    encoder_costs: Sequence[EncoderCost],
    packs: PackPlan,
    flops: Flops,
    traffic: Sequence[Traffic],
    states: States,
    ds_json: dict[str, Any],
    mechanisms: Mechanisms = AS_BUILT,
) -> StepTime:
    """Return the expected duration of a step.

    The reduction of the audio side's gradients overlaps with the encoders if weights are gathered per module and the
    DeepSpeed JSON enables `overlap_comm`. DeepSpeed does not prefetch weights, because the order of encoder calls
    changes from step to step. The exchange of the LLM's gradients and weights overlaps with computation if the recipe
    enables this. Nothing else overlaps, except as `mechanisms` assumes.

    Args:
        recipe: The recipe of the run.
        model: The model that the recipe describes.
        parts: The sizes of the model's parts.
        topology: The layout of the ranks.
        accelerator: The rates of the accelerator.
        encoder_costs: The encoder costs on their busiest ranks.
        packs: The LLM's packs.
        flops: The FLOPs of a step.
        traffic: The bytes that the busiest rank sends, by kind of collective.
        states: The model states of the fullest rank.
        ds_json: The DeepSpeed JSON.
        mechanisms: Assumptions that differ from the trainer.
    """
    seconds = {t.name: t.seconds(accelerator) for t in traffic}
    gradient = GRADIENT_BYTES[recipe.parallel.grad_reduce_dtype]
    rates = RankRates(accelerator, mechanisms, DTYPES[recipe.train.precision].itemsize, gradient)
    compute = sum(encoder_seconds(one, parts.encoder_width, rates) for one in encoder_costs)
    gathers = sum(s for name, s in seconds.items() if name.startswith("ZeRO-3") and name.endswith("weights"))
    reductions = sum(s for name, s in seconds.items() if name.startswith("ZeRO-3") and name.endswith("gradients"))
    per_module = recipe.train.gather_audio_weights == "per_module"
    overlaps = per_module and bool(ds_json["zero_optimization"].get("overlap_comm", True))
    encoders = gathers + (max(compute, reductions) if overlaps else compute + reductions)

    llm = _llm(recipe, model, parts, topology, rates, packs, seconds)
    moved = sum(seconds.get(name, 0.0) for name in ("clips and features", "audio embeddings and tokens"))
    update = rates.memory(update_bytes(states, rates.bytes_per_value))
    exchange = moved + llm.gradients
    total = encoders + llm.pipeline + exchange + update
    ran = total * topology.world * rates.peak
    return StepTime(
        encoders,
        llm.pipeline,
        exchange,
        update,
        llm.bubble / llm.pipeline,
        flops.model / ran,
        (flops.model + flops.masked_attention) / ran,
        {
            "computing the LLM": llm.products,
            "recomputing the LLM's activations": llm.recomputation,
            "tensor-parallel collectives": llm.tensor,
            **({"sending tokens to experts": llm.experts} if llm.experts else {}),
            **({"gathering keys and values": llm.context} if llm.context else {}),
            "the pipeline's bubble": llm.bubble,
            "transfers between stages": llm.stages,
            "gradients and weights over replicas": llm.gradients,
            "computing the encoders": min(compute, encoders),
            "ZeRO-3's collectives": encoders - min(compute, encoders),
            "exchanging clips and embeddings": moved,
            "updating the weights": update,
        },
    )


def _llm(
    recipe: Recipe,
    model: SizedModel,
    parts: PartSizes,
    topology: Topology,
    rates: RankRates,
    packs: PackPlan,
    seconds: dict[str, float],
) -> _Llm:
    """Return the times of the LLM in the 1F1B schedule.

    Every stage computes M micro-batches. A rank of the slowest stage is idle while the first micro-batch passes through
    the other PP - 1 stages forward and backward. With V virtual stages, this time is divided by V, and transfers
    between stages overlap with computation, except for the transfers of the first micro-batch.
    """
    mechanisms, config = rates.mechanisms, as_dense(model.llm)
    tp, pp = topology.tp, topology.pp
    microbatches = packs.num_microbatches * mechanisms.context
    # The chunks of a pack are divided so that all context-parallel ranks compute equally many scores.
    rows = packs.pack_tokens / mechanisms.context / topology.cp
    squares = _squares(packs) / mechanisms.context / topology.cp
    layer = layer_seconds(config, rates, tp, rows, squares, parts.layers.learned > 0)
    attention = attention_seconds(config, rates, tp, rows, squares)
    layer = _with_ring_attention(layer, attention, config, rates, tp, rows)
    head = head_seconds(config, rates, tp, rows)
    held = [sum(stage_chunks(config.num_hidden_layers, pp, topology.vp, stage)) for stage in range(pp)]
    again = recomputed_seconds(config, rates, tp, rows, squares, recipe.train.recompute_llm)
    if topology.cp > 1:  # The backward pass of attention to gathered keys runs its forward pass again.
        again += attention.forward
    if mechanisms.recompute_attention:
        again += attention.forward
    if mechanisms.mlp == "recomputed":
        again += mlp_seconds(config, rates, tp, rows)
    # `seconds` contains the traffic of a stage with the most layers.
    tensor = seconds.get("LLM, tensor parallel", 0.0) / microbatches / max(held)
    if mechanisms.overlap_tensor:
        tensor /= tp
    experts = seconds.get(ALL_TO_ALL, 0.0) / microbatches / max(held)
    context = seconds.get(CONTEXT, 0.0) / microbatches / max(held)
    each = layer.total + again + tensor + experts + context
    with_head = held[-1] * each + head.total
    slowest = pp - 1 if with_head >= max(held) * each else held.index(max(held))
    layers = held[slowest]
    fill = (sum(held) - layers) * each / topology.vp
    stages = seconds.get("LLM, between stages", 0.0)
    if topology.vp > 1:
        stages *= (pp - 1) / (microbatches * topology.vp)
    return _Llm(
        microbatches * (layers * layer.total + (head.total if slowest == pp - 1 else 0.0)),
        microbatches * layers * again,
        microbatches * layers * tensor,
        microbatches * layers * experts,
        microbatches * layers * context,
        fill,
        stages,
        _exchange_of_replicas(recipe, layers, microbatches if mechanisms.sharded_weights else 1, layer, seconds),
    )


def _exchange_of_replicas(
    recipe: Recipe, layers: int, overlapping: int, layer: Seconds, seconds: Mapping[str, float]
) -> float:
    """Return the seconds of the exchange of gradients and weights that do not overlap with computation.

    Args:
        recipe: The recipe of the run.
        layers: The number of layers of the slowest stage.
        overlapping: The number of micro-batches with which the exchange can overlap: all of them with sharded weights;
            otherwise one, which is the last micro-batch for gradients and the first one for weights.
        layer: The time of a layer for one micro-batch.
        seconds: The seconds of each kind of traffic.
    """
    scatter, gather = (seconds.get(f"LLM, {kind} over replicas", 0.0) for kind in ("gradients", "weights"))
    if recipe.parallel.overlap_grad_reduce:
        scatter = max(scatter - layers * overlapping * layer.backward, scatter / layers)
    if recipe.parallel.overlap_param_gather:
        gather = max(gather - layers * overlapping * layer.forward, gather / layers)
    return scatter + gather


def update_bytes(states: States, bytes_per_value: int) -> float:
    """Return the bytes that the update of the weights reads and writes on a rank.

    For each weight that the rank updates, these are the passes over its fp32 gradient, moments and master weight, and
    the copy of the new weight. Before the next step, all accumulated gradients of the rank are set to zero.

    Args:
        states: The rank's model states. Their optimizer state is a copy of the weights (if `bytes_per_value` is below
            4) and two moments.
        bytes_per_value: The size of a weight in bytes.
    """
    updated = states.optimizer / (FP32_BYTES * (3 if bytes_per_value < FP32_BYTES else 2))
    copied = FP32_BYTES + bytes_per_value
    return updated * (_NORM_BYTES + _CLIP_BYTES + _ADAM_BYTES + copied) + states.gradients


def _squares(packs: PackPlan) -> float:
    """Return the mean over packs of the sum of squared segment lengths."""
    return float((packs.num_tokens.astype(np.float64) ** 2).sum()) / (packs.num_microbatches * packs.replicas)


def _with_ring_attention(
    layer: Seconds, attention: Seconds, config: Any, rates: RankRates, tp: int, rows: float
) -> Seconds:
    """Add the time of context parallelism's exchange of keys and values that does not overlap with attention."""
    count = rates.mechanisms.context
    if count == 1:
        return layer
    width = config.num_key_value_heads / tp * config.hidden_size / config.num_attention_heads
    moved = (count - 1) * rows * 2 * width * rates.bytes_per_value
    accelerator = rates.accelerator
    link = accelerator.node_gb_s if tp * count <= accelerator.per_node else accelerator.network_gb_s
    ring = moved / (link * 1e9 * accelerator.link_efficiency)
    return Seconds(
        layer.forward + max(0.0, ring - attention.forward), layer.backward + max(0.0, 2 * ring - attention.backward)
    )
