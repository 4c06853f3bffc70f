"""Megatron-core MoE layers that combine Megatron's all-to-all dispatcher and expert MLPs with this project's router.

The router chooses experts with the same function as the single-process model (`model.llm.experts.choose`), in fp32.
Megatron's own auxiliary losses are not used, because their gradients depend on the topology. The router losses
are entries of the loss table instead (`model.losses.router`).

A *pack* is a packed sequence (`model.llm.packing`).

Shapes: t rows of a pack, E experts, C = E + N choices including N null experts, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import linear

from model.llm.experts import choose, gate_experts
from model.llm.jitter import jittered_rows
from model.llm.mixture import Clamp, Mixture
from model.llm.mlp import GatedMLP
from model.llm.packing import PackedSequences


def expert_options(mixture: Mixture | None, *, tp_size: int, ep_size: int, expert_tp_size: int) -> dict[str, Any]:
    """Return the fields of Megatron's config that describe the experts; empty for an LLM without experts.

    Args:
        mixture: The experts.
        tp_size: The tensor-parallel size.
        ep_size: The number of ranks over which the experts are distributed.
        expert_tp_size: The number of ranks that share an expert. It must be `tp_size` if `ep_size` is 1, since
            otherwise the gradients of megatron-core 0.16.1 are wrong.
    """
    if mixture is None:
        return {}
    assert ep_size > 1 or expert_tp_size == tp_size, "megatron-core 0.16.1 computes wrong gradients"
    shared = {"moe_shared_expert_intermediate_size": mixture.shared_width} if mixture.shared else {}
    return {
        **shared,
        "num_moe_experts": len(mixture.experts),
        # Megatron only checks this value. With null experts, `top_k` may exceed the number of experts.
        "moe_router_topk": min(mixture.top_k, len(mixture.experts)),
        "moe_ffn_hidden_size": mixture.width,
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": True,  # `Router` ignores it, but Megatron rejects top_k = 1 without it.
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": ep_size,
        "expert_tensor_parallel_size": expert_tp_size,
    }


def expert_spec(mixture: Mixture) -> ModuleSpec:
    """Return the module specification of the feed-forward network in a layer with experts."""
    projections = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = ModuleSpec(module=SequentialMLP, submodules=projections)
    if mixture.biases:
        projections = MLPSubmodules(linear_fc1=ColumnParallelWithBias, linear_fc2=RowParallelWithBias)
        experts = ModuleSpec(module=ExpertsWithBiases, submodules=projections, params={"clamp": mixture.clamp})
    router = partial(Router, mixture=mixture)
    shared = ModuleSpec(module=SharedExperts, params={"mixture": mixture}) if mixture.shared else None
    submodules = MoESubmodules(experts=experts, shared_experts=shared, router=router)
    return ModuleSpec(module=MoELayer, submodules=submodules)


class ColumnParallelWithBias(ColumnParallelLinear):
    """Megatron's column-parallel layer with a bias, even if Megatron's config disables biases.

    Megatron has a single setting for the biases of all layers, and rejects biases for experts that tensor-parallel
    ranks share.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": True})


class RowParallelWithBias(RowParallelLinear):
    """Megatron's row-parallel layer with a bias; see `ColumnParallelWithBias`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": True})
        if self.is_expert:
            # Every rank that shares the expert computes the whole gradient, which must not be summed.
            self.bias.sequence_parallel = False
            if self.tp_group.size() == 1:
                # The tensor-parallel ranks hold different experts, so the gradient norm must count it on each of them.
                set_tensor_model_parallel_attributes(self.bias, True, 0, 1)


class ExpertsWithBiases(SequentialMLP):
    """The experts on a rank. They have biases and may have a clamped gate.

    Args:
        num_local_experts: The number of experts.
        config: Megatron's config.
        submodules: The classes of the projections.
        pg_collection: Megatron's process groups.
        clamp: The clamped gate; None for SwiGLU.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: Any,
        clamp: Clamp | None,
    ) -> None:
        super().__init__(0, config, submodules, pg_collection)  # With 0, Megatron creates none of its own experts.
        self.num_local_experts = num_local_experts
        group = pg_collection.expt_tp
        self.local_experts.extend(_Expert(self.config, submodules, group, clamp) for _ in range(num_local_experts))


