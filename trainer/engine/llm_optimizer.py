"""The gradients and the optimizer of the LLM, which is Megatron's distributed optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch import nn
from transformers import PretrainedConfig

from model.llm.names import local_pieces
from model.llm.weights import global_parameters
from trainer.engine.optim import OptimConfig, ParamSetting, setting_of
from trainer.parallel.groups import Groups
from trainer.parallel.topology import ParallelConfig
from trainer.parallel.values import all_gather_values

PREFIX = "llm."


@dataclass(frozen=True)
class Reduction:
    """The settings for the exchange of gradients and weights between the replicas of the LLM."""

    overlap_gradients: bool = False
    """True to reduce the gradients of each bucket of weights while the last backward pass still runs."""
    overlap_weights: bool = False
    """True to gather updated weights during the first forward pass after the update."""
    dtype: torch.dtype = torch.float32
    """The type in which gradients are accumulated over micro-batches and summed over replicas."""
    bucket_elements: int | None = None
    """The number of weights after which a bucket is closed; None selects Megatron's default. Weights are divided into
    buckets only with `overlap_gradients`, and only in the first chunk of the first stage, whose exchange can overlap
    only with the computation of its other buckets."""

    @classmethod
    def of(cls, parallel: ParallelConfig) -> Reduction:
        """Return the settings that the section `parallel` of a recipe selects."""
        dtype = torch.bfloat16 if parallel.grad_reduce_dtype == "bf16" else torch.float32
        return cls(parallel.overlap_grad_reduce, parallel.overlap_param_gather, dtype)


FP32_REDUCTION = Reduction()
"""An exchange in fp32 that does not overlap with computation."""


def hf_name(name: str, hf_config: PretrainedConfig) -> str:
    """Return the Hugging Face name of a Megatron parameter, with the prefix `llm.`.

    If the parameter consists of several Hugging Face tensors, the name of the first one is returned.
    """
    pieces = local_pieces(name, hf_config, 0, 1)
    return PREFIX + next(p.hf_name for p in pieces if p.hf_name is not None)


def freeze(chunks: Sequence[nn.Module], hf_config: PretrainedConfig, optim: OptimConfig) -> dict[int, ParamSetting]:
    """Set `requires_grad` of a stage's parameters, and return the setting of every parameter by its `id`."""
    settings = {}
    for name, parameter in global_parameters(chunks):
        setting = setting_of(optim, hf_name(name, hf_config), parameter.dim())
        # Weights with an adapter have been frozen already.
        setting = replace(setting, frozen=setting.frozen or not parameter.requires_grad)
        parameter.requires_grad_(not setting.frozen)
        settings[id(parameter)] = setting
    return settings


def data_parallel(chunks: Sequence[Any], reduction: Reduction = FP32_REDUCTION) -> list[Any]:
    """Return the chunks of a stage in Megatron's data-parallel wrapper.

    The wrapper stores the trained weights and their gradients in flat buffers.
    """
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=reduction.overlap_gradients,
        overlap_param_gather=reduction.overlap_weights,
        grad_reduce_in_fp32=reduction.dtype == torch.float32,
        bucket_size=reduction.bucket_elements,
    )
    config = chunks[0].config
    # The loss is already divided by the counts of the global batch, so Megatron must not divide again.
    config.finalize_model_grads_func = lambda models, _num_tokens=None, **kw: finalize_model_grads(models, None, **kw)
    models = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)
    ]
    if reduction.overlap_gradients:  # The schedule uses this function to defer the exchange to the last micro-batch.
        config.no_sync_func = [model.no_sync for model in models] if len(models) > 1 else models[0].no_sync
    return models


def build_optimizer(
    models: Sequence[Any], optim: OptimConfig, settings: dict[int, ParamSetting], dtype: torch.dtype
) -> Any:
    """Return Megatron's distributed optimizer for the models of a stage.

    Collective: every rank of the world must call it.

    Args:
        models: The result of `data_parallel`.
        optim: The optimizer settings.
        settings: The result of `freeze`.
        dtype: The dtype of the weights.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        clip_grad=0.0,
    )
    # Megatron creates the same optimizer groups on all ranks. Without the patch, it would send their keys as pickles.
    with patch("torch.distributed.all_gather_object", _all_gather_keys):
        optimizer = get_megatron_optimizer(
            config, list(models), config_overrides=_overrides(settings), use_gloo_process_groups=False
        )
    for one in optimizer.chained_optimizers:
        _fuse(one.optimizer)
    return optimizer


def _fuse(optimizer: Any) -> None:
    """Let torch's AdamW update a parameter in one pass over its memory.

    Megatron uses torch's AdamW if neither TransformerEngine nor Apex is installed, but does not pass the option
    `fused`.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        for options in (optimizer.defaults, *optimizer.param_groups):
            options["fused"] = True


def _all_gather_keys(found: list[Any], keys: Any) -> None:
    """Replace `torch.distributed.all_gather_object` for the keys of optimizer groups."""
    found[:] = all_gather_values(keys, None, (ParamSetting,))


def _overrides(settings: dict[int, ParamSetting]) -> dict[ParamKey, Any]:
    """Return one optimizer group per distinct setting. `set_rates` reads the groups' settings."""
    overrides = {}
    for wanted in {s for s in settings.values() if not s.frozen}:
        predicate = ParamPredicate(str(wanted), lambda p, w=wanted: settings.get(id(p)) == w)
        overrides[ParamKey(predicate=predicate)] = {"max_lr": wanted.lr, "setting": wanted}
    return overrides


def all_frozen(settings: dict[int, ParamSetting], groups: Groups) -> bool:
    """Return whether no rank has trainable parameters of the LLM.

    Collective: every rank of the world must call it.
    """
    learned = torch.tensor([sum(not s.frozen for s in settings.values())], device=groups.device)
    torch.distributed.all_reduce(learned, group=groups.world)
    return int(learned) == 0
