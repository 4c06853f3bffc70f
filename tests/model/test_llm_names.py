"""Tests of the names, shapes and slices of LLM tensors, with tensors whose elements are all different."""

from __future__ import annotations

import torch
from transformers import AutoConfig, PretrainedConfig

from model.llm.names import Index, global_to_hf, hf_shapes, hf_to_local, local_pieces, padded_vocab_size, tp_dim

QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
EMBEDDING = "embedding.word_embeddings.weight"


def config(model_type: str = "llama", **fields: object) -> PretrainedConfig:
    shape = {
        "vocab_size": 5,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 1,
    }
    made: PretrainedConfig = AutoConfig.for_model(model_type, **{**shape, **fields})
    return made


def labelled(hf_config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Return all tensors of the model by name. Each element of the model has a different value."""
    tensors, first = {}, 0
    for name, shape in hf_shapes(hf_config).items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(first, first + count, dtype=torch.float64).reshape(shape)
        first += count
    return tensors


def row_owners(name: str, hf_config: PretrainedConfig, rank: int, size: int) -> list[str]:
    """Return the origin of every row of a shard: the first letter of its projection and the row there, such as q0."""
    owners = []
    for piece in local_pieces(name, hf_config, rank, size):
        rows = range(piece.index[0].start, piece.index[0].stop)
        short = "-" if piece.hf_name is None else piece.hf_name.split(".")[-2][0]
        owners += [f"{short}{'' if short == '-' else r}" for r in rows]
    return owners


def test_qkv_is_interleaved_by_query_group() -> None:
    assert row_owners(QKV, config(), 0, 1) == ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
    assert row_owners(QKV, config(), 1, 2) == ["q2", "q3", "k1", "v1"]
    # With more ranks than key-value heads, a rank holds only a part of a group. Megatron gathers the group before use.
    assert row_owners(QKV, config(), 1, 4) == ["k0", "v0"]


def test_gate_and_up_are_split_each() -> None:
    assert row_owners(FC1, config(), 0, 2) == ["g0", "g1", "u0", "u1"]
    assert row_owners(FC1, config(), 1, 2) == ["g2", "g3", "u2", "u3"]


def test_vocabulary_is_padded_at_the_end() -> None:
    assert padded_vocab_size(config(), 4) == 8
    assert row_owners(EMBEDDING, config(), 2, 4) == ["e4", "-"]
    assert row_owners(EMBEDDING, config(), 3, 4) == ["-", "-"]


def test_every_element_survives_the_round_trip() -> None:
    for model_type, fields in (
        ("llama", {}),
        ("qwen2", {"tie_word_embeddings": True, "head_dim": None}),
        ("qwen3", {"head_dim": 2}),
    ):
        hf_config = config(model_type, **fields)
        tensors = labelled(hf_config)

        def read(name: str, index: Index, tensors: dict[str, torch.Tensor] = tensors) -> torch.Tensor:
            return tensors[name][index]

        layer = ["input_layernorm.weight", "pre_mlp_layernorm.weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
        layer += ["self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"]
        layer += {"qwen2": ["self_attention.linear_qkv.bias"]}.get(model_type, [])
        if model_type == "qwen3":
            layer += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
        names = [f"decoder.layers.0.{name}" for name in layer] + [EMBEDDING, "decoder.final_layernorm.weight"]
        for size in (1, 2, 4):
            found: dict[str, torch.Tensor] = {}
            for name in [*names, "output_layer.weight"]:
                dim = tp_dim(name)
                shards = [hf_to_local(name, read, hf_config, rank, size) for rank in range(size)]
                full = shards[0] if dim is None else torch.cat(shards, dim=dim)
                found.update(global_to_hf(name, full, hf_config, size))
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], tensors[name]) for name in tensors), (model_type, size)
