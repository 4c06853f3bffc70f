"""The LLM under Megatron-core: tensor, sequence and pipeline parallel, data parallel with the distributed optimizer.

Shapes: M micro-batches, t rows of a pack, H hidden width, V vocabulary. All gradients are sums over the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn
from transformers import PretrainedConfig

from model.llm.lora import add_llm_adapters
from model.llm.megatron import build_megatron, embed_tokens
from model.llm.names import is_expert, local_pieces
from model.llm.packing import PackedSequences
from model.llm.weights import WeightSource, global_parameters, load_megatron
from model.lora import NO_ADAPTERS, Adapters, llm_shapes
from model.transfer import to_device
from trainer.engine.optim import OptimConfig, ParamSetting, set_rates, setting_of
from trainer.engine.router_meter import RouterMeter
from trainer.engine.token_losses import PackedLoss
from trainer.parallel.cpu import megatron_calls
from trainer.parallel.groups import Groups

PREFIX = "llm."


@dataclass(frozen=True)
class Packs:
    """The packed sequences of one replica in a step, as one of its ranks holds them."""

    lengths: tuple[tuple[int, ...], ...]
    """The lengths of the segments of each of the M packs. Those of a pack sum to t."""
    token_ids: Tensor
    """[M·t] int64; first and last stage only."""
    labels: Tensor
    """[M·t] int64, IGNORE where there is no label; first and last stage only."""
    samples: tuple[tuple[int, ...], ...]
    """For each of the M packs, the index in the global batch of the sample of every segment.

    Padding is the last segment of a pack and has no index.
    """
    audio: Tensor
    """[M·t/TP, H] the audio embeddings in this rank's slice of every pack; first stage only."""
    audio_mask: Tensor
    """[M·t/TP] bool, true where a row of the slice is audio."""
    num_samples: int
    """The number of samples in the global batch."""
    is_audio: Tensor | None = None
    """[M·t] bool, true where a row is audio; first and last stage only, and None without audio."""

    @property
    def pack_tokens(self) -> int:
        """The number of rows t of every pack."""
        return sum(self.lengths[0])

    def sequences(self, microbatch: int) -> PackedSequences:
        """Return what attention must know of one pack."""
        return PackedSequences(lengths=self.lengths[microbatch], num_samples=len(self.samples[microbatch]))

    def rows(self, microbatch: int) -> slice:
        """Return the rows of one pack among those of all packs."""
        return slice(microbatch * self.pack_tokens, (microbatch + 1) * self.pack_tokens)

    def sum_by_sample(self, token_losses: Sequence[Tensor], device: torch.device) -> Tensor:
        """Return the sum of the token losses of each sample, [num_samples] in fp32.

        The rows of a sample are always added in the same order.

        Args:
            token_losses: The losses [t] of the rows of every pack; empty for zeros.
            device: The device of the result.
        """
        sums = torch.zeros(self.num_samples, device=device)
        places = [place for one in self.samples for place in one]
        if not token_losses or not places:
            return sums
        # Padding is dropped before the sum because it has no sample.
        parts = [t[: sum(n[: len(s)])] for t, n, s in zip(token_losses, self.lengths, self.samples, strict=True)]
        lengths = [n for one, s in zip(self.lengths, self.samples, strict=True) for n in one[: len(s)]]
        sizes, rows = to_device([lengths, places], device)
        # `unsafe` omits a check of the lengths, for which the host would wait.
        return sums.index_copy_(0, rows, torch.segment_reduce(torch.cat(parts), "sum", lengths=sizes, unsafe=True))


