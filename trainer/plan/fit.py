"""A search for the fastest layout that fits into memory.

The search estimates the LLM's settings and those of the audio side separately, since their times and their memory
nearly add up. It then plans pairs of such settings in full, in the order of their estimated times, until a pair fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError
from trainer.config.schema import Recipe
from trainer.parallel.packs import PackPlan
from trainer.parallel.topology import Topology, build_topology
from trainer.plan.encoder_memory import EncoderTracer
from trainer.plan.experts import expert_parameters
from trainer.plan.layouts import audio_layouts, changes_between, combined, llm_layouts
from trainer.plan.llm_memory import interleaved_in_flight
from trainer.plan.plan import Plan
from trainer.plan.planner import Planner
from trainer.plan.sizes import Size
from trainer.plan.states import FP32_BYTES, States
from trainer.plan.workload import EncoderWork, Workload

_MAX_FULL = 24
"""The largest number of candidates that are planned in full."""
_MAX_LISTED = 200_000
"""The largest number of candidates that are considered. Those with the shortest estimated times are chosen."""
_LEAST_GAIN = 1.01
"""The factor by which a layout with bf16 gradients must be faster than one with fp32 gradients to be preferred."""
_BOUND = 0.95
"""The factor by which traced activations are multiplied to get a lower bound, since stages differ."""


@dataclass(frozen=True)
class _Half:
    """The settings of the LLM or of the audio side, and their contribution to a step. Bytes are lower bounds."""

    recipe: Recipe
    seconds: float
    """The time of a step with these settings, and with the recipe's settings for the other half."""
    states: float
    """The bytes of the model states of this half."""
    in_llm: float
    """The bytes of activations and buffers while the LLM runs."""
    backward: float
    """The bytes of activations and buffers in the backward pass of the audio side."""


@dataclass(frozen=True)
class Candidate:
    """A layout whose step time and memory have been estimated."""

    seconds: float
    """The estimated seconds of a step."""
    in_llm: float
    """A lower bound of the memory on the fullest rank while the LLM runs, in bytes."""
    backward: float
    """A lower bound of the memory on the fullest rank in the backward pass of the audio side, in bytes."""
    recipe: Recipe


