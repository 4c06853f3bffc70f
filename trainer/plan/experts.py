"""Parameters, computation, traffic and memory of FFN experts in a plan.

The plan assumes that all experts of a layer, including null experts, are chosen equally often, because the true numbers
are not known in advance. No token is dropped, so the plan also contains the memory that the most uneven distribution
would need.

With k chosen experts of width F that are not null, a layer computes as much per token as a dense layer of width k·F.
Shared experts add their widths. Therefore, the time of the matmuls is planned for the dense LLM that `as_dense`
returns. Shared experts are divided among ranks like dense layers, so the functions below do not count them as experts.
"""

from __future__ import annotations

import copy
import math
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
    """Return the config of a dense LLM that computes as much per token as an LLM with FFN experts.

    If the LLM has no FFN experts, its own config is returned.
    """
    mixture = mixture_of(hf_config)
    if mixture is None:
        return hf_config
    dense, layers = copy.deepcopy(hf_config), hf_config.num_hidden_layers
    active = len(mixture.layers) * mixture.mean_top_k * mixture.width
    active += len(mixture.layers) * len(mixture.shared) * mixture.shared_width
    active += (layers - len(mixture.layers)) * hf_config.intermediate_size
    if hasattr(dense, FIELD):
        delattr(dense, FIELD)
    else:
        dense.num_experts = 0
    dense.intermediate_size = math.ceil(active / layers)
    return dense


def expert_parameters(hf_config: PretrainedConfig) -> int:
    """Return the number of parameters of all FFN experts of all layers; 0 if there are none.

    Routers and shared experts are not counted.
    """
    mixture = mixture_of(hf_config)
    if mixture is None:
        return 0
    hidden = hf_config.hidden_size
    size = 3 * mixture.width * hidden + (2 * mixture.width + hidden if mixture.biases else 0)
    return len(mixture.layers) * len(mixture.experts) * size


def active_parameters(hf_config: PretrainedConfig) -> int:
    """Return the mean number of the LLM's parameters that are used for a token."""
    total = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in hf_shapes(hf_config).values())
    mixture = mixture_of(hf_config)
    if mixture is None:
        return total
    unused = 1 - mixture.mean_top_k / len(mixture.experts)
    return round(total - expert_parameters(hf_config) * unused)


@dataclass(frozen=True)
class ExpertPlan:
    """The memory and traffic of FFN experts on a rank."""

    num_experts: int
    """The number of experts in a layer, without null experts."""
    num_null: int
    """The number of null experts in a layer."""
    num_shared: int
    """The number of shared experts in a layer."""
    top_k: int
    """The number of experts, including null experts, that are chosen for a token."""
    num_layers: int
    """The number of layers with experts in the LLM."""
    total_parameters: int
    """The number of the LLM's parameters."""
    active_parameters: int
    """The mean number of the LLM's parameters that are used for a token."""
    layer_bytes: int
    """The bytes of received tokens, outputs and router values that a layer keeps for a micro-batch's backward pass, if
    all experts are used equally. A dense layer with as much computation does not keep them."""
    worst_bytes: int
    """The bytes that a micro-batch adds to the peak if all tokens choose experts on one rank. With recomputation, these
    are the activations of one layer. Without it, they are the activations of all layers of a stage."""
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
    """Return the memory and traffic of the FFN experts on a rank; None if the LLM has none.

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
    # All experts are assumed to be used equally. Ranks that share an expert receive each other's tokens.
    arrived = rows * mixture.mean_top_k * etp
    routed = rows * mixture.num_choices * _ROUTER_VALUES * _FP32_BYTES
    layer_bytes = 2 * arrived * hidden * value_bytes + routed
    if mixture.jitter and value_bytes == _FP32_BYTES:
        # Otherwise, the router reads the values that the norm keeps. In half precision, it reads a copy in any case.
        layer_bytes += rows * hidden * _FP32_BYTES
    # The output of every shared expert is kept for the gradient of its gate.
    layer_bytes += rows * hidden * value_bytes * len(mixture.shared) * mixture.shared_gate
    # A token cannot choose more experts on one rank than the rank has.
    factor = ep * min(mixture.top_k, count // ep) / mixture.mean_top_k
    per_row = (2 * hidden + 3 * width / etp) * value_bytes
    layers = -(-len(mixture.layers) // topology.pp)
    worst = (factor - 1) * arrived * per_row * (1 if recompute else layers)
    sent = rows * mixture.mean_top_k * hidden * value_bytes * (ep - 1) / ep
    passes = 4 + (2 if recompute else 0)  # to the experts and back, in the forward and the backward pass
    total = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in hf_shapes(hf_config).values())
    return ExpertPlan(
        count,
        mixture.num_null,
        len(mixture.shared),
        mixture.top_k,
        len(mixture.layers),
        total,
        active_parameters(hf_config),
        int(layer_bytes),
        int(worst),
        passes * sent * microbatches * layers,
    )
