"""The text that describes a plan."""

from __future__ import annotations

from trainer.plan.accelerator import GIB
from trainer.plan.memory import RankMemory
from trainer.plan.plan import Plan
from trainer.plan.tables import bytes_text, count_text, ranks_text, table


def report(plan: Plan) -> str:
    """Return the text that `earshot plan` prints."""
    blocks = (_head(plan), _memory(plan), _traffic(plan), _time(plan), _progress(plan))
    return "\n\n".join("\n".join(block) for block in blocks)


def _head(plan: Plan) -> list[str]:
    topology, work, packs, recipe = plan.topology, plan.workload, plan.packs, plan.recipe
    total, learned = (sum(getattr(s, k) for s in plan.sizes.values()) for k in ("total", "learned"))
    return [
        f"{recipe.name} on {topology.world} x {plan.accelerator.name}: TP {topology.tp} x PP {topology.pp} x DP "
        f"{topology.dp}, EP {topology.ep} (encoder experts), {recipe.train.precision}; {count_text(total)} parameters, "
        f"{count_text(learned)} of them trainable",
        f"A step takes {len(work.num_tokens)} samples, {work.audio_sec:,.0f} s of audio, {work.tokens:,} tokens in "
        f"{packs.num_microbatches} packs of {packs.pack_tokens} per replica, "
        f"{1 - work.tokens / (packs.num_microbatches * packs.pack_tokens * topology.dp):.1%} of it padding.",
    ]


def _memory(plan: Plan) -> list[str]:
    rows = [["ranks of", "weights", "gradients", "optimizer", "activations", "encoders", "buffers", "total", "peak in"]]
    for stages, kind in _fullest_by_stage(plan):
        parts = [kind.states.weights, kind.states.gradients, kind.states.optimizer]
        parts += (kind.activations, kind.encoder_activations, kind.buffers, kind.total)
        at = f", EP place {kind.place}" if plan.topology.ep > 1 else ""
        rows.append([f"stage {ranks_text(stages)}{at}", *map(bytes_text, parts), kind.phase])
    usable = plan.accelerator.usable_bytes
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    return [
        f"Peak memory of the fullest ranks of each stage ({len(plan.kinds)} kinds of ranks in total):",
        *table(rows),
        f"{verdict}: {plan.worst.total / GIB:.1f} of {usable / GIB:.1f} GiB usable "
        f"({plan.accelerator.memory_gib:g} less {plan.accelerator.reserve_gib:g} for CUDA, NCCL and fragmentation).",
        f"Host memory for checkpoints: {plan.snapshot_bytes / GIB:.1f} GiB on a node of {plan.accelerator.per_node}.",
    ]


def _fullest_by_stage(plan: Plan) -> list[tuple[list[int], RankMemory]]:
    """Return the kind of rank that needs the most memory for each stage, with consecutive stages of one kind merged."""
    found: list[tuple[list[int], RankMemory]] = []
    for stage in range(plan.topology.pp):
        kind = max((k for k in plan.kinds if stage in k.stages), key=lambda k: k.total)
        if found and found[-1][1] is kind:
            found[-1][0].append(stage)
        else:
            found.append(([stage], kind))
    return found


def _traffic(plan: Plan) -> list[str]:
    rows = [["sent per step by the busiest rank", "ranks", "bytes", "over"]]
    rows += [[t.name, str(t.ranks), bytes_text(t.bytes), "node" if t.within_node else "network"] for t in plan.traffic]
    return table(rows)


def _time(plan: Plan) -> list[str]:
    time, flops = plan.time, plan.flops
    return [
        f"FLOPs per step: LLM {flops.llm:.3g}, encoders {flops.encoders:.3g}, recomputed {flops.recomputed:.3g}.",
        f"Expected step: {time.total:.2f} s = encoders {time.encoders:.2f} + LLM {time.llm:.2f} (bubble "
        f"{time.bubble:.0%}) + exchange {time.exchange:.2f} + update {time.update:.2f}; MFU {time.mfu:.1%}.",
        f"Assumed: matrix products reach {plan.accelerator.efficiency:.0%} of the data sheet's rate, links "
        f"{plan.accelerator.link_efficiency:.0%}.",
    ]


def _progress(plan: Plan) -> list[str]:
    work, per_day = plan.workload, plan.steps_per_day
    return [
        f"{work.tokens * per_day / 1e9:.2f} B tokens and {work.audio_sec / 3600 * per_day:,.0f} h of audio per day; "
        f"{plan.recipe.train.steps:,} steps take {plan.days:.1f} days."
    ]
