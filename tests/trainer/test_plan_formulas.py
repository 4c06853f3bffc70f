"""Tests that terms of the plan equal closed formulas: activations, the pipeline's bubble, collectives and matmuls."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from model.llm.stages import Recompute
from trainer.config.load import load_recipe
from trainer.engine.optim import OptimConfig
from trainer.parallel.topology import Topology, build_topology
from trainer.plan.accelerator import KNOWN
from trainer.plan.communication import CONTEXT, Traffic, tensor_units, traffic
from trainer.plan.llm_memory import Kernels, StageMemory, interleaved_in_flight, stage_memory
from trainer.plan.mechanisms import Mechanisms
from trainer.plan.plan import Plan
from trainer.plan.planner import Planner
from trainer.plan.report import report
from trainer.plan.states import States
from trainer.plan.trace import Traced
from trainer.plan.what_if import what_if_bytes
from trainer.plan.workload import Workload, source_ranks_of, typical_workload

ROWS, HIDDEN = 1024, 512
FUSED = Kernels(mechanisms=Mechanisms(fused_kernels=True))


def gpt(layers: int) -> LlamaConfig:
    """Return a config with a gated MLP, whose layers have as many parameters as those of GPT, 12 h²."""
    return LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=8 * HIDDEN // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1024,
        max_position_embeddings=ROWS,
    )


def of_layer(tp: int, recompute: Recompute, kernels: Kernels, cp: int = 1) -> float:
    """Return the bytes that one more layer keeps for the backward pass, in units of s · b · h / (t · c)."""
    found: list[StageMemory] = []
    for layers in (2, 3):
        found.append(
            stage_memory(
                gpt(layers),
                Topology(tp * cp, tp, 1, cp=cp),
                0,
                (ROWS,),
                1,
                optim=OptimConfig(),
                dtype=torch.bfloat16,
                recompute=recompute,
                kernels=kernels,
            )
        )
    return (found[1].traced.kept - found[0].traced.kept) / (ROWS * HIDDEN / tp / cp)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_full_recomputation_keeps_two_bytes_per_hidden_value(tp: int) -> None:
    assert of_layer(tp, "full", Kernels()) == pytest.approx(2, abs=1e-9)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_fused_kernels_keep_34_bytes_per_hidden_value(tp: int) -> None:
    assert of_layer(tp, "none", FUSED) == pytest.approx(34, rel=0.1)


def test_graphs_hold_the_activations_of_the_mlp_outside_of_the_rest() -> None:
    """Check the MLP's activations: the output of the norm, both halves of SwiGLU, and their product."""
    ffn = gpt(1).intermediate_size / HIDDEN
    found = {}
    for name in ("kept", "graphed", "recomputed"):
        fused = Mechanisms(fused_kernels=True, mlp=name)  # type: ignore[arg-type]
        found[name] = Kernels(mechanisms=fused)
    kept, graphed, recomputed = (of_layer(2, "none", found[name]) for name in ("kept", "graphed", "recomputed"))
    assert graphed == recomputed == pytest.approx(kept - 2 * (1 + 3 * ffn), abs=0.01)
    stage = StageMemory(Traced(70, 80, 90), 60, 0, 5, 10, graphed=100)
    assert stage.peak(4) == max(3 * 70 + 90 + 2 * 15, 4 * 100) == 400
    assert stage.peak(1) == 90 + 30


@pytest.mark.parametrize(("again", "change"), [(True, -1), (False, 1)])
def test_fp8_halves_the_inputs_of_matmuls_but_attention_keeps_its_output(again: bool, change: int) -> None:
    config = gpt(1)
    fp8 = Mechanisms(fp8=True, fp8_weights=True, recompute_attention=again)
    found = what_if_bytes(config, Topology(2, 2, 1), ROWS, torch.bfloat16, "none", fp8)
    assert found.kept == ROWS * (change * HIDDEN - 2 * HIDDEN - config.intermediate_size) / 2
    assert found.smaller_weights == (4 * HIDDEN**2 + 3 * HIDDEN * config.intermediate_size) / 2


@pytest.mark.slow
def test_the_trainer_keeps_more_with_deterministic_kernels() -> None:
    fused, plain = of_layer(2, "none", FUSED), of_layer(2, "none", Kernels())
    padded = of_layer(2, "none", Kernels(deterministic=True))
    on_cpu = of_layer(2, "none", Kernels("cpu"))
    # Deterministic attention copies its inputs into padded batches.
    assert fused == plain < padded < on_cpu
    # On a CPU, both norms keep fp32 copies of their inputs.
    assert on_cpu - padded == pytest.approx(12, abs=0.1)


