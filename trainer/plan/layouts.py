"""The layouts that the search of `earshot plan --fit` considers. The trainer accepts all of them.

A layout is divided into the LLM's settings and those of the audio side. Whether one part is legal does not depend
on the other, and a step's time is nearly the sum of what both contribute. The search therefore never has to enumerate
all combinations.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PretrainedConfig

from model.errors import UserError
from model.llm.families import mixture_of
from model.llm.stages import PARTIAL, Recompute
from trainer.config.checks import check_packs, check_recipe
from trainer.config.schema import Recipe
from trainer.engine.ds_config import Gathering
from trainer.parallel.topology import ParallelConfig, divisors

TOKENS = (2048, 4096, 8192, 16384, 32768)
"""The values of `train.llm_tokens_per_microbatch` that are tried."""
ENCODER_SEC = (120.0, 240.0, 480.0)
"""The values of `train.encoder_batch_sec` that are tried."""
RECOMPUTES: tuple[Recompute, ...] = ("none", "pointwise", "selective", "full")
_GATHERINGS: tuple[Gathering, ...] = ("per_update", "per_module")
_CHUNK_LAYERS, _ENDS = (2, 4), 2
AUDIO_KEYS = {
    "parallel": ("expert", "audio_shard"),
    "train": ("encoder_batch_sec", "gather_audio_weights", "recompute_encoders", "recompute_encoder_calls"),
}
"""The keys of a layout that belong to the audio side. All other keys that the search changes belong to the LLM."""


def llm_layouts(recipe: Recipe, config: PretrainedConfig, per_node: int) -> Iterator[Recipe]:
    """Yield copies of `recipe` with all legal LLM settings that the search considers.

    They differ in tensor parallelism and context parallelism (each within a node), pipeline parallelism, virtual
    stages, the overlap and the dtype of the gradient reduction, the tokens per micro-batch, and recomputation.

    Args:
        recipe: The recipe. It is one of the results.
        config: The configuration of the LLM.
        per_node: The number of ranks per node.
    """
    parallel, world = recipe.parallel, recipe.parallel.num_ranks
    within = [d for d in divisors(world) if d <= per_node]
    pipelines = [d for d in divisors(world) if d <= config.num_hidden_layers]
    tokens = list(dict.fromkeys([recipe.train.llm_tokens_per_microbatch, *TOKENS]))
    has_experts = mixture_of(config) is not None
    recomputes = [mode for mode in RECOMPUTES if not (has_experts and mode in PARTIAL)]
    unpacked = dataclasses.replace(recipe.train, pack_multiple_tokens=None)
    for tp, cp, pp in itertools.product(within, within, pipelines):
        if tp * cp > max(per_node, parallel.tensor * parallel.context):
            continue
        plain = dataclasses.replace(parallel, tensor=tp, context=cp, pipeline=pp, virtual_stages=1)
        if not _is_legal(dataclasses.replace(recipe, parallel=plain, train=unpacked)):
            continue
        virtual = [1] if has_experts else _virtual_stages(config.num_hidden_layers, pp, parallel.virtual_stages)
        for vp, reduction in itertools.product(virtual, _reductions(recipe, has_experts)):
            split = dataclasses.replace(plain, virtual_stages=vp, **reduction)
            yield from _with_packs(recipe, split, tokens, recomputes)


def audio_layouts(recipe: Recipe, config: PretrainedConfig, per_node: int) -> Iterator[Recipe]:
    """Yield copies of `recipe` with all legal settings of the audio side that the search considers.

    They differ in the keys `AUDIO_KEYS`. The audio side is divided among all ranks, among the ranks of a node, or among
    as many ranks as in the recipe.

    Args:
        recipe: The recipe. It is one of the results.
        config: The configuration of the LLM.
        per_node: The number of ranks per node.
    """
    parallel, train, world = recipe.parallel, recipe.train, recipe.parallel.num_ranks
    experts = [d for d in divisors(world) if d <= max(1, len(recipe.model.experts))]
    shards = dict.fromkeys([None, parallel.audio_shard, per_node])
    if parallel.audio_shard == world:
        shards.pop(None)  # None has the same meaning.
    batches = dict.fromkeys([train.encoder_batch_sec, *ENCODER_SEC])
    for ep, shard, gathering in itertools.product(experts, shards, _GATHERINGS):
        if shard is not None and shard >= world and shard != parallel.audio_shard:
            continue
        split = dataclasses.replace(parallel, expert=ep, audio_shard=shard)
        gathered = dataclasses.replace(train, gather_audio_weights=gathering)
        if not _is_legal(dataclasses.replace(recipe, parallel=split, train=gathered)):
            continue
        for seconds, layers, calls in itertools.product(batches, (False, True), (False, True)):
            changed = dataclasses.replace(
                gathered, encoder_batch_sec=seconds, recompute_encoders=layers, recompute_encoder_calls=calls
            )
            yield dataclasses.replace(recipe, parallel=split, train=changed)


def combined(llm: Recipe, audio: Recipe) -> Recipe:
    """Return `llm` with the audio side's settings of `audio`."""
    parallel, train = (
        dataclasses.replace(getattr(llm, name), **{key: getattr(getattr(audio, name), key) for key in keys})
        for name, keys in AUDIO_KEYS.items()
    )
    return dataclasses.replace(llm, parallel=parallel, train=train)


