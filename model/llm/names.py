"""Hugging Face ↔ Megatron parameters: which tensors build which, and which part of them a tensor-parallel rank holds.

Pure: shapes and indices, no models. Layers in Megatron names are numbered globally here (`decoder.layers.<n>`, n from 0
over all pipeline stages). Layouts of Megatron-core's local layer spec:

- `linear_qkv` interleaves per query group: the group's query heads, its key head, its value head. A rank holds a run of
  rows; with fewer key-value heads than ranks that run is a part of a group.
- `linear_fc1` holds `[gate_r; up_r]` on rank r: the ranks' shards laid end to end are *not* `[gate; up]`.
- the vocabulary is padded with zero rows to a multiple of the tensor-parallel size.

"Full" always means the shards of all ranks laid end to end along `tp_dim`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

Index = tuple[slice, ...]
Read = Callable[[str, Index], Tensor]

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_FACTOR = re.compile(r"^(.+)\.(lora_[AB])\.([^.]+)$")
"""A factor of an adapter (`model.llm.lora`): the layer, the factor and the Hugging Face projection."""

_COLUMN_PARALLEL = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "word_embeddings.weight")
_ROW_PARALLEL = ("linear_proj.weight", "linear_fc2.weight")


@dataclass(frozen=True)
class Piece:
    """A rectangle of a Hugging Face tensor, or (name None) rows of zeros; a shard is pieces laid end to end."""

    hf_name: str | None
    index: Index


def tp_dim(megatron_name: str) -> int | None:
    """Dimension along which tensor parallelism splits the parameter; None: every rank holds all of it."""
    if (found := _FACTOR.match(megatron_name)) is not None:
        dim = tp_dim(found[1] + ".weight")
        return dim if (dim == 0) == (found[2] == "lora_B") else None
    if megatron_name == "output_layer.weight" or megatron_name.endswith(_COLUMN_PARALLEL):
        return 0
    return 1 if megatron_name.endswith(_ROW_PARALLEL) else None


def padded_vocab_size(hf_config: PretrainedConfig, tp_size: int) -> int:
    """Rows of embedding and output layer over all tensor-parallel ranks."""
    return -(-hf_config.vocab_size // tp_size) * tp_size


def head_dim(hf_config: PretrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def hf_shapes(hf_config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face model, in its order, with its shape; a tied output layer is not listed."""
    hidden, ffn, width = hf_config.hidden_size, hf_config.intermediate_size, head_dim(hf_config)
    queries, keys = hf_config.num_attention_heads * width, hf_config.num_key_value_heads * width
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (hf_config.vocab_size, hidden)}
    for n in range(hf_config.num_hidden_layers):
        layer = f"model.layers.{n}."
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            shapes[f"{layer}self_attn.{name}.weight"] = (rows, hidden)
            if has_qkv_bias(hf_config):
                shapes[f"{layer}self_attn.{name}.bias"] = (rows,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, queries)
        if has_qk_norm(hf_config):
            shapes[f"{layer}self_attn.q_norm.weight"] = shapes[f"{layer}self_attn.k_norm.weight"] = (width,)
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, ffn)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not hf_config.tie_word_embeddings:
        shapes["lm_head.weight"] = (hf_config.vocab_size, hidden)
    return shapes


def has_qkv_bias(hf_config: PretrainedConfig) -> bool:
    """Whether q, k and v projections have biases."""
    return bool(hf_config.model_type == "qwen2")


def has_qk_norm(hf_config: PretrainedConfig) -> bool:
    """Whether every query and key head is normalised."""
    return bool(hf_config.model_type == "qwen3")


def local_pieces(megatron_name: str, hf_config: PretrainedConfig, tp_rank: int, tp_size: int) -> list[Piece]:
    """What rank `tp_rank` of `tp_size` holds of the parameter, laid end to end along dimension 0."""
    if _FACTOR.match(megatron_name):
        return _factor_pieces(megatron_name, hf_config, tp_rank, tp_size)
    whole = slice(None)
    vocab = {"embedding.word_embeddings.weight": "model.embed_tokens.weight", "output_layer.weight": "lm_head.weight"}
    if megatron_name in vocab:
        tied = hf_config.tie_word_embeddings
        rows = padded_vocab_size(hf_config, tp_size) // tp_size
        hf_name = vocab["embedding.word_embeddings.weight" if tied else megatron_name]
        return _vocab_pieces(hf_name, hf_config, tp_rank * rows, rows)
    if megatron_name == "decoder.final_layernorm.weight":
        return [Piece("model.norm.weight", (whole,))]
    match = _LAYER.match(megatron_name)
    assert match, f"unknown Megatron parameter {megatron_name}"
    layer, rest = f"model.layers.{match[1]}.", match[2]
    if rest in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
        return list(_qkv_pieces(layer, rest.rsplit(".", 1)[1], hf_config, tp_rank, tp_size))
    if rest == "mlp.linear_fc1.weight":
        rows = hf_config.intermediate_size // tp_size
        index = (slice(tp_rank * rows, (tp_rank + 1) * rows), whole)
        return [Piece(f"{layer}mlp.{name}.weight", index) for name in ("gate_proj", "up_proj")]
    single = {
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    }
    assert rest in single, f"unknown Megatron parameter {megatron_name}"
    if tp_dim(megatron_name) is None:
        return [Piece(layer + single[rest], (whole,))]
    queries = hf_config.num_attention_heads * head_dim(hf_config)
    columns = (queries if rest.startswith("self_attention") else hf_config.intermediate_size) // tp_size
    return [Piece(layer + single[rest], (whole, slice(tp_rank * columns, (tp_rank + 1) * columns)))]


