"""Tests of plans for LLM families with more features than Llama: parameters, memory and FLOPs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model.config import LLMConfig
from model.llm.names import hf_shapes
from model.llm.reference import resolve_hf_config
from model.llm.rotary import num_positions
from model.llm.stages import Recompute
from trainer.engine.optim import OptimConfig
from trainer.parallel.topology import Topology
from trainer.parity_cases import tiny_model
from trainer.parity_llms import FEATURED
from trainer.plan.accelerator import KNOWN
from trainer.plan.experts import expert_parameters
from trainer.plan.flops import causal_attention_flops, linear_attention_flops
from trainer.plan.layer_time import RankRates, attention_seconds
from trainer.plan.llm_memory import Kernels, stage_memory
from trainer.plan.mechanisms import Mechanisms

PUBLISHED: dict[str, tuple[float, dict[str, Any]]] = {
    "Phi-4-mini": (
        3.84e9,
        {"model_type": "phi3", "vocab_size": 200064, "num_attention_heads": 24, "num_key_value_heads": 8}
        | {"tie_word_embeddings": True},
    ),
    "Gemma 2 2B": (2.61e9, {"model_type": "gemma2"}),
    "Gemma 3 1B": (
        1.0e9,
        {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912}
        | {"num_attention_heads": 4, "num_key_value_heads": 1},
    ),
    "SmolLM3 3B": (3.08e9, {"model_type": "smollm3"}),
    "Qwen3.5 27B": (
        26.9e9,
        {"model_type": "qwen3_5_text", "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 64}
        | {"num_attention_heads": 24, "linear_num_value_heads": 48},
    ),
    "OLMo 2 7B": (7.30e9, {"model_type": "olmo2", "vocab_size": 100352}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    size, fields = PUBLISHED[name]
    shapes = hf_shapes(resolve_hf_config(LLMConfig(config=fields)))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == pytest.approx(size, rel=0.005)


@pytest.mark.parametrize("family", FEATURED)
def test_memory_is_traced_with_the_modules_of_the_family(family: str) -> None:
    """Check that layers with more norms or with a state keep more, and recomputed layers keep only their input."""

    def kept(name: str, recompute: Recompute) -> int:
        hf_config = resolve_hf_config(tiny_model(name).llm)
        kernels = Kernels(device="cuda")
        memory = stage_memory(
            hf_config,
            Topology(4, 2, 2),
            1,
            (40, 24),
            2,
            optim=OptimConfig(),
            dtype=torch.bfloat16,
            recompute=recompute,
            kernels=kernels,
        )
        return memory.layers

    plain, featured = kept("llama", "none"), kept(family, "none")
    larger = ("gemma2", "gemma3_text", "olmo2", "olmo3", "qwen3_5_text")
    assert featured > 0.9 * plain and (featured > plain) == (family in larger)
    assert kept(family, "full") == 2 * 64 // 2 * 32 * 2


def test_the_plan_of_experts_with_biases_has_all_parameters_and_the_memory_of_sinks() -> None:
    hf_config = resolve_hf_config(tiny_model("gpt_oss").llm)
    names = [name for name in hf_shapes(hf_config) if ".experts." in name]
    assert expert_parameters(hf_config) == sum(torch.Size(hf_shapes(hf_config)[n]).numel() for n in names)
    options: dict[str, Any] = {"optim": OptimConfig(), "dtype": torch.bfloat16, "recompute": "none"}
    kernels, topology = Kernels(device="cuda"), Topology(2, 1, 2)
    sinks = stage_memory(hf_config, topology, 1, (40, 24), 2, kernels=kernels, **options)
    mixtral = resolve_hf_config(tiny_model("mixtral").llm)
    assert sinks.layers > stage_memory(mixtral, topology, 1, (40, 24), 2, kernels=kernels, **options).layers


def test_windows_save_flops() -> None:
    fields = {"model_type": "mistral", "sliding_window": 64, "num_hidden_layers": 3, "max_position_embeddings": 4096}
    tokens = np.array([1000, 32])
    workload: Any = SimpleNamespace(num_tokens=tokens)
    found = []
    for window in (64, None):
        config = resolve_hf_config(LLMConfig(config={**fields, "sliding_window": window}))
        model: Any = SimpleNamespace(llm=config)
        scores = sum(min(i + 1, window or i + 1) for n in tokens for i in range(n))
        found.append(causal_attention_flops(model, workload))
        assert found[-1] == pytest.approx(3 * 4.0 * 4096 * scores, rel=0.02)
    assert found[0] < 0.13 * found[1]


def test_linear_attention_takes_flops_in_proportion_to_the_length() -> None:
    config = resolve_hf_config(tiny_model("qwen3_5_text").llm)  # 2 of 4 layers have it, with 4 value heads of 16 x 12
    model: Any = SimpleNamespace(llm=config)
    short, long = (SimpleNamespace(num_tokens=np.array([n]), tokens=n) for n in (100, 300))
    found: list[Any] = [(linear_attention_flops(model, w), causal_attention_flops(model, w)) for w in (short, long)]
    assert found[0][0] == 2 * 4 * 100 * (6 * 16 * 12 + 64 * (5 * 16 + 3 * 12))
    assert found[1][0] == 3 * found[0][0]
    assert found[0][1] == 4 * (4 * 16) * 2 * 100**2 / 2


def test_bounded_scores_take_more_time_than_a_fused_kernel() -> None:
    """Check soft-capped scores, which are written to memory and computed twice."""
    mechanisms = Mechanisms(fused_attention=True)
    rates = RankRates(KNOWN["h100"], mechanisms, bytes_per_value=2)
    gemma2, gemma3 = (resolve_hf_config(tiny_model(name).llm) for name in ("gemma2", "gemma3_text"))
    slow, fast = (attention_seconds(config, rates, 1, 4096, 4096.0**2) for config in (gemma2, gemma3))
    assert slow.forward > 2 * fast.forward and slow.backward > 2 * fast.backward


def test_longrope_supports_the_original_number_of_positions() -> None:
    assert num_positions(resolve_hf_config(tiny_model("phi3").llm)) == 128
    assert num_positions(resolve_hf_config(tiny_model("ministral3").llm)) == 256
