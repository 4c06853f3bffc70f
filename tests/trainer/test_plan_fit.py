"""Tests of the search for a layout: layouts are valid for random recipes, and optimal for a small recipe."""

from __future__ import annotations

import dataclasses
import itertools
from random import Random

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from model.errors import UserError
from trainer.config.checks import check_packs, check_recipe
from trainer.config.llm_checks import known_llm_config
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.parallel.topology import build_topology
from trainer.plan.accelerator import GIB, KNOWN
from trainer.plan.fit import Search, batch_within, fit
from trainer.plan.layouts import AUDIO_KEYS, audio_layouts, changes_between, combined, llm_layouts
from trainer.plan.planner import Planner
from trainer.plan.workload import typical_workload


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    """Draw overrides of the recipe `debug`. Not all combinations are legal."""
    heads = draw(st.sampled_from([4, 8, 12]))
    ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))
    batch = draw(st.sampled_from([8, 12, 16, 24]))
    budget = draw(st.sampled_from([256, 2048, 3000]))
    return [
        f"parallel.num_ranks={ranks}",
        f"parallel.context={draw(st.sampled_from([1, 1, 2]))}",
        f"train.gather_audio_weights={draw(st.sampled_from(['per_update', 'per_update', 'per_module']))}",
        f"parallel.audio_shard={draw(st.sampled_from(['null', 'null', '2']))}",
        f"data.global_batch_samples={batch}",
        f"data.num_lanes={draw(st.sampled_from([batch, batch // 2]))}",
        f"model.llm.config.hidden_size={heads * 8}",
        f"model.llm.config.num_attention_heads={heads}",
        f"model.llm.config.num_key_value_heads={draw(st.sampled_from([heads, heads // 2, 2]))}",
        f"model.llm.config.intermediate_size={draw(st.sampled_from([64, 96, 100]))}",
        f"model.llm.config.num_hidden_layers={draw(st.sampled_from([1, 2, 3, 6]))}",
        f"train.llm_tokens_per_microbatch={budget}",
        f"train.pack_multiple_tokens={draw(st.sampled_from(['null', '8', '100', str(budget)]))}",
        f"train.precision={draw(st.sampled_from(['fp32', 'bf16']))}",
    ]


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(overrides(), st.randoms(use_true_random=False))
def test_the_search_proposes_only_what_the_trainer_accepts(changes: list[str], random: Random) -> None:
    try:
        recipe = load_recipe("debug", changes)
        check_recipe(recipe)
    except UserError:
        event("the recipe itself is illegal")
        return
    event("legal")
    config = known_llm_config(recipe.model.llm)
    assert config is not None
    llm, audio = (list(of(recipe, config, 8)) for of in (llm_layouts, audio_layouts))
    assert recipe in llm and recipe in audio
    for half in llm:
        check_packs(half.train, half.parallel)
    for half in (random.choice(llm), random.choice(audio)):
        check_recipe(half)
    for _ in range(2):  # a user would pass the changes as overrides
        variant = combined(random.choice(llm), random.choice(audio))
        again = load_recipe("debug", [*changes, *changes_between(recipe, variant)])
        check_recipe(again)
        assert again == variant
        build_topology(again.parallel, again.parallel.num_ranks)


def test_the_search_varies_every_key_that_it_may_change() -> None:
    recipe = load_recipe("debug", [*SMALL, "parallel.num_ranks=16", "data.global_batch_samples=16", *LAYERS])
    config = known_llm_config(recipe.model.llm)
    assert config is not None
    changed = {
        change.split("=")[0]
        for of in (llm_layouts, audio_layouts)
        for variant in of(recipe, config, 8)
        for change in changes_between(recipe, variant)
    }
    audio = {f"{section}.{key}" for section, keys in AUDIO_KEYS.items() for key in keys}
    assert changed == audio | {
        "parallel.tensor",
        "parallel.context",
        "parallel.pipeline",
        "parallel.virtual_stages",
        "parallel.overlap_grad_reduce",
        "parallel.overlap_param_gather",
        "parallel.grad_reduce_dtype",
        "train.llm_tokens_per_microbatch",
        "train.recompute_llm",
    }


