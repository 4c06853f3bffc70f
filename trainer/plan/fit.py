"""A search for the fastest layout that fits, which estimates all legal layouts and plans the best ones in full."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from model.errors import UserError
from trainer.config.checks import check_packs, check_recipe
from trainer.config.schema import Recipe
from trainer.parallel.packs import PackPlan
from trainer.parallel.topology import Topology, build_topology, divisors
from trainer.plan.experts import expert_parameters
from trainer.plan.plan import Plan, Planner
from trainer.plan.states import FP32_BYTES, States
from trainer.plan.workload import EncoderWork, Workload

_MAX_FULL = 12
"""The largest number of candidates that are planned in full."""
_TOKENS = (2048, 4096, 8192, 16384, 32768)
"""The values of `train.llm_tokens_per_microbatch` that are tried."""


def fit(planner: Planner, recipe: Recipe, workload: Workload) -> tuple[Plan, list[str]]:
    """Return the plan of the fastest layout that fits into memory.

    The search varies the degrees of tensor parallelism (within a node), pipeline parallelism and expert parallelism,
    the tokens per micro-batch, and whether the LLM and the encoders recompute activations. The number of ranks, the
    global batch and the model do not change.

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
    pipelines = [d for d in divisors(world) if hf.num_hidden_layers % d == 0]
    experts = [d for d in divisors(world) if d <= max(1, len(recipe.model.experts))]
    tokens = sorted({*_TOKENS, recipe.train.llm_tokens_per_microbatch})
    unpacked = dataclasses.replace(recipe.train, pack_multiple_tokens=None)
    for tp, pp, ep in itertools.product(tensors, pipelines, experts):
        split = dataclasses.replace(parallel, tensor=tp, pipeline=pp, expert=ep)
        try:
            check_recipe(dataclasses.replace(recipe, parallel=split, train=unpacked))
        except UserError:
            continue
        for rows, llm, encoders in itertools.product(tokens, (False, True), (False, True)):
            train = dataclasses.replace(
                recipe.train, llm_tokens_per_microbatch=rows, recompute_llm=llm, recompute_encoders=encoders
            )
            try:
                check_packs(train, split)
            except UserError:
                continue
            yield dataclasses.replace(recipe, parallel=split, train=train)


def estimates(planner: Planner, recipe: Recipe, workload: Workload) -> Iterator[tuple[float, Recipe]]:
    """Yield (expected seconds of a step, recipe) for the variants that may fit."""
    accelerator = planner.accelerator
    placed: dict[object, tuple[Topology, list[EncoderWork], PackPlan]] = {}
    for variant in variants(planner, recipe):
        states = _rough_states(planner, variant)
        if states.total > accelerator.usable_bytes:
            continue
        key = (variant.parallel, variant.train.llm_tokens_per_microbatch)
        if key not in placed:
            placed[key] = planner.place(variant, workload)
        topology, work, packs = placed[key]
        if states.total + _rough_activations(planner, variant, packs) > accelerator.usable_bytes:
            continue
        _, _, time = planner.time(variant, workload, topology, work, packs, states)
        yield time.total, variant


def _rough_states(planner: Planner, variant: Recipe) -> States:
    """Estimate the model states of a rank of the first stage, which holds its share of the layers and the embedding."""
    parallel, size = variant.parallel, 2 if variant.train.precision == "bf16" else FP32_BYTES
    topology, parts = build_topology(parallel, parallel.num_ranks), planner.parts
    dp = topology.dp
    audio = sum(parts.experts.values(), parts.shared)

    def share(kind: str) -> float:
        layers = getattr(parts.layers, kind)
        experts = layers * expert_parameters(planner.model.llm) / max(1, parts.layers.total)
        held = experts / parallel.pipeline / (topology.ffn_ep * topology.expert_tp)
        stage = (layers - experts) / parallel.pipeline + getattr(parts.embedding, kind)
        return float(stage / parallel.tensor + held)

    total, learned = share("total"), share("learned")
    shared = audio.total / parallel.num_ranks
    master = 3 if size < FP32_BYTES else 2
    return States(
        int(total * size + shared * size),
        int(learned * FP32_BYTES + shared * FP32_BYTES),
        int((learned / dp + shared) * FP32_BYTES * master),
    )


def _rough_activations(planner: Planner, variant: Recipe, packs: PackPlan) -> float:
    """Return a lower bound of the number of bytes that the LLM's layers keep for the backward pass.

    With recomputation, a layer keeps its input. Without recomputation, a layer keeps 34 bytes per bf16 hidden value
    (Korthikanti et al. 2022), of which 24 are counted here.
    """
    parallel, train, hf = variant.parallel, variant.train, planner.model.llm
    rows, count = packs.pack_tokens, packs.num_microbatches
    each = rows * hf.hidden_size / parallel.tensor * (2 if train.recompute_llm else 24)
    in_flight = min(parallel.pipeline, count)
    return each * (2 if train.precision == "fp32" else 1) * hf.num_hidden_layers / parallel.pipeline * in_flight


def changes_between(recipe: Recipe, variant: Recipe) -> list[str]:
    """Return the differences between `recipe` and `variant` as `key=value`."""
    found = []
    for section in ("parallel", "train"):
        old, new = getattr(recipe, section), getattr(variant, section)
        for field in dataclasses.fields(old):
            value = getattr(new, field.name)
            if value != getattr(old, field.name):
                found.append(f"{section}.{field.name}={str(value).lower()}")
    return found
