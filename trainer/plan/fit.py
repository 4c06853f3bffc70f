"""A search for the fastest layout that fits into memory. All valid layouts are estimated, and the best are planned."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from model.errors import UserError
from model.llm.families import mixture_of
from model.llm.stages import Recompute
from trainer.config.checks import check_packs, check_recipe
from trainer.config.schema import Recipe
from trainer.parallel.packs import PackPlan
from trainer.parallel.topology import ParallelConfig, Topology, build_topology, divisors
from trainer.plan.encoder_memory import audio_memory
from trainer.plan.experts import expert_parameters
from trainer.plan.llm_memory import interleaved_in_flight
from trainer.plan.memory import fullest_rank
from trainer.plan.plan import Plan, Planner
from trainer.plan.sizes import Size
from trainer.plan.states import FP32_BYTES, States
from trainer.plan.workload import EncoderWork, Workload

_MAX_FULL = 12
"""The largest number of candidates that are planned in full."""
_TOKENS = (2048, 4096, 8192, 16384, 32768)
"""The values of `train.llm_tokens_per_microbatch` that are tried."""
_RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
_CHUNK_LAYERS, _ENDS = (2, 4), 2
_KEPT = {"none": 24, "selective": 16, "full": 2}
"""A lower bound of the bytes that a layer keeps per bf16 hidden value, by `train.recompute_llm`."""


def fit(planner: Planner, recipe: Recipe, workload: Workload) -> tuple[Plan, list[str]]:
    """Return the plan of the fastest layout that fits into memory.

    The search varies the sizes of tensor parallelism (within a node), pipeline parallelism and expert parallelism, the
    number of virtual stages, the tokens per micro-batch, the recomputation in the LLM and in the encoders, whether the
    exchange between replicas overlaps with computation, and whether ZeRO-3 divides the audio side among all ranks or
    among those of a node. The number of ranks, the global batch, the dtype in which gradients are reduced and the model
    do not change.

    Returns:
        The plan, and the differences between its recipe and `recipe` as `key=value`.

    Raises:
        UserError: If nothing fits. The message describes the candidate that needs the least memory.
    """
    timed = sorted(estimates(planner, recipe, workload), key=lambda item: item[0])
    if not timed:
        raise UserError(
            f"--fit: no layout of parallel.num_ranks = {recipe.parallel.num_ranks} is legal for this model and can "
            "hold its weights; use more ranks"
        )
    closest: Plan | None = None
    for _, variant in timed[:_MAX_FULL]:
        plan = planner.plan(variant, workload)
        if plan.fits:
            return plan, changes_between(recipe, variant)
        if closest is None or plan.worst.total < closest.worst.total:
            closest = plan
    assert closest is not None
    closest.check_fits()
    raise AssertionError("check_fits accepted a plan that does not fit")


def variants(planner: Planner, recipe: Recipe) -> Iterator[Recipe]:
    """Yield every layout that the search considers. The trainer accepts all of them."""
    world, parallel, hf = recipe.parallel.num_ranks, recipe.parallel, planner.model.llm
    tensors = [d for d in divisors(world) if d <= planner.accelerator.per_node]
    pipelines = [d for d in divisors(world) if d <= hf.num_hidden_layers]
    experts = [d for d in divisors(world) if d <= max(1, len(recipe.model.experts))]
    tokens = list(dict.fromkeys([recipe.train.llm_tokens_per_microbatch, *_TOKENS]))
    unpacked = dataclasses.replace(recipe.train, pack_multiple_tokens=None)
    overlaps = dict.fromkeys([(parallel.overlap_grad_reduce, parallel.overlap_param_gather), (True, True)])
    has_experts = mixture_of(hf) is not None
    if has_experts or recipe.stages:  # Overlap is not allowed.
        overlaps = dict.fromkeys([(parallel.overlap_grad_reduce, parallel.overlap_param_gather)])
    recomputes = [mode for mode in _RECOMPUTES if not (has_experts and mode == "selective")]
    for tp, pp, ep in itertools.product(tensors, pipelines, experts):
        plain = dataclasses.replace(parallel, tensor=tp, pipeline=pp, expert=ep, virtual_stages=1, audio_shard=None)
        try:
            check_recipe(dataclasses.replace(recipe, parallel=plain, train=unpacked))
        except UserError:
            continue
        virtual = [1] if has_experts else _virtual_stages(hf.num_hidden_layers, pp, parallel.virtual_stages)
        shards = _shards(recipe, ep, planner.accelerator.per_node)
        for vp, (gradients, weights), shard in itertools.product(virtual, overlaps, shards):
            split = dataclasses.replace(
                plain,
                virtual_stages=vp,
                overlap_grad_reduce=gradients,
                overlap_param_gather=weights,
                audio_shard=shard,
            )
            yield from _with_packs(recipe, split, tokens, recomputes)


def _shards(recipe: Recipe, ep: int, per_node: int) -> list[int | None]:
    """Return the values of `parallel.audio_shard` to try: none, that of the recipe, and the ranks of a node."""
    world = recipe.parallel.num_ranks
    if recipe.train.gather_audio_weights != "per_update":
        return [None]
    found = dict.fromkeys([recipe.parallel.audio_shard, per_node])
    return [None, *(n for n in found if n is not None and n < world and world % n == 0 and n % ep == 0)]


def _with_packs(
    recipe: Recipe, split: ParallelConfig, tokens: Sequence[int], recomputes: Sequence[Recompute]
) -> Iterator[Recipe]:
    """Yield the variants with the parallelism `split`, one for each pack size and combination of recomputations."""
    for rows in tokens:
        packed = dataclasses.replace(recipe.train, llm_tokens_per_microbatch=rows)
        try:
            check_packs(packed, split)
        except UserError:
            continue
        for llm, layers, calls in itertools.product(recomputes, (False, True), (False, True)):
            train = dataclasses.replace(
                packed, recompute_llm=llm, recompute_encoders=layers, recompute_encoder_calls=calls
            )
            yield dataclasses.replace(recipe, parallel=split, train=train)


def _virtual_stages(num_layers: int, pp: int, current: int) -> list[int]:
    """Return the numbers of virtual stages to try.

    These are 1, the recipe's own number, and the numbers that lead to chunks of 2 or 4 layers, where at most the first
    and the last chunk have fewer layers. If no number leads to such chunks, chunks of one layer are tried.
    """
    if pp == 1:
        return [1]
    most = num_layers // pp
    found = {vp for size in _CHUNK_LAYERS if (vp := -(-num_layers // (pp * size))) <= most}
    found = {vp for vp in found if -num_layers % (pp * vp) <= _ENDS} or {most}
    return sorted({1, *found, min(current, most)})


def estimates(planner: Planner, recipe: Recipe, workload: Workload) -> Iterator[tuple[float, Recipe]]:
    """Yield (expected seconds of a step, recipe) for the variants that may fit into memory."""
    accelerator = planner.accelerator
    seen: set[object] = set()
    placed: dict[tuple[int, ...], tuple[Topology, list[EncoderWork], PackPlan]] = {}
    audio: dict[tuple[int, bool, bool], tuple[int, int]] = {}
    for variant in variants(planner, recipe):
        states = _rough_states(planner, variant)
        if states.total > accelerator.usable_bytes:
            continue
        parallel = variant.parallel
        key = (
            *(parallel.tensor, parallel.pipeline, parallel.expert, parallel.virtual_stages),
            variant.train.llm_tokens_per_microbatch,
        )
        if key not in placed:
            placed[key] = planner.place(variant, workload)
        topology, work, packs = placed[key]
        topology = dataclasses.replace(topology, shard=build_topology(parallel, parallel.num_ranks).shard)
        train = dataclasses.replace(variant.train, llm_tokens_per_microbatch=1)
        if (same := (parallel, train, packs.num_microbatches, packs.pack_tokens)) in seen:
            continue  # Another limit on the tokens of a pack has led to the same packs.
        seen.add(same)
        train = variant.train
        encoders = (topology.ep, train.recompute_encoders, train.recompute_encoder_calls)
        if encoders not in audio:
            audio[encoders] = _audio_activations(planner, variant, workload, topology, work)
        kept, backward = audio[encoders]
        weights, gradients = _rough_whole_weights(planner, variant, topology)
        activations = weights + max(kept + _rough_activations(planner, variant, packs), backward + gradients)
        if states.total + activations > accelerator.usable_bytes:
            continue
        _, _, time = planner.time(variant, workload, topology, work, packs, states)
        yield time.total, variant


def _rough_states(planner: Planner, variant: Recipe) -> States:
    """Estimate the model states of a rank of the first stage, which holds its share of the layers and the embedding."""
    parallel, size = variant.parallel, 2 if variant.train.precision == "bf16" else FP32_BYTES
    topology, parts = build_topology(parallel, parallel.num_ranks), planner.parts
    dp = topology.without_context.dp
    audio = sum(parts.experts.values(), parts.shared)

    def share(kind: str) -> float:
        layers = getattr(parts.layers, kind)
        experts = layers * expert_parameters(planner.model.llm) / max(1, parts.layers.total)
        held = experts / parallel.pipeline / (topology.ffn_ep * topology.expert_tp)
        stage = (layers - experts) / parallel.pipeline + getattr(parts.embedding, kind)
        return float(stage / parallel.tensor + held)

    total, learned = share("total"), share("learned")
    shared = audio.total / topology.shard_ranks
    master = 3 if size < FP32_BYTES else 2
    return States(
        int(total * size + shared * size),
        int(learned * FP32_BYTES + shared * FP32_BYTES),
        int((learned / dp + shared) * FP32_BYTES * master),
    )


def _rough_activations(planner: Planner, variant: Recipe, packs: PackPlan) -> float:
    """Return a lower bound of the number of bytes that the LLM's layers keep for the backward pass.

    With full recomputation, a layer keeps its input. Without recomputation, a layer keeps 34 bytes per bf16 hidden
    value (Korthikanti et al. 2022), of which 24 are counted here.
    """
    parallel, train, hf = variant.parallel, variant.train, planner.model.llm
    rows, count = packs.pack_tokens / parallel.context, packs.num_microbatches
    each = rows * hf.hidden_size / parallel.tensor * _KEPT[train.recompute_llm]
    in_flight = interleaved_in_flight(0, parallel.pipeline, count, parallel.virtual_stages)
    return each * (2 if train.precision == "fp32" else 1) * hf.num_hidden_layers / parallel.pipeline * in_flight


def _rough_whole_weights(planner: Planner, variant: Recipe, topology: Topology) -> tuple[float, float]:
    """Return lower bounds of the bytes of the audio side's whole weights and whole gradients on a rank."""
    if variant.train.gather_audio_weights != "per_update":
        return 0, 0
    size = 2 if variant.train.precision == "bf16" else FP32_BYTES
    parts = planner.parts
    experts = sum(parts.experts.values(), Size())
    total, learned = (getattr(parts.shared, n) + getattr(experts, n) / topology.ep for n in ("total", "learned"))
    return total * size, learned * FP32_BYTES


