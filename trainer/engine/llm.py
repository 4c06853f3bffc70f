"""The LLM under Megatron-core: tensor, sequence and pipeline parallel, data parallel with the distributed optimizer.

Shapes: M micro-batches, t rows of a pack, H hidden width. Gradients are sums over the global batch throughout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn
from transformers import PretrainedConfig

from model.batch import IGNORE
from model.llm.lora import add_llm_adapters
from model.llm.megatron import build_megatron, embed_tokens
from model.llm.names import local_pieces
from model.llm.packing import PackedSequences
from model.llm.weights import WeightSource, global_parameters, load_megatron
from model.lora import NO_ADAPTERS, Adapters, llm_shapes
from model.transfer import to_device
from trainer.engine.optim import OptimConfig, ParamSetting, setting_of
from trainer.parallel.cpu import megatron_calls
from trainer.parallel.groups import Groups

PREFIX = "llm."


@dataclass(frozen=True)
class Packs:
    """One replica's packed sequences of a step, as one of its ranks sees them."""

    lengths: tuple[tuple[int, ...], ...]
    """Segment lengths of each of the M packs; every pack sums to t."""
    token_ids: Tensor
    """[M·t] int64; first and last stage only"""
    labels: Tensor
    """[M·t] int64, IGNORE where no loss; first and last stage only"""
    samples: tuple[tuple[int, ...], ...]
    """For each of the M packs the sample (index in the global batch) of every segment; padding, the last, has none."""
    audio: Tensor
    """[M·t/TP, H]: audio embeddings in this rank's slice of every pack; first stage only"""
    audio_mask: Tensor
    """[M·t/TP] bool: which of those rows are audio"""
    num_samples: int
    """In the global batch."""
    num_targets: int
    """Labelled rows in the global batch."""

    @property
    def pack_tokens(self) -> int:
        return sum(self.lengths[0])

    def sum_by_sample(self, token_losses: Sequence[Tensor], device: torch.device) -> Tensor:
        """[num_samples] fp32 sums of the rows [t] of every pack, each sample's in one order; without rows, zeros."""
        sums = torch.zeros(self.num_samples, device=device)
        places = [place for one in self.samples for place in one]
        if not token_losses or not places:
            return sums
        # What fills a pack up is dropped before the sum: it has no sample.
        parts = [t[: sum(n[: len(s)])] for t, n, s in zip(token_losses, self.lengths, self.samples, strict=True)]
        lengths = [n for one, s in zip(self.lengths, self.samples, strict=True) for n in one[: len(s)]]
        sizes, rows = to_device([lengths, places], device)
        # unsafe: without a check of the lengths, which would make the host wait.
        return sums.index_copy_(0, rows, torch.segment_reduce(torch.cat(parts), "sum", lengths=sizes, unsafe=True))


