"""The rules on a recipe's LLM: the division of its layers and experts among ranks, and the losses of its routers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from transformers import PretrainedConfig

from model.config import LLMConfig, ModelConfig
from model.errors import UserError
from model.llm.families import mixture_of
from model.llm.features import has_linear_layers
from model.llm.reference import resolve_hf_config
from model.losses.router import RouterLoss
from model.losses.table import active_losses
from trainer.parallel.topology import ParallelConfig, build_topology, divisors


def known_llm_config(config: LLMConfig) -> PretrainedConfig | None:
    """Return the LLM's Hugging Face config if it can be resolved without network access.

    It is read from a local directory or the recipe. If the recipe contains only a hub id, the result is None. In this
    case, the ranks call `check_llm` after they have downloaded the config.
    """
    if config.weights is None or Path(config.weights).is_dir():
        return resolve_hf_config(config)
    if "model_type" in config.config:
        return resolve_hf_config(dataclasses.replace(config, weights=None))
    return None


def check_llm(hf_config: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Check that the LLM can be divided among its tensor-parallel, pipeline-parallel and expert-parallel ranks.

    Raises:
        UserError: If a parallel size does not fit the LLM. The message lists the allowed sizes.
    """
    _check_experts(hf_config, parallel)
    _check_linear_layers(hf_config, parallel)
    tp, pp = parallel.tensor, parallel.pipeline
    heads, groups = hf_config.num_attention_heads, hf_config.num_key_value_heads
    layers, mixture = hf_config.num_hidden_layers, mixture_of(hf_config)
    has_dense_layers = mixture is None or len(mixture.layers) < layers
    ffn = hf_config.intermediate_size if has_dense_layers else 0
    if mixture is not None and mixture.shared:
        ffn = math.gcd(ffn, mixture.shared_width)
    if heads % tp or groups % tp or ffn % tp:
        legal = [d for d in divisors(groups) if not (heads % d or ffn % d or parallel.num_ranks % (d * pp))]
        raise UserError(
            f"parallel.tensor = {tp}: must divide the LLM's {heads} attention heads, {groups} key-value heads and "
            f"{ffn} feed-forward channels; {_legal(legal, parallel, f'pipeline={pp}')}"
        )
    if pp > layers:
        legal = [d for d in divisors(parallel.num_ranks // tp) if d <= layers]
        raise UserError(
            f"parallel.pipeline = {pp}: the LLM has only {layers} layers; {_legal(legal, parallel, f'tensor={tp}')}"
        )
    if pp * parallel.virtual_stages > layers:
        raise UserError(
            f"parallel.virtual_stages = {parallel.virtual_stages}: the LLM's {layers} layers are too few for "
            f"pipeline={pp}; it must be within 1..{layers // pp}"
        )


def _check_experts(hf_config: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Check that the FFN experts of the LLM can be divided among ranks."""
    ep, mixture = parallel.ffn_expert, mixture_of(hf_config)
    if mixture is None:
        if ep > 1:
            raise UserError(f"parallel.ffn_expert = {ep}: the LLM ({hf_config.model_type}) has no experts; set it to 1")
        return
    # An overlapped reduction would wait for the gradient of an expert without tokens. The losses of the routers are
    # computed from whole packs, which context-parallel ranks do not have.
    for key, value, only in (
        ("context", parallel.context, 1),
        ("virtual_stages", parallel.virtual_stages, 1),
        ("overlap_grad_reduce", parallel.overlap_grad_reduce, False),
    ):
        if value != only:
            raise UserError(
                f"parallel.{key} = {str(value).lower()}: must be {str(only).lower()} for an LLM with experts"
            )
    count, etp = len(mixture.experts), build_topology(parallel, parallel.num_ranks).expert_tp
    if count % ep:
        ranks = parallel.num_ranks // parallel.pipeline // etp
        legal = [d for d in divisors(count) if ranks % d == 0]
        raise UserError(
            f"parallel.ffn_expert = {ep}: must divide the {count} experts of a layer of the LLM; "
            f"{_legal(legal, parallel, f'pipeline={parallel.pipeline} and ffn_expert_tensor={etp}')}"
        )
    if mixture.width % etp:
        raise UserError(
            f"parallel.ffn_expert_tensor = {etp}: must divide the {mixture.width} channels of an expert; set it to 1 "
            "with parallel.ffn_expert above 1"
        )


def _check_linear_layers(hf_config: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Check that the layers with linear attention can be divided among ranks."""
    if not has_linear_layers(hf_config):
        return
    if parallel.context > 1:
        raise UserError(
            f"parallel.context = {parallel.context}: the only legal value for an LLM with linear attention "
            f"({hf_config.model_type}) is 1, since its state cannot be divided among context-parallel ranks"
        )
    heads = hf_config.linear_num_key_heads
    if heads % parallel.tensor:
        legal = [d for d in divisors(heads) if parallel.num_ranks % (d * parallel.pipeline) == 0]
        raise UserError(
            f"parallel.tensor = {parallel.tensor}: must divide the {heads} key heads of the LLM's linear attention; "
            f"{_legal(legal, parallel, f'pipeline={parallel.pipeline}')}"
        )


def check_routers(config: LLMConfig) -> None:
    """Check that the LLM's loss trains the routers of the experts that the recipe adds.

    If a token is sent to one expert, and weights are divided by the sum of those of the chosen experts, the weight is
    always 1, and the scores of the routers have no gradient.

    Raises:
        UserError: If the routers would not be trained.
    """
    num_choices = sum(not expert.shared for expert in config.experts) + config.router.null_experts
    if config.top_k == 1 < num_choices and config.router.normalize and config.router.forced is None:
        raise UserError(
            "model.llm.top_k = 1: with model.llm.router.normalize = true, the weight of the chosen expert is always 1, "
            "and the routers would not be trained; set model.llm.router.normalize=false, or a larger top_k"
        )


def check_router_losses(model: ModelConfig, hf_config: PretrainedConfig) -> None:
    """Check that the LLM's router losses are enabled only if the LLM has FFN experts.

    Raises:
        UserError: If such a loss is enabled for an LLM without FFN experts.
    """
    for loss in active_losses(model):
        if isinstance(loss, RouterLoss) and mixture_of(hf_config) is None:
            raise UserError(
                f"model.losses.{loss.name}: the LLM ({hf_config.model_type}) has no experts; remove the entry"
            )


def _legal(values: list[int], parallel: ParallelConfig, other: str) -> str:
    listed = ", ".join(map(str, values)) if values else "none"
    return f"possible with {parallel.num_ranks} ranks and {other}: {listed}"