class Search:
    """The estimated layouts of a recipe.

    Args:
        planner: The planner of the recipe.
        recipe: The recipe. The number of ranks, the global batch and the model do not change.
        workload: The samples of a step.
    """

    def __init__(self, planner: Planner, recipe: Recipe, workload: Workload) -> None:
        self.planner, self.recipe, self.workload = planner, recipe, workload
        self.usable = planner.accelerator.usable_bytes
        config, per_node = planner.model.llm, planner.accelerator.per_node
        self._units: dict[str, float] = {}
        self._base_audio = _audio_states(planner, recipe)
        self._base_llm = _llm_states(planner, recipe)
        self.llm = self._unique(llm_layouts(recipe, config, per_node))
        self.audio = [self._audio_half(variant) for variant in audio_layouts(recipe, config, per_node)]
        topology, work, packs = planner.place(recipe, workload)
        self._seconds = self._time(recipe, topology, work, packs)

    def candidates(self) -> Iterator[Candidate]:
        """Yield the layouts that may fit into memory, in the order of their estimated times.

        Where gradients in bf16 would save less than 1 % of the time, the same layout with fp32 gradients comes first.
        """
        times = np.array([one.seconds for one in self.llm])[:, None] + [one.seconds for one in self.audio]
        in_llm, backward = (self._bytes(phase) for phase in ("in_llm", "backward"))
        halved = [one.recipe.parallel.grad_reduce_dtype != self.recipe.parallel.grad_reduce_dtype for one in self.llm]
        keys = (times - self._seconds) * np.where(halved, _LEAST_GAIN, 1.0)[:, None]
        keys[np.maximum(in_llm, backward) > self.usable] = np.inf
        count = min(int(np.isfinite(keys).sum()), _MAX_LISTED)
        first = np.argpartition(keys, min(count, keys.size - 1), axis=None)[: count + 1]
        for at in first[np.argsort(keys.ravel()[first], kind="stable")][:count]:
            i, j = divmod(int(at), len(self.audio))
            recipe = combined(self.llm[i].recipe, self.audio[j].recipe)
            yield Candidate(float(times[i, j]) - self._seconds, float(in_llm[i, j]), float(backward[i, j]), recipe)

    def single_changes(self) -> list[Candidate]:
        """Return the layouts that may fit into memory and differ from the recipe in one key, fastest first.

        The dtype of gradients is never the changed key, because it changes the learned weights and not only the layout.
        """
        found = []
        for halves, others in ((self.llm, self.audio), (self.audio, self.llm)):
            # The recipe's own settings for the other half are missing if they do not fit.
            other = next((one for one in others if one.recipe == self.recipe), _Half(self.recipe, 0, 0, 0, 0))
            for half in halves:
                if half.recipe.parallel.grad_reduce_dtype != self.recipe.parallel.grad_reduce_dtype:
                    continue
                if len(changes_between(self.recipe, half.recipe)) != 1:
                    continue
                states = half.states + other.states
                in_llm, backward = states + half.in_llm + other.in_llm, states + half.backward + other.backward
                if max(in_llm, backward) <= self.usable:
                    found.append(Candidate(half.seconds, in_llm, backward, half.recipe))
        return sorted(found, key=lambda one: one.seconds)

    def _bytes(self, phase: str) -> NDArray[np.float64]:
        """Return the lower bound of the memory in a phase for every pair of halves, [LLM, audio]."""
        llm, audio = (np.array([h.states + getattr(h, phase) for h in halves]) for halves in (self.llm, self.audio))
        found: NDArray[np.float64] = llm[:, None] + audio
        return found

    def _unique(self, variants: Iterable[Recipe]) -> list[_Half]:
        """Return the LLM's halves that may fit. Of halves that lead to equal packs, only the first is returned."""
        found: dict[object, _Half] = {}
        for variant in variants:
            states = _llm_states(self.planner, variant)
            if states.total > self.usable:
                continue
            topology, work, packs = self.planner.place(variant, self.workload)
            train = dataclasses.replace(variant.train, llm_tokens_per_microbatch=1)
            key = (variant.parallel, train, packs.num_microbatches, packs.pack_tokens)
            activations = self._activations(variant, topology, packs)
            if key in found or states.total + activations > self.usable:
                continue
            seconds = self._time(variant, topology, work, packs)
            found[key] = _Half(variant, seconds, states.total, activations, 0.0)
        return list(found.values())

    def _audio_half(self, variant: Recipe) -> _Half:
        topology, work, packs = self.planner.place(variant, self.workload)
        kept, call = _kept(self.planner.tracer(variant), work, variant.train.recompute_encoder_calls)
        whole, gradients = _whole_bytes(self.planner, variant, topology)
        seconds, states = self._time(variant, topology, work, packs), _audio_states(self.planner, variant)
        return _Half(variant, seconds, states.total, whole + kept, whole + gradients + kept + call)

    def _time(self, variant: Recipe, topology: Topology, work: Sequence[EncoderWork], packs: PackPlan) -> float:
        states = _llm_states(self.planner, variant) + _audio_states(self.planner, variant)
        return self.planner.time(variant, self.workload, topology, work, packs, states)[2].total

    def _activations(self, variant: Recipe, topology: Topology, packs: PackPlan) -> float:
        """Return a lower bound of the bytes of the LLM's activations on the first stage."""
        parallel, train, hf = variant.parallel, variant.train, self.planner.model.llm
        size = 2 if train.precision == "bf16" else FP32_BYTES
        values = packs.pack_tokens / (parallel.context * parallel.tensor) * hf.hidden_size * size
        in_flight = interleaved_in_flight(0, parallel.pipeline, packs.num_microbatches, parallel.virtual_stages)
        layers = hf.num_hidden_layers / parallel.pipeline * in_flight * self._unit(variant)
        whole = self._unit(dataclasses.replace(variant, train=dataclasses.replace(train, recompute_llm="none")))
        again = whole if train.recompute_llm == "full" else 0.0
        return float(values * (_BOUND * (layers + again) + 2 * packs.num_microbatches))

    def _unit(self, variant: Recipe) -> float:
        """Return the bytes that a layer keeps, divided by the bytes of its input, as traced without parallelism."""
        mode = variant.train.recompute_llm
        if mode not in self._units:
            self._units[mode] = self.planner.layer_unit(variant)
        return self._units[mode]


def fit(planner: Planner, recipe: Recipe, workload: Workload) -> tuple[Plan, list[str]]:
    """Return the plan of the fastest layout that fits into memory.

    The search considers the layouts of `trainer.plan.layouts`. The number of ranks, the global batch and the model do
    not change.

    Returns:
        The plan, and the differences between its recipe and `recipe` as `key=value`.

    Raises:
        UserError: If nothing fits. The message describes the candidate that needs the least memory.
    """
    found, closest = first_that_fits(planner, workload, Search(planner, recipe, workload).candidates(), _MAX_FULL)
    if found is not None:
        return found, changes_between(recipe, found.recipe)
    if closest is None:
        raise UserError(
            f"--fit: no layout of parallel.num_ranks = {recipe.parallel.num_ranks} is legal for this model and can "
            "hold its weights; use more ranks"
        )
    changes = " ".join(changes_between(recipe, closest.recipe)) or "the recipe without changes"
    raise UserError(f"--fit: found no layout that fits; with {changes}, {closest.misfit}; use more ranks")