class LLMEngine:
    """This rank's part of the LLM, its gradients and its optimizer.

    Args:
        hf_config: of the model.
        source: its weights; every rank reads only its slices.
        optim: what learns, and how.
        groups: this rank's place (Megatron's groups exist).
        dtype: of weights and activations; gradients and optimizer state are fp32.
        recompute: keep only each layer's input for the backward pass.
        adapters: the low-rank adapters to add.
    """

    def __init__(
        self,
        hf_config: PretrainedConfig,
        source: WeightSource,
        optim: OptimConfig,
        groups: Groups,
        dtype: torch.dtype,
        recompute: bool,
        adapters: Adapters = NO_ADAPTERS,
    ) -> None:
        self.hf_config, self.groups, self.dtype = hf_config, groups, dtype
        self.shapes = llm_shapes(hf_config, adapters)
        """The shapes of all tensors of the LLM, by name without `llm.`."""
        topology, place = groups.topology, groups.place
        with megatron_calls():
            self.gpt = build_megatron(
                hf_config,
                tp_size=topology.tp,
                pp_size=topology.pp,
                first_stage=groups.is_first_stage,
                last_stage=groups.is_last_stage,
                dtype=dtype,
                recompute=recompute,
            ).to(groups.device)
            load_megatron(self.gpt, source, hf_config, tp_rank=place.tp, tp_size=topology.tp)
            add_llm_adapters(self.gpt, hf_config, adapters, tp_rank=place.tp, tp_size=topology.tp)
            self.settings = freeze(self.gpt, hf_config, optim)
            self.model: nn.Module = self.gpt
            self.optimizer: Any = None
            if not _all_frozen(self.settings, groups):
                self.model = data_parallel(self.gpt)
                self.optimizer = _build_optimizer(self.model, optim, self.settings, dtype)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's parameters by Megatron name, layers numbered over all stages."""
        return list(global_parameters(self.gpt))

    def hf_name(self, name: str) -> str:
        """See `hf_name`."""
        return hf_name(name, self.hf_config)

    def forward_backward(self, packs: Packs) -> tuple[Tensor, Tensor]:
        """Run all micro-batches through the pipeline (1F1B) and back.

        Returns:
            sample_losses: [number of samples in the global batch] fp32, Σ of each one's token losses; non-zero only on
                tensor rank 0 of the last stage of the replica that ran it, so a sum over ranks completes it.
            audio_grad: [M·t/TP, H] gradient of Σ losses / num_targets with respect to `packs.audio`.
        """
        forward = _Forward(self, packs)
        with megatron_calls():
            if self.optimizer is not None:
                self.model.zero_grad_buffer()  # type: ignore[operator]
                self.optimizer.zero_grad()
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter(range(len(packs.lengths))),
                model=[self.model],
                num_microbatches=len(packs.lengths),
                seq_length=packs.pack_tokens,
                micro_batch_size=1,
                forward_only=False,
            )
        counts_here = self.groups.is_last_stage and self.groups.place.tp == 0
        sample_losses = packs.sum_by_sample(forward.token_losses if counts_here else [], self.groups.device)
        grads = [torch.zeros_like(a) if a.grad is None else a.grad for a in forward.audio]
        return sample_losses, torch.cat(grads) if grads else torch.zeros_like(packs.audio)

    def grad_norm_sq(self) -> Tensor:
        """Σ g² over this rank's gradient shards, each parameter counted once over the world; fp64 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        if self.optimizer is not None:
            with megatron_calls():
                self.optimizer.prepare_grads()
                for optimizer in self.optimizer.chained_optimizers:
                    for grad in optimizer.get_main_grads_for_grad_norm():
                        total += grad.double().square().sum()
        return total

    def step(self, clip_coef: float, lr_scale: float) -> None:
        """Update after `grad_norm_sq`; `clip_coef` scales the gradients, `lr_scale` every peak learning rate."""
        if self.optimizer is None:
            return
        with megatron_calls():
            for group in self.optimizer.param_groups:
                group["lr"], group["weight_decay"] = group["max_lr"] * lr_scale, group.get("start_wd", 0.0)
            if clip_coef < 1.0:
                for optimizer in self.optimizer.chained_optimizers:
                    for parameter in optimizer.get_parameters():
                        if parameter.grad is not None:
                            parameter.grad.mul_(clip_coef)
            self.optimizer.step_with_ready_grads()

    def train(self, mode: bool) -> None:
        """Training or evaluation mode of every module."""
        self.gpt.train(mode)


class _Forward:
    """Megatron's `forward_step_func`: one micro-batch through this stage."""

    def __init__(self, engine: LLMEngine, packs: Packs) -> None:
        self.engine, self.packs = engine, packs
        share = packs.pack_tokens // engine.groups.topology.tp
        parts = packs.audio.detach().split(share) if engine.groups.is_first_stage else ()
        self.audio = [part.requires_grad_() for part in parts]
        """A leaf of the graph per pack: every micro-batch's gradient would be as large as what it was sliced from."""
        self.token_losses: list[Tensor] = []
        """[t] fp32 of every pack that this stage has computed losses of, in order."""

    def __call__(self, microbatches: Iterator[int], model: nn.Module) -> tuple[Tensor, Any]:
        m = next(microbatches)
        packs, groups = self.packs, self.engine.groups
        rows = slice(m * packs.pack_tokens, (m + 1) * packs.pack_tokens)
        decoder_input = labels = None
        if groups.is_first_stage:
            share = packs.pack_tokens // groups.topology.tp
            mine = slice(m * share, (m + 1) * share)
            text = embed_tokens(self.engine.gpt, packs.token_ids[rows])
            # Not masked_scatter: rows without audio must stay in the graph, or a text-only pack has none.
            mask = packs.audio_mask[mine][:, None, None]
            decoder_input = torch.where(mask, self.audio[m][:, None].to(text.dtype), text)
        if groups.is_last_stage:
            labels = packs.labels[rows]
        output = model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=decoder_input,
            labels=None if labels is None else labels.clamp(min=0)[None],
            packed_seq_params=PackedSequences(lengths=packs.lengths[m]),
        )
        return output, lambda losses: self._loss(losses, packs.labels[rows])

    def _loss(self, losses: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        counted = labels != IGNORE
        token_losses = losses[0].float() * counted
        self.token_losses.append(token_losses.detach())
        return token_losses.sum() / max(1, self.packs.num_targets), counted.sum().int(), {}


def hf_name(name: str, hf_config: PretrainedConfig) -> str:
    """`llm.` + the (first) Hugging Face tensor that the Megatron parameter `name` is made of."""
    pieces = local_pieces(name, hf_config, 0, 1)
    return PREFIX + next(p.hf_name for p in pieces if p.hf_name is not None)


def freeze(gpt: nn.Module, hf_config: PretrainedConfig, optim: OptimConfig) -> dict[int, ParamSetting]:
    """Mark the parameters of a stage that do not learn; returns every parameter's setting, by its id."""
    settings = {}
    for name, parameter in global_parameters(gpt):
        setting = setting_of(optim, hf_name(name, hf_config), parameter.dim())
        # A weight under an adapter does not require a gradient already.
        setting = replace(setting, frozen=setting.frozen or not parameter.requires_grad)
        parameter.requires_grad_(not setting.frozen)
        settings[id(parameter)] = setting
    return settings


def data_parallel(gpt: Any) -> nn.Module:
    """A stage in Megatron's data-parallel wrapper: the weights that learn and their gradients in flat buffers."""
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=False, grad_reduce_in_fp32=True
    )
    # The loss is divided by the global batch's targets already, so Megatron must not divide again.
    gpt.config.finalize_model_grads_func = lambda model, _num_tokens=None, **kw: finalize_model_grads(model, None, **kw)
    return DistributedDataParallel(gpt.config, ddp_config, gpt)


