"""The audio side under DeepSpeed ZeRO-3: its parameters, gradients and optimizer state are sharded over all ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor, nn

from model import lengths
from model.audio_tower import AudioOutput, AudioTower
from model.batch import Ragged
from model.errors import UserError
from trainer.engine.optim import OptimConfig, param_groups
from trainer.parallel.exchange import gather_ragged
from trainer.parallel.groups import Groups
from trainer.parallel.plan import encoder_calls, group_by_length

PREFIX = "audio."


@dataclass(frozen=True)
class EncoderCost:
    """What one encoder cost one rank."""

    compute_sec: float = 0.0
    """Within the encoder's calls."""
    wait_sec: float = 0.0
    """For other ranks, before and after its calls."""
    sent_bytes: int = 0
    """To other ranks: waveforms and features."""
    received_bytes: int = 0

    def __add__(self, other: EncoderCost) -> EncoderCost:
        return EncoderCost(
            self.compute_sec + other.compute_sec,
            self.wait_sec + other.wait_sec,
            self.sent_bytes + other.sent_bytes,
            self.received_bytes + other.received_bytes,
        )


class AudioEngine:
    """`AudioTower` over all ranks.

    Args:
        tower: built identically on every rank (same seed or same weights).
        optim: what learns, and how.
        ds_config: see `trainer.engine.ds_config`.
        groups: this rank's place.
        batch_sec: padded audio seconds that one encoder call may hold.
    """

    def __init__(
        self, tower: AudioTower, optim: OptimConfig, ds_config: dict[str, Any], groups: Groups, batch_sec: float
    ) -> None:
        self.groups = groups
        self._costs: dict[str, EncoderCost] = {}
        self._budget_samples = lengths.num_samples(batch_sec)
        named = [(PREFIX + name, p, p.dim()) for name, p in tower.named_parameters()]
        learned = param_groups(optim, named)
        if not learned:
            raise UserError("optim.parts: every audio parameter is frozen; leave at least audio.projector.* to learn")
        # Its shared-memory all-reduce serves inference on CPUs. It compiles C++ at start, and a build that was killed
        # leaves a lock on which every later start waits without a word.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # All of them, explicitly: a parameter partitioned later would inherit another one's group.
        deepspeed.zero.Init(module=tower, config_dict_or_path=ds_config)
        optimizer = torch.optim.AdamW(learned, lr=optim.lr, betas=optim.betas, eps=optim.eps)
        self.engine, *_ = deepspeed.initialize(
            model=tower, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
        self.tower: AudioTower = self.engine.module
        self._keep_persistent()

    @property
    def zero(self) -> Any:
        """DeepSpeed's ZeRO-3 optimizer."""
        return self.engine.optimizer

    def _keep_persistent(self) -> None:
        """Keep parameters below `stage3_param_persistence_threshold` gathered until the next update.

        DeepSpeed releases them too after every call while the order of module calls differs from the last step's, and
        ours does: the number of calls follows the batch. It releases no parameter that some module still uses.
        """
        for _, parameter in self.named_parameters():
            if parameter.ds_persist:  # type: ignore[attr-defined]
                parameter.ds_active_sub_modules.add("persistent")  # type: ignore[attr-defined]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """ZeRO-3 parameters (`ds_shape`, `ds_tensor`) by name, `audio.…`."""
        return [(PREFIX + name, p) for name, p in self.tower.named_parameters()]

    def forward(self, clips: Ragged, prompts: Ragged, ctc_targets: Ragged, noise: Tensor | None) -> AudioOutput:
        """As `AudioTower.forward`, for any number of clips; every rank must call it. Results lie on the device.

        A rank without clips computes a stand-in, whose rows are cut off: its gradients are zeros.
        """
        device, num_clips = self.groups.device, len(clips)
        if num_clips == 0:
            clips, noise = Ragged.of([stand_in()]), None
            prompts = Ragged(torch.zeros(1, dtype=torch.int64), (1,))
            ctc_targets = Ragged(torch.zeros(0, dtype=torch.int64), (0,))
        out: AudioOutput = self.engine(
            clips.to(device),
            prompts.to(device),
            ctc_targets.to(device),
            None if noise is None else noise.to(device),
            run=self._run,
        )
        if num_clips:
            return out
        routing = None if out.routing is None else out.routing.head(0)
        return AudioOutput(Ragged(out.embeddings.values[:0], ()), routing, out.ctc_loss_sum * 0.0)

    def _run(self, encoders: Mapping[str, nn.Module], clips: Mapping[str, Ragged]) -> dict[str, Ragged]:
        """Compute on the spot, in as many calls on every rank as the busiest one needs (ZeRO-3 gathers weights and
        reduces gradients per call, so ranks must call alike)."""
        sizes = [n for name in encoders for n in (len(clips[name]), *clips[name].lengths)]
        gathered = gather_ragged(np.array(sizes), self.groups.world)
        everyone = [_parse(row.tolist(), len(encoders)) for row in gathered]
        found = {}
        for k, (name, encoder) in enumerate(encoders.items()):
            calls = encoder_calls([rank[k] for rank in everyone], self._budget_samples)
            start_sec = time.perf_counter()
            found[name] = self._run_one(encoder, clips[name], calls)
            cost = EncoderCost(compute_sec=time.perf_counter() - start_sec)
            self._costs[name] = self._costs.get(name, EncoderCost()) + cost
        return found

    def take_costs(self) -> dict[str, EncoderCost]:
        """What each encoder (the primary included) cost this rank since the last call; starts again from nothing."""
        costs, self._costs = self._costs, {}
        return costs

    def _run_one(self, encoder: nn.Module, clips: Ragged, calls: int) -> Ragged:
        outputs: list[Tensor] = []
        order: list[int] = []
        for members in group_by_length(clips.lengths, self._budget_samples, calls):
            if members:
                outputs += encoder(clips.select(members)).split()
                order += members
            else:
                dummy = encoder(Ragged.of([stand_in().to(clips.values)]))
                outputs.append(dummy.values[:0])
                order.append(len(clips) + len(order))
        sequences = [outputs[place] for place in sorted(range(len(order)), key=order.__getitem__)]
        return Ragged(torch.cat(sequences), tuple(s.shape[0] for s in sequences[: len(clips)]))

    def backward(self, loss: Tensor) -> None:
        """Gradients of the sum over ranks of `loss` (DeepSpeed averages over ranks: undone here)."""
        self.engine.backward(loss * self.groups.topology.world)

    def grad_square(self) -> Tensor:
        """Σ g² over this rank's partitions, fp32 on the device: sums over ranks to that of all parameters."""
        partitions = self.zero.get_fp32_grad_partitions()
        flat = [g for group in partitions.values() for g in group.values()]
        return torch.stack([g.double().square().sum() for g in flat]).sum().to(self.groups.device)

    def step(self, coefficient: float, norm: float, lr_scale: float) -> None:
        """Update.

        Args:
            coefficient: factor on the gradients, at most 1.
            norm: of the audio side's gradients.
            lr_scale: factor on every group's peak learning rate.
        """
        for group in self.zero.param_groups:
            group["lr"] = group["peak_lr"] * lr_scale
        # DeepSpeed divides by max(1, (norm + 1e-6) / clip_grad): choose clip_grad so that this is 1 / coefficient.
        self.zero.clip_grad = 0.0 if coefficient >= 1.0 else (norm + 1e-6) * coefficient
        self.engine.step()
        self._keep_persistent()

    def discard(self) -> None:
        """Forget the gradients of this step."""
        self.zero._overflow_clean_up(self.zero.loss_scale)

    def train(self, mode: bool) -> None:
        """Training or evaluation mode of every module."""
        self.engine.train(mode)


def stand_in() -> Tensor:
    """0.1 s of a faint tone: input for an encoder call that has no clip. Not silence: normalising that divides by 0."""
    return 0.01 * torch.sin(torch.arange(1600) * 0.1)


def _parse(flat: list[int], num_encoders: int) -> list[list[int]]:
    rows, at = [], 0
    for _ in range(num_encoders):
        rows.append(flat[at + 1 : at + 1 + flat[at]])
        at += 1 + flat[at]
    return rows
