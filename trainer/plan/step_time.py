"""Expected seconds of a step: the phases one after another, as the step runs them."""

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
"""AdamW without fused kernels goes over its tensors about so often."""


@dataclass(frozen=True)
class StepTime:
    """Seconds, and what follows from them."""

    encoders: float
    """Forward and backward, of the slowest rank."""
    llm: float
    """All micro-batches through the pipeline and back, the bubble included."""
    exchange: float
    """Clips, features and embeddings between ranks; gradients and weights between replicas."""
    update: float
    bubble: float
    """Share of the pipeline's time in which a stage has nothing to do."""
    mfu: float
    """Model FLOPs / (time · ranks · peak rate): recomputation is no progress."""

    @property
    def total(self) -> float:
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
    """By the accelerator's rates. What hides behind what: ZeRO-3's collectives behind the encoders' work where the JSON
    has `overlap_comm`; nothing else."""
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
    return (model_flops / forward if forward else 0.0) + recompute


def _link(traffic: Traffic, accelerator: Accelerator) -> float:
    return (
        (accelerator.node_gb_s if traffic.within_node else accelerator.network_gb_s) * 1e9 * accelerator.link_efficiency
    )
