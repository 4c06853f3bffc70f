"""The audio side of the model (encoders, router, adapter, projector) under DeepSpeed ZeRO-3.

The parameters, gradients and optimizer state are sharded over ranks; see `trainer.engine.partitions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed

# `deepspeed.initialize` imports this module, which decorates functions with `torch.compile`. When it is imported here,
# `lean_imports` keeps it from loading torch's compiler, which takes more than a second.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import numpy as np
import torch
from torch import Tensor, nn

from model import lengths
from model.audio_output import AudioOutput
from model.audio_tower import AudioTower
from model.batch import Ragged
from model.config import EncoderConfig
from model.encoders.registry import encoder_windowing
from model.errors import UserError
from model.precision import cast
from model.transfer import to_device
from trainer.engine.cpu_attention import use_fp32_attention
from trainer.engine.ds_config import Gathering, without_buffers
from trainer.engine.expert_parallel import EncoderCost, EncoderDispatch, dummy_clip, gather_lengths
from trainer.engine.module_weights import ModuleWeights
from trainer.engine.optim import OptimConfig, param_groups, set_rates
from trainer.engine.partitions import copies_of_partitions, partition
from trainer.engine.placement import clip_cost, place
from trainer.engine.whole_weights import WholeWeights
from trainer.parallel.dispatch import ClipLengths
from trainer.parallel.groups import Groups, device_groups

PREFIX = "audio."


class AudioEngine:
    """An `AudioTower` that is distributed over all ranks.

    Collective: every rank of the world must create one.

    Args:
        tower: The tower, built on every rank from the same seed or weights. It must contain the experts that
            `place(config, ep)` assigns to this rank.
        optim: The optimizer section of the recipe.
        ds_config: The configuration of DeepSpeed; see `trainer.engine.ds_config`.
        groups: The process groups of this rank.
        batch_sec: The largest number of padded audio seconds in one encoder call, which encodes a batch of clips.
        debug_plan: True to compare the plans of all ranks before clips are sent.
        gathering: The time at which weights are gathered; see `TrainConfig.gather_audio_weights`.
        recompute_calls: True to recompute every encoder call, and the modules after the encoders, in the backward pass.

    Raises:
        UserError: If every parameter is frozen.
    """

    def __init__(
        self,
        tower: AudioTower,
        optim: OptimConfig,
        ds_config: dict[str, Any],
        groups: Groups,
        batch_sec: float,
        debug_plan: bool = False,
        gathering: Gathering = "per_update",
        recompute_calls: bool = False,
    ) -> None:
        self.groups = groups
        use_fp32_attention()
        named = [(PREFIX + name, p, p.dim()) for name, p in tower.named_parameters()]
        learned = param_groups(optim, named)
        if not learned:
            raise UserError("optim.parts: every audio parameter is frozen; train at least audio.projector.*")
        self._learned = [(p, group["setting"]) for group in learned for p in group["params"]]
        # This disables DeepSpeed's shared-memory all-reduce on CPUs, which would compile C++ code at startup. If the
        # compilation is killed, its lock file remains, and every later start waits for it without a message.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        topology = groups.topology
        if ds_config.get("bf16", {}).get("enabled"):
            cast(tower, torch.bfloat16)  # DeepSpeed does not cast modules that have already been sharded.
        if gathering == "per_update":
            ds_config = without_buffers(ds_config)
        assert gathering == "per_update" or topology.num_shard_copies == 1, "see trainer.config.checks"
        with device_groups(groups.device):
            partition(tower, ds_config, topology, groups.rank)
            copies = copies_of_partitions(topology, groups.rank)
            _move_buffers(tower, groups.device)
            optimizer = torch.optim.AdamW(learned, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
            self.engine, *_ = deepspeed.initialize(
                model=tower, optimizer=optimizer, config=ds_config, dist_init_required=False
            )
        self.tower: AudioTower = self.engine.module
        self.tower.recompute_joined = recompute_calls
        self._weights = (
            WholeWeights(self.engine, groups.device, copies)
            if gathering == "per_update"
            else ModuleWeights(self.engine, topology.world, topology.ep, recompute_calls)
        )
        self._dispatch = self._build_dispatch(lengths.num_samples(batch_sec), debug_plan, recompute_calls)

    def _build_dispatch(
        self, budget_samples: int, debug_plan: bool, recompute_calls: bool
    ) -> dict[tuple[str, ...], EncoderDispatch]:
        """Create one dispatch for the primary encoder, which every rank holds, and one for all experts.

        Collective: every rank of the world must call it.

        Returns:
            The dispatches, by the names of their encoders.
        """
        config, device = self.tower.config, self.groups.device
        dtype = next(self.tower.projector.parameters()).dtype
        placement = place(config, self.groups.topology.ep)

        def build(
            encoders: Sequence[EncoderConfig], places: Sequence[int], ep: int, width: int, every_clip: bool
        ) -> EncoderDispatch:
            names = [e.name for e in encoders]
            held = {n: self.tower.encoder(n) for n in names if ep == 1 or n in self.tower.experts}
            assert set(held) == set(names if ep == 1 else placement.held_by(self.groups.rank)), held.keys()
            empty = torch.zeros(0, width, dtype=dtype, device=device)
            flushes = ep > 1 and placement.has_empty_place
            return EncoderDispatch(
                held,
                names,
                [clip_cost(e) for e in encoders],
                [encoder_windowing(e) for e in encoders],
                places,
                ep,
                self.groups,
                budget_samples=budget_samples,
                empty=empty,
                before_backward=self._weights.before_features_return if flushes else None,
                calls_are_collective=self._weights.calls_are_collective,
                recompute_calls=recompute_calls,
                every_clip=every_clip,
                debug_plan=debug_plan,
            )

        found: dict[tuple[str, ...], EncoderDispatch] = {}
        if config.primary is not None and self.tower.primary is not None:
            found[(config.primary.name,)] = build([config.primary], [0], 1, self.tower.primary.dim, every_clip=True)
        if config.experts:
            found[placement.names] = build(
                config.experts, placement.places, placement.ep, config.expert_dim, every_clip=False
            )
        return found

    def take_costs(self) -> dict[str, EncoderCost]:
        """Return the cost of every encoder on this rank since the last call of this method, by the encoder's name."""
        costs: dict[str, EncoderCost] = {}
        for dispatch in self._dispatch.values():
            costs |= dispatch.take_costs()
        return costs

    @property
    def zero(self) -> Any:
        """DeepSpeed's ZeRO-3 optimizer."""
        return self.engine.optimizer

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the names (`audio.…`) and the ZeRO-3 parameters (with the attributes `ds_shape` and `ds_tensor`)."""
        return [(PREFIX + name, p) for name, p in self.tower.named_parameters()]

    def forward(
        self, clips: Ragged, prompts: Ragged, noise: Tensor | None, everyone: ClipLengths | None = None
    ) -> AudioOutput:
        """Compute `AudioTower.forward` for this rank's clips. The results are on the device.

        Collective: every rank of the world must call it.

        A rank without clips encodes a dummy clip and drops the resulting rows, so that its gradients are zero.

        Args:
            clips: The waveforms [ΣT] of this rank's clips at 16 kHz; may be empty.
            prompts: The instruction tokens [ΣP], one sequence per clip.
            noise: Standard normal noise [B, G, K] for the router; None outside training.
            everyone: The lengths of the clips of all ranks, without dummy clips; None to gather them.
        """
        device, num_clips = self.groups.device, len(clips)
        if num_clips == 0:
            clips, noise = Ragged.of([dummy_clip()]), None
            prompts = Ragged(torch.zeros(1, dtype=torch.int64), (1,))
        if everyone is None:
            lengths_of_all = gather_lengths(clips, self.groups)
        else:
            lengths_of_all = everyone.with_dummies(self.groups.topology.world, len(dummy_clip()))

        def encode(names: Sequence[str], clips: Ragged, wanted: Tensor) -> list[Ragged]:
            return self._dispatch[tuple(names)](names, clips, wanted, lengths_of_all)

        out = self._weights.forward(
            *(Ragged(to_device(part.values, device), part.lengths) for part in (clips, prompts)),
            None if noise is None else to_device(noise, device),
            encode=encode,
        )
        return out if num_clips else out.without_clips()

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the sum of `loss` over all ranks.

        Collective: every rank of the world must call it.

        The gradients are stored in ZeRO-3's partitions.
        """
        self._weights.backward(loss)

    def release_weights(self) -> None:
        """Free all gathered weights. The next forward pass gathers them again.

        Every rank of the world must call it after the partitions have been given new values.
        """
        self._weights.release(are_loaded=True)

    def grad_norm_sq(self) -> Tensor:
        """Return the sum of squared gradients over this rank's partitions, a float64 scalar on the device.

        If several ranks hold copies of the same partitions, the result is divided by their number. The sum of the
        results of all ranks is therefore the squared gradient norm of all parameters.
        """
        partitions = self.zero.get_fp32_grad_partitions()
        flat = [g for group in partitions.values() for g in group.values()]
        total = torch.stack([g.double().square().sum() for g in flat]).sum()
        return (total / self.groups.topology.num_shard_copies).to(self.groups.device)

    def begin_stage(self, stage: int) -> None:
        """Set `requires_grad` to true for exactly those parameters that are trained in a stage.

        Collective: every rank of the world must call it.
        """
        for parameter, setting in self._learned:
            parameter.requires_grad_(not setting.in_stage(stage).frozen)
        for flat in self.zero.fp32_partitioned_groups_flat:
            if flat.grad is not None:  # With offload, these are still the gradients of the last step.
                flat.grad.zero_()
        for dispatch in self._dispatch.values():
            dispatch.agree_on_learning()

    def step(self, clip_coef: float, norm: float, lr_scale: float, stage: int = 0) -> None:
        """Update the parameters.

        Collective: every rank of the world must call it.

        Args:
            clip_coef: The factor by which gradients are multiplied, at most 1.
            norm: The norm of the audio side's gradients.
            lr_scale: The factor by which the peak learning rate of every parameter group is multiplied.
            stage: The index of the stage of training.
        """
        set_rates(self.zero.param_groups, stage, lr_scale)
        # DeepSpeed divides by max(1, (norm + 1e-6) / clip_grad). With this clip_grad, the divisor is 1 / clip_coef.
        self.zero.clip_grad = 0.0 if clip_coef >= 1.0 else (norm + 1e-6) * clip_coef
        # DeepSpeed would compute the norm by one all-reduce per group of experts. The ranks hold different experts, so
        # these collectives would hang.
        self.zero._get_norm_groups = lambda: [to_device(np.float32(norm), self.groups.device)]
        self._weights.step()

    def discard(self) -> None:
        """Discard the gradients of this step without an update."""
        self.zero._overflow_clean_up(self.zero.loss_scale)

    def train(self, mode: bool) -> None:
        """Switch every module to training mode, or to evaluation mode if `mode` is false."""
        self.engine.train(mode)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move every buffer to `device`. `zero.Init` moves only parameters, and `deepspeed.initialize` moves no buffers."""
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            child._buffers[name] = buffer.to(device)
