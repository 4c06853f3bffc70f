"""Low-rank adapters in Megatron's column- and row-parallel linear layers (see `model.lora`).

Every Hugging Face projection has its own adapter, even where Megatron fuses several projections into one layer. For
example, `linear_qkv` has the factors `lora_A.q_proj`, `lora_B.q_proj`, `lora_A.k_proj` and so on.

With tensor parallelism, a column-parallel layer splits B along the outputs and a row-parallel layer splits A along the
inputs. The other factor is the same on all tensor-parallel ranks and is applied to this rank's rows of the sequence. It
is marked `sequence_parallel`, so Megatron sums its gradient over the tensor-parallel ranks. The tensors that ranks
exchange have only `rank` columns.

An expert has its own adapters. Expert tensor parallelism splits them in the same way, but it is Megatron's dispatcher
that gathers and scatters the tokens of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import PretrainedConfig

from model.config import LoraConfig
from model.llm.names import Piece, hf_shapes, is_expert, local_pieces
from model.lora import LLM, Adapters

_COLUMN_PARALLEL = ("linear_qkv", "in_proj", "linear_fc1")


def add_llm_adapters(
    gpt: Any,
    hf_config: PretrainedConfig,
    adapters: Adapters,
    *,
    tp_rank: int,
    tp_size: int,
    expert_tp: tuple[int, int] | None = None,
) -> None:
    """Add the adapters to a stage of the LLM, and freeze the weights under them.

    Args:
        gpt: The stage, on its device, with its weights loaded.
        hf_config: The configuration of the LLM.
        adapters: The adapters.
        tp_rank: The index of this rank among the tensor-parallel ranks.
        tp_size: The number of tensor-parallel ranks.
        expert_tp: The index of this rank among the ranks that share an expert, and the number of these ranks; None for
            `tp_rank` and `tp_size`.
    """
    if not adapters.parts:
        return
    shapes = hf_shapes(hf_config)
    for weight, module in _linear_layers(gpt):
        split = expert_tp if expert_tp is not None and is_expert(weight) else (tp_rank, tp_size)
        pieces = local_pieces(weight, hf_config, *split)
        names = dict.fromkeys(_projection(piece) for piece in pieces)
        if any(adapters.freezes(LLM + name) for name in names):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        parts = {name: part for name in names if (part := adapters.of_layer(LLM + name)) is not None}
        if parts:
            is_column_parallel = weight.removesuffix(".weight").endswith(_COLUMN_PARALLEL)
            add = _add_columns if is_column_parallel else _add_rows
            module.lora_A, module.lora_B = _Factors(), _Factors()
            add(module, pieces, parts, shapes, adapters)


def _linear_layers(gpt: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parallel linear layers of a stage with the names of their weights, numbered as in `model.llm.names`."""
    for layer in gpt.decoder.layers:
        prefix = f"decoder.layers.{layer.layer_number - 1}."
        for name in ("linear_qkv", "linear_proj", "in_proj", "out_proj"):
            if hasattr(layer.self_attention, name):
                yield f"{prefix}self_attention.{name}.weight", getattr(layer.self_attention, name)
        experts = getattr(layer.mlp, "local_expert_indices", None)
        networks = [("mlp", layer.mlp)]
        if experts is not None:
            networks = [
                (f"mlp.experts.local_experts.{number}", expert)
                for number, expert in zip(experts, layer.mlp.experts.local_experts, strict=True)
            ]
            if (shared := layer.mlp.shared_experts) is not None:
                networks += [(f"mlp.shared_experts.networks.{i}", one) for i, one in enumerate(shared.networks)]
        for path, network in networks:
            yield f"{prefix}{path}.linear_fc1.weight", network.linear_fc1
            yield f"{prefix}{path}.linear_fc2.weight", network.linear_fc2


class _Factors(nn.Module):
    """The factors A or B of a layer's adapters, by projection.

    Callers read a factor by calling this module. If weights are gathered during the forward pass, Megatron's hooks on
    module calls wait for them.
    """

    def forward(self, key: str) -> Tensor:
        """Return the factor of a projection."""
        factor: Tensor = self.get_parameter(key)
        return factor


@dataclass(frozen=True)
class _Part:
    """The adapter of one projection in a column-parallel layer."""

    key: str
    """The name of the projection, such as q_proj."""
    config: LoraConfig
    rows: Tensor
    """The positions of the projection's outputs on this rank in the layer's output, [outputs] int64."""


