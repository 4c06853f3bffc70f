"""The JSON form of a plan, which `earshot plan --json` prints and with which a run is compared."""

from __future__ import annotations

import dataclasses
from typing import Any

from trainer.parallel.topology import Topology
from trainer.plan.data import DatasetSummary
from trainer.plan.forecast import digest_of
from trainer.plan.memory import RankMemory
from trainer.plan.plan import Plan


def as_json(plan: Plan) -> dict[str, Any]:
    """Return all numbers of a plan as JSON values. The keys contain the units."""
    time = plan.time
    return {
        "recipe": plan.recipe.name,
        "digest": digest_of(plan.recipe),
        "accelerator": plan.accelerator.name,
        "usable_bytes": int(plan.accelerator.usable_bytes),
        "fits": plan.fits,
        "is_tight": plan.is_tight,
        **_sizes(plan.topology),
        "ffn_experts": None if plan.experts is None else dataclasses.asdict(plan.experts),
        "parameters": sum(s.total for s in plan.sizes.values()),
        "learned_parameters": sum(s.learned for s in plan.sizes.values()),
        "num_microbatches": plan.packs.num_microbatches,
        "pack_tokens": plan.packs.pack_tokens,
        "tokens_per_step": plan.workload.tokens,
        "audio_sec_per_step": plan.workload.audio_sec,
        "encoder_balance": plan.encoder_balance,
        "encoder_padding": plan.encoder_padding,
        "datasets": None if plan.workload.data is None else [_dataset(d) for d in plan.workload.data.datasets],
        "kinds": [_kind(kind) for kind in plan.kinds],
        "host_bytes_per_node": {"total": plan.host.total, **dataclasses.asdict(plan.host)},
        "checkpoint_bytes": plan.disk.checkpoint,
        "checkpoints_kept": plan.disk.num_kept,
        "disk_bytes_per_run": 0 if plan.disk.in_bucket else plan.disk.run,
        "model_flops": plan.flops.model,
        "llm_flops": plan.flops.llm,
        "encoder_flops": plan.flops.encoders,
        "recomputed_flops": plan.flops.recomputed,
        "sent_bytes_per_rank": {t.name: t.bytes for t in plan.traffic},
        "bubble": time.bubble,
        "step_sec": time.total,
        "encoders_sec": time.encoders,
        "llm_sec": time.llm,
        "exchange_sec": time.exchange,
        "update_sec": time.update,
        "step_sec_range": list(plan.seconds_range),
        "fixed_share": plan.fixed_share,
        "too_small": plan.too_small,
        "attention": plan.attention,
        "what_if": plan.mechanisms.labels(),
        "mfu": time.mfu,
        "mfu_full_attention": time.mfu_full_attention,
        "parts_sec": time.parts,
        "tokens_per_day": plan.workload.tokens * plan.steps_per_day,
        "audio_hours_per_day": plan.workload.audio_sec / 3600 * plan.steps_per_day,
        "days": plan.days,
    }


def _sizes(topology: Topology) -> dict[str, int]:
    return {
        "ranks": topology.world,
        "tensor": topology.tp,
        "context": topology.cp,
        "pipeline": topology.pp,
        "virtual_stages": topology.vp,
        "data": topology.dp,
        "expert": topology.ep,
        "ffn_expert": topology.ffn_ep,
        "ffn_expert_tensor": topology.expert_tp,
    }


def _dataset(one: DatasetSummary) -> dict[str, Any]:
    lengths = one.lengths
    return {
        "name": one.name,
        "num_samples": lengths.num_samples,
        "hours": lengths.hours,
        "share": one.share,
        "epochs": one.epochs,
        "mean_sec": float(lengths.seconds.mean()),
        "longest_sec": float(lengths.seconds.max()),
        "num_too_long": lengths.num_too_long,
    }


def _kind(kind: RankMemory) -> dict[str, Any]:
    return {
        "stages": list(kind.stages),
        "expert_place": kind.place,
        "phase": kind.phase,
        "weights_bytes": kind.states.weights,
        "gradients_bytes": kind.states.gradients,
        "optimizer_bytes": kind.states.optimizer,
        "activations_bytes": kind.activations,
        "encoder_activations_bytes": kind.encoder_activations,
        "buffers_bytes": kind.buffers,
        "whole_audio_weights_bytes": kind.whole_weights,
        "whole_audio_gradients_bytes": kind.whole_gradients,
        "total_bytes": kind.total,
    }
