"""The LLM under Megatron-core, with tensor, sequence, context, pipeline and data parallelism.

The optimizer is Megatron's distributed optimizer. A pack (packed sequence) contains several samples one after another,
followed by padding. Each sample is a segment of the pack. One pack is one micro-batch.

Shapes: M micro-batches, t rows of a pack on one rank, H hidden width, V vocabulary size. With context parallelism, a
rank holds only a part of the rows of each pack. All gradients are sums over the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn
from transformers import PretrainedConfig

from model.llm.lora import add_llm_adapters
from model.llm.megatron import build_megatron, embed_tokens
from model.llm.names import Piece, is_expert, local_pieces
from model.llm.packing import PackedSequences
from model.llm.stages import Recompute
from model.llm.weights import WeightSource, global_parameters, load_megatron
from model.lora import NO_ADAPTERS, Adapters, llm_shapes
from trainer.engine.llm_optimizer import (
    FP32_REDUCTION,
    Reduction,
    all_frozen,
    build_optimizer,
    data_parallel,
    freeze,
    hf_name,
)
from trainer.engine.microbatches import TrainedPacks
from trainer.engine.optim import OptimConfig, set_rates
from trainer.engine.packs import Packs
from trainer.engine.router_meter import RouterMeter
from trainer.engine.token_losses import PackedLoss
from trainer.parallel.cpu import megatron_calls
from trainer.parallel.groups import Groups


class LLMEngine:
    """This rank's part of the LLM, its gradients and its optimizer.

    Args:
        hf_config: The LLM's Hugging Face config.
        source: The weights. Every rank reads only its slices.
        optim: The optimizer settings, which determine the parameters that are trained.
        groups: The process groups of this rank. Megatron's groups must already exist.
        dtype: The dtype of weights and activations. The optimizer state is fp32.
        recompute: The activations that are not kept, but recomputed in the backward pass.
        adapters: The low-rank adapters to add.
        reduction: The settings for the exchange of gradients and weights between replicas.
    """

    def __init__(
        self,
        hf_config: PretrainedConfig,
        source: WeightSource,
        optim: OptimConfig,
        groups: Groups,
        dtype: torch.dtype,
        recompute: Recompute = "none",
        adapters: Adapters = NO_ADAPTERS,
        reduction: Reduction = FP32_REDUCTION,
    ) -> None:
        self.hf_config, self.groups, self.dtype, self.reduction = hf_config, groups, dtype, reduction
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        self.saved_views: dict[str, Any] = {}
        """The values that `trainer.checkpoint.llm_state` keeps between saves, by Megatron parameter."""
        self.shapes = llm_shapes(hf_config, adapters)
        """The shapes of all tensors of the LLM, by name without `llm.`."""
        topology, place = groups.topology, groups.place
        with megatron_calls():
            self.chunks = build_megatron(
                hf_config,
                tp_size=topology.tp,
                pp_size=topology.pp,
                vp_size=topology.vp,
                cp_size=topology.cp,
                first_stage=groups.is_first_stage,
                last_stage=groups.is_last_stage,
                dtype=dtype,
                recompute=recompute,
                ep_size=topology.ffn_ep,
                expert_tp_size=topology.expert_tp,
            )
            """The models of this rank, one per virtual stage."""
            for chunk in self.chunks:
                chunk.to(groups.device)
            expert_tp = groups.expert_place.tp, topology.expert_tp
            load_megatron(self.chunks, source, hf_config, tp_rank=place.tp, tp_size=topology.tp, expert_tp=expert_tp)
            for chunk in self.chunks:
                add_llm_adapters(chunk, hf_config, adapters, tp_rank=place.tp, tp_size=topology.tp, expert_tp=expert_tp)
            self._parameters = list(global_parameters(self.chunks))
            self.settings = freeze(self.chunks, hf_config, optim)
            self.models: list[Any] = list(self.chunks)
            """The chunks, in Megatron's data-parallel wrapper if any rank trains parameters of the LLM."""
            self.optimizer: Any = None
            if not all_frozen(self.settings, groups):
                self.models = data_parallel(self.chunks, reduction)
                self.optimizer = build_optimizer(self.models, optim, self.settings, dtype)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the Megatron names and the parameters of this rank. Layers are numbered over all stages."""
        return self._parameters

    def split(self, name: str) -> tuple[int, int]:
        """Return this rank's index among the ranks that share the Megatron parameter `name`, and their number."""
        topology = self.groups.topology
        if is_expert(name):
            return self.groups.expert_place.tp, topology.expert_tp
        return self.groups.place.tp, topology.tp

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Return `local_pieces` of the Megatron parameter `name`. The pieces are cached, because saves need them."""
        if name not in self._pieces:
            self._pieces[name] = tuple(local_pieces(name, self.hf_config, *self.split(name)))
        return self._pieces[name]

    def copy_index(self, name: str) -> int:
        """Return the index of this rank's copy of the Megatron parameter `name`; 0 if there is only one copy."""
        return self.groups.expert_place.dp if is_expert(name) else self.groups.without_context.place.dp

    def hf_name(self, name: str) -> str:
        """Return the Hugging Face name of a Megatron parameter; see `trainer.engine.llm_optimizer.hf_name`."""
        return hf_name(name, self.hf_config)

    def forward_backward(
        self, packs: Packs, losses: Sequence[PackedLoss], router: RouterMeter | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the forward and backward passes of all micro-batches (1F1B, interleaved if there are virtual stages).

        Collective: every rank of the world must call it.

        Args:
            packs: The packed sequences of this replica.
            losses: The losses that are computed from the logits.
            router: The meter of the routers' choices; None for an LLM without FFN experts.

        Returns:
            sample_losses: The sum of the token losses of each sample, [number of losses, number of samples in the
                global batch] in fp32. A sample's value is non-zero only on tensor-parallel rank 0 of the last stage of
                the replica that computed the sample. Each context-parallel rank adds only its own rows, so callers sum
                the result over all ranks.
            audio_grad: The gradient [M·t/TP, H] of the total of `losses` with respect to `packs.audio`.
        """
        step = TrainedPacks(self.chunks[0], self.groups, packs, losses, router)
        self.zero_grad()
        with megatron_calls():
            self._run(self.models, step.sequences, len(packs.lengths), packs.pack_tokens, step.embed, step.loss)
        counts_here = self.groups.is_last_stage and self.groups.place.tp == 0
        sample_losses = torch.stack(
            [packs.sum_by_sample(f if counts_here else [], self.groups.device) for f in step.token_losses]
        )
        grads = [torch.zeros_like(a) if a.grad is None else a.grad for a in step.audio]
        return sample_losses, torch.cat(grads) if grads else torch.zeros_like(packs.audio)

    def zero_grad(self) -> None:
        """Set the gradients of all parameters to zero."""
        if self.optimizer is None:
            return
        with megatron_calls():
            for model in self.models:
                model.zero_grad_buffer()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def forward_only(
        self,
        sequences: Sequence[PackedSequences],
        embed: Callable[[int], Tensor],
        read: Callable[[int, Tensor], Tensor],
    ) -> list[Tensor]:
        """Run packs through the pipeline without gradients.

        Collective: every rank of the replica must call it.

        Args:
            sequences: The packs, all of the same number of rows t.
            embed: A function that is called on the first stage with the number of a pack. It returns this rank's input
                [t/TP, 1, H].
            read: A function that is called on the last stage with the number of a pack and this rank's columns
                [t, V/TP] of the logits of the pack.

        Returns:
            The results of `read`, in order; empty on other stages.
        """
        count = len(sequences)
        # The interleaved schedule needs a multiple of PP packs. The added dummy packs write nothing to the KV cache,
        # and run while stages would otherwise be idle.
        dummies = -count % self.groups.topology.microbatch_multiple
        run = [*sequences, *[PackedSequences(lengths=sequences[-1].lengths)] * dummies]

        def read_pack(m: int, logits: Tensor, non_loss_data: bool) -> Tensor | None:
            return read(m, logits[0]) if m < count else None

        with megatron_calls():
            found = self._run(
                self.chunks,
                run.__getitem__,
                len(run),
                sequences[0].num_tokens,
                lambda m: embed(min(m, count - 1)),
                read_pack,
                forward_only=True,
                collect_non_loss_data=True,
            )
        return found[:count] if self.groups.is_last_stage else []

    def _run(
        self,
        models: Sequence[Any],
        sequences: Callable[[int], PackedSequences],
        num_packs: int,
        pack_tokens: int,
        embed: Callable[[int], Tensor],
        read: Callable[..., Any],
        *,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
    ) -> list[Any]:
        """Run packs through the pipeline by Megatron's schedule.

        Collective: every rank of the replica must call it.

        Args:
            models: `chunks` or `models`.
            sequences: A function that returns the segments of the pack with a given number.
            num_packs: The number of packs, a multiple of `topology.microbatch_multiple`.
            pack_tokens: The number of rows of every pack on this rank.
            embed: A function that is called on the first stage with the number of a pack. It returns this rank's input
                [t/TP, 1, H].
            read: A function that is called on the last stage with the number of a pack, its logits [1, t, V/TP], and
                the further arguments of Megatron's loss functions.
            forward_only: See Megatron.
            collect_non_loss_data: See Megatron.
        """

        def forward(numbers: Iterator[tuple[int, int]], model: nn.Module) -> tuple[Tensor, Any]:
            chunk, m = next(numbers)
            output = model(
                input_ids=None,
                position_ids=None,
                attention_mask=None,
                decoder_input=embed(m) if chunk == 0 and self.groups.is_first_stage else None,
                packed_seq_params=sequences(m),
            )
            return output, partial(read, m)

        numbers = [iter([(chunk, m) for m in range(num_packs)]) for chunk in range(len(models))]
        found: list[Any] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=numbers if len(models) > 1 else numbers[0],
            model=list(models),
            num_microbatches=num_packs,
            seq_length=pack_tokens * self.groups.topology.cp,  # Megatron divides it by the context-parallel size.
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
        )
        return found

    def reference_logits(self, packs: Packs, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute the logits at some rows of every pack, without gradients and without audio embeddings.

        Collective: every rank of the replica must call it.

        Args:
            packs: The packed sequences of this replica.
            rows: The indices [n] of the rows, for each pack.

        Returns:
            This rank's columns [n, V/TP] of the logits, for each pack; empty on all stages but the last.
        """
        return tuple(
            self.forward_only(
                [packs.sequences(m) for m in range(len(packs.lengths))],
                lambda m: embed_tokens(self.chunks[0], packs.token_ids[packs.rows(m)]),
                lambda m, logits: logits.index_select(0, rows[m]),
            )
        )

    def grad_norm_sq(self) -> Tensor:
        """Return the sum of squared gradients over this rank's gradient shards, a float64 scalar on the device.

        Over all ranks, each gradient is counted once.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        if self.optimizer is not None:
            with megatron_calls():
                self.optimizer.prepare_grads()
                for optimizer in self.optimizer.chained_optimizers:
                    for grad in optimizer.get_main_grads_for_grad_norm():
                        total += grad.double().square().sum()
        return total

    def begin_stage(self, stage: int) -> None:
        """Set `requires_grad` to true for exactly those parameters that are trained in a stage."""
        for _, parameter in self.parameters():
            setting = self.settings[id(parameter)]
            if not setting.frozen:
                parameter.requires_grad_(not setting.in_stage(stage).frozen)

    def step(self, clip_coef: float, lr_scale: float, stage: int = 0) -> None:
        """Update the weights. `grad_norm_sq` must have been called before, because it prepares the gradients.

        Args:
            clip_coef: The factor by which gradients are multiplied, at most 1.
            lr_scale: The factor by which the peak learning rate of every group is multiplied.
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

    def finish_gathering(self) -> None:
        """Gather the updated weights, if `overlap_weights` would otherwise defer this to the next forward pass.

        Collective: every rank of the data-parallel group must call it.
        """
        if self.optimizer is None or not self.reduction.overlap_weights:
            return
        with megatron_calls():
            for group in (group for model in self.models for group in model.bucket_groups):
                # Weights that have already been gathered since the update are not gathered again.
                if not group.param_gather_dispatched or group.param_gather_handle is not None:
                    group.start_param_sync(force_sync=True)

    def train(self, mode: bool) -> None:
        """Switch every module to training mode or to evaluation mode."""
        for chunk in self.chunks:
            chunk.train(mode)