@pytest.mark.parametrize("tp", [1, 2])
def test_selective_recomputation_keeps_the_inputs_of_what_it_recomputes(tp: int) -> None:
    """Check the kept values: inputs of both norms, query, key, value, attention output, and both halves of SwiGLU."""
    values = 2 + 3 + 1 + 2 * gpt(1).intermediate_size / HIDDEN
    for kernels in (Kernels(), FUSED):
        assert of_layer(tp, "selective", kernels) == pytest.approx(2 * values, rel=0.01)


@pytest.mark.parametrize("tp", [1, 2])
def test_pointwise_recomputation_also_keeps_what_attention_keeps(tp: int) -> None:
    """Check the values kept in addition to selective recomputation: rotated queries and keys."""
    rotated = 2 * 2  # The tiny LLM has as many key heads as query heads.
    found = of_layer(tp, "pointwise", FUSED) - of_layer(tp, "selective", FUSED)
    assert found == pytest.approx(rotated, rel=0.1)
    assert of_layer(tp, "pointwise", FUSED) < of_layer(tp, "none", FUSED)


def test_context_parallel_ranks_keep_their_part_of_a_pack() -> None:
    assert of_layer(2, "full", Kernels(), cp=4) == pytest.approx(2, abs=1e-9)
    assert of_layer(2, "selective", Kernels(), cp=4) == pytest.approx(of_layer(2, "selective", Kernels()), rel=0.01)
    # Queries, keys and values are kept both for gathered keys and, of whole segments, in padded batches. Without
    # context parallelism, only deterministic attention has padded batches.
    assert 1 < of_layer(1, "none", Kernels(), cp=2) / of_layer(1, "none", Kernels(deterministic=True)) < 1.1


@pytest.mark.parametrize(("recompute", "gathers"), [("none", 2), ("full", 3)])
def test_keys_and_values_are_gathered_over_context_and_their_gradients_summed(recompute: str, gathers: int) -> None:
    parallel = ["parallel.tensor=2", "parallel.context=4", "parallel.pipeline=1", "parallel.virtual_stages=1"]
    recipe = load_recipe("mowe_8b", [*parallel, f"train.recompute_llm={recompute}"])
    planner = Planner(recipe, KNOWN["h100"])
    topology = build_topology(recipe.parallel, recipe.parallel.num_ranks)
    _, work, packs = planner.place(recipe, typical_workload(recipe, topology))
    sent = traffic(recipe, planner.model, planner.parts, topology, work, packs, 8)
    (found,) = (t for t in sent if t.name == CONTEXT)
    assert topology.dp == 2 and packs.replicas == 2 and packs.pack_tokens % 16 == 0
    values = (
        32 * packs.num_microbatches * packs.pack_tokens * 2 * 8 * 128 / 2
    )  # keys and values in all layers of a rank
    assert found.bytes == pytest.approx(values * 3 / 4 * (2 * gathers + 4)) and found.within_node


@pytest.mark.parametrize(("pp", "microbatches"), [(1, 4), (2, 4), (4, 4), (4, 16), (8, 8)])
def test_the_bubble_of_1f1b(pp: int, microbatches: int) -> None:
    assert bubble(pp, microbatches, 1) == pytest.approx((pp - 1) / (microbatches + pp - 1), rel=0.02)


@pytest.mark.parametrize("virtual", [2, 4])
def test_virtual_stages_divide_the_bubble(virtual: int) -> None:
    share = 7 / 8 / virtual  # relative to the time without a bubble
    assert bubble(8, 8, virtual) == pytest.approx(share / (1 + share), rel=0.02)


def test_duration_of_stages_without_the_llm() -> None:
    """A step without the LLM takes as long as all parts of a step but the LLM."""
    stages = "stages=[{name: a, steps: 30, llm: false, train: [connector, encoders]}, {name: b, steps: 10}]"
    keys = ["model.ctc_weight=1.0", "train.steps=40", stages]
    recipe = load_recipe("debug", keys)
    plan = Planner(recipe, KNOWN["h100"]).plan(recipe, typical_workload(recipe, build_topology(recipe.parallel, 2)))
    parts = plan.time
    assert 0 < parts.llm < parts.total
    assert plan.run_sec(parts.total) == pytest.approx(40 * parts.total - 30 * parts.llm)
    assert plan.run_sec(2 * parts.total) == pytest.approx(2 * plan.run_sec(parts.total))
    assert plan.days == pytest.approx(plan.run_sec(parts.total) / 86_400)
    assert "stages without it" in " ".join(report(plan).split())