def _build_optimizer(
    model: nn.Module, optim: OptimConfig, settings: dict[int, ParamSetting], dtype: torch.dtype
) -> Any:
    return get_megatron_optimizer(
        OptimizerConfig(
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
        ),
        [model],
        config_overrides=_overrides(settings),
        use_gloo_process_groups=False,
    )


def _overrides(settings: dict[int, ParamSetting]) -> dict[ParamKey, Any]:
    """One optimizer group per distinct setting; `max_lr` and `start_wd` carry it to `step`."""
    kinds = {(s.lr, s.weight_decay) for s in settings.values() if not s.frozen}
    overrides = {}
    for lr, weight_decay in kinds:
        wanted = ParamSetting(False, lr, weight_decay)
        predicate = ParamPredicate(f"{lr}/{weight_decay}", lambda p, w=wanted: settings.get(id(p)) == w)
        overrides[ParamKey(predicate=predicate)] = {"max_lr": lr, "start_wd": weight_decay}
    return overrides


def _all_frozen(settings: dict[int, ParamSetting], groups: Groups) -> bool:
    """Whether no rank has anything to learn in the LLM."""
    learned = torch.tensor([sum(not s.frozen for s in settings.values())], device=groups.device)
    torch.distributed.all_reduce(learned, group=groups.world)
    return int(learned) == 0
