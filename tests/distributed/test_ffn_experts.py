"""Tests that LLMs with FFN experts on several ranks equal the single-process model.

In the cases, experts are spread over replicas, over tensor-parallel ranks or over both, and a single expert may be
divided among tensor-parallel ranks. The cases also cover recomputation (PP > 1), layers without experts, low-rank
adapters on experts, frozen experts, shared experts, null experts, jitter, and balancing biases. `earshot parity
--family mixtral` covers more cases.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from tools.parity_measure import Comparison, Row, measure
from trainer.parallel.topology import Topology

CASES: list[tuple[Topology, str, dict[str, Any]]] = [
    (Topology(2, 1, 1, 1, 2, 1), "mixtral", {"kinds": ["mixed", "fewer_samples_than_ranks"], "num_steps": 3}),
    (Topology(2, 2, 1, 1, 1, 2), "mixtral", {}),
    (Topology(2, 2, 1, 1, 1, 2), "gpt_oss", {"num_steps": 2}),
    (Topology(2, 2, 1, 1, 2, 1), "qwen3_moe", {"kinds": ["mixed", "text_only"], "num_steps": 3}),
    (Topology(4, 2, 1, 2, 2, 2), "mixtral", {}),
    (Topology(4, 1, 2, 1, 2, 1), "qwen3_moe", {"num_steps": 2}),
    (Topology(2, 2, 1, 1, 2, 1), "mixture_balanced", {"num_steps": 3}),
    (Topology(2, 2, 1, 1, 1, 2), "qwen2_moe", {}),
    (Topology(4, 1, 2, 1, 2, 1), "mixture_balanced", {"num_steps": 2}),
    (Topology(2, 2, 1, 1, 2, 1), "mixture_qwen3_5", {"num_steps": 2}),
]
MORE_CASES: list[tuple[Topology, str, dict[str, Any]]] = [
    (Topology(4, 1, 1, 2, 4, 1), "mixtral", {"kinds": ["mixed", "rank_without_audio"]}),
    (Topology(4, 2, 1, 1, 4, 1), "qwen3_moe", {}),
    (Topology(4, 2, 2, 1, 2, 1), "qwen3_moe", {"kinds": ["mixed", "text_only"]}),
    (Topology(4, 2, 2, 1, 2, 1), "mixtral", {}),
    (Topology(4, 2, 2, 1, 2, 1), "gpt_oss", {}),
    (Topology(4, 2, 2, 1, 2, 1), "qwen2_moe", {"num_steps": 2}),
    (Topology(4, 2, 1, 1, 2, 2), "qwen2_moe", {"lora": True, "num_steps": 2}),
    (Topology(4, 2, 1, 1, 2, 2), "gpt_oss", {"lora": True, "num_steps": 2}),
    (Topology(4, 4, 1, 1, 2, 1), "qwen3_moe", {}),
    (Topology(4, 2, 1, 1, 2, 2), "mixtral", {"lora": True, "num_steps": 2}),
    (Topology(1, 1, 1), "mixture_balanced", {"kinds": ["mixed", "conversations"], "num_steps": 3}),
    (Topology(2, 2, 1, 1, 1, 2), "mixture_balanced", {"kinds": ["mixed", "text_only"]}),
    (Topology(2, 1, 2), "mixture_balanced", {}),
    (Topology(4, 2, 1, 1, 2, 2), "mixture_balanced", {"lora": True, "num_steps": 2}),
    (Topology(4, 2, 2, 1, 2, 1), "mixture_balanced", {"kinds": ["mixed", "fewer_samples_than_ranks"]}),
    (Topology(4, 2, 2, 1, 2, 1), "qwen3_moe", {"lora": True, "num_steps": 2}),
    (Topology(4, 2, 2, 1, 2, 1), "mixture_qwen3_5", {}),
]
CHANGED_CASES: list[tuple[Topology, str, dict[str, Any]]] = [
    (Topology(2, 1, 1, 1, 2, 1), "mixtral", {"freeze": ["llm.*.experts.*"], "num_steps": 2}),
    (Topology(2, 2, 1, 1, 2, 1), "qwen3_moe", {"freeze": ["llm.*", "audio.primary.*"], "lora": True, "num_steps": 2}),
]


def case_name(case: tuple[Topology, str, dict[str, Any]]) -> str:
    topology, family, options = case
    split = f"tp{topology.tp}-pp{topology.pp}-ep{topology.ffn_ep}"
    return f"{family}-{split}{'-lora' if options.get('lora') else ''}"


def check(topology: Topology, family: str, options: dict[str, Any]) -> list[Row]:
    settings: dict[str, Any] = {"kinds": ["mixed"], **options}
    comparison = Comparison(topology, family=family, **settings)
    ranks = run_ranks(topology.world, measure, comparison.arguments(), timeout_sec=200)
    rows = [Row(**row) for row in ranks[0]]
    assert len(rows) == len(comparison.kinds) + (comparison.num_steps > 0)
    return rows


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("topology", "family", "options"), CASES)
def test_topology_equals_the_oracle(topology: Topology, family: str, options: dict[str, Any]) -> None:
    rows = check(topology, family, options)
    assert all(row.passed for row in rows), rows
    assert all(0 < row.gap < 1 for row in rows if row.gap is not None) and rows[0].gap is not None


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("topology", "family", "options"), MORE_CASES, ids=map(case_name, MORE_CASES))
def test_more_topologies_equal_the_oracle(topology: Topology, family: str, options: dict[str, Any]) -> None:
    rows = check(topology, family, options)
    assert all(row.passed for row in rows), rows


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("topology", "family", "options"), CHANGED_CASES)
def test_frozen_experts_and_adapters_equal_the_oracle(topology: Topology, family: str, options: dict[str, Any]) -> None:
    rows = check(topology, family, options)
    assert all(row.passed for row in rows), rows
