"""Tests of the global batch that a plan assumes, and of the table of accelerators."""

from __future__ import annotations

import numpy as np
import pytest

from model.encoders.registry import encoder_windowing
from model.errors import UserError
from model.lengths import num_samples
from trainer.config.load import load_recipe
from trainer.data.lanes import lanes_of_rank
from trainer.engine.placement import place
from trainer.parallel.topology import build_topology
from trainer.plan.accelerator import KNOWN, parse_accelerator
from trainer.plan.sizes import sized_model
from trainer.plan.workload import encoder_work, pack_work, source_ranks_of, typical_workload


@pytest.mark.parametrize(("mean", "expected"), [(None, 10.0), (3.0, 3.0), (45.0, 45.0)])
def test_clips_have_the_wanted_mean_and_are_not_too_long(mean: float | None, expected: float) -> None:
    recipe = load_recipe("mowe_70b")
    found = typical_workload(recipe, build_topology(recipe.parallel, 128), mean)
    assert found.audio_sec / recipe.data.global_batch_samples == pytest.approx(expected, rel=1e-3)
    assert 0 < found.audio_samples.min() and found.audio_samples.max() <= num_samples(60)


def test_an_impossible_mean_is_refused() -> None:
    recipe = load_recipe("mowe_70b")
    with pytest.raises(UserError, match=r"--audio-sec = 61: must be within 0\.\.60 s \(data\.max_audio_sec\)"):
        typical_workload(recipe, build_topology(recipe.parallel, 128), 61.0)
    recipe = load_recipe("debug")
    for mean in (-1.0, 0.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match=rf"--audio-sec = {mean:g}: must be above 0 s$"):
            typical_workload(recipe, build_topology(recipe.parallel, 2), mean)


@pytest.mark.parametrize("ranks", [1, 3, 8, 12])
def test_source_rank_of_samples_is_that_of_their_lane(ranks: int) -> None:
    recipe = load_recipe("debug", [f"parallel.num_ranks={ranks}", "data.global_batch_samples=16"])
    source_ranks = source_ranks_of(recipe, build_topology(recipe.parallel, ranks))
    expected = [2 * len(lanes_of_rank(r, ranks, recipe.data.num_lanes)) for r in range(ranks)]
    assert np.bincount(source_ranks, minlength=ranks).tolist() == expected


def test_every_clip_is_encoded_by_the_primary_and_by_two_experts() -> None:
    recipe = load_recipe("debug", ["parallel.num_ranks=4", "parallel.expert=2", "parallel.tensor=2"])
    topology = build_topology(recipe.parallel, 4)
    workload = typical_workload(recipe, topology, 2.0)
    work = encoder_work(sized_model(recipe), workload, topology, num_samples(20), "cpu")
    clips = [sorted(c for rank in one.calls for calls in rank for call in calls for c in call) for one in work]
    assert clips[0] == sorted(workload.audio_samples.tolist())
    assert clips[1] == sorted(2 * workload.audio_samples.tolist())  # two gates choose two experts
    held = place(recipe.model, 2)
    for rank in range(4):
        runs = {name for name, calls in zip(work[1].names, work[1].calls[rank], strict=True) if calls}
        assert runs == set(held.held_by(rank))
    packs = pack_work(recipe, workload, topology)
    assert packs.num_microbatches * packs.pack_tokens * topology.dp >= workload.tokens


def test_plan_pads_packs_as_the_recipe_says() -> None:
    lengths = []
    for multiple in ("null", "4096"):
        recipe = load_recipe("mowe_70b", [f"train.pack_multiple_tokens={multiple}"])
        topology = build_topology(recipe.parallel, 128)
        lengths.append(pack_work(recipe, typical_workload(recipe, topology, 3.0), topology).pack_tokens)
    assert lengths[0] % 4096 and lengths[1] == -(-lengths[0] // 4096) * 4096


def test_calls_are_planned_by_what_their_windows_compute() -> None:
    recipe = load_recipe("mowe_70b", ["data.global_batch_samples=4096", "model.primary.length_mode=full"])
    topology = build_topology(recipe.parallel, 128)
    workload = typical_workload(recipe, topology, 2.0)
    budget = num_samples(recipe.train.encoder_batch_sec)
    model = sized_model(recipe)
    primary, *_ = encoder_work(model, workload, topology, budget, "cuda")
    assert model.config.primary is not None
    windowing = encoder_windowing(model.config.primary)
    assert windowing.least_samples == num_samples(30)
    calls = [call for rank in primary.calls for call in rank[0]]
    assert max(map(len, calls)) == budget // num_samples(30)
    assert max(map(windowing.computed_samples, calls)) == budget


def test_accelerators_by_name_and_by_numbers() -> None:
    assert parse_accelerator("a100") == KNOWN["a100"]
    found = parse_accelerator("tflops=100,per_node=4")
    assert (found.tflops, found.per_node, found.memory_gib) == (100.0, 4, KNOWN["h100"].memory_gib)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v100", "--accelerator v100: must be one of h100, h200, a100; or specify values as key=value"),
        ("h100,flops=1", "--accelerator flops=1: known keys are tflops, fp32_tflops"),
        ("h100,tflops=x", "--accelerator tflops=x: 'x' is not a number"),
        ("h100,tflops=0", "--accelerator tflops=0: must be positive"),
    ],
)
def test_a_wrong_accelerator_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_accelerator(text)
    assert str(error.value).startswith(message)