def hf_to_local(megatron_name: str, read: Read, hf_config: PretrainedConfig, tp_rank: int, tp_size: int) -> Tensor:
    """The shard of `tp_rank`, reading only the slices it is made of: `read(hf_name, index)` returns one."""
    parts: list[Tensor] = []
    for piece in local_pieces(megatron_name, hf_config, tp_rank, tp_size):
        if piece.hf_name is not None:
            parts.append(read(piece.hf_name, piece.index))
        else:
            rows = piece.index[0].stop - piece.index[0].start
            parts.append(torch.zeros(rows, hf_config.hidden_size, dtype=parts[0].dtype if parts else torch.float32))
    return torch.cat(parts)


def global_to_hf(megatron_name: str, full: Tensor, hf_config: PretrainedConfig, tp_size: int) -> dict[str, Tensor]:
    """Inverse of `hf_to_local`: the Hugging Face tensors that `full` (all ranks' shards along `tp_dim`) holds."""
    dim, shapes = tp_dim(megatron_name), hf_shapes(hf_config)
    tensors: dict[str, Tensor] = {}
    # A parameter that is not split is the same on every rank: rank 0 of 1 describes it.
    ranks = 1 if dim is None else tp_size
    for rank, shard in enumerate(full.chunk(ranks, dim=dim or 0)):
        row = 0
        for piece in local_pieces(megatron_name, hf_config, rank, ranks):
            if piece.hf_name is None:
                continue
            if piece.hf_name not in tensors:
                tensors[piece.hf_name] = full.new_empty(shapes[piece.hf_name])
            target = tensors[piece.hf_name][piece.index]
            target.copy_(shard[row : row + target.shape[0]])
            row += target.shape[0]
    return tensors


def _vocab_pieces(hf_name: str, hf_config: PretrainedConfig, start: int, num_rows: int) -> list[Piece]:
    real_stop = max(start, min(start + num_rows, hf_config.vocab_size))
    pieces = [Piece(hf_name, (slice(start, real_stop), slice(None)))] if real_stop > start else []
    if real_stop < start + num_rows:
        pieces.append(Piece(None, (slice(real_stop, start + num_rows), slice(None))))
    return pieces


def _qkv_pieces(layer: str, kind: str, hf_config: PretrainedConfig, tp_rank: int, tp_size: int) -> Iterator[Piece]:
    """Walk the rows of all query groups and cut out the run that the rank holds."""
    width = head_dim(hf_config)
    per_group = hf_config.num_attention_heads // hf_config.num_key_value_heads
    num_rows = hf_config.num_key_value_heads * (per_group + 2) * width
    first, last = tp_rank * num_rows // tp_size, (tp_rank + 1) * num_rows // tp_size
    row = 0
    for group in range(hf_config.num_key_value_heads):
        for name, heads in (("q_proj", per_group), ("k_proj", 1), ("v_proj", 1)):
            size = heads * width
            start, stop = max(first, row) - row, min(last, row + size) - row
            if start < stop:
                rows = slice(group * size + start, group * size + stop)
                index = (rows, slice(None)) if kind == "weight" else (rows,)
                yield Piece(f"{layer}self_attn.{name}.{kind}", index)
            row += size


def _factor_pieces(megatron_name: str, hf_config: PretrainedConfig, tp_rank: int, tp_size: int) -> list[Piece]:
    """Return what a rank holds of a LoRA factor: B is split like the rows of the weight, A like its columns."""
    found = _FACTOR.match(megatron_name)
    assert found is not None, megatron_name
    weight, factor, projection = found[1] + ".weight", found[2], found[3]
    pieces = local_pieces(weight, hf_config, tp_rank, tp_size)
    own = [p for p in pieces if p.hf_name is not None and p.hf_name.endswith(f".{projection}.weight")]
    assert own, f"{megatron_name}: the layer has no such projection"
    name = f"{str(own[0].hf_name).removesuffix('.weight')}.{factor}"
    if factor == "lora_A":
        return [Piece(name, (slice(None), own[0].index[1]))]
    return [Piece(name, (p.index[0], slice(None))) for p in own]
