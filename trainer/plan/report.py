"""The text that describes a plan, in at most 100 columns."""

from __future__ import annotations

import math
import textwrap

import numpy as np

from trainer.engine.stages import stages_of
from trainer.plan.accelerator import GIB
from trainer.plan.advice import WORTH, Advice, limits
from trainer.plan.memory import RankMemory
from trainer.plan.plan import MEMORY_MARGIN, UNCERTAINTY, Plan
from trainer.plan.sizes import sized_model, stage_sizes
from trainer.plan.tables import bytes_text, count_text, gib, ranks_text, table

WIDTH = 100
_MAX_STAGES = 6
"""The largest number of rows of the memory table. If there are more, stages in the middle are merged."""


def report(plan: Plan, advice: Advice | None = None, price_per_gpu_hour: float | None = None) -> str:
    """Return the text that `earshot plan` prints.

    Args:
        plan: The plan.
        advice: The recommended changes to the recipe; None prints no advice.
        price_per_gpu_hour: The price of one accelerator for an hour; None prints no costs.
    """
    blocks = (
        _summary(plan, advice, price_per_gpu_hour),
        _model(plan),
        _data(plan),
        _memory(plan),
        _traffic(plan),
        _time(plan),
    )
    return "\n\n".join("\n".join(block) for block in blocks)


def explain(plan: Plan) -> str:
    """Return a table of the parts of a step, with the duration of each part and a way to shorten it."""
    lines = ["The time of a step by part, and how to shorten each part:"]
    for name, seconds, remedy in limits(plan):
        lines.append(f"  {duration_text(seconds):>9s} {seconds / plan.time.total:4.0%}  {name}")
        lines += textwrap.wrap(remedy, WIDTH, initial_indent=" " * 18, subsequent_indent=" " * 18)
    lines += _wrapped(
        "The listed changes are not checked with a full plan, so they may not fit, or may make other parts longer. Add "
        "one to the command to see its effect."
    )
    return "\n".join(lines)


def _summary(plan: Plan, advice: Advice | None, price: float | None) -> list[str]:
    usable, worst = plan.accelerator.usable_bytes, plan.worst
    verdict = "yes, but tightly" if plan.is_tight else plan.verdict
    margin = f"; real peaks may be {MEMORY_MARGIN:.0%} higher" if plan.is_tight else ""
    phase = "LLM" if worst.phase == "llm" else worst.phase
    rows = [
        (
            "fits",
            f"{verdict}: the fullest rank needs {gib(worst.total)} of {gib(usable)} usable GiB (stage "
            f"{worst.stages[0]}, in the {phase} phase){margin}",
        )
    ]
    if plan.too_small:
        text = "too small to forecast: kernel launches and link latencies account for more than half of a step"
        rows.append(("time", f"{text} (at least {duration_text(plan.seconds_range[0])})"))
    else:
        low, high = plan.seconds_range
        rows.append(
            (
                "time",
                f"{range_text(low, high)} per step; {plan.recipe.train.steps:,} steps take "
                f"{range_text(plan.run_sec(low), plan.run_sec(high))}, without evaluations and checkpoints",
            )
        )
        rows.append(
            (
                "MFU",
                f"{plan.time.mfu:.1%} with causal attention, {plan.time.mfu_full_attention:.1%} as NVIDIA counts it",
            )
        )
        name, seconds, _ = limits(plan)[0]
        rows.append(("limited by", f"{name}, {seconds / plan.time.total:.0%} of the step"))
    rows += _advice(plan, advice)
    if price is not None and not plan.too_small:
        rows.append(("cost", f"{costs(plan, price)} for the run at {price:g} per accelerator-hour"))
    if plan.mechanisms.labels():
        rows.append(("WHAT IF", f"the trainer cannot run this: {', '.join(plan.mechanisms.labels())}"))
    lines = [f"{plan.recipe.name} on {plan.topology.world} x {plan.accelerator.name} ({_nodes(plan)})"]
    for name, text in rows:
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"  {name:12s}", subsequent_indent=" " * 14)
    return lines


def _nodes(plan: Plan) -> str:
    count = math.ceil(plan.topology.world / plan.accelerator.per_node)
    return f"{count} node{'s' if count > 1 else ''}"