def _add_columns(
    module: Any,
    pieces: Sequence[Piece],
    parts: Mapping[str, LoraConfig],
    shapes: Mapping[str, tuple[int, ...]],
    adapters: Adapters,
) -> None:
    """Add the adapters `parts`, by projection, to a column-parallel layer whose weight consists of `pieces`."""
    found = []
    for name, config in parts.items():
        key, (outputs, inputs) = name.rpartition(".")[2], shapes[f"{name}.weight"]
        a = adapters.initial(f"{LLM}{name}.lora_A", (config.rank, inputs))
        b = adapters.initial(f"{LLM}{name}.lora_B", (outputs, config.rank))
        own = [piece.index[0] for piece in pieces if _projection(piece) == name]
        module.lora_A.register_parameter(key, _copied(a, module))
        module.lora_B.register_parameter(key, _split(torch.cat([b[rows] for rows in own]), module, dim=0))
        found.append(_Part(key, config, _positions(pieces, name).to(module.weight.device)))
    module.register_forward_hook(partial(_add_to_columns, parts=found))


def _add_rows(
    module: Any,
    pieces: Sequence[Piece],
    parts: Mapping[str, LoraConfig],
    shapes: Mapping[str, tuple[int, ...]],
    adapters: Adapters,
) -> None:
    """Add the adapter of a row-parallel layer, which consists of one projection."""
    ((name, config),) = parts.items()
    key, (outputs, inputs) = name.rpartition(".")[2], shapes[f"{name}.weight"]
    a = adapters.initial(f"{LLM}{name}.lora_A", (config.rank, inputs))
    module.lora_A.register_parameter(key, _split(a[:, pieces[0].index[1]], module, dim=1))
    b = adapters.initial(f"{LLM}{name}.lora_B", (outputs, config.rank))
    module.lora_B.register_parameter(key, _copied(b, module))
    module.register_forward_hook(partial(_add_to_rows, key=key, scale=config.scale))


def _add_to_columns(module: Any, args: tuple[Tensor, ...], output: tuple[Tensor, Any], *, parts: list[_Part]) -> Any:
    values, bias = output
    low = linear(args[0], torch.cat([module.lora_A(part.key) for part in parts]))
    if module.sequence_parallel and not module.explicit_expert_comm:
        low = gather_from_sequence_parallel_region(low, group=module.tp_group)
    # All factors B form one matrix for all outputs. Scattering its few columns takes much less time than scattering the
    # outputs of every token.
    factor = low.new_zeros(values.shape[-1], low.shape[-1])
    first = 0
    for part in parts:
        own = pad(part.config.scale * module.lora_B(part.key), (first, low.shape[-1] - first - part.config.rank))
        factor = factor.index_add(0, part.rows, own)
        first += part.config.rank
    return values + linear(low, factor), bias


def _add_to_rows(module: Any, args: tuple[Tensor, ...], output: tuple[Tensor, Any], *, key: str, scale: float) -> Any:
    values, bias = output
    low = linear(args[0], module.lora_A(key))  # With several tensor-parallel ranks, this is a partial sum.
    if module.sequence_parallel and not module.explicit_expert_comm:
        low = reduce_scatter_to_sequence_parallel_region(low, group=module.tp_group)
    return values + scale * linear(low, module.lora_B(key)), bias


def _copied(values: Tensor, module: Any) -> nn.Parameter:
    """Return a factor that is the same on all ranks that share the layer."""
    parameter = _parameter(values, module)
    num_ranks = module.tp_group.size()
    assert module.sequence_parallel or num_ranks == 1, "tensor parallelism implies sequence parallelism"
    parameter.sequence_parallel = num_ranks > 1  # type: ignore[attr-defined]
    if module.is_expert and num_ranks == 1:
        # The tensor-parallel ranks hold different experts, so the gradient norm must count the factor on each of them.
        set_tensor_model_parallel_attributes(parameter, True, 0, 1)
    return parameter


def _split(values: Tensor, module: Any, dim: int) -> nn.Parameter:
    """Return this rank's part of a factor that tensor parallelism splits along `dim`."""
    parameter = _parameter(values, module)
    # Without this mark, the gradient norm would count the factor only on the first tensor-parallel rank.
    set_tensor_model_parallel_attributes(parameter, True, dim, 1)
    return parameter


def _parameter(values: Tensor, module: Any) -> nn.Parameter:
    weight = module.weight
    parameter = nn.Parameter(values.to(device=weight.device, dtype=weight.dtype, copy=True))
    # The value is false for experts. Their gradients are reduced only over the copies of the expert.
    parameter.allreduce = getattr(weight, "allreduce", True)  # type: ignore[attr-defined]
    return parameter


def _projection(piece: Piece) -> str:
    """Return the name of the Hugging Face layer to which a piece of a weight belongs."""
    assert piece.hf_name is not None, "only the vocabulary is padded"
    return piece.hf_name.removesuffix(".weight")


def _positions(pieces: Sequence[Piece], name: str) -> Tensor:
    """Return the positions of a projection's rows in the layer whose weight consists of `pieces`."""
    found, first = [], 0
    for piece in pieces:
        count = piece.index[0].stop - piece.index[0].start
        if _projection(piece) == name:
            found.append(torch.arange(first, first + count))
        first += count
    return torch.cat(found)
