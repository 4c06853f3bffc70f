"""Tests of FFN experts in a plan: parameters, traffic, and the most uneven use of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from model.config import LLMConfig
from model.llm.families import mixture_of
from model.llm.mixture import ExpertConfig, ExpertRouterConfig
from model.llm.names import hf_shapes
from model.llm.reference import resolve_hf_config
from trainer.config.chain import load_chain
from trainer.config.checks import check_recipe
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.parallel.topology import Topology, build_topology
from trainer.plan.accelerator import KNOWN
from trainer.plan.experts import active_parameters, as_dense, expert_parameters, expert_plan
from trainer.plan.planner import Planner
from trainer.plan.workload import typical_workload

QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
LLAMA = {"model_type": "llama", "vocab_size": 64, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [16, 64])
@pytest.mark.parametrize("name", ["mowe_30b_a3b", "unimoe_8b"])
def test_large_recipes_with_experts_fit(name: str, num_ranks: int) -> None:
    recipe = mixture_of_chain() if name == "unimoe_8b" else load_recipe(name)
    check_recipe(recipe)
    recipe = replace(recipe, parallel=replace(recipe.parallel, num_ranks=num_ranks))
    topology = build_topology(recipe.parallel, num_ranks)
    plan = Planner(recipe, KNOWN["h100"]).plan(recipe, typical_workload(recipe, topology))
    assert plan.fits
    traffic = {part.name: part.bytes for part in plan.traffic}
    if name == "unimoe_8b":  # 0.3 % of the LLM is trained
        assert 0 < traffic["LLM, gradients over replicas"] < 0.2 * 2**30
    else:
        assert traffic["LLM, gradients over replicas"] > 2**30


def mixture_of_chain() -> Recipe:
    (found,) = (recipe for recipe in load_chain("unimoe_8b") if recipe.name == "unimoe_8b_mixture")
    return found


def test_the_published_sizes_of_qwen3_30b_a3b() -> None:
    config = resolve_hf_config(LLMConfig(config=QWEN3_30B_A3B))
    total = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in hf_shapes(config).values())
    assert total == pytest.approx(30.5e9, rel=0.01) and active_parameters(config) == pytest.approx(3.3e9, rel=0.02)
    assert expert_parameters(config) == 48 * 128 * 3 * 768 * 2048


def test_the_published_sizes_of_qwen15_moe_a27b() -> None:
    """Check transformers' default config, which is that of Qwen1.5-MoE-A2.7B with a shared expert in every layer."""
    config = resolve_hf_config(LLMConfig(config={"model_type": "qwen2_moe"}))
    total = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in hf_shapes(config).values())
    assert total == pytest.approx(14.3e9, rel=0.01) and active_parameters(config) == pytest.approx(2.7e9, rel=0.02)
    dense = as_dense(config)
    assert mixture_of(dense) is None and dense.intermediate_size == 4 * 1408 + 5632


def test_a_dense_llm_computes_as_much_per_token() -> None:
    experts = tuple(ExpertConfig(name) for name in "abcd")
    config = resolve_hf_config(LLMConfig(config=LLAMA, experts=experts, moe_layers="every_2", top_k=2))
    dense = as_dense(config)
    assert mixture_of(dense) is None and dense.intermediate_size == (2 * 2 * 16 + 2 * 16) // 4
    assert mixture_of(config) is not None, "the config itself must not change"
    matrices = [sum(s[0] * s[1] for s in hf_shapes(c).values() if len(s) == 2) for c in (config, dense)]
    routers = 2 * 4 * 8
    active = matrices[0] - expert_parameters(config) // 2 - routers
    assert matrices[1] == active
    assert as_dense(dense) is dense