def _advice(plan: Plan, advice: Advice | None) -> list[tuple[str, str]]:
    if advice is None or (plan.too_small and plan.fits):
        return []
    if not plan.fits:
        change = f"{advice.change[0]} fits" if advice.change else "no single change fits; try --fit, or more ranks"
        return [("would help", change)]
    rows = []
    if advice.change:
        rows.append(("would help", f"{advice.change[0]} makes a step {_faster(advice.change_speedup)} faster"))
    else:
        rows.append(("would help", "no single change to the layout makes the step faster and still fits into memory"))
    if advice.layout_speedup >= WORTH:
        rows.append(("", f"--fit makes a step {_faster(advice.layout_speedup)} faster: {' '.join(advice.layout)}"))
    return rows


def _faster(speedup: float) -> str:
    return f"{speedup - 1:.0%}"


def _model(plan: Plan) -> list[str]:
    topology, work, packs, recipe = plan.topology, plan.workload, plan.packs, plan.recipe
    total, learned = (sum(getattr(s, k) for s in plan.sizes.values()) for k in ("total", "learned"))
    padding = 1 - work.tokens / (packs.num_microbatches * packs.pack_tokens * topology.dp)
    context = f" x CP {topology.cp}" if topology.cp > 1 else ""
    virtual = f" ({topology.vp} virtual stages)" if topology.vp > 1 else ""
    return _wrapped(
        f"Layout: TP {topology.tp}{context} x PP {topology.pp}{virtual} x DP {topology.dp}, EP {topology.ep} (encoder "
        f"experts), {recipe.train.precision}; {count_text(total)} parameters, {count_text(learned)} of them trainable.",
        *_experts(plan),
        f"A step processes {len(work.num_tokens):,} samples, {work.audio_sec:,.0f} s of audio and {work.tokens:,} "
        f"tokens, in {packs.num_microbatches} packs of {packs.pack_tokens:,} tokens per replica; {padding:.1%} of the "
        "packs is padding.",
        *_stages(plan),
    )


def _data(plan: Plan) -> list[str]:
    """Return the table of datasets, and a paragraph on the balance and padding that their lengths cause."""
    balance = f"The busiest rank does {plan.encoder_balance:.2f} times the average encoder work per rank"
    work = f"{balance}, and {plan.encoder_padding:.0%} of the encoders' input is padding."
    data = plan.workload.data
    if data is None:
        mean = plan.workload.audio_sec / len(plan.workload.num_tokens)
        return _wrapped(
            f"The lengths of clips are assumed (log-normal with a mean of {mean:.1f} s; --audio-sec changes it), not "
            f"read from the data (--data). {work}"
        )
    rows = [["dataset", "samples", "hours", "share", "epochs", "mean s", "95 % s", "longest s", "too long"]]
    for one in data.datasets:
        lengths = one.lengths
        shown = (lengths.seconds.mean(), np.quantile(lengths.seconds, 0.95), lengths.seconds.max())
        count = f"{lengths.num_samples:,}"
        cells = [one.name, count, f"{lengths.hours:,.1f}", f"{one.share:.1%}", f"{one.epochs:.2f}"]
        rows.append([*cells, *(f"{sec:.1f}" for sec in shown), f"{lengths.num_too_long:,}"])
    notes = [work]
    if data.skipped_fraction > data.max_skipped_fraction:
        notes.insert(
            0,
            f"WARNING: {data.skipped_fraction:.1%} of the samples are longer than data.max_audio_sec, and the run "
            f"stops at data.max_skipped_fraction = {data.max_skipped_fraction:g}; raise one of them.",
        )
    return [*table(rows), *_wrapped(*notes)]


def _experts(plan: Plan) -> list[str]:
    """Return a paragraph about the FFN experts, if the LLM has any."""
    found = plan.experts
    if found is None:
        return []
    topology = plan.topology
    shared = f", and {topology.expert_tp} ranks share each expert" if topology.expert_tp > 1 else ""
    every = f" and to {found.num_shared} shared experts" if found.num_shared else ""
    null = f" and {found.num_null} null experts" if found.num_null else ""
    mean = " on average" if found.num_null else ""
    return [
        f"The LLM has {found.num_experts} experts{null} in each of {found.num_layers} layers and sends each token to "
        f"{found.top_k} of them{every}, so {count_text(found.active_parameters)} of its "
        f"{count_text(found.total_parameters)} parameters are used for a token{mean}. The experts are spread over "
        f"{topology.ffn_ep} ranks{shared}. A rank sends {gib(found.all_to_all_bytes)} GiB of tokens to experts per "
        "step. The memory estimate assumes that all experts are used equally; if all tokens chose experts on one rank, "
        f"its peak would be {gib(found.worst_bytes)} GiB higher."
    ]


