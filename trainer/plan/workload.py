"""The work of one step: a global batch of typical lengths, and its distribution over ranks by the trainer's planners.

A recipe does not contain the durations of clips. Unless they are read from its data (`trainer/plan/data.py`), the plan
assumes log-normal durations, which are typical of speech corpora. They have a given mean and are limited to
`data.max_audio_sec`. Every sample is assumed to have the same number of text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from model.config import EncoderConfig
from model.encoders.registry import encoder_windowing
from model.errors import UserError
from model.lengths import SAMPLE_RATE, num_frames, num_samples
from trainer.config.schema import Recipe
from trainer.data.lanes import lanes_of_rank, permutation
from trainer.engine.placement import clip_cost, place
from trainer.parallel.dispatch import CALL_COST_SAMPLES, ClipTable, dispatch_of, group_by_length, plan_dispatch
from trainer.parallel.packs import PackPlan, plan_packs
from trainer.parallel.plan import Ints
from trainer.parallel.topology import Topology
from trainer.plan.data import DataSummary
from trainer.plan.sizes import SizedModel

SIGMA = 0.6
"""The assumed standard deviation of the logarithm of durations."""
DEFAULT_AUDIO_SEC, DEFAULT_TEXT_TOKENS = 10.0, 64


@dataclass(frozen=True)
class Workload:
    """The samples of a global batch, in lane order."""

    audio_samples: Ints
    """The total length of each sample's clips in audio samples, [n]; 0 if it has no clip."""
    num_tokens: Ints
    """The number of tokens of each sample, including audio tokens, [n]."""
    source_ranks: Ints
    """The rank that loads each sample, [n], in ascending order."""
    data: DataSummary | None = None
    """The datasets from which the lengths were read; None if the lengths are assumed."""
    num_clips: Ints | None = None
    """The number of clips of each sample, [n], which are taken to be equally long; None if no sample has several."""

    @cached_property
    def clips(self) -> tuple[Ints, Ints]:
        """The length of each clip in audio samples, and the rank that loads it, both [number of clips]."""
        ones = (self.audio_samples > 0).astype(np.int64)
        counts = ones if self.num_clips is None else self.num_clips * ones
        return np.repeat(self.audio_samples // np.maximum(1, counts), counts), np.repeat(self.source_ranks, counts)

    def loaded_by(self, rank: int) -> list[int]:
        """Return the lengths of the clips that a rank loads, in audio samples."""
        lengths, ranks = self.clips
        return [int(n) for n in lengths[ranks == rank]]

    @property
    def audio_sec(self) -> float:
        """The total duration of audio in seconds."""
        return float(self.audio_samples.sum()) / SAMPLE_RATE

    @property
    def tokens(self) -> int:
        """The total number of tokens, including audio tokens."""
        return int(self.num_tokens.sum())


def typical_workload(
    recipe: Recipe, topology: Topology, mean_audio_sec: float | None = None, text_tokens: int = DEFAULT_TEXT_TOKENS
) -> Workload:
    """Return a global batch of clips with typical durations, with as many samples as the recipe's global batches.

    Args:
        recipe: The recipe of the run.
        topology: The layout of the ranks.
        mean_audio_sec: The mean duration of a clip in seconds; None means 10 s, or half of `data.max_audio_sec` if that
            is less.
        text_tokens: The number of text tokens in each sample.

    Raises:
        UserError: If the mean is not positive or exceeds `data.max_audio_sec`, or if `text_tokens` is not positive.
    """
    data = recipe.data
    if mean_audio_sec is not None and not 0 < mean_audio_sec < math.inf:
        raise UserError(f"--audio-sec = {mean_audio_sec:g}: must be above 0 s")
    limit = data.max_audio_sec or 4 * (mean_audio_sec or DEFAULT_AUDIO_SEC)
    mean = min(DEFAULT_AUDIO_SEC, limit / 2) if mean_audio_sec is None else mean_audio_sec
    if mean > limit:
        raise UserError(f"--audio-sec = {mean:g}: must be within 0..{limit:g} s (data.max_audio_sec)")
    _check_text_tokens(text_tokens)
    seconds = _log_normal(data.global_batch_samples, mean, limit)
    seconds = seconds[permutation(len(seconds), "plan")]
    samples = np.array([max(1, num_samples(s)) for s in seconds], dtype=np.int64)
    audio_tokens = [recipe.model.adapter.rate.tokens_of_samples(int(n)) for n in samples]
    return Workload(samples, np.array(audio_tokens) + text_tokens, source_ranks_of(recipe, topology))


def data_workload(
    recipe: Recipe, topology: Topology, data: DataSummary, text_tokens: int = DEFAULT_TEXT_TOKENS
) -> Workload:
    """Return a global batch with the lengths of the recipe's own data.

    Args:
        recipe: The recipe of the run.
        topology: The layout of the ranks.
        data: The lengths of the samples.
        text_tokens: The number of text tokens in each sample.

    Raises:
        UserError: If `text_tokens` is not positive.
    """
    _check_text_tokens(text_tokens)
    seconds, clips = data.batch(recipe.data.global_batch_samples)
    order = permutation(len(seconds), "plan")
    seconds, clips = seconds[order], clips[order]
    each = [max(1, num_samples(s / max(1, count))) if s > 0 else 0 for s, count in zip(seconds, clips, strict=True)]
    rate, samples = recipe.model.adapter.rate, np.array(each, dtype=np.int64)
    audio_tokens = clips * np.array([rate.tokens_of_samples(n) if n else 0 for n in each])
    sources = source_ranks_of(recipe, topology)
    return Workload(samples * clips, audio_tokens + text_tokens, sources, data, clips)


def _check_text_tokens(text_tokens: int) -> None:
    if text_tokens < 1:
        raise UserError(f"--text-tokens = {text_tokens}: must be at least 1")


def source_ranks_of(recipe: Recipe, topology: Topology) -> Ints:
    """Return the rank that loads each sample of a global batch, in lane order."""
    per_lane = recipe.data.global_batch_samples // recipe.data.num_lanes
    lanes = [len(lanes_of_rank(rank, topology.world, recipe.data.num_lanes)) for rank in range(topology.world)]
    return np.repeat(np.arange(topology.world), np.array(lanes) * per_lane)


def _log_normal(count: int, mean: float, limit: float) -> NDArray[np.float64]:
    """Return evenly spaced quantiles of a log-normal distribution.

    Args:
        count: The number of quantiles.
        mean: The mean to which the quantiles are scaled.
        limit: The largest value. Larger quantiles are set to it.
    """
    normal = NormalDist()
    shape = np.exp(SIGMA * np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)]))
    low, high = 0.0, limit / float(shape.min())
    for _ in range(60):
        scale = (low + high) / 2
        if np.minimum(shape * scale, limit).mean() < mean:
            low = scale
        else:
            high = scale
    return np.minimum(shape * high, limit)


