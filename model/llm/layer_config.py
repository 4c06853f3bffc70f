"""Megatron's config of an LLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from transformers import PretrainedConfig

from model.llm.families import family_of, mixture_of
from model.llm.megatron_experts import expert_options
from model.llm.names import head_dim
from model.llm.stages import Recompute, check_recompute, chunk_layers

_RECOMPUTATION: dict[Recompute, dict[str, Any]] = {
    "none": {},
    # `RMSNorm`, `GatedMLP` and `PackedAttention` recompute themselves. Megatron's recomputed norms need
    # TransformerEngine.
    "pointwise": {"recompute_granularity": "selective", "recompute_modules": []},
    "selective": {"recompute_granularity": "selective", "recompute_modules": [], "recompute_attention": True},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@dataclass
class LayerConfig(TransformerConfig):
    """Megatron's config, with the settings of layers that are defined here."""

    recompute_attention: bool = False
    """Whether the backward pass runs attention, or the gated delta rule, again from its inputs."""


def transformer_config(
    hf_config: PretrainedConfig,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    vp_size: int = 1,
    cp_size: int = 1,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute = "none",
    ep_size: int = 1,
    expert_tp_size: int | None = None,
) -> LayerConfig:
    """Return Megatron's config of the model.

    Gradients are plain sums over micro-batches and data-parallel ranks (`calculate_per_token_loss`). The caller divides
    by the number of target tokens of the global batch.

    Args:
        hf_config: The LLM.
        tp_size: The tensor-parallel size.
        pp_size: The number of pipeline stages.
        vp_size: The number of virtual stages of each pipeline stage.
        cp_size: The context-parallel size.
        dtype: The dtype of the parameters.
        recompute: The activations that the backward pass recomputes.
        ep_size: The number of ranks over which the FFN experts of a layer are distributed.
        expert_tp_size: The number of ranks that share an FFN expert; None for `tp_size`.

    Raises:
        UserError: If recomputation of parts of layers is requested for an LLM with experts.
    """
    family, mixture = family_of(hf_config), mixture_of(hf_config)
    if mixture is not None:
        check_recompute(recompute)
    experts = expert_options(mixture, tp_size=tp_size, ep_size=ep_size, expert_tp_size=expert_tp_size or tp_size)
    return LayerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=head_dim(hf_config),
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_norm or family.all_heads_norm,
        attention_output_gate=family.gated_attention,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.rms_norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        context_parallel_size=cp_size,
        pipeline_model_parallel_layout=_layout(hf_config.num_hidden_layers, pp_size, vp_size),
        # With two stages, the next and the previous stage are the same rank. Separate transfers keep the two directions
        # apart.
        overlap_p2p_comm=vp_size > 1,
        batch_p2p_comm=vp_size == 1,
        sequence_parallel=tp_size > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        # All packs of a step have the same length, so a stage knows the shape of its input from `seq_length`.
        variable_seq_lengths=False,
        batch_p2p_sync=False,  # Waiting for a transfer already orders the streams.
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        **_RECOMPUTATION[recompute],
        **experts,
    )


def _layout(num_layers: int, pp_size: int, vp_size: int) -> list[list[str]] | None:
    """Return the layers of each chunk in Megatron's format, in the order of the model; None without a pipeline."""
    if pp_size == 1:
        return None
    chunks = [["decoder"] * count for count in chunk_layers(num_layers, pp_size, vp_size)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks
