"""Tests of the search for a layout: it is valid for random recipes, and optimal for a small recipe."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from model.errors import UserError
from trainer.config.checks import check_packs, check_recipe
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.parallel.topology import build_topology
from trainer.plan.accelerator import KNOWN
from trainer.plan.fit import batch_within, changes_between, estimates, fit, variants
from trainer.plan.plan import Planner
from trainer.plan.workload import typical_workload


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    """Overrides of the debug recipe, not all of them legal."""
    heads = draw(st.sampled_from([4, 8, 12]))
    ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))
    batch = draw(st.sampled_from([8, 12, 16, 24]))
    budget = draw(st.sampled_from([256, 2048, 3000]))
    return [
        f"parallel.num_ranks={ranks}",
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
@pytest.mark.timeout(600)
@settings(max_examples=270, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(overrides())
def test_the_search_proposes_only_what_the_trainer_accepts(changes: list[str]) -> None:
    try:
        recipe = load_recipe("debug", changes)
        check_recipe(recipe)
    except UserError:
        event("the recipe itself is illegal")
        return
    event("legal")
    planner = Planner(recipe, KNOWN["h100"])
    found = list(variants(planner, recipe))
    assert recipe in found
    for variant in found:
        check_packs(variant.train, variant.parallel)
    layouts = {variant.parallel: variant for variant in found}
    for variant in layouts.values():
        check_recipe(variant)
    for variant in list(layouts.values())[:: max(1, len(layouts) // 2)]:  # as a user would pass the changes on
        again = load_recipe("debug", [*changes, *changes_between(recipe, variant)])
        check_recipe(again)
        assert again == variant
        build_topology(again.parallel, again.parallel.num_ranks)


def small() -> Recipe:
    return load_recipe("debug", ["parallel.num_ranks=4", "data.num_lanes=8", "train.llm_tokens_per_microbatch=512"])


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_the_search_finds_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.plan.fit._TOKENS", (1024,))
    recipe = small()
    planner = Planner(recipe, KNOWN["h100"])
    workload = typical_workload(recipe, build_topology(recipe.parallel, 4))
    plan, changes = fit(planner, recipe, workload)
    everything = [planner.plan(variant, workload) for variant in _thinned(list(variants(planner, recipe)))]
    best = min((one for one in everything if one.fits), key=lambda one: one.time.total)
    assert plan.fits and plan.time.total <= best.time.total * 1.001
    assert load_recipe("debug", ["parallel.num_ranks=4", "data.num_lanes=8", "train.llm_tokens_per_microbatch=512",
                                 *changes]) == plan.recipe  # fmt: skip


def _thinned(found: list[Recipe]) -> list[Recipe]:
    """Return the variants without recomputation of encoders, which never helps where everything fits."""
    return [v for v in found if not v.train.recompute_encoders and not v.train.recompute_encoder_calls]


def test_a_budget_of_tokens_decides_the_batch() -> None:
    recipe = load_recipe("mowe_8b")
    workload = typical_workload(recipe, build_topology(recipe.parallel, 16))
    found = batch_within(recipe, workload, 2.1e6)
    check_recipe(found)
    assert changes_between(recipe, found) == ["data.global_batch_samples=16384"]
    tokens = typical_workload(found, build_topology(found.parallel, 16)).tokens
    assert tokens <= 2.1e6 < tokens * (1 + 256 / 16384)
    with pytest.raises(
        UserError, match=r"--tokens-per-update 1000: one sample in each of data.num_lanes = 256 has 32,5"
    ):
        batch_within(recipe, workload, 1000)


@pytest.mark.slow
def test_estimates_are_those_of_the_full_plan() -> None:
    recipe = small()
    planner = Planner(recipe, KNOWN["h100"])
    workload = typical_workload(recipe, build_topology(recipe.parallel, 4))
    for seconds, variant in itertools.islice(estimates(planner, recipe, workload), 0, None, 40):
        assert planner.plan(variant, workload).time.total == pytest.approx(seconds, rel=0.02)
