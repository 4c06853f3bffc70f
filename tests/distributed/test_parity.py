"""Tests that every topology matches the single-process model. `earshot parity` covers more cases."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from tools.parity_measure import KINDS, Comparison, Row, measure
from trainer.parallel.topology import Topology

CASES = [
    (Topology(2, 1, 1), 5, "llama", KINDS),
    (Topology(2, 2, 1), 0, "qwen2", KINDS),
    (Topology(2, 1, 2), 0, "qwen2", ("mixed", "text_only", "conversations")),
    (Topology(4, 2, 2), 0, "qwen3", ("mixed", "rank_without_audio")),
    (Topology(4, 2, 1), 0, "llama", ("mixed", "fewer_samples_than_ranks")),
    (Topology(4, 1, 2, 2), 0, "mistral", ("mixed", "one_expert", "conversations")),
    (Topology(4, 2, 1, 2), 0, "qwen2", ("mixed", "rank_without_audio")),
    (Topology(2, 1, 1, 2), 20, "llama", KINDS),
    (Topology(4, 1, 1, 4), 2, "llama", ("mixed", "text_only", "one_expert")),
]
# Each case has a topology whose blocks of `shard` ranks hold copies, whether low-rank adapters are trained, the
# DeepSpeed JSON, whether encoder calls are recomputed, and whether training has stages.
SHARD_CASES: list[tuple[Topology, bool, str | None, bool, bool]] = [
    (Topology(2, 1, 1, shard=1), False, None, False, False),
    (Topology(4, 2, 1, 2, shard=2), True, None, True, False),
    (Topology(4, 1, 2, shard=2), False, "ds_configs/zero3_offload.json", False, True),
    (Topology(4, 1, 1, 1, shard=2, cp=2), True, None, False, False),
]
# Each case has a topology, an LLM family, whether low-rank adapters are trained, the kinds of batches, and the modes.
CONTEXT_CASES: list[tuple[Topology, str, bool, tuple[str, ...], list[dict[str, Any]]]] = [
    (Topology(2, 1, 1, cp=2), "gemma3_text", False, ("mixed", "text_only", "fewer_samples_than_ranks"), [{}]),
    (Topology(2, 1, 1, cp=2), "llama", True, ("mixed",), [{"recompute": "full"}]),
    (Topology(4, 1, 1, cp=4), "qwen3", False, ("mixed",), [{"recompute": "selective"}, {"recompute": "pointwise"}]),
    (Topology(4, 2, 1, cp=2), "qwen2", True, ("mixed", "conversations"), [{"recompute": "selective"}]),
    (Topology(4, 1, 2, vp=2, cp=2), "qwen2", False, ("mixed", "rank_without_audio"), [{"recompute": "none"}]),
    (Topology(4, 1, 1, cp=2), "llama", False, ("mixed",), [{"overlap": "both"}]),
]
LORA_CASES = [
    (Topology(2, 2, 1), 3, "qwen2", ("mixed", "text_only")),
    (Topology(2, 1, 2, 2), 3, "llama", ("mixed", "one_expert")),
    (Topology(4, 2, 2), 0, "qwen3", ("mixed", "text_only")),
    (Topology(4, 2, 1, 2), 0, "llama", ("mixed", "rank_without_audio")),
    (Topology(2, 2, 1), 3, "qwen3_5_text", ("mixed",)),
]
# Each case has a topology, an LLM family, whether low-rank adapters are trained, and modes, which are the number of
# layers, the recomputation and the overlap. The cases together contain every pair of settings.
MODE_CASES: list[tuple[Topology, str, bool, list[tuple[int, str, str]]]] = [
    (Topology(2, 1, 1), "llama", False, [(4, "selective", "both"), (4, "pointwise", "gradients"), (4, "full", "both")]),
    (Topology(2, 1, 2, vp=2), "qwen2", False, [(4, "none", "none"), (7, "selective", "none"), (7, "full", "none")]),
    (
        Topology(4, 1, 2, vp=2),
        "llama",
        False,
        [(7, "none", "both"), (4, "selective", "gradients"), (7, "pointwise", "none")],
    ),
    (Topology(4, 2, 2, vp=2), "qwen3", False, [(7, "selective", "none"), (4, "pointwise", "none")]),
    (Topology(4, 1, 2), "qwen2", False, [(7, "selective", "both")]),
    (Topology(4, 2, 1), "llama", True, [(4, "selective", "both")]),
    (Topology(4, 1, 2, 2, vp=2), "qwen2", True, [(7, "full", "gradients")]),
]

# Each case has a topology, whether low-rank adapters are trained, and LLM families, which run in the same processes.
FAMILY_CASES = [
    (Topology(2, 2, 1), True, ("phi3", "granite")),
    (Topology(4, 2, 2), False, ("gemma3_text", "olmo3")),
]
ADAPTER_CASES = [
    ("stacking", Topology(2, 2, 1), 3, ("mixed", "text_only")),
    ("queries", Topology(2, 1, 2, 2), 3, ("mixed", "one_expert")),
    ("queries", Topology(4, 2, 1, 2), 0, ("mixed", "rank_without_audio")),
    ("stacked_convolutions", Topology(2, 2, 1), 0, ("mixed",)),
    ("pooling", Topology(2, 1, 1, 2), 0, ("mixed",)),
    ("swiglu", Topology(2, 2, 1), 0, ("mixed", "one_expert")),
    ("swiglu_post_norm", Topology(2, 2, 1), 3, ("mixed", "one_expert")),
    ("pooling_perceptron", Topology(2, 1, 1, 2), 0, ("mixed",)),
]


def check(topology: Topology, num_steps: int, family: str, kinds: tuple[str, ...], **settings: Any) -> list[Row]:
    """Compare a topology with the oracle. `settings` are additional fields of `Comparison`."""
    comparison = Comparison(topology, num_steps, family, kinds, **settings)
    return [Row(**row) for row in run_ranks(topology.world, measure, comparison.arguments(), timeout_sec=200)[0]]


@pytest.mark.timeout(240)
def test_weights_gathered_per_module_equal_the_oracle() -> None:
    rows = check(Topology(4, 1, 2, 4), 2, "llama", ("mixed", "one_expert"), lora=True, gathering="per_module")
    assert len(rows) == 3 and all(row.passed for row in rows), rows


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("topology", "lora", "gathering"),
    [(Topology(4, 1, 2, 2), True, "per_update"), (Topology(2, 1, 1), False, "per_module")],
)
def test_encoder_calls_that_run_again_equal_the_oracle(topology: Topology, lora: bool, gathering: str) -> None:
    rows = check(topology, 2, "llama", ("mixed", "one_expert"), lora=lora, gathering=gathering, recompute_calls=True)
    assert len(rows) == 3 and all(row.passed for row in rows), rows


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("deepspeed", "topology", "gathering"),
    [("zero3_offload", Topology(4, 1, 1, 2), "per_update"), ("zero3_cpu", Topology(2, 1, 1, 2), "per_module")],
)
def test_experts_equal_the_oracle_offloaded_and_with_weights_that_stay_gathered(
    deepspeed: str, topology: Topology, gathering: str
) -> None:
    rows = check(topology, 2, "llama", ("mixed",), deepspeed=f"ds_configs/{deepspeed}.json", gathering=gathering)
    assert len(rows) == 2 and all(row.passed for row in rows), rows


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("topology", "lora", "deepspeed", "recompute_calls", "stages"), SHARD_CASES)
def test_copies_of_the_audio_side_equal_the_oracle(
    topology: Topology, lora: bool, deepspeed: str | None, recompute_calls: bool, stages: bool
) -> None:
    kinds, steps = ("mixed", "one_expert"), 8 if stages else 3
    rows = check(
        topology, steps, "llama", kinds, deepspeed=deepspeed, lora=lora, recompute_calls=recompute_calls, stages=stages
    )
    assert len(rows) == 3 and all(row.passed for row in rows), rows
    assert rows[-1].gradient < (1e-3 if stages else 1e-4), "the gradient norms of the curve differ"


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("topology", "multiple"), [(Topology(2, 2, 1), 24), (Topology(4, 1, 2, 2), 48)])
def test_packs_padded_to_a_grid_equal_the_oracle(topology: Topology, multiple: int) -> None:
    rows = check(topology, 2, "qwen2", ("mixed", "text_only"), pack_multiple=multiple)
    assert len(rows) == 3 and all(row.passed for row in rows), rows


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("adapter", "topology", "steps", "kinds"), ADAPTER_CASES)
def test_every_kind_of_adapter_with_normalization_equals_the_oracle(
    adapter: str, topology: Topology, steps: int, kinds: tuple[str, ...]
) -> None:
    rows = check(topology, steps, "llama", kinds, adapter=adapter)
    assert len(rows) == len(kinds) + (steps > 0)
    assert all(row.passed for row in rows), rows


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("topology", "deepspeed"),
    [
        (Topology(2, 2, 1), None),
        (Topology(2, 1, 2, 2), None),
        (Topology(2, 1, 1), "ds_configs/zero3_offload.json"),
        (Topology(4, 1, 1, 4), None),
    ],
)
def test_stages_equal_the_oracle_that_freezes_and_thaws(topology: Topology, deepspeed: str | None) -> None:
    rows = check(topology, 13, "llama", ("mixed",), deepspeed=deepspeed, stages=True)
    assert len(rows) == 2 and all(row.passed for row in rows), rows
    assert rows[1].gradient < 1e-3, rows


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("topology", "steps", "family", "kinds"), LORA_CASES)
def test_adapters_and_frozen_weights_equal_the_oracle(
    topology: Topology, steps: int, family: str, kinds: tuple[str, ...]
) -> None:
    rows = check(topology, steps, family, kinds, lora=True)
    assert len(rows) == len(kinds) + (steps > 0)
    assert all(row.passed for row in rows), rows


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("topology", "steps", "family", "kinds"), CASES)
def test_topology_equals_the_oracle(topology: Topology, steps: int, family: str, kinds: tuple[str, ...]) -> None:
    rows = check(topology, steps, family, kinds)
    assert len(rows) == len(kinds) + (steps > 0)
    assert all(row.passed for row in rows), rows


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("topology", "family", "lora", "kinds", "modes"), CONTEXT_CASES)
def test_context_parallelism_equals_the_oracle(
    topology: Topology, family: str, lora: bool, kinds: tuple[str, ...], modes: list[dict[str, Any]]
) -> None:
    rows = check(topology, 3, family, kinds, lora=lora, modes=modes)
    assert len(rows) == len(modes) * (len(kinds) + 1) and all(row.passed for row in rows), rows
    assert all(row.gradient < 1e-4 for row in rows if row.kind.startswith("curve")), "the gradient norms differ"


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("topology", "lora", "families"), FAMILY_CASES)
def test_families_equal_the_oracle(topology: Topology, lora: bool, families: tuple[str, ...]) -> None:
    rows = check(topology, 0, "llama", ("mixed",), lora=lora, modes=[{"family": family} for family in families])
    assert [row.topology.rpartition(" ")[2] for row in rows] == list(families)
    assert all(row.passed for row in rows), rows


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("topology", "family", "lora", "modes"), MODE_CASES)
def test_modes_of_the_llm_equal_the_oracle(
    topology: Topology, family: str, lora: bool, modes: list[tuple[int, str, str]]
) -> None:
    fields = [dict(zip(("num_layers", "recompute", "overlap"), mode, strict=True)) for mode in modes]
    rows = check(topology, 2, family, ("mixed", "text_only"), lora=lora, modes=fields)
    assert len(rows) == 3 * len(modes) and len({row.topology for row in rows}) == len(modes)
    assert all(row.passed for row in rows), rows