def first_that_fits(
    planner: Planner, workload: Workload, candidates: Iterable[Candidate], tries: int
) -> tuple[Plan | None, Plan | None]:
    """Plan candidates in full until one fits.

    If a candidate does not fit, the bounds of later candidates are scaled by the error of its bound. The bound for the
    LLM's phase is scaled only for similar LLM settings, and the other bound only for similar settings of the
    audio side.

    Args:
        planner: The planner.
        workload: The samples of a step.
        candidates: The candidates, fastest first.
        tries: The largest number of candidates that are planned.

    Returns:
        The plan of the first candidate that fits, or None; and, of those that do not fit, the plan that needs the least
        memory, or None.
    """
    closest: Plan | None = None
    errors: dict[tuple[object, ...], float] = {}
    for one in candidates:
        parallel, train = one.recipe.parallel, one.recipe.train
        llm = (parallel.tensor, parallel.context, parallel.pipeline, train.recompute_llm)
        audio = (
            *(parallel.expert, train.encoder_batch_sec, train.gather_audio_weights),
            *(train.recompute_encoders, train.recompute_encoder_calls),
        )
        needed = max(one.in_llm * errors.get(llm, 1.0), one.backward * errors.get(audio, 1.0))
        if needed > planner.accelerator.usable_bytes:
            continue
        plan = planner.plan(one.recipe, workload)
        if plan.fits:
            return plan, closest
        kind, bound = (llm, one.in_llm) if plan.worst.phase == "llm" else (audio, one.backward)
        errors[kind] = plan.worst.total / bound if bound else 1.0
        if closest is None or plan.worst.total < closest.worst.total:
            closest = plan
        tries -= 1
        if not tries:
            break
    return None, closest


def _llm_states(planner: Planner, variant: Recipe) -> States:
    """Estimate the LLM's states on a rank of the first stage, which holds its share of the layers and the embedding."""
    parallel, size = variant.parallel, 2 if variant.train.precision == "bf16" else FP32_BYTES
    topology, parts = build_topology(parallel, parallel.num_ranks), planner.parts

    def share(kind: str) -> float:
        layers = getattr(parts.layers, kind)
        experts = layers * expert_parameters(planner.model.llm) / max(1, parts.layers.total)
        held = experts / parallel.pipeline / (topology.ffn_ep * topology.expert_tp)
        stage = (layers - experts) / parallel.pipeline + getattr(parts.embedding, kind)
        return float(stage / parallel.tensor + held)

    learned, gradient = share("learned"), 2 if parallel.grad_reduce_dtype == "bf16" else FP32_BYTES
    optimizer = learned / topology.without_context.dp * FP32_BYTES * (3 if size < FP32_BYTES else 2)
    return States(int(share("total") * size), int(learned * gradient), int(optimizer))


def _audio_states(planner: Planner, variant: Recipe) -> States:
    """Estimate the audio side's states on a rank."""
    size, parts = 2 if variant.train.precision == "bf16" else FP32_BYTES, planner.parts
    ranks = build_topology(variant.parallel, variant.parallel.num_ranks).shard_ranks
    audio = sum(parts.experts.values(), parts.shared)
    learned = audio.learned / ranks * FP32_BYTES
    return States(int(audio.total / ranks * size), int(learned), int(3 * learned))


def _whole_bytes(planner: Planner, variant: Recipe, topology: Topology) -> tuple[float, float]:
    """Return lower bounds of the bytes of the audio side's whole weights and whole gradients on a rank."""
    if variant.train.gather_audio_weights != "per_update":
        return 0, 0
    size = 2 if variant.train.precision == "bf16" else FP32_BYTES
    parts = planner.parts
    experts = sum(parts.experts.values(), Size())
    total, learned = (getattr(parts.shared, n) + getattr(experts, n) / topology.ep for n in ("total", "learned"))
    return total * size, learned * FP32_BYTES


def _kept(tracer: EncoderTracer, work: Sequence[EncoderWork], recompute_calls: bool) -> tuple[float, float]:
    """Return lower bounds of the bytes that encoder calls keep, and of what the backward pass needs on top.

    The bounds are for the rank with the most work of the primary encoder. Calls that run again keep only their clips
    until the backward pass.
    """
    rank = int(work[0].cost.argmax())
    calls = [
        (tracer.calls(name), call)
        for one in work
        for name, some in zip(one.names, one.calls[rank], strict=True)
        for call in some
    ]
    sizes = [max(0.0, cost.kept(call)) for cost, call in calls]
    if recompute_calls:
        return float(sum(sum(call) for _, call in calls)) * FP32_BYTES, max(sizes, default=0.0)
    return sum(sizes), 0.0


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
            f"--tokens-per-update {tokens_per_update:,.0f}: one sample in each of data.num_lanes = {lanes} has "
            f"{lanes * mean:,.0f} tokens; allow more, or lower data.num_lanes"
        )
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, global_batch_samples=samples))