class LLMEngine:
    """This rank's part of the LLM, its gradients and its optimizer.

    Args:
        hf_config: The Hugging Face config of the LLM.
        source: The weights. Every rank reads only its slices.
        optim: The parameters that learn, and their settings.
        groups: The place of this rank. Megatron's groups must exist.
        dtype: The dtype of weights and activations. Gradients and optimizer state are fp32.
        recompute: If true, only the input of each layer is kept for the backward pass.
        adapters: The low-rank adapters to add.
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
                ep_size=topology.ffn_ep,
                expert_tp_size=topology.expert_tp,
            ).to(groups.device)
            expert_tp = groups.expert_place.tp, topology.expert_tp
            load_megatron(self.gpt, source, hf_config, tp_rank=place.tp, tp_size=topology.tp, expert_tp=expert_tp)
            add_llm_adapters(self.gpt, hf_config, adapters, tp_rank=place.tp, tp_size=topology.tp, expert_tp=expert_tp)
            self.settings = freeze(self.gpt, hf_config, optim)
            self.model: nn.Module = self.gpt
            self.optimizer: Any = None
            if not _all_frozen(self.settings, groups):
                self.model = data_parallel(self.gpt)
                self.optimizer = _build_optimizer(self.model, optim, self.settings, dtype)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return this rank's parameters by Megatron name, with layers numbered over all stages."""
        return list(global_parameters(self.gpt))

    def split(self, name: str) -> tuple[int, int]:
        """Return this rank's index among the ranks that share the Megatron parameter `name`, and their number."""
        topology = self.groups.topology
        if is_expert(name):
            return self.groups.expert_place.tp, topology.expert_tp
        return self.groups.place.tp, topology.tp

    def copy_index(self, name: str) -> int:
        """Return the index of this rank's copy of the Megatron parameter `name`; 0 if there is only one copy."""
        return self.groups.expert_place.dp if is_expert(name) else self.groups.place.dp

    def hf_name(self, name: str) -> str:
        """Return `hf_name` for this LLM."""
        return hf_name(name, self.hf_config)

    def forward_backward(
        self, packs: Packs, losses: Sequence[PackedLoss], router: RouterMeter | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run all micro-batches through the pipeline (1F1B) and back.

        Collective: every rank of the world must call it.

        Args:
            packs: The packed sequences of this replica.
            losses: The losses of the logits.
            router: What measures the choices of the routers; None for an LLM without experts.

        Returns:
            sample_losses: The sums of the token losses of each sample, [number of losses, number of samples in the
                global batch] in fp32. They are non-zero only on tensor rank 0 of the last stage of the replica that
                computed the sample, so the sum over ranks is complete.
            audio_grad: The gradient [M·t/TP, H] of the total of `losses` with respect to `packs.audio`.
        """
        forward = _Forward(self, packs, losses, router)
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
        sample_losses = torch.stack(
            [packs.sum_by_sample(f if counts_here else [], self.groups.device) for f in forward.token_losses]
        )
        grads = [torch.zeros_like(a) if a.grad is None else a.grad for a in forward.audio]
        return sample_losses, torch.cat(grads) if grads else torch.zeros_like(packs.audio)

    @torch.no_grad()
    def forward_only(
        self,
        sequences: Sequence[PackedSequences],
        embed: Callable[[int], Tensor],
        read: Callable[[int, Tensor], Tensor],
    ) -> list[Tensor]:
        """Run packs through the pipeline without gradient.

        Collective: every rank of the replica must call it.

        Args:
            sequences: The packs, all of the same number of rows t.
            embed: Called on the first stage with the number of a pack, for this rank's input [t/TP, 1, H].
            read: Called on the last stage with the number of a pack and this rank's columns [t, V/TP] of its logits.

        Returns:
            The results of `read`, in order; empty on other stages.
        """

        def forward(microbatches: Iterator[int], model: nn.Module) -> tuple[Tensor, Any]:
            m = next(microbatches)
            output = model(
                input_ids=None,
                position_ids=None,
                attention_mask=None,
                decoder_input=embed(m) if self.groups.is_first_stage else None,
                packed_seq_params=sequences[m],
            )
            return output, lambda logits, non_loss_data: read(m, logits[0])

        with megatron_calls():
            found: list[Tensor] = get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter(range(len(sequences))),
                model=[self.gpt],
                num_microbatches=len(sequences),
                seq_length=sequences[0].num_tokens,
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        return found if self.groups.is_last_stage else []

    def reference_logits(self, packs: Packs, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return this rank's columns [n, V/TP] of the logits at the given rows [n] of every pack, without gradient.

        Collective: every rank of the replica must call it.

        Returns:
            One tensor per pack; empty on all stages but the last.
        """
        return tuple(
            self.forward_only(
                [packs.sequences(m) for m in range(len(packs.lengths))],
                lambda m: embed_tokens(self.gpt, packs.token_ids[packs.rows(m)]),
                lambda m, logits: logits.index_select(0, rows[m]),
            )
        )

    def grad_norm_sq(self) -> Tensor:
        """Return Σ g² over this rank's gradient shards, an fp64 scalar; each parameter counts once over the world."""
        total = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        if self.optimizer is not None:
            with megatron_calls():
                self.optimizer.prepare_grads()
                for optimizer in self.optimizer.chained_optimizers:
                    for grad in optimizer.get_main_grads_for_grad_norm():
                        total += grad.double().square().sum()
        return total

    def begin_stage(self, stage: int) -> None:
        """Let those parameters learn that learn in a stage."""
        for parameter in self.gpt.parameters():
            setting = self.settings[id(parameter)]
            if not setting.frozen:
                parameter.requires_grad_(not setting.in_stage(stage).frozen)

    def step(self, clip_coef: float, lr_scale: float, stage: int = 0) -> None:
        """Update the weights, after `grad_norm_sq`.

        Args:
            clip_coef: The factor on the gradients, at most 1.
            lr_scale: The factor on the peak learning rate of every group.
            stage: The index of the stage of training.
        """
        if self.optimizer is None:
            return
        with megatron_calls():
            # On a rank without parameters of a setting, Megatron adds an empty group.
            set_rates((g for g in self.optimizer.param_groups if "setting" in g), stage, lr_scale)
            if clip_coef < 1.0:
                for optimizer in self.optimizer.chained_optimizers:
                    for parameter in optimizer.get_parameters():
                        if parameter.grad is not None:
                            parameter.grad.mul_(clip_coef)
            self.optimizer.step_with_ready_grads()

    def train(self, mode: bool) -> None:
        """Switch every module to training mode or to evaluation mode."""
        self.gpt.train(mode)


class _Forward:
    """The `forward_step_func` of Megatron, which runs one micro-batch through this stage."""

    def __init__(
        self, engine: LLMEngine, packs: Packs, losses: Sequence[PackedLoss], router: RouterMeter | None
    ) -> None:
        self.engine, self.packs, self.losses = engine, packs, losses
        self.router = router
        share = packs.pack_tokens // engine.groups.topology.tp
        parts = packs.audio.detach().split(share) if engine.groups.is_first_stage else ()
        self.audio = [part.requires_grad_() for part in parts]
        """One leaf of the graph per pack. With a single leaf, every micro-batch's gradient would be as large as all."""
        self.token_losses: list[list[Tensor]] = [[] for _ in losses]
        """For each loss, the token losses [t] in fp32 of the packs so far; last stage only."""

    def __call__(self, microbatches: Iterator[int], model: nn.Module) -> tuple[Tensor, Any]:
        m = next(microbatches)
        packs, groups = self.packs, self.engine.groups
        decoder_input = None
        if groups.is_first_stage:
            share = packs.pack_tokens // groups.topology.tp
            mask = packs.audio_mask[m * share : (m + 1) * share]
            decoder_input = embed_pack(self.engine.gpt, packs.token_ids[packs.rows(m)], self.audio[m], mask)
        observe = None if self.router is None else partial(self.router.observe, m)
        output = model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=decoder_input,
            packed_seq_params=replace(packs.sequences(m), observe=observe),
        )
        return output, lambda logits: self._loss(m, logits[0])

    def _loss(self, m: int, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        labels = self.packs.labels[self.packs.rows(m)]
        total = torch.zeros((), device=logits.device)
        for packed, kept in zip(self.losses, self.token_losses, strict=True):
            token_losses = packed.token_losses(m, logits, labels)
            kept.append(token_losses.detach())
            total = total + packed.factor * token_losses.sum()
        # Megatron divides by this number only if it finalizes the gradients itself, see `data_parallel`.
        return total, torch.ones((), dtype=torch.int32, device=logits.device), {}


def embed_pack(gpt: Any, token_ids: Tensor, audio: Tensor, audio_mask: Tensor) -> Tensor:
    """Return the input [t/TP, 1, H] of the first stage: this rank's slice of a pack, audio embeddings in their place.

    Args:
        gpt: This rank's stage of the model.
        token_ids: The token ids [t] of the whole pack.
        audio: The audio embeddings [t/TP, H] of the slice.
        audio_mask: The rows [t/TP] of the slice that are audio.
    """
    text = embed_tokens(gpt, token_ids)
    # Not masked_scatter: rows without audio must stay in the graph, or a text-only pack would have none.
    return torch.where(audio_mask[:, None, None], audio[:, None].to(text.dtype), text)


def hf_name(name: str, hf_config: PretrainedConfig) -> str:
    """Return `llm.` and the name of the first Hugging Face tensor that the Megatron parameter `name` consists of."""
    pieces = local_pieces(name, hf_config, 0, 1)
    return PREFIX + next(p.hf_name for p in pieces if p.hf_name is not None)


def freeze(gpt: nn.Module, hf_config: PretrainedConfig, optim: OptimConfig) -> dict[int, ParamSetting]:
    """Mark the parameters of a stage that do not learn, and return the setting of every parameter by its `id`."""
    settings = {}
    for name, parameter in global_parameters(gpt):
        setting = setting_of(optim, hf_name(name, hf_config), parameter.dim())
        # A weight under an adapter does not require a gradient already.
        setting = replace(setting, frozen=setting.frozen or not parameter.requires_grad)
        parameter.requires_grad_(not setting.frozen)
        settings[id(parameter)] = setting
    return settings


def data_parallel(gpt: Any) -> nn.Module:
    """Return a stage in Megatron's data-parallel wrapper.

    The weights that learn and their gradients are stored in flat buffers.
    """
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=False, grad_reduce_in_fp32=True
    )
    # The loss is already divided by the counts of the global batch, so Megatron must not divide again.
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
    """Return one optimizer group per distinct setting, which `set_rates` reads."""
    overrides = {}
    for wanted in {s for s in settings.values() if not s.frozen}:
        predicate = ParamPredicate(str(wanted), lambda p, w=wanted: settings.get(id(p)) == w)
        overrides[ParamKey(predicate=predicate)] = {"max_lr": wanted.lr, "setting": wanted}
    return overrides


def _all_frozen(settings: dict[int, ParamSetting], groups: Groups) -> bool:
    """Return whether no rank has anything to learn in the LLM.

    Collective: every rank of the world must call it.
    """
    learned = torch.tensor([sum(not s.frozen for s in settings.values())], device=groups.device)
    torch.distributed.all_reduce(learned, group=groups.world)
    return int(learned) == 0