def small() -> Recipe:
    return load_recipe("debug", SMALL)


LAYERS = ["model.llm.config.num_hidden_layers=8"]
SMALL = ["parallel.num_ranks=4", "data.num_lanes=8", "train.llm_tokens_per_microbatch=512", "train.precision=bf16"]


@pytest.fixture
def few_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the search space, so that all layouts can be planned."""
    monkeypatch.setattr("trainer.plan.layouts.TOKENS", ())
    monkeypatch.setattr("trainer.plan.layouts.ENCODER_SEC", ())
    monkeypatch.setattr("trainer.plan.layouts.RECOMPUTES", ("none", "full"))
    monkeypatch.setattr("trainer.plan.layouts._GATHERINGS", ("per_update",))


@pytest.mark.slow
@pytest.mark.usefixtures("few_layouts")
def test_the_search_finds_the_optimum() -> None:
    """Compare with the plans of all layouts, with so little memory that the fastest layouts do not fit."""
    recipe = small()
    workload = typical_workload(recipe, build_topology(recipe.parallel, 4))
    planner = Planner(recipe, KNOWN["h100"])
    estimated = {
        tuple(changes_between(recipe, one.recipe)): one for one in Search(planner, recipe, workload).candidates()
    }
    single = {
        tuple(changes_between(recipe, one.recipe)): one for one in Search(planner, recipe, workload).single_changes()
    }
    assert single and all(len(changes) == 1 and 0 < one.in_llm for changes, one in single.items())
    halves = (list(of(recipe, planner.model.llm, 8)) for of in (llm_layouts, audio_layouts))
    everything = []
    for pair in itertools.product(*halves):
        plan = planner.plan(combined(*pair), workload)
        everything.append(plan)
        changes = tuple(changes_between(recipe, plan.recipe))
        for one in (estimated.pop(changes, None), single.get(changes)):
            if one is not None:  # another layout may have the same packs, and is estimated instead
                assert plan.time.total == pytest.approx(one.seconds, rel=0.03)
                assert max(one.in_llm, one.backward) <= plan.worst.total * 1.02
    assert len(everything) > 300 and not estimated
    sizes = sorted(one.worst.total for one in everything)
    usable = sizes[len(sizes) // 10]
    planner.accelerator = dataclasses.replace(planner.accelerator, memory_gib=usable / GIB, reserve_gib=0.0)
    best = min(one.time.total for one in everything if one.worst.total <= usable)
    assert min(one.time.total for one in everything) < best
    for one in Search(planner, recipe, workload).single_changes():
        assert max(one.in_llm, one.backward) <= usable
    plan, found = fit(planner, recipe, workload)
    assert plan.fits and plan.time.total <= best * 1.01
    assert load_recipe("debug", [*SMALL, *found]) == plan.recipe
    planner.accelerator = dataclasses.replace(planner.accelerator, memory_gib=0.99 * sizes[0] / GIB)
    with pytest.raises(UserError, match="^--fit: .*; use more ranks$"):
        fit(planner, recipe, workload)


def test_a_budget_of_tokens_decides_the_batch() -> None:
    recipe = load_recipe("mowe_8b")
    workload = typical_workload(recipe, build_topology(recipe.parallel, 16))
    found = batch_within(recipe, workload, 2.1e6)
    check_recipe(found)
    assert changes_between(recipe, found) == ["data.global_batch_samples=16384"]
    tokens = typical_workload(found, build_topology(found.parallel, 16)).tokens
    assert tokens <= 2.1e6 < tokens * (1 + 256 / 16384)
    with pytest.raises(
        UserError, match=r"--tokens-per-update 1,000: one sample in each of data.num_lanes = 256 has 32,5"
    ):
        batch_within(recipe, workload, 1000)