_LLM_TEXT = {True: "", False: " without the LLM"}


def _stages(plan: Plan) -> list[str]:
    """Return a paragraph about the stages of training, if there are any."""
    stages = stages_of(plan.recipe.staged_optim, plan.recipe.train.steps) if plan.recipe.stages else ()
    if not stages:
        return []
    model = sized_model(plan.recipe)
    counts = [sum(s.learned for s in stage_sizes(model, stage).values()) for stage in stages]
    each = [
        f"{stage.name} ({stage.steps:,} steps{_LLM_TEXT[stage.runs_llm]}, {count_text(count)} trainable)"
        for stage, count in zip(stages, counts, strict=True)
    ]
    every_stage_runs_llm = all(stage.runs_llm for stage in stages)
    shorter = "" if every_stage_runs_llm else " The duration of all steps does not count the LLM in stages without it."
    return [
        f"Stages: {', '.join(each)}. Memory and time are for a step that trains every parameter that any stage trains; "
        f"the optimizer states of all stages are held from the beginning.{shorter}"
    ]


def _wrapped(*paragraphs: str) -> list[str]:
    return [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, WIDTH)]


def _memory(plan: Plan) -> list[str]:
    unit, name = (GIB, "GiB") if plan.worst.total >= GIB else (2**20, "MiB")
    rows = [["", "weights", "gradients", "optimizer", "LLM", "encoders", "buffers", "total", "peak in"]]
    for stages, kind in _fullest_by_stage(plan):
        parts = [kind.states.weights, kind.states.gradients, kind.states.optimizer]
        parts += (kind.activations, kind.encoder_activations, kind.buffers, kind.total)
        at = f", EP place {kind.place}" if plan.topology.ep > 1 else ""
        rows.append([f"stage {ranks_text(stages)}{at}", *(f"{part / unit:.2f}" for part in parts), kind.phase])
    device, whole = plan.accelerator, []
    kinds = f"{len(plan.kinds)} kind{'s' if len(plan.kinds) > 1 else ''} of ranks"
    places = ", and an EP place is a rank's position in its expert-parallel group" if plan.topology.ep > 1 else ""
    if plan.worst.whole_weights:
        whole = _wrapped(
            f"Buffers include the whole weights of the audio side ({gib(plan.worst.whole_weights)} GiB) and, in the "
            f"backward pass, their whole gradients ({gib(plan.worst.whole_gradients)} GiB). "
            "train.gather_audio_weights=per_module avoids both, but gathers the weights of each module in every "
            "encoder call."
        )
    return [
        *_wrapped(
            f"Peak memory in {name} on the fullest rank of each stage ({kinds} in total); "
            f"the columns LLM and encoders are activations{places}:"
        ),
        *table(rows),
        *whole,
        *_wrapped(
            f"{gib(device.usable_bytes)} GiB are usable: {device.memory_gib:g} minus {device.reserve_gib:g} for CUDA, "
            f"NCCL and fragmentation. LLM attention: {plan.attention}."
        ),
        *_host(plan),
    ]


def _host(plan: Plan) -> list[str]:
    host, disk, per_node = plan.host, plan.disk, min(plan.accelerator.per_node, plan.topology.world)
    parts = {
        "processes": host.processes,
        "loading": host.loading,
        "shared memory": host.shared,
        "pinned batches": host.pinned,
        "checkpoints": host.snapshot,
    }
    named = ", ".join(f"{name} {gib(number)}" for name, number in parts.items() if number)
    ranks = f"{per_node} rank{'s' if per_node != 1 else ''}"
    where = "in the bucket" if disk.in_bucket else "on the disk"
    shared = f", which share {bytes_text(disk.shared)} of weights that are not trained" if disk.shared else ""
    size = sum(one.lengths.num_bytes for one in plan.workload.data.datasets) if plan.workload.data else 0
    cache = f" The shards take {gib(size)} GiB. A node reads them once if they fit into its page cache." if size else ""
    return _wrapped(
        f"Host memory of a node with {ranks}: {gib(host.total)} GiB ({named}), without page cache.{cache}",
        f"A checkpoint takes {bytes_text(disk.checkpoint)}. Up to {disk.num_kept} exist at once{shared}, and take "
        f"{bytes_text(disk.run)} {where}.",
    )


