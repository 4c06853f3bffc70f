"""Tests of FFN experts in one process: the choice of experts, the losses, and comparisons with transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from model.config import LLMConfig, ModelConfig
from model.errors import UserError
from model.llm.experts import choose, observed, smallest_gap
from model.llm.families import mixture_of
from model.llm.mixture import Mixture
from model.llm.names import hf_shapes
from model.llm.reference import build_reference, resolve_hf_config
from model.losses.router import ExpertBalance, RoutedTokens, RouterZ
from trainer.parity_llms import EXPERTS

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
QWEN = {"model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 24, "head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3-normalized": {**QWEN, "num_experts_per_tok": 3, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "qwen3-every-second": {**QWEN, "num_experts_per_tok": 2, "norm_topk_prob": False, "decoder_sparse_step": 2},
    "qwen2_moe": {"model_type": "qwen2_moe", **EXPERTS["qwen2_moe"], "mlp_only_layers": [1]},
    "gpt_oss": {"model_type": "gpt_oss", **EXPERTS["gpt_oss"], "intermediate_size": 64},
}
CONFIG = ModelConfig.__new__(ModelConfig)  # the tested losses do not read the config


def stock_folder(path: Path, family: str) -> Any:
    """Save a model of transformers with random weights, and return it."""
    values = {**SHAPE, **FAMILIES[family]}
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape) + (parameter.dim() == 1))
    model.save_pretrained(path)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_folder_is_read_and_computes_the_same(tmp_path: Path, family: str) -> None:
    stock = stock_folder(tmp_path, family)
    ours = build_reference(LLMConfig(weights=str(tmp_path))).eval()
    ids = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), observed(ours) as choices:
        difference = (ours(ids, use_cache=False).logits - stock(ids, use_cache=False).logits).abs().max()
    assert difference <= 1e-5
    assert len(choices) == {"qwen2_moe": 2, "qwen3-normalized": 2, "qwen3-every-second": 1}.get(family, 3)
    assert all(choice.experts.shape == (22, FAMILIES[family]["num_experts_per_tok"]) for choice in choices)
    assert {n: tuple(p.shape) for n, p in ours.named_parameters()} == hf_shapes(stock.config)


def test_a_quantized_folder_is_refused_and_read_after_the_documented_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the format of the published GPT-OSS, in which 32 values of 4 bits share a scale of 8 bits."""
    stock_folder(tmp_path / "plain", "gpt_oss")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "mxfp4").mkdir()
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (tmp_path / "mxfp4" / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        count, inputs, outputs = tensors.pop(name).shape
        blocks = (count, outputs, inputs // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, blocks, generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(123, 127, blocks[:3], generator=generator, dtype=torch.uint8)
    save_file(tensors, tmp_path / "mxfp4" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"mxfp4: the weights are quantized \(mxfp4\); write them in bf16 .*llms.md"):
        resolve_hf_config(LLMConfig(weights=str(tmp_path / "mxfp4")))
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "llms.md").read_text(encoding="utf-8")
    found = re.search(r"## Dequantize GPT-OSS.*?```python\n(.*?)```", page, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1].replace("openai/gpt-oss-20b", "mxfp4"), names)
    read = build_reference(LLMConfig(weights="gpt-oss-20b-bf16")).eval()
    ids = torch.randint(0, 97, (1, 11), generator=generator)
    with torch.no_grad():
        wanted = names["llm"].float().eval()(ids, use_cache=False).logits
        assert (read(ids, use_cache=False).logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_the_number_of_experts_can_be_overridden_under_either_name(tmp_path: Path) -> None:
    stock_folder(tmp_path, "qwen3-normalized")
    for key in ("num_experts", "num_local_experts"):
        found = resolve_hf_config(LLMConfig(weights=str(tmp_path), config={key: 6}))
        assert found.num_experts == 6


def test_a_config_that_chooses_more_experts_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match=r"num_experts_per_tok = 5: must be within 1\.\.4"):
        resolve_hf_config(LLMConfig(config={**SHAPE, **FAMILIES["mixtral"], "num_experts_per_tok": 5}))
    with pytest.raises(UserError, match=r"router_jitter_noise = 0\.1: only 0\.0 is supported"):
        resolve_hf_config(LLMConfig(config={**SHAPE, **FAMILIES["mixtral"], "router_jitter_noise": 0.1}))


