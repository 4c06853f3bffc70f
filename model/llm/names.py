"""The mapping between the parameters of Hugging Face and of Megatron, and the part of each on a tensor-parallel rank.

The functions only compute names, shapes and indices, and do not access a model. In this module, n in the Megatron name
`decoder.layers.<n>` is the number of the layer, counted from 0 over all pipeline stages. Megatron-core's local layer
spec has these layouts:

- `linear_qkv` holds, for each query group, the query heads, the key head and the value head. A rank holds consecutive
  rows. If there are fewer key-value heads than ranks, these rows are a part of a group.
- `linear_fc1` holds `[gate_r; up_r]` on rank r, so the concatenation of all ranks' shards is *not* `[gate; up]`.
- The vocabulary is padded with zero rows to a multiple of the tensor-parallel size.
- In layers with linear attention, `in_proj` holds the rows of queries, keys and values, of the gate, and of the rate
  and the decay of each head. A rank holds the rows of consecutive heads of each kind.
- In layers with experts, `mlp.experts.local_experts.<e>` is expert e, counted over all ranks. Expert tensor parallelism
  divides the expert's `linear_fc1` and `linear_fc2` among ranks, as tensor parallelism divides a dense layer.

"Full" always means the concatenation of all ranks' shards along `tp_dim`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from model.llm.delta_names import DELTA, Index, delta_parts, delta_shapes
from model.llm.expert_names import expert_parts, expert_shapes
from model.llm.families import family_of, mixture_of, modules_of
from model.llm.features import attention_layers, delta_sizes

Read = Callable[[str, Index], Tensor]

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_FACTOR = re.compile(r"^(.+)\.(lora_[AB])\.([^.]+)$")
"""A pattern for the name of a LoRA factor (`model.llm.lora`), with groups for the layer, factor and projection."""

_COLUMN_PARALLEL = (
    *("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias", "word_embeddings.weight"),
    *("core_attention.sinks", "in_proj.weight", "conv1d.weight", "self_attention.dt_bias", "self_attention.A_log"),
)
_ROW_PARALLEL = ("linear_proj.weight", "linear_fc2.weight", "out_proj.weight")

_VOCABULARY = {"embedding.word_embeddings.weight": "embedding", "output_layer.weight": "output"}
_SINGLE = {
    "self_attention.linear_proj.weight": "attention_output.weight",
    "self_attention.linear_proj.bias": "attention_output.bias",
    "self_attention.core_attention.sinks": "sinks.sinks",
    "self_attention.norm.weight": "delta_norm.weight",
    "self_attention.out_proj.weight": "delta_output.weight",
    "self_attention.q_layernorm.weight": "query_norm.weight",
    "self_attention.k_layernorm.weight": "key_norm.weight",
    "mlp.linear_fc2.weight": "down.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "self_attn_bda.norm.weight": "attention_output_norm.weight",
    "pre_mlp_layernorm.weight": "mlp_norm.weight",
    "mlp_bda.norm.weight": "mlp_output_norm.weight",
}
"""The parameters of a layer that each correspond to a single Hugging Face tensor, and the tensor's role in
`LLAMA_MODULES`, followed by the last part of the tensor's name."""


@dataclass(frozen=True)
class Piece:
    """A rectangle of a Hugging Face tensor, or rows of zeros. A shard is a concatenation of pieces."""

    hf_name: str | None
    """The name of the tensor; None for rows of zeros."""
    index: Index


def is_expert(megatron_name: str) -> bool:
    """Return whether a parameter belongs to an expert and is therefore divided by expert tensor parallelism."""
    return ".local_experts." in megatron_name


def tp_dim(megatron_name: str) -> int | None:
    """Return the dimension along which tensor parallelism splits a parameter; None if the parameter is not split."""
    if (found := _FACTOR.match(megatron_name)) is not None:
        dim = tp_dim(found[1] + ".weight")
        return dim if (dim == 0) == (found[2] == "lora_B") else None
    if megatron_name == "output_layer.weight" or megatron_name.endswith(_COLUMN_PARALLEL):
        return 0
    return 1 if megatron_name.endswith(_ROW_PARALLEL) else None