def _audio_activations(
    planner: Planner, variant: Recipe, workload: Workload, topology: Topology, work: Sequence[EncoderWork]
) -> tuple[int, int]:
    """Return the bytes that the audio side keeps while the LLM runs, and the bytes at the peak of its backward pass.

    Both are for the rank whose encoder calls keep the most memory, and do not include ZeRO-3's buffers.
    """
    tracer = planner.tracer(variant)
    rank = fullest_rank(tracer, work, range(topology.world))
    loaded = [int(n) for n in workload.audio_samples[workload.source_ranks == rank] if n]
    found = audio_memory(tracer, work, rank, loaded, 0, 0, variant.train.recompute_encoder_calls)
    return found.kept, found.kept + found.backward


def batch_within(recipe: Recipe, workload: Workload, tokens_per_update: float) -> Recipe:
    """Return the recipe with the largest global batch whose tokens do not exceed a limit.

    Args:
        recipe: The recipe. The number of samples in the result is a multiple of its `data.num_lanes`.
        workload: A typical global batch, from which the mean number of tokens per sample is taken.
        tokens_per_update: The largest number of tokens per update.

    Raises:
        UserError: If one sample per lane already has more tokens.
    """
    lanes, mean = recipe.data.num_lanes, workload.tokens / len(workload.num_tokens)
    samples = int(tokens_per_update / mean / lanes) * lanes
    if samples < 1:
        raise UserError(
            f"--tokens-per-update {tokens_per_update:g}: one sample in each of data.num_lanes = {lanes} has "
            f"{lanes * mean:,.0f} tokens; allow more, or lower data.num_lanes"
        )
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, global_batch_samples=samples))


def changes_between(recipe: Recipe, variant: Recipe) -> list[str]:
    """Return the differences between `recipe` and `variant` as `key=value`."""
    found = []
    for section in ("data", "parallel", "train"):
        old, new = getattr(recipe, section), getattr(variant, section)
        for field in dataclasses.fields(old):
            value = getattr(new, field.name)
            if value != getattr(old, field.name):
                text = "null" if value is None else str(value).lower()
                found.append(f"{section}.{field.name}={text}")
    return found
