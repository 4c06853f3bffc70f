"""Expected duration of a step, as the sum of its phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.schema import Recipe
from trainer.parallel.packs import PackPlan
from trainer.parallel.topology import Topology
from trainer.plan.accelerator import Accelerator
from trainer.plan.communication import Traffic
from trainer.plan.flops import Flops, llm_forward_flops
from trainer.plan.sizes import SizedModel
from trainer.plan.states import States
from trainer.plan.workload import EncoderWork, Workload

_UPDATE_PASSES = 3
"""The approximate number of times that AdamW without fused kernels passes over its tensors."""


@dataclass(frozen=True)
class StepTime:
    """The expected seconds of a step and of its phases, and derived rates."""

    encoders: float
    """The encoders' forward and backward passes on the slowest rank."""
    llm: float
    """The forward and backward passes of all micro-batches through the pipeline, including the bubble."""
    exchange: float
    """The exchange of clips, features and embeddings between ranks, and of gradients and weights between replicas."""
    update: float
    """The optimizer's update."""
    bubble: float
    """The share of the pipeline's time in which a stage is idle."""
    mfu: float
    """The model FLOPs utilization: model FLOPs / (time · ranks · peak rate), without recomputation."""

    @property
    def total(self) -> float:
        """The expected seconds of a step."""
        return self.encoders + self.llm + self.exchange + self.update


def step_time(
    recipe: Recipe,
    model: SizedModel,
    topology: Topology,
    accelerator: Accelerator,
    workload: Workload,
    work: Sequence[EncoderWork],
    packs: PackPlan,
    flops: Flops,
    traffic: Sequence[Traffic],
    states: States,
    ds_json: dict[str, Any],
) -> StepTime:
    """Return the expected duration of a step.

    ZeRO-3's collectives overlap with the encoders' computation if the DeepSpeed JSON sets `overlap_comm`. Nothing else
    is assumed to overlap.

    Args:
        recipe: the recipe of the run.
        model: the model that the recipe describes.
        topology: the layout of the ranks.
        accelerator: the rates of the accelerator.
        workload: the samples of a step.
        work: the encoders' work.
        packs: the LLM's packs.
        flops: the FLOPs of a step.
        traffic: the bytes that the busiest rank sends, by kind of collective.
        states: the model states of the fullest rank.
        ds_json: the DeepSpeed JSON.
    """
    train = recipe.train
    peak = (accelerator.tflops if train.precision == "bf16" else accelerator.fp32_tflops) * 1e12
    rate = peak * accelerator.efficiency
    seconds = {t.name: t.bytes / _link(t, accelerator) for t in traffic}

    passes = _passes(flops.encoders, sum(float(w.cost.sum()) for w in work), train.recompute_encoders)
    compute = sum(float(w.cost.max(initial=0.0)) for w in work) * passes / rate
    gathers = seconds.get("ZeRO-3, weights", 0.0) + seconds.get("ZeRO-3, gradients", 0.0)
    overlaps = bool(ds_json["zero_optimization"].get("overlap_comm", True))
    encoders = max(compute, gathers) if overlaps else compute + gathers

    microbatches, pp = packs.num_microbatches, topology.pp
    padded = microbatches * packs.pack_tokens * topology.dp / max(1, workload.tokens)
    forward = llm_forward_flops(model, workload) * padded / topology.dp / topology.tp
    head = 2.0 * model.llm.vocab_size * model.llm.hidden_size * workload.tokens * padded / topology.dp / topology.tp
    slowest = (forward - head) / pp + head
    llm_passes = _passes(flops.llm, llm_forward_flops(model, workload), train.recompute_llm)
    one = slowest / microbatches * llm_passes / rate + seconds.get("LLM, sequence parallel", 0.0) / microbatches
    llm = (microbatches + pp - 1) * one + seconds.get("LLM, between stages", 0.0)

    names = ("clips and features", "audio embeddings and tokens", "LLM, gradients and weights over replicas")
    exchange = sum(seconds.get(name, 0.0) for name in names)
    moved = 2 * states.optimizer + states.gradients + states.weights
    update = _UPDATE_PASSES * moved / (accelerator.memory_tb_s * 1e12)
    total = encoders + llm + exchange + update
    return StepTime(
        encoders,
        llm,
        exchange,
        update,
        (pp - 1) / (microbatches + pp - 1),
        flops.model / (total * topology.world * peak),
    )


def _passes(model_flops: float, forward: float, recompute: bool) -> float:
    """Return the work of a step in units of one forward pass."""
    return (model_flops / forward if forward else 0.0) + recompute


def _link(traffic: Traffic, accelerator: Accelerator) -> float:
    """Return the bandwidth of the links that `traffic` uses, in bytes per second."""
    return (
        (accelerator.node_gb_s if traffic.within_node else accelerator.network_gb_s) * 1e9 * accelerator.link_efficiency
    )