def test_the_chosen_experts_and_their_weights() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.15, 0.05]]))
    raw = Mixture(("a", "b", "c", "d"), 2, 1, (0,), normalize=False)
    found = choose(logits, raw)
    assert found.experts.tolist() == [[1, 3], [0, 2]]
    torch.testing.assert_close(found.weights, torch.tensor([[0.4, 0.3], [0.7, 0.15]]))
    normalized = choose(logits, Mixture(("a", "b", "c", "d"), 2, 1, (0,), normalize=True))
    torch.testing.assert_close(normalized.weights, logits.gather(1, found.experts).softmax(-1))


def test_the_smallest_gap_is_between_the_last_chosen_and_the_first_other_expert() -> None:
    logits = torch.tensor([[3.0, 2.99, 1.0, 0.5], [0.0, 1.0, 4.0, 0.75]])
    mixture = Mixture(("a", "b", "c", "d"), 2, 1, (0,), normalize=True)
    assert smallest_gap([choose(logits, mixture)], 2) == pytest.approx(0.25)
    assert smallest_gap([choose(logits[:0], mixture)], 2) == float("inf")
    assert smallest_gap([choose(logits, mixture)], 4) == float("inf")


def tokens_of(logits: torch.Tensor, lengths: list[int], top_k: int) -> RoutedTokens:
    """Return the routed tokens of samples with these lengths, from the router's logits [ΣT, 4]."""
    mixture = Mixture(tuple("abcd"), top_k, 1, (0,), normalize=True)
    samples = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return RoutedTokens(choose(logits, mixture), samples, torch.tensor(lengths), lambda tensor: tensor)


def test_balance_is_one_for_an_even_use_and_larger_for_an_uneven_one() -> None:
    cyclic = 20 * torch.eye(4)[[0, 1, 2, 3, 0, 1, 2, 3]]
    assert float(ExpertBalance().sum(tokens_of(cyclic, [4, 4], 1), CONFIG)) == pytest.approx(2.0, abs=1e-5)
    same = 20 * torch.eye(4)[[0] * 8]
    assert float(ExpertBalance().sum(tokens_of(same, [4, 4], 1), CONFIG)) == pytest.approx(8.0, abs=1e-5)


def test_z_is_the_squared_log_of_the_sum_of_exponentials() -> None:
    logits = torch.log(torch.tensor([[1.0, 2, 3, 4], [0.1, 0.2, 0.3, 0.4]]))
    found = RouterZ().sum(tokens_of(logits, [2], 2), CONFIG)
    assert float(found) == pytest.approx(float(torch.tensor(10.0).log() ** 2), abs=1e-5)


def test_ranks_that_share_the_tokens_of_samples_add_up_to_the_losses_of_all() -> None:
    lengths, logits = [5, 3], torch.randn(8, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    whole = tokens_of(logits, lengths, 2)
    counts: list[torch.Tensor] = []
    halves = [slice(0, 4), slice(4, 8)]

    def part(rows: slice, reduce: Any) -> RoutedTokens:
        return RoutedTokens(whole.choice.rows(rows), whole.samples[rows], whole.lengths, reduce)

    for rows in halves:  # the first pass collects what each rank contributes to the reduction
        ExpertBalance().sum(part(rows, lambda t: counts.append(t.clone()) or t), CONFIG)
    for loss in (ExpertBalance(), RouterZ()):
        parts = sum(loss.sum(part(rows, lambda t: counts[0] + counts[1]), CONFIG) for rows in halves)
        wanted = loss.sum(whole, CONFIG)
        torch.testing.assert_close(parts, wanted)
        for found, expected in zip(
            torch.autograd.grad(parts, logits, retain_graph=True),
            torch.autograd.grad(wanted, logits, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(found, expected)


def test_a_qwen_without_a_layer_with_experts_is_dense() -> None:
    config: PretrainedConfig = resolve_hf_config(
        LLMConfig(config={**SHAPE, **QWEN, "num_experts_per_tok": 2, "decoder_sparse_step": 9})
    )
    assert mixture_of(config) is None
    assert "model.layers.0.mlp.gate_proj.weight" in hf_shapes(config)