@dataclass(frozen=True)
class EncoderWork:
    """The work of every rank for encoders whose clips are dispatched together."""

    names: tuple[str, ...]
    """The names of these encoders."""
    calls: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]
    """The lengths of each call's clips in audio samples, indexed by [rank][encoder][call]."""
    cost: NDArray[np.float64]
    """The FLOPs of the forward passes of each rank, [number of ranks]."""
    moved_samples: int
    """The total number of audio samples that source ranks send to other ranks."""
    moved_frames: int
    """The total number of frames that encoder ranks send back to other ranks."""


def encoder_work(
    model: SizedModel, workload: Workload, topology: Topology, budget_samples: int, device: str
) -> list[EncoderWork]:
    """Return the work of the primary encoder, and the work of all encoder experts together.

    Every gate is assumed to distribute the clips evenly over the encoder experts.

    Args:
        model: The model that the recipe describes.
        workload: The samples of a step.
        topology: The layout of the ranks.
        budget_samples: The largest number of audio samples per encoder call.
        device: The type of device that the ranks run on, `cuda` or `cpu`.
    """
    samples, source_ranks = workload.clips
    config, found = model.config, []
    if config.primary is not None:
        every = np.ones((len(samples), 1), dtype=bool)
        found.append(
            _spread([config.primary], [0], 1, ClipTable(source_ranks, samples, every), topology, budget_samples, device)
        )
    if config.experts:
        placement, router = place(config, topology.ep), config.router
        count = len(config.experts)
        chosen = min(count, len(router.gates) * router.top_k)
        first = np.arange(len(samples))[:, None] + np.arange(chosen)
        wanted = np.zeros((len(samples), count), dtype=bool)
        np.put_along_axis(wanted, first % count, True, axis=1)
        table = ClipTable(source_ranks, samples, wanted)
        found.append(_spread(config.experts, placement.places, topology.ep, table, topology, budget_samples, device))
    return found


def _spread(
    encoders: Sequence[EncoderConfig],
    places: Sequence[int],
    ep: int,
    clips: ClipTable,
    topology: Topology,
    budget_samples: int,
    device: str,
) -> EncoderWork:
    world = topology.world
    plan = plan_dispatch(clips, [clip_cost(e) for e in encoders], places, ep, world)
    windowings = [encoder_windowing(e) for e in encoders]
    calls = []
    for rank in range(world):
        part = dispatch_of(plan, rank)
        mine: list[tuple[tuple[int, ...], ...]] = []
        for k, work in enumerate(part.work):
            lengths = [part.recv_lengths[i] for i in work]
            if ep > 1 and places[k] != rank % ep:
                mine.append(())
                continue
            groups = group_by_length(lengths, budget_samples, CALL_COST_SAMPLES[device], windowings[k])
            mine.append(tuple(tuple(lengths[i] for i in group) for group in groups if group))
        calls.append(tuple(mine))
    moved = np.flatnonzero(clips.source_rank[plan.clip] != plan.encoder_rank)
    once = np.unique(plan.encoder_rank[moved] * len(clips.source_rank) + plan.clip[moved]) % max(
        1, len(clips.source_rank)
    )
    return EncoderWork(
        tuple(e.name for e in encoders),
        tuple(calls),
        np.bincount(plan.encoder_rank, weights=plan.cost, minlength=world).astype(np.float64),
        int(clips.samples[once].sum()),
        int(num_frames(clips.samples[plan.clip[moved]]).sum()),
    )


def encoder_balance(work: Sequence[EncoderWork]) -> float:
    """Return the encoders' FLOPs on the busiest rank, divided by the mean over ranks; 1 without encoders."""
    cost = sum((one.cost for one in work), np.zeros(1))
    return float(cost.max() / cost.mean()) if cost.any() else 1.0


def encoder_padding(work: Sequence[EncoderWork]) -> float:
    """Return the fraction of the encoders' input that is padding, if each clip is padded to the longest in its call.

    The fraction is not exact for encoders that cut their clips into windows of a fixed length.
    """
    calls = [call for one in work for rank in one.calls for encoder in rank for call in encoder if call]
    padded = sum(max(call) * len(call) for call in calls)
    return 1 - sum(map(sum, calls)) / padded if padded else 0.0


def pack_work(recipe: Recipe, workload: Workload, topology: Topology) -> PackPlan:
    """Return the LLM's packs for the samples of a step."""
    train = recipe.train
    multiple = train.pack_multiple_tokens or topology.row_multiple
    budget = train.llm_tokens_per_microbatch
    return plan_packs(workload.num_tokens, topology.dp, budget, multiple, topology.microbatch_multiple)