def bubble(pp: int, microbatches: int, virtual: int) -> float:
    """Return the planned share of idle time, for a model whose output layer is small."""
    recipe = load_recipe(
        "debug",
        [
            "model.llm.config.hidden_size=4096",
            "model.llm.config.intermediate_size=16384",
            "model.llm.config.num_hidden_layers=32",
            "model.llm.config.num_attention_heads=32",
            "model.llm.config.num_key_value_heads=32",
            f"parallel.num_ranks={pp}",
            f"parallel.pipeline={pp}",
            f"parallel.virtual_stages={virtual}",
            f"data.global_batch_samples={microbatches}",
            f"data.num_lanes={microbatches}",
            "train.precision=bf16",
            "train.llm_tokens_per_microbatch=4096",
        ],
    )
    device = dataclasses.replace(KNOWN["h100"], per_node=16, node_gb_s=1e9, node_latency_us=0.0)
    planner = Planner(recipe, device)
    topology = build_topology(recipe.parallel, pp)
    clips = np.full(microbatches, 1600, dtype=np.int64)
    tokens = np.full(microbatches, 4096, dtype=np.int64)
    workload = Workload(clips, tokens, source_ranks_of(recipe, topology))
    topology, work, packs = planner.place(recipe, workload)
    assert packs.num_microbatches == microbatches
    return planner.time(recipe, workload, topology, work, packs, States())[2].bubble


def test_virtual_stages_hold_more_micro_batches() -> None:
    assert interleaved_in_flight(0, 4, 16, 1) == 4
    # The number grows by the factor 1 + (p - 1) / (p m) (Korthikanti et al. 2022, section 4.2.3).
    assert interleaved_in_flight(0, 4, 16, 2) == pytest.approx(4 * (1 + 3 / (4 * 2)))
    assert interleaved_in_flight(0, 4, 1, 2) == 1


@pytest.mark.parametrize(
    ("recompute", "sequence_parallel", "expected"),
    [(False, False, 8), (True, False, 12), (False, True, 10), (True, True, 14)],
)
def test_the_backward_pass_of_sequence_parallelism_gathers_once_more(
    recompute: bool, sequence_parallel: bool, expected: int
) -> None:
    assert tensor_units(recompute, sequence_parallel) == expected


def test_concurrent_rings_share_the_ports_of_a_node_and_a_single_one_uses_all() -> None:
    device = dataclasses.replace(KNOWN["h100"], network_latency_us=0.0, node_latency_us=0.0, link_efficiency=1.0)
    one_of_eight, alone, all_to_all = (
        Traffic("x", 64, 1e9, False, members, 1, ring).seconds(device)
        for members, ring in ((1, True), (8, True), (1, False))
    )
    assert one_of_eight == pytest.approx(1 / 50) and alone == pytest.approx(1 / 400)
    assert all_to_all == pytest.approx(1 / 50)
    assert Traffic("x", 8, 1e9, True, 8).seconds(device) == pytest.approx(1 / 450)


def test_a_ring_waits_at_every_hop() -> None:
    device = KNOWN["h100"]
    within, between = (Traffic("x", 16, 0.0, w, 8, 10).seconds(device) for w in (True, False))
    assert within == pytest.approx(10 * 15 * 3.4e-6 / 5)
    assert between == pytest.approx(10 * (13 * 3.4e-6 + 2 * 14e-6) / 5)


def test_a_product_reaches_what_the_table_says() -> None:
    device = dataclasses.replace(KNOWN["h100"], matrix=((100.0, 0.2), (400.0, 0.6)))
    assert device.matrix_share(300, 300, 300) == pytest.approx(0.2)
    assert device.matrix_share(150, 150, 150) == pytest.approx(0.1)
    assert device.matrix_share(600, 600, 600) == pytest.approx(0.4)
    assert device.matrix_share(1e5, 1e5, 1e5) == pytest.approx(0.6)
    assert dataclasses.replace(device, efficiency=0.3).matrix_share(1, 1, 1) == 0.3


