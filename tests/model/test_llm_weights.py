"""Tests of the sources of LLM weights and of LLM configs, and of the errors for bad files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import LLMConfig
from model.errors import UserError
from model.llm.features import AttentionLayer, attention_layers
from model.llm.mixture import ExpertConfig
from model.llm.names import hf_shapes
from model.llm.reference import build_reference, resolve_hf_config
from model.llm.weights import RandomSource, SafetensorsSource, local_directory

SHAPE = {
    "model_type": "llama",
    "vocab_size": 600,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llm(**fields: Any) -> LLMConfig:
    return LLMConfig(config={**SHAPE, **fields})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    build_reference(llm(), seed=1).save_pretrained(tmp_path)
    return tmp_path


def test_random_slices_are_those_of_the_whole() -> None:
    source = RandomSource(resolve_hf_config(llm()), seed=3)
    name = "model.embed_tokens.weight"
    whole = source.read(name, (slice(None), slice(None)))
    assert whole.shape == (600, 16)
    assert torch.equal(source.read(name, (slice(250, 521), slice(3, 9))), whole[250:521, 3:9])
    assert 0.019 < whole.std() < 0.021
    assert not torch.equal(whole[:256], whole[256:512])
    other = RandomSource(resolve_hf_config(llm()), seed=4).read(name, (slice(None), slice(None)))
    assert not torch.equal(whole, other)


def test_seed_decides_the_reference() -> None:
    first, again, other = (build_reference(llm(), seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("max_shard_size", ["10GB", "30KB"])
def test_reads_transformers_checkpoints(tmp_path: Path, max_shard_size: str) -> None:
    made = build_reference(llm(), seed=1)
    made.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "30KB")
    read = build_reference(LLMConfig(weights=str(tmp_path))).state_dict()
    assert all(torch.equal(read[n], t) for n, t in made.state_dict().items())
    part = SafetensorsSource(tmp_path).read("model.norm.weight", (slice(2, 5),))
    assert torch.equal(part, made.state_dict()["model.norm.weight"][2:5])


def test_missing_tensor_is_named(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight \(24, 16\) is missing"):
        build_reference(LLMConfig(weights=str(checkpoint)))


def test_mismatching_shape_is_named_with_its_file(checkpoint: Path) -> None:
    config = LLMConfig(weights=str(checkpoint), config={"intermediate_size": 32})
    with pytest.raises(UserError, match=r"model\.safetensors: tensor .*gate_proj.* has shape \(24, 16\).*\(32, 16\)"):
        build_reference(config)


def test_unreadable_checkpoints(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(UserError, match="holds neither model.safetensors nor"):
        SafetensorsSource(tmp_path / "nothing")
    (checkpoint / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        SafetensorsSource(checkpoint)
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="shards must be in the directory itself"):
        SafetensorsSource(checkpoint).shape("model.norm.weight")


def test_neither_directory_nor_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for weights in ("no/such/directory", "someone/llama-that-is-not-cached"):
        with pytest.raises(UserError, match=f"model.llm.weights = '{weights}'"):
            local_directory(weights)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2: supported families are llama, mistral, qwen2, qwen3"),
        ({"num_key_value_head": 2}, "num_key_value_head: unknown key; did you mean num_key_value_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide num_attention_heads = 4"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type = dynamic: must be one of default, linear",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5: only 1.0 is supported"),
        ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 2}, "layer_types = linear_attention"),
        ({"model_type": "granite", "attention_bias": True}, "attention_bias = True"),
        ({"model_type": "smollm3", "mlp_bias": True}, "mlp_bias = True"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "not a valid smollm3 config"),
        ({"model_type": "phi3", "resid_pdrop": 0.1}, "resid_pdrop = 0.1"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"model_type": "gemma3_text", "hidden_activation": "silu"}, "hidden_activation = silu"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"model_type": "ministral3", "rope_parameters": {"rope_type": "default"}}, "llama_4_scaling_beta is missing"),
        ({"model_type": "olmo2", "attention_bias": True}, "attention_bias = True"),
        ({"attention_bias": True}, "attention_bias = True: only False is supported"),
        ({"hidden_size": "big"}, "not a valid llama config"),
    ],
)
def test_configs_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_hf_config(llm(**fields))


@pytest.mark.parametrize("family", ["phi3", "gemma3_text"])
def test_other_feed_forward_networks_get_no_experts(family: str) -> None:
    config = replace(llm(model_type=family), experts=(ExpertConfig("a"), ExpertConfig("b")))
    with pytest.raises(UserError, match=f"model.llm.experts: not supported for {family}"):
        resolve_hf_config(config)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral", "sliding_window": 128, "max_position_embeddings": 128},
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 64},
        {"model_type": "qwen3", "head_dim": 8, "rope_theta": 1e6},
    ],
)
def test_configs_that_are_accepted(fields: dict[str, Any]) -> None:
    hf_config = resolve_hf_config(llm(**fields))
    parameters = {n: tuple(p.shape) for n, p in build_reference(llm(**fields), seed=0).named_parameters()}
    assert hf_shapes(hf_config) == parameters


@pytest.mark.parametrize("family", ["llama", "granite", "olmo2"])
def test_fields_that_transformers_ignores_change_nothing(family: str) -> None:
    """Check a config.json with fields of other families, which transformers' models do not read."""
    foreign = {"sliding_window": 4, "no_rope_layers": [0, 1], "layer_types": ["sliding_attention"] * 2}
    cls: Any = type(resolve_hf_config(llm(model_type=family)))
    found = cls(**{**SHAPE, "model_type": family, **foreign, "max_position_embeddings": 64})
    assert found.sliding_window == 4, "the field must be stored"
    assert attention_layers(found) == (AttentionLayer(), AttentionLayer())
