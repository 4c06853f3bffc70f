"""The LLM in Megatron-core.

The `GPTModel`s of all pipeline stages together compute the same function as transformers' model.

Before building a model, the caller must call `parallel_state.initialize_model_parallel` and
`model_parallel_cuda_manual_seed`. On machines without CUDA, all calls must be within
`trainer.parallel.cpu.megatron_calls`.

A stage has one model per virtual stage, called a chunk (`model.llm.stages`). A *pack* is a packed sequence
(`model.llm.packing`). The forward pass of every chunk is called as follows: ::

    gpt(input_ids=None, position_ids=None, attention_mask=None,
        decoder_input=x,              # first chunk: [t/TP, 1, hidden] (see embed_tokens); other chunks: None
        labels=labels,                # [1, t], no IGNORE (use any valid id and mask the losses); None for logits
        packed_seq_params=packed)     # PackedSequences of t rows, t a multiple of TP

On the last chunk, it returns losses `[1, t]` in fp32, or logits `[1, t, padded vocabulary / TP]` (all columns with
`runtime_gather_output=True`). On other chunks, it returns hidden states `[t/TP, 1, hidden]`. The logits of padded
vocabulary columns are -inf.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor, nn
from transformers import PretrainedConfig

from model.llm.attention import GatedSelfAttention, PackedAttention
from model.llm.delta_net import GatedDeltaNet
from model.llm.families import LLMFamily, family_of, mixture_of
from model.llm.features import AttentionLayer, attention_layers, delta_sizes
from model.llm.frozen import use_one_product
from model.llm.layer_config import LayerConfig, transformer_config
from model.llm.megatron_experts import RowParallelWithBias, expert_spec, watch
from model.llm.mlp import MLPS
from model.llm.names import padded_vocab_size, tp_dim
from model.llm.norms import Addition, AllHeadsNorm, RMSNorm
from model.llm.rotary import rotary_embeddings
from model.llm.stages import Recompute


def build_megatron(
    hf_config: PretrainedConfig,
    *,
    tp_size: int,
    pp_size: int,
    first_stage: bool,
    last_stage: bool,
    vp_size: int = 1,
    cp_size: int = 1,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute = "none",
    ep_size: int = 1,
    expert_tp_size: int | None = None,
) -> list[GPTModel]:
    """Build this rank's chunks of the model, one per virtual stage, without initializing their weights.

    `model.llm.weights.load_megatron` fills the weights. `model.llm.stages` divides the layers, and the vocabulary is
    padded to a multiple of `tp_size`. Sequence parallelism is on if `tp_size` > 1.

    Args:
        hf_config: The LLM.
        tp_size: The tensor-parallel size.
        pp_size: The number of pipeline stages.
        first_stage: True if this rank holds the first pipeline stage.
        last_stage: True if this rank holds the last pipeline stage.
        vp_size: The number of virtual stages with which Megatron's groups were created.
        cp_size: The context-parallel size.
        dtype: The dtype of the parameters.
        recompute: The activations that the backward pass recomputes.
        ep_size: The number of ranks over which the FFN experts of a layer are distributed.
        expert_tp_size: The number of ranks that share an expert; None for `tp_size`.
    """
    use_one_product()
    config = transformer_config(
        hf_config,
        tp_size=tp_size,
        pp_size=pp_size,
        vp_size=vp_size,
        cp_size=cp_size,
        dtype=dtype,
        recompute=recompute,
        ep_size=ep_size,
        expert_tp_size=expert_tp_size,
    )
    return [
        _build_chunk(
            config, hf_config, first_stage and v == 0, last_stage and v == vp_size - 1, v if vp_size > 1 else None
        )
        for v in range(vp_size)
    ]


def _build_chunk(
    config: LayerConfig, hf_config: PretrainedConfig, first: bool, last: bool, vp_stage: int | None
) -> GPTModel:
    """Build one chunk. `first` and `last` specify whether it is the first or the last chunk of the whole model."""
    tp_size = config.tensor_model_parallel_size
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=_block_spec(config, hf_config, vp_stage),
        vocab_size=padded_vocab_size(hf_config, tp_size),
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=first,
        post_process=last,
        position_embedding_type="none",
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        vp_stage=vp_stage,
    )
    for name, parameter in gpt.named_parameters():
        # Megatron marks parameters only when it initializes them. Without the mark, the gradient norm would count them
        # once per TP rank.
        dim = tp_dim(name)
        if dim is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, dim, 2 if "linear_fc1" in name else 1)
    _add_hooks(gpt, hf_config, first, last)
    return gpt


def embed_tokens(gpt: GPTModel, token_ids: Tensor) -> Tensor:
    """Return the embeddings [t/TP, 1, hidden] of this rank's rows of a pack `token_ids` [t], on the first stage.

    Collective: every rank of the tensor-parallel group must call it.
    """
    embedded: Tensor = gpt.embedding(input_ids=token_ids[None], position_ids=None)
    return embedded if gpt.token_scale == 1.0 else embedded * gpt.token_scale


def _block_spec(config: LayerConfig, hf_config: PretrainedConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    family, scales = family_of(hf_config), family_of(hf_config).scales(hf_config)
    attention, rotary = attention_layers(hf_config), rotary_embeddings(hf_config)
    norm = ModuleSpec(module=RMSNorm, params={"from_zero": family.norms_from_zero})
    before = IdentityOp if family.norms == "after" else norm
    addition = _addition(config, norm if family.norms != "before" else None, scales.branches)
    mixture = mixture_of(hf_config)
    with_experts = () if mixture is None else mixture.layers
    experts = None if mixture is None else expert_spec(mixture)

    def mixer(own: AttentionLayer) -> ModuleSpec:
        if own.is_linear:
            return ModuleSpec(
                module=GatedDeltaNet,
                params={"sizes": delta_sizes(hf_config), "recompute": config.recompute_attention},
            )
        core = partial(
            PackedAttention,
            rotary=None if own.rope is None else rotary[own.rope],
            layer=own,
            scales=scales,
            has_sinks=family.sinks,
            recompute=config.recompute_attention,
        )
        return ModuleSpec(
            module=GatedSelfAttention if family.gated_attention else SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=_attention_modules(config, family, norm, core),
        )

    def layer(number: int) -> ModuleSpec:
        return ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=before,
                self_attention=mixer(attention[number]),
                self_attn_bda=addition,
                pre_mlp_layernorm=before,
                mlp=experts if number in with_experts and experts is not None else MLPS[family.activation],
                mlp_bda=addition,
            ),
        )

    first = get_transformer_layer_offset(config, vp_stage)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage))
    return TransformerBlockSubmodules(layer_specs=[layer(n) for n in numbers], layer_norm=norm)


def _addition(config: TransformerConfig, norm: ModuleSpec | None, scale: float) -> Any:
    """Return the module that adds the output of attention, or of the feed-forward network, to its input."""
    if norm is None and scale == 1.0:
        return get_bias_dropout_add
    sizes = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
    build = None if norm is None else partial(build_module, norm, **sizes)
    return ModuleSpec(module=Addition, params={"norm": build, "scale": scale})


def _attention_modules(config: TransformerConfig, family: LLMFamily, norm: Any, core: Any) -> SelfAttentionSubmodules:
    """Return the modules of a layer's attention, given the modules for head norms and for the core attention."""
    query_norm = key_norm = norm if family.qk_norm else IdentityOp
    if family.all_heads_norm:
        query_norm = ModuleSpec(module=AllHeadsNorm, params={"num_heads": config.num_attention_heads})
        key_norm = ModuleSpec(module=AllHeadsNorm, params={"num_heads": config.num_query_groups})
    return SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=core,
        linear_proj=RowParallelWithBias if family.output_bias else RowParallelLinear,
        q_layernorm=query_norm,
        k_layernorm=key_norm,
    )