def changes_between(recipe: Recipe, variant: Recipe) -> list[str]:
    """Return the differences between `recipe` and `variant` as `key=value`."""
    found = []
    for section in ("data", "parallel", "train"):
        old, new = getattr(recipe, section), getattr(variant, section)
        for field in dataclasses.fields(old):
            value = getattr(new, field.name)
            if value != getattr(old, field.name):
                found.append(f"{section}.{field.name}={_text(value)}")
    return found


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower()


def _is_legal(recipe: Recipe) -> bool:
    try:
        check_recipe(recipe)
    except UserError:
        return False
    return True


def _reductions(recipe: Recipe, has_experts: bool) -> list[dict[str, Any]]:
    """Return the settings for the gradient reduction to try: those of the recipe, with overlap, and in bf16."""
    parallel = recipe.parallel
    overlaps = dict.fromkeys([(parallel.overlap_grad_reduce, parallel.overlap_param_gather), (True, True)])
    if has_experts or recipe.stages:  # Overlap is not allowed.
        overlaps.pop((True, True), None)
    dtypes = [parallel.grad_reduce_dtype]
    if recipe.train.precision == "bf16" and parallel.grad_reduce_dtype == "fp32":
        dtypes.append("bf16")
    return [
        {"overlap_grad_reduce": gradients, "overlap_param_gather": weights, "grad_reduce_dtype": dtype}
        for (gradients, weights), dtype in itertools.product(overlaps, dtypes)
    ]


def _with_packs(
    recipe: Recipe, split: ParallelConfig, tokens: Sequence[int], recomputes: Sequence[Recompute]
) -> Iterator[Recipe]:
    """Yield the variants with the parallelism `split`, one for each pack size and kind of recomputation."""
    for rows in tokens:
        packed = dataclasses.replace(recipe.train, llm_tokens_per_microbatch=rows)
        try:
            check_packs(packed, split)
        except UserError:
            continue
        for mode in recomputes:
            train = dataclasses.replace(packed, recompute_llm=mode)
            yield dataclasses.replace(recipe, parallel=split, train=train)


def _virtual_stages(num_layers: int, pp: int, current: int) -> list[int]:
    """Return the numbers of virtual stages to try.

    These are 1, the recipe's own number, and the numbers that lead to chunks of 2 or 4 layers. Only the first and the
    last chunk may then have fewer layers. If no number leads to such chunks, chunks of one layer are tried.
    """
    if pp == 1:
        return [1]
    most = num_layers // pp
    found = {vp for size in _CHUNK_LAYERS if (vp := -(-num_layers // (pp * size))) <= most}
    found = {vp for vp in found if -num_layers % (pp * vp) <= _ENDS} or {most}
    return sorted({1, *found, min(current, most)})