class _Expert(MLP):
    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, group: Any, clamp: Clamp | None) -> None:
        width = config.moe_ffn_hidden_size
        super().__init__(config, submodules, ffn_hidden_size=width, is_expert=True, tp_group=group)
        self.clamp, self.num_ranks = clamp, group.size()

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Return the output [n, H] for n tokens, multiplied by their weights `per_token_scale` [n].

        The outputs of the ranks that share the expert add up to the whole output.
        """
        both, bias = self.linear_fc1(hidden_states)
        weight = per_token_scale[:, None]
        gate, up = (both + bias).chunk(2, dim=-1)
        gated = gate_experts(gate, up, self.clamp)
        output, bias = self.linear_fc2((gated * weight).to(gated.dtype))
        return output + (_Share.apply(bias, self.num_ranks) * weight).to(output.dtype), None


class _Share(torch.autograd.Function):
    """Divide a bias by N, since each of N ranks adds it to its partial sum. The gradient is that of the whole bias."""

    @staticmethod
    def forward(_ctx: Any, bias: Tensor, num_ranks: int) -> Tensor:
        return bias / num_ranks

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class SharedExperts(nn.Module):
    """The shared experts of a layer. Each is divided among tensor-parallel ranks like the network of a dense layer.

    Megatron-core's own class holds a single network, so it cannot have a separate name and gate for each shared expert.

    Args:
        config: Megatron's config.
        pg_collection: Megatron's process groups. Megatron passes them, but this class ignores them.
        gate: A setting of Megatron's shared expert. Megatron passes it, but this class ignores it.
        mixture: The experts.
    """

    def __init__(self, config: TransformerConfig, pg_collection: Any, gate: bool, mixture: Mixture) -> None:
        super().__init__()
        own = copy(config)
        own.ffn_hidden_size = mixture.shared_width
        self.networks = nn.ModuleList(GatedMLP(own) for _ in mixture.shared)
        self.score_weight: nn.Parameter | None = None
        if mixture.shared_gate:
            device = None if config.use_cpu_initialization else torch.cuda.current_device()
            shape = (len(mixture.shared), config.hidden_size)
            self.score_weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
            self.score_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the sum of the shared experts' outputs [t/TP, 1, H] for this rank's rows of a pack.

        Collective: every rank of the tensor-parallel group must call it.
        """
        outputs = [network(hidden)[0] for network in self.networks]
        if self.score_weight is not None:
            gates = linear(hidden, self.score_weight).sigmoid().split(1, dim=-1)
            outputs = [output * gate for output, gate in zip(outputs, gates, strict=True)]
        total: Tensor = sum(outputs[1:], outputs[0])
        return total


class Router(nn.Module):
    """The router of a layer. With sequence parallelism, each tensor-parallel rank routes only its rows of a pack.

    Args:
        config: Megatron's config.
        pg_collection: Megatron's process groups.
        mixture: The experts.
    """

    def __init__(self, config: TransformerConfig, pg_collection: Any, mixture: Mixture) -> None:
        super().__init__()
        self.mixture, self.tp_group = mixture, pg_collection.tp
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        shape = (mixture.num_choices, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias: nn.Parameter | None = None
        if mixture.biases:
            self.bias = nn.Parameter(torch.empty(shape[0], dtype=config.params_dtype, device=device))
            self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.score_bias: nn.Parameter | None = None
        """The fp32 biases [C] that balance the experts; None if there are none. They have no gradient, and are the same
        on all ranks that hold the layer."""
        if mixture.bias_rate:
            self.score_bias = nn.Parameter(torch.empty(shape[0], device=device), requires_grad=False)
        self.layer_number = 0
        self.packed: PackedSequences | None = None
        """The pack whose rows the next forward pass routes. A hook on the layer sets it (see `watch`)."""

    def set_layer_number(self, layer_number: int) -> None:
        """Set the number of the layer, counted from 1. Megatron calls this method."""
        self.layer_number = layer_number

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the weights [t/TP, E] of the experts (0 if not chosen), and a bool mask of the chosen experts.

        Null experts are omitted, so the mask has fewer than `top_k` experts for some tokens.

        Args:
            hidden: This rank's rows [t/TP, 1, H] of a pack.
            padding_mask: An argument that Megatron passes. It must be None.
        """
        assert padding_mask is None
        rows = hidden.reshape(-1, hidden.shape[-1])
        bias = None if self.bias is None else self.bias.float()
        packed, read = self.packed, rows.float()
        if packed is not None and packed.noise is not None:
            first = self.tp_group.rank() * len(rows)
            noise = packed.token_noise(rows.device).rows(slice(first, first + len(rows)))
            read = jittered_rows(read, noise, self.layer_number - 1, self.mixture.jitter)
        choice = choose(linear(read, self.weight.float(), bias), self.mixture, self.score_bias)
        weights = choice.weights
        if packed is not None and packed.observe is not None and torch.is_grad_enabled():
            loss = packed.observe(self.layer_number - 1, choice, packed, self.tp_group)
            weights = _WithLoss.apply(weights, loss)
        probs = torch.zeros_like(choice.logits).scatter(1, choice.experts, weights)
        chosen = torch.zeros_like(choice.logits, dtype=torch.bool).scatter(1, choice.experts, True)
        count = len(self.mixture.experts)
        return probs[:, :count], chosen[:, :count]


def routers_of(chunks: Iterable[Any]) -> dict[int, Router]:
    """Return the routers of a pipeline stage by layer number, counted from 0."""
    layers = (layer for chunk in chunks for layer in chunk.decoder.layers)
    return {layer.layer_number - 1: layer.mlp.router for layer in layers if isinstance(layer.mlp, MoELayer)}


def watch(gpt: Any) -> None:
    """Make every layer with experts pass its pack to its router before each forward pass.

    The pack is an argument of the layer, so a recomputed layer gets the same pack again.
    """
    for layer in gpt.decoder.layers:
        if isinstance(layer.mlp, MoELayer):
            layer.register_forward_pre_hook(_set_pack, with_kwargs=True)


def _set_pack(layer: Any, _args: Any, kwargs: dict[str, Any]) -> None:
    layer.mlp.router.packed = kwargs["packed_seq_params"]


class _WithLoss(torch.autograd.Function):
    """Return `values` unchanged. The backward pass also computes the gradient of the scalar `loss`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, loss: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, grad.new_ones(())