def _add_hooks(gpt: GPTModel, hf_config: PretrainedConfig, first: bool, last: bool) -> None:
    """Add hooks to a chunk for computations that Megatron's modules lack.

    For `first` and `last`, see `_build_chunk`.
    """
    config, scales = gpt.config, family_of(hf_config).scales(hf_config)
    for layer in gpt.decoder.layers:
        # Megatron's handler enables gradients even in evaluation, so an `Addition` would keep its inputs in memory.
        layer.bias_dropout_add_exec_handler = nullcontext
    watch(gpt)
    if config.recompute_granularity == "selective":
        for layer in gpt.decoder.layers:
            for norm, consumer in (
                (layer.input_layernorm, layer.self_attention),
                (layer.pre_mlp_layernorm, layer.mlp),
            ):
                if isinstance(norm, RMSNorm):
                    norm.recompute_after(consumer)
    if first:
        # The factor is rounded as in transformers, which stores it in the dtype of the weights.
        gpt.token_scale = float(torch.tensor(scales.tokens, dtype=config.params_dtype, device="cpu"))
        if scales.inputs != 1.0:
            gpt.decoder.register_forward_pre_hook(partial(_scale_inputs, scale=scales.inputs), with_kwargs=True)
        if config.recompute_granularity is not None:
            gpt.decoder.register_forward_pre_hook(_require_grad, with_kwargs=True)
    if last:
        gpt.output_layer.rows = None
        gpt.register_forward_pre_hook(_note_output_rows, with_kwargs=True)
        gpt.output_layer.register_forward_pre_hook(_select_output_rows)
    if last and (scales.logits != 1.0 or scales.logits_cap is not None):
        gpt.output_layer.register_forward_hook(partial(_scale_logits, divisor=scales.logits, cap=scales.logits_cap))
    if last and padded_vocab_size(hf_config, config.tensor_model_parallel_size) > hf_config.vocab_size:
        gpt.output_layer.register_forward_hook(partial(_mask_padded_columns, vocab_size=hf_config.vocab_size))