def _fullest_by_stage(plan: Plan) -> list[tuple[list[int], RankMemory]]:
    """Return the kind of rank that needs the most memory in each stage, with consecutive stages of one kind merged.

    If there are many kinds, all stages except the first and the last are merged, and the fullest of them is returned.
    """
    found: list[tuple[list[int], RankMemory]] = []
    for stage in range(plan.topology.pp):
        kind = max((k for k in plan.kinds if stage in k.stages), key=lambda k: k.total)
        if found and found[-1][1] is kind:
            found[-1][0].append(stage)
        else:
            found.append(([stage], kind))
    if len(found) > _MAX_STAGES:
        middle = found[1:-1]
        stages = [stage for group, _ in middle for stage in group]
        found = [found[0], (stages, max((kind for _, kind in middle), key=lambda k: k.total)), found[-1]]
    return found


def _traffic(plan: Plan) -> list[str]:
    rows = [["sent per step by the busiest rank", "ranks", "bytes", "over", "seconds"]]
    for one in plan.traffic:
        over = "node" if one.within_node else "network"
        seconds = f"{one.seconds(plan.accelerator):.3f}"
        rows.append([one.name, str(one.ranks), bytes_text(one.bytes), over, seconds])
    note = (
        "The seconds are those of the transfers alone. Transfers that overlap with computation add less to a step; "
        "--explain shows how much."
    )
    return [*table(rows), *_wrapped(note)]


def _time(plan: Plan) -> list[str]:
    time, flops, device = plan.time, plan.flops, plan.accelerator
    share = f"{device.efficiency:.0%}" if device.efficiency else f"up to {device.matrix[-1][1]:.0%}"
    lines = [
        f"FLOPs per step: LLM {flops.llm:.3g}, encoders {flops.encoders:.3g}, recomputed {flops.recomputed:.3g}.",
        f"Expected step: {duration_text(time.total)} = encoders {duration_text(time.encoders)} + LLM "
        f"{duration_text(time.llm)} (bubble {time.bubble:.0%}) + exchange {duration_text(time.exchange)} + update "
        f"{duration_text(time.update)}. The range above is for assumed rates that are {UNCERTAINTY:.0%} better or "
        "worse.",
        f"Assumed, not measured here: matmuls reach {share} of the peak rate on the data sheet, "
        f"attention {device.attention_efficiency:.0%}, memory {device.memory_efficiency:.0%}, links "
        f"{device.link_efficiency:.0%}.",
    ]
    if not plan.too_small:
        whole, daily = (_amount(plan, steps) for steps in (plan.recipe.train.steps, plan.steps_per_day))
        lines.append(f"The run processes {whole} in {plan.recipe.train.steps:,} steps; per day, {daily}.")
    return _wrapped(*lines)


def _amount(plan: Plan, steps: float) -> str:
    work = plan.workload
    return f"{count_text(work.tokens * steps)} tokens and {work.audio_sec / 3600 * steps:,.0f} h of audio"


def duration_text(seconds: float) -> str:
    """Return a duration as text such as `23 ms`, `3.1 s`, `5.2 h` or `1.7 days`."""
    for limit, divisor, unit in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{_digits(seconds / divisor)} {unit}"
    return f"{_digits(seconds / 86_400)} days"


def range_text(low: float, high: float) -> str:
    """Return a range of durations as text such as `2.6–3.5 s`."""
    first, last = duration_text(low), duration_text(high)
    number, unit = first.split(" ", 1)
    return f"{number}–{last}" if last.endswith(f" {unit}") else f"{first}–{last}"


def _digits(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 100 else f"{number:,.0f}"


def costs(plan: Plan, price: float) -> str:
    """Return the range of the cost of all steps as text."""
    return "–".join(_digits(plan.cost(seconds, price)) for seconds in plan.seconds_range)