def padded_vocab_size(hf_config: PretrainedConfig, tp_size: int) -> int:
    """Return the number of rows of the embedding and the output layer over all tensor-parallel ranks."""
    return -(-hf_config.vocab_size // tp_size) * tp_size


def head_dim(hf_config: PretrainedConfig) -> int:
    """Return the width of one attention head."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def hf_shapes(hf_config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the Hugging Face model by name, in order. A tied output layer is omitted."""
    modules = modules_of(hf_config)
    hidden, ffn = hf_config.hidden_size, hf_config.intermediate_size
    layers = attention_layers(hf_config)
    attention = {is_linear: _attention_shapes(hf_config, is_linear) for is_linear in {n.is_linear for n in layers}}
    dense = {"gate.weight": (ffn, hidden), "up.weight": (ffn, hidden), "down.weight": (hidden, ffn)}
    mixture = mixture_of(hf_config)
    shapes: dict[str, tuple[int, ...]] = {_hf_name(modules, "embedding.weight"): (hf_config.vocab_size, hidden)}

    def add(tensors: Mapping[str, tuple[int, ...]], layer: int) -> None:
        for tensor, (rows, *columns) in tensors.items():
            name = _hf_name(modules, tensor, layer)
            # Roles with the same module are stored in one tensor, one after the other.
            shapes[name] = (shapes.get(name, (0,))[0] + rows, *columns)

    for n, layer in enumerate(layers):
        add(attention[layer.is_linear], n)
        if mixture is None or n not in mixture.layers:
            add(dense, n)
            continue
        shapes |= expert_shapes(hf_config, n)
    shapes[_hf_name(modules, "final_norm.weight")] = (hidden,)
    if not hf_config.tie_word_embeddings:
        shapes[_hf_name(modules, "output.weight")] = (hf_config.vocab_size, hidden)
    return shapes


def _attention_shapes(hf_config: PretrainedConfig, is_linear: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes by role of a layer's tensors outside the feed-forward network."""
    family, hidden = family_of(hf_config), hf_config.hidden_size
    shapes = delta_shapes(hf_config) if is_linear else _softmax_shapes(hf_config)
    if family.norms != "after":
        shapes["attention_norm.weight"] = shapes["mlp_norm.weight"] = (hidden,)
    if family.norms != "before":
        shapes["attention_output_norm.weight"] = shapes["mlp_output_norm.weight"] = (hidden,)
    return shapes


def _softmax_shapes(hf_config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes by role of the tensors of a layer's attention."""
    family, hidden, width = family_of(hf_config), hf_config.hidden_size, head_dim(hf_config)
    rows = _projection_rows(hf_config)
    queries = hf_config.num_attention_heads * width
    shapes: dict[str, tuple[int, ...]] = {}
    for role in ("query", "key", "value"):
        shapes[f"{role}.weight"] = (rows[role], hidden)
        if family.qkv_bias:
            shapes[f"{role}.bias"] = (rows[role],)
    shapes["attention_output.weight"] = (hidden, queries)
    if family.output_bias:
        shapes["attention_output.bias"] = (hidden,)
    if family.sinks:
        shapes["sinks.sinks"] = (hf_config.num_attention_heads,)
    if family.qk_norm:
        shapes["query_norm.weight"] = shapes["key_norm.weight"] = (width,)
    if family.all_heads_norm:
        shapes["query_norm.weight"], shapes["key_norm.weight"] = (queries,), (rows["key"],)
    return shapes


def _projection_rows(hf_config: PretrainedConfig) -> dict[str, int]:
    """Return the number of rows, by role, of the projections that some families store together in one tensor."""
    width = head_dim(hf_config)
    keys = hf_config.num_key_value_heads * width
    queries = hf_config.num_attention_heads * width * (2 if family_of(hf_config).gated_attention else 1)
    rows = {"query": queries, "key": keys, "value": keys}
    return {**rows, "gate": hf_config.intermediate_size, "up": hf_config.intermediate_size}


def _first_row(hf_config: PretrainedConfig, role: str) -> int:
    """Return the first row of a projection in its tensor. It is 0 unless several projections share the tensor."""
    modules, first = modules_of(hf_config), 0
    for other, rows in _projection_rows(hf_config).items():
        if other == role:
            break
        if modules[other] == modules[role]:
            first += rows
    return first


def _hf_name(modules: Mapping[str, str], tensor: str, layer: int | None = None) -> str:
    """Return the Hugging Face name of a tensor, given its role and the last part of its name, such as `role.weight`.

    `layer` is None for tensors outside the layers.
    """
    role, _, kind = tensor.partition(".")
    prefix = "" if layer is None else modules["layer"].format(n=layer) + "."
    return f"{prefix}{modules[role]}.{kind}"


def local_pieces(megatron_name: str, hf_config: PretrainedConfig, tp_rank: int, tp_size: int) -> list[Piece]:
    """Return the pieces of a parameter that rank `tp_rank` of `tp_size` holds, in order along dimension 0.

    For a parameter of an expert (`is_expert`), `tp_rank` and `tp_size` are the rank and size of expert tensor
    parallelism.
    """
    if _FACTOR.match(megatron_name):
        return _factor_pieces(megatron_name, hf_config, tp_rank, tp_size)
    modules, whole = modules_of(hf_config), slice(None)
    if megatron_name in _VOCABULARY:
        role = "embedding" if hf_config.tie_word_embeddings else _VOCABULARY[megatron_name]
        rows = padded_vocab_size(hf_config, tp_size) // tp_size
        return _vocab_pieces(_hf_name(modules, f"{role}.weight"), hf_config, tp_rank * rows, rows)
    if megatron_name == "decoder.final_layernorm.weight":
        return [Piece(_hf_name(modules, "final_norm.weight"), (whole,))]
    match = _LAYER.match(megatron_name)
    assert match, f"unknown Megatron parameter {megatron_name}"
    layer, rest = int(match[1]), match[2]
    if rest in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
        return list(_qkv_pieces(layer, rest.rsplit(".", 1)[1], hf_config, tp_rank, tp_size))
    if (delta := DELTA.match(rest)) is not None:
        parts = delta_parts(delta[1], delta_sizes(hf_config), tp_rank, tp_size)
        return [Piece(_hf_name(modules, tensor, layer), index) for tensor, index in parts]
    if rest == "mlp.linear_fc1.weight":
        rows = hf_config.intermediate_size // tp_size
        first = {role: _first_row(hf_config, role) + tp_rank * rows for role in ("gate", "up")}
        return [
            Piece(_hf_name(modules, f"{role}.weight", layer), (slice(start, start + rows), whole))
            for role, start in first.items()
        ]
    of_experts = expert_parts(rest, layer, hf_config, tp_rank, tp_size)
    if of_experts is not None:
        return [Piece(*part) for part in of_experts]
    assert rest in _SINGLE, f"unknown Megatron parameter {megatron_name}"
    hf_name = _hf_name(modules, _SINGLE[rest], layer)
    if tp_dim(megatron_name) is None:
        return [Piece(hf_name, (whole,))]
    if rest.endswith(".sinks"):
        heads = hf_config.num_attention_heads // tp_size
        return [Piece(hf_name, (slice(tp_rank * heads, (tp_rank + 1) * heads),))]
    if rest == "mlp.linear_fc2.weight":
        num_columns = hf_config.intermediate_size
    elif rest == "self_attention.out_proj.weight":
        num_columns = delta_sizes(hf_config).values
    else:
        num_columns = hf_config.num_attention_heads * head_dim(hf_config)
    own = slice(tp_rank * num_columns // tp_size, (tp_rank + 1) * num_columns // tp_size)
    return [Piece(hf_name, (whole, own))]


def hf_to_local(megatron_name: str, read: Read, hf_config: PretrainedConfig, tp_rank: int, tp_size: int) -> Tensor:
    """Return the shard of a parameter on rank `tp_rank`, reading only the required slices of Hugging Face tensors.

    Args:
        megatron_name: The parameter.
        read: A function that returns the part of a Hugging Face tensor at an index, given the tensor's name.
        hf_config: The LLM.
        tp_rank: The tensor-parallel rank.
        tp_size: The tensor-parallel size.
    """
    parts: list[Tensor] = []
    for piece in local_pieces(megatron_name, hf_config, tp_rank, tp_size):
        if piece.hf_name is not None:
            parts.append(read(piece.hf_name, piece.index))
        else:
            rows = piece.index[0].stop - piece.index[0].start
            parts.append(torch.zeros(rows, hf_config.hidden_size, dtype=parts[0].dtype if parts else torch.float32))
    return torch.cat(parts)


def global_to_hf(megatron_name: str, full: Tensor, hf_config: PretrainedConfig, tp_size: int) -> dict[str, Tensor]:
    """Return the Hugging Face tensors that a parameter contains. This is the inverse of `hf_to_local` on all ranks.

    Args:
        megatron_name: The parameter.
        full: The concatenation of all ranks' shards along `tp_dim`.
        hf_config: The LLM.
        tp_size: The tensor-parallel size.
    """
    dim, shapes = tp_dim(megatron_name), hf_shapes(hf_config)
    tensors: dict[str, Tensor] = {}
    # A parameter that is not split is the same on every rank, so the pieces of one rank describe it.
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


def _qkv_pieces(layer: int, kind: str, hf_config: PretrainedConfig, tp_rank: int, tp_size: int) -> Iterator[Piece]:
    """Yield the pieces of queries, keys and values on a rank, in the order of their rows in `linear_qkv`."""
    modules = modules_of(hf_config)
    blocks = [block for group in range(hf_config.num_key_value_heads) for block in _group_blocks(hf_config, group)]
    num_rows = sum(size for *_, size in blocks)
    first, last = tp_rank * num_rows // tp_size, (tp_rank + 1) * num_rows // tp_size
    row = 0
    for role, first_row, size in blocks:
        start, stop = max(first, row) - row, min(last, row + size) - row
        if start < stop:
            rows = slice(first_row + start, first_row + stop)
            index = (rows, slice(None)) if kind == "weight" else (rows,)
            yield Piece(_hf_name(modules, f"{role}.{kind}", layer), index)
        row += size


def _group_blocks(hf_config: PretrainedConfig, group: int) -> Iterator[tuple[str, int, int]]:
    """Yield the role, the first row in its tensor, and the number of rows of each block of a group in `linear_qkv`.

    With `LLMFamily.gated_attention`, the tensor of queries has the rows of each head's query, followed by those of its
    gate. In `linear_qkv`, the gates of a group follow its queries.
    """
    width, heads = head_dim(hf_config), hf_config.num_attention_heads // hf_config.num_key_value_heads
    queries = _first_row(hf_config, "query")
    if family_of(hf_config).gated_attention:
        for offset in (0, width):
            for head in range(group * heads, (group + 1) * heads):
                yield "query", queries + 2 * head * width + offset, width
    else:
        yield "query", queries + group * heads * width, heads * width
    for role in ("key", "value"):
        yield role, _first_row(hf_config, role) + group * width, width


def _factor_pieces(megatron_name: str, hf_config: PretrainedConfig, tp_rank: int, tp_size: int) -> list[Piece]:
    """Return the pieces of a LoRA factor on a rank. B is split like the weight's rows, and A like its columns."""
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