def _note_output_rows(gpt: GPTModel, _args: Any, kwargs: dict[str, Any]) -> None:
    gpt.output_layer.rows = kwargs["packed_seq_params"].output_rows


def _select_output_rows(module: nn.Module, args: Any) -> Any:
    """Reduce the input [t, 1, H] of the output layer to the rows whose logits are wanted (`PackedSequences`)."""
    return args if module.rows is None else (args[0].index_select(0, module.rows), *args[1:])


def _scale_inputs(_module: nn.Module, args: Any, kwargs: dict[str, Any], *, scale: float) -> tuple[Any, dict[str, Any]]:
    kwargs["hidden_states"] = kwargs["hidden_states"] * scale
    return args, kwargs


def _scale_logits(
    _module: nn.Module, _args: Any, output: tuple[Tensor, Any], *, divisor: float, cap: float | None
) -> tuple[Tensor, Any]:
    logits, bias = output
    if divisor != 1.0:
        logits = logits / divisor
    return logits if cap is None else torch.tanh(logits / cap) * cap, bias


def _require_grad(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Make the input of the first layer require a gradient.

    Otherwise, if the embedding is frozen and the pack contains only text, recomputed layers would silently get no
    gradient.
    """
    x = kwargs["hidden_states"]
    if torch.is_grad_enabled() and not x.requires_grad:
        kwargs["hidden_states"] = x.detach().requires_grad_()
    return args, kwargs


def _mask_padded_columns(
    module: ColumnParallelLinear, _args: Any, output: tuple[Tensor, Any], *, vocab_size: int
) -> tuple[Tensor, Any]:
    """Set the logits of the vocabulary's padding to -inf. Otherwise, each column would add exp(0) to the softmax."""
    logits, bias = output
    gathered = logits.shape[-1] == module.output_size
    first = 0 if gathered else module.tp_group.rank() * module.output_size_per_partition
    num_real = max(vocab_size - first, 0)
    if num_real < logits.shape[-1]:
        logits[..., num_real:] = float("-inf")
    return logits, bias