def test_mfu_in_both_conventions() -> None:
    """Check Llama-3 70B with 8,192 tokens, which takes 14.66 s on 64 H100s.

    The MFU of 54.3 % that NVIDIA reports is 50.8 % if only causal attention is counted.
    """
    recipe = load_recipe("mowe_70b")
    planner = Planner(recipe, KNOWN["h100"])
    topology = build_topology(recipe.parallel, 128)
    source_ranks = source_ranks_of(recipe, topology)
    num = len(source_ranks)
    workload = Workload(np.zeros(num, dtype=np.int64), np.full(num, 8192, dtype=np.int64), source_ranks)
    topology, work, packs = planner.place(recipe, workload)
    flops, _, _ = planner.time(recipe, workload, topology, work, packs, States())
    assert (flops.llm + flops.masked_attention) / flops.llm == pytest.approx(54.3 / 50.8, abs=0.01)


@pytest.mark.slow
def test_the_plan_shows_the_price_of_whole_audio_weights() -> None:
    """Check that weights and gradients are sent once per update, and that their memory is planned."""
    recipe = load_recipe("debug")
    per_module = dataclasses.replace(recipe.train, gather_audio_weights="per_module")
    planner, workload = Planner(recipe, KNOWN["h100"]), typical_workload(recipe, build_topology(recipe.parallel, 2))
    whole = planner.plan(recipe, workload)
    parts = planner.plan(dataclasses.replace(recipe, train=per_module), workload)
    sizes = [size for name, size in whole.sizes.items() if name.startswith("audio.")]
    total, learned = sum(s.total for s in sizes), sum(s.learned for s in sizes)
    for kind, elements in (("weights", total), ("gradients", learned)):
        found = [t for t in whole.traffic if t.name in (f"ZeRO-3, {kind}", f"ZeRO-3 of encoder experts, {kind}")]
        assert sum(t.bytes for t in found) == 4 * elements / 2 and [t.calls for t in found] == [1, 1]
    assert whole.worst.whole_weights == 4 * total and whole.worst.whole_gradients >= 4 * learned
    assert parts.worst.whole_weights == parts.worst.whole_gradients == 0
    assert "per_module avoids both" in " ".join(report(whole).split())


@pytest.mark.slow
def test_blocks_with_copies_of_the_audio_side() -> None:
    """Check four ranks in blocks of two. They hold more state, gather in smaller rings, and all-reduce gradients."""
    recipe = load_recipe("debug", ["parallel.num_ranks=4", "parallel.expert=2", "data.global_batch_samples=8"])
    divided = dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, audio_shard=2))
    planner, workload = Planner(recipe, KNOWN["h100"]), typical_workload(recipe, build_topology(recipe.parallel, 4))
    whole, blocks = planner.plan(recipe, workload), planner.plan(divided, workload)

    def sent(plan: Plan, name: str) -> float:
        return sum(t.bytes for t in plan.traffic if t.name == name)

    learned = planner.parts.shared.learned
    assert sent(whole, "ZeRO-3, gradients") == 4 * learned * 3 / 4
    assert sent(blocks, "ZeRO-3, gradients") == 4 * learned / 2
    assert sent(blocks, "ZeRO-3 over copies, gradients") == 2 * 4 * learned / 2 / 2
    assert sent(whole, "ZeRO-3 over copies, gradients") == 0
    # Without blocks, two of the four ranks share an expert. With blocks, one of the two ranks of a block holds it.
    assert sent(blocks, "ZeRO-3 of encoder experts, gradients") == 0
    assert sent(blocks, "ZeRO-3 of encoder experts over copies, gradients") > 0
    assert blocks.worst.states.optimizer > whole.worst.states.optimizer
    assert blocks.disk.checkpoint == pytest.approx(whole.disk.checkpoint, rel=0.01)


@pytest.mark.slow
def test_encoder_calls_that_run_again_keep_little_for_a_larger_batch() -> None:
    kept = {}
    for samples in (8, 64):
        recipe = load_recipe("debug", [f"data.global_batch_samples={samples}", "train.encoder_batch_sec=10"])
        planner = Planner(recipe, KNOWN["h100"])
        workload = typical_workload(recipe, build_topology(recipe.parallel, 2))
        for again in (False, True):
            train = dataclasses.replace(recipe.train, recompute_encoder_calls=again)
            plan = planner.plan(dataclasses.replace(recipe, train=train), workload)
            kept[again, samples] = plan.worst.phases["llm"][1]
    assert kept[True, 8] < kept[False, 8]
    assert kept[True, 64] - kept[True, 8] < 0.25 * (kept[False, 64] - kept[False, 8])