def test_null_experts_are_planned_as_choices_that_compute_nothing() -> None:
    experts = tuple(ExpertConfig(name) for name in "abcd")
    plain = resolve_hf_config(LLMConfig(config=LLAMA, experts=experts, top_k=2))
    router = ExpertRouterConfig(null_experts=4)
    null = resolve_hf_config(LLMConfig(config=LLAMA, experts=experts, top_k=4, router=router))
    assert as_dense(null).intermediate_size == as_dense(plain).intermediate_size == 2 * 16
    routers = 4 * 4 * 8  # the rows of the null experts
    assert active_parameters(null) == active_parameters(plain) + routers
    topology = Topology(4, 1, 1, 1, 2, 1)
    plans = [expert_plan(c, topology, 64, 3, 2, recompute=False) for c in (plain, null)]
    assert plans[0] is not None and plans[1] is not None and plans[1].num_null == 4
    assert plans[1].all_to_all_bytes == plans[0].all_to_all_bytes
    # In the worst case, two of the two or four choices are the two experts of one rank, instead of one on average.
    assert plans[1].worst_bytes == plans[0].worst_bytes
    alone = [expert_plan(c, Topology(1, 1, 1), 64, 3, 2, recompute=False) for c in (plain, null)]
    assert alone[0] is not None and alone[1] is not None and alone[0].worst_bytes == 0
    assert alone[1].worst_bytes == 64 * 2 * (2 * 8 + 3 * 16) * 2 * 4, "at worst, no null expert is chosen"


def test_shared_experts_are_planned_as_dense_layers() -> None:
    experts = (*(ExpertConfig(name) for name in "abcd"), ExpertConfig("s", shared=True))
    router = ExpertRouterConfig(shared_gate=True)
    shared = resolve_hf_config(LLMConfig(config=LLAMA, experts=experts, top_k=2, router=router))
    plain = resolve_hf_config(LLMConfig(config=LLAMA, experts=experts[:-1], top_k=2))
    assert as_dense(shared).intermediate_size == as_dense(plain).intermediate_size + 16
    assert expert_parameters(shared) == expert_parameters(plain)
    assert active_parameters(shared) == active_parameters(plain) + 4 * (3 * 16 * 8 + 8)
    plans = [expert_plan(c, Topology(2, 2, 1), 64, 3, 2, recompute=False) for c in (plain, shared)]
    assert plans[0] is not None and plans[1] is not None and plans[1].num_shared == 1
    assert plans[1].layer_bytes - plans[0].layer_bytes == 64 // 2 * 8 * 2


def test_jittered_inputs_of_routers_are_kept() -> None:
    experts = tuple(ExpertConfig(name) for name in "abcd")
    found = []
    for jitter in (0.0, 0.1):
        config = resolve_hf_config(LLMConfig(config=LLAMA, experts=experts, router=ExpertRouterConfig(jitter=jitter)))
        plan = expert_plan(config, Topology(2, 2, 1), 64, 3, 4, recompute=False)
        assert plan is not None
        found.append(plan.layer_bytes)
    assert found[1] - found[0] == 64 // 2 * 8 * 4


def test_traffic_and_the_most_uneven_use() -> None:
    config = resolve_hf_config(LLMConfig(config=QWEN3_30B_A3B))
    topology = Topology(16, 2, 1, 1, 8, 1)
    plan = expert_plan(config, topology, pack_tokens=4096, microbatches=3, value_bytes=2, recompute=False)
    assert plan is not None
    rows = 4096 // 2 * 8
    assert plan.all_to_all_bytes == 4 * rows * 2048 * 2 * 7 / 8 * 3 * 48
    # In the worst case, all tokens of all eight ranks choose eight of the sixteen experts of one rank.
    assert plan.worst_bytes == 7 * rows * (2 * 2048 + 3 * 768) * 2 * 48
    with_recompute = expert_plan(config, topology, 4096, 3, 2, recompute=True)
    assert with_recompute is not None and with_recompute.worst_bytes * 48 == plan.worst_bytes
    assert with_recompute.all_to_all_bytes == plan.all_to_all_bytes * 6 / 4
    alone = expert_plan(config, Topology(2, 2, 1), 4096, 3, 2, recompute=False)
    assert alone is not None and alone.all_to_all_bytes == alone.worst_bytes == 0
    assert expert_plan(as_dense(config), topology, 4096, 3, 2, recompute=False) is None
