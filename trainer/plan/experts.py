"""What a plan computes for the experts in the LLM's layers: parameters, computation, traffic and memory.

How many tokens an expert receives is not known in advance. The plan assumes that all experts are used equally. Since no
token is dropped, it also states how much memory the most uneven use would cost.

With k chosen experts of width F, a layer computes as much per token as a dense layer of width k·F. Its matmuls are
therefore planned as those of the dense LLM that `as_dense` returns.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from transformers import PretrainedConfig

from model.llm.families import mixture_of
from model.llm.mixture import FIELD
from model.llm.names import hf_shapes
from trainer.parallel.topology import Topology

_FP32_BYTES = 4
_ROUTER_VALUES = 3
"""The number of fp32 values per token and expert that a router keeps: the scores, the weights, and the softmax of the
scores, which its backward pass needs."""


def as_dense(hf_config: PretrainedConfig) -> PretrainedConfig:
    """Return the config of a dense LLM that computes as much per token as this one.

    If the LLM has no experts, its own config is returned.
    """
    mixture = mixture_of(hf_config)
    if mixture is None:
        return hf_config
    dense, layers = copy.deepcopy(hf_config), hf_config.num_hidden_layers
    active = len(mixture.layers) * mixture.top_k * mixture.width
    active += (layers - len(mixture.layers)) * hf_config.intermediate_size
    if hasattr(dense, FIELD):
        delattr(dense, FIELD)
    else:
        dense.num_experts = 0
    dense.intermediate_size = -(-active // layers)
    return dense


def expert_parameters(hf_config: PretrainedConfig) -> int:
    """Return the number of parameters of all experts of all layers, without routers."""
    mixture = mixture_of(hf_config)
    if mixture is None:
        return 0
    return len(mixture.layers) * len(mixture.experts) * 3 * mixture.width * hf_config.hidden_size


def active_parameters(hf_config: PretrainedConfig) -> int:
    """Return the number of the LLM's parameters that are used for a token."""
    total = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in hf_shapes(hf_config).values())
    mixture = mixture_of(hf_config)
    if mixture is None:
        return total
    return total - expert_parameters(hf_config) * (len(mixture.experts) - mixture.top_k) // len(mixture.experts)


@dataclass(frozen=True)
class ExpertPlan:
    """The memory and traffic of an LLM's experts on a rank."""

    num_experts: int
    """The number of experts in a layer."""
    top_k: int
    num_layers: int
    """The number of layers with experts in the LLM."""
    total_parameters: int
    """The number of the LLM's parameters."""
    active_parameters: int
    """The number of the LLM's parameters that are used for a token."""
    layer_bytes: int
    """The bytes that a layer with experts keeps for the backward pass of a micro-batch in addition to those of a dense
    layer with as much computation, if all experts are used equally: received tokens, outputs, and router values."""
    worst_bytes: int
    """The bytes that a micro-batch adds to the peak if all tokens choose experts on one rank. With recomputation,
    these are the activations of one layer; otherwise, those of all layers of a stage."""
    all_to_all_bytes: float
    """The bytes that a rank sends to other ranks for the experts in a step."""


def expert_plan(
    hf_config: PretrainedConfig,
    topology: Topology,
    pack_tokens: int,
    microbatches: int,
    value_bytes: int,
    recompute: bool,
) -> ExpertPlan | None:
    """Return the memory and traffic of the experts on a rank; None if the LLM has no experts.

    Args:
        hf_config: The LLM.
        topology: The layout of the ranks.
        pack_tokens: The number of rows in a pack.
        microbatches: The number of micro-batches in a step.
        value_bytes: The size of a weight or activation in bytes.
        recompute: Whether only the input of each layer is kept for the backward pass.
    """
    mixture = mixture_of(hf_config)
    if mixture is None:
        return None
    hidden, width, count = hf_config.hidden_size, mixture.width, len(mixture.experts)
    ep, etp = topology.ffn_ep, topology.expert_tp
    rows = pack_tokens / topology.tp  # tokens that a rank routes
    # if all experts are used equally; expert-tensor-parallel ranks that share an expert receive each other's tokens
    arrived = rows * mixture.top_k * etp
    routed = rows * count * _ROUTER_VALUES * _FP32_BYTES
    layer_bytes = 2 * arrived * hidden * value_bytes + routed
    # A token cannot choose more experts on one rank than the rank has.
    factor = ep * min(mixture.top_k, count // ep) / mixture.top_k
    per_row = (2 * hidden + 3 * width / etp) * value_bytes
    layers = -(-len(mixture.layers) // topology.pp)
    worst = (factor - 1) * arrived * per_row * (1 if recompute else layers)
    sent = rows * mixture.top_k * hidden * value_bytes * (ep - 1) / ep
    passes = 4 + (2 if recompute else 0)  # there and back, forward and backward
    total = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in hf_shapes(hf_config).values())
    return ExpertPlan(
        count,
        mixture.top_k,
        len(mixture.layers),
        total,
        active_parameters(hf_config),
        int(layer_bytes),
        int(worst),
        passes * sent * microbatches * layers,
    )
