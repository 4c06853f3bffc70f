"""One training step, as the data sees it (docs/architecture.md has the picture).

    1 load     each rank takes its share of the global batch          (trainer.data.loader, before this)
    2 encode   the primary encoder reads every clip                   ┐
    3 route    the router chooses experts per clip                    │ AudioEngine.forward:
    4 encode   the chosen experts read the clips                      │ DeepSpeed ZeRO-3
    5 adapt    features become audio embeddings, at home              ┘
    6 pack     plan where samples go; embeddings and tokens go there  exchange
    7 llm      1F1B over the packs                                    LLMEngine: Megatron-core
    8 back     gradients of the embeddings come home; encoders learn  exchange, AudioEngine.backward
    9 update   one norm, one clip coefficient, both optimizers

Whatever the topology, loss and gradients equal those of `model.speech_llm.SpeechLLM` on the global batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.audio_tower import AudioOutput, count, usable_ctc_targets
from model.batch import IGNORE, Batch
from model.config import ModelConfig
from model.lengths import SAMPLE_RATE
from model.routing_loss import RoutingSums, routing_loss
from model.transfer import to_device
from trainer.config.spike import SpikeConfig
from trainer.engine.encoders import AudioEngine
from trainer.engine.llm import LLMEngine, Packs
from trainer.engine.optim import OptimConfig, lr_scale
from trainer.parallel.exchange import check_same_plan, exchange
from trainer.parallel.groups import Groups
from trainer.parallel.packs import PackPlan, embedding_segments, token_segments
from trainer.parallel.plan import route
from trainer.scoring.tasks import task_names
from trainer.telemetry.load_history import LoadInterval, LoadMeter
from trainer.telemetry.metrics import PhaseTimer, StepReport
from trainer.training.global_batch import GlobalBatch, gather, plan
from trainer.training.spike_guard import SpikeGuard


class Step:
    """Both engines and the way between them.

    Args:
        model, optim: sections of the recipe.
        audio, llm: the engines.
        groups: this rank's place.
        num_steps: of the run (the schedule's length).
        tokens_per_microbatch: rows that a pack may hold.
        pack_multiple_tokens: rows of every pack are a multiple of this; None: of the tensor-parallel size.
        seed: of the router's noise.
        debug_plan: compare all ranks' plans before each step's exchanges.
        spike: when an update is left out.
    """

    def __init__(
        self,
        model: ModelConfig,
        optim: OptimConfig,
        audio: AudioEngine,
        llm: LLMEngine,
        groups: Groups,
        *,
        num_steps: int,
        tokens_per_microbatch: int,
        seed: int,
        pack_multiple_tokens: int | None = None,
        debug_plan: bool = False,
        spike: SpikeConfig | None = None,
    ) -> None:
        self.debug_plan = debug_plan
        self.guard = SpikeGuard(spike or SpikeConfig())
        self.model, self.optim = model, optim
        self.audio, self.llm, self.groups = audio, llm, groups
        self.num_steps, self.tokens_per_microbatch, self.seed = num_steps, tokens_per_microbatch, seed
        self.pack_multiple_tokens = pack_multiple_tokens
        self.meter = LoadMeter([e.name for e in model.experts], None if model.primary is None else model.primary.name)
        self.timer = PhaseTimer(torch.cuda.synchronize if groups.device.type == "cuda" else None)

    def __call__(self, step: int, batch: Batch) -> StepReport:
        """Train on this rank's part of the global batch; `step` counts from 0. Every rank gets the same report."""
        self.audio.take_costs()  # an evaluation's
        report = self.forward_backward(step, batch)
        with self.timer("update"):
            norm, scale, skip_reason = self.update(step, self.guard.judge(report.loss))
        self.guard.note(report.step, report.loss, skip_reason is not None)
        report = replace(report, grad_norm=norm, lr=self.optim.lr * scale, skip_reason=skip_reason)
        report = replace(report, num_skipped_updates=self.guard.num_skipped_updates, phase_sec=self.timer.take())
        costs = {name: astuple(cost) for name, cost in self.audio.take_costs().items()}
        self.meter.add_step(costs, report.seconds)
        return report

    def take_load(self, step: int) -> LoadInterval | None:
        """On rank 0, what all ranks' encoders did since the last call; `step` is the last one done. Collective."""
        parts: list[Any] | None = [None] * self.groups.topology.world if self.groups.rank == 0 else None
        dist.gather_object(self.meter.take(), parts, group=self.groups.world)
        return None if parts is None else self.meter.merge(step, parts)

    def forward_backward(self, step: int, batch: Batch) -> StepReport:
        """Lines 2 to 8: leave the gradients of the global batch's loss in both engines."""
        timer = self.timer
        with timer("plan"):
            ctc_targets = usable_ctc_targets(batch, self.model)
            whole = gather(batch, count(batch, ctc_targets), self.groups)
            packing = plan(whole, self.groups, self.tokens_per_microbatch, self.pack_multiple_tokens)
            if self.debug_plan:
                check_same_plan("packs", (packing.pack, packing.row, packing.num_tokens), self.groups.world)
        with timer("encode"):
            noise = self.router_noise(step, batch)
            audio = self.audio.forward(batch.clips, batch.prompts, ctc_targets, noise)
        with timer("exchange"):
            packs, embeddings = send(batch, audio.embeddings.values, whole, packing, self.groups)
        with timer("llm"):
            sample_losses, grad = self.llm.forward_backward(packs)
        with timer("backward"):
            mowe, ctc = self.auxiliary_losses(audio, whole)
            auxiliary = self.model.routing_loss.weight * mowe + self.model.ctc_weight * ctc
            self.audio.backward((embeddings * grad).sum() + auxiliary)
        with timer("report"):
            report = self.report(step, whole, sample_losses, mowe, ctc)
            if np.isfinite(report.loss):
                self.meter.add_clips(batch, audio.routing)
            return report

    def router_noise(self, step: int, batch: Batch) -> Tensor | None:
        """[clips, gates, experts] standard normal, a function of seed, step, sample and the expert's name: not of where
        the sample ran, nor of what other experts there are."""
        router = self.model.router
        if router.noise_std == 0 or not batch.clip_owner or not self.model.experts:
            return None
        rows = []
        for clip, owner in enumerate(batch.clip_owner):
            text = f"{self.seed}/{step}/{batch.samples[owner].key}/{clip - batch.clip_owner.index(owner)}"
            columns = []
            for expert in self.model.experts:
                digest = hashlib.sha256(f"{text}/{expert.name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
                columns.append(torch.randn(len(router.gates), generator=generator))
            rows.append(torch.stack(columns, dim=1))
        return torch.stack(rows)

    def auxiliary_losses(self, audio: AudioOutput, whole: GlobalBatch) -> tuple[Tensor, Tensor]:
        """(L_MoWE of the global batch, this rank's share of L_CTC): their gradients add up over ranks."""
        ctc = audio.ctc_loss_sum / max(1, whole.counts.ctc_targets)
        if audio.routing is None:
            return torch.zeros((), device=self.groups.device), ctc
        local = RoutingSums.of(audio.routing)
        sums = torch.cat([local.probs, local.sample_entropy[None], local.independent_entropy[None]]).detach().clone()
        dist.all_reduce(sums, group=self.groups.world)
        total = RoutingSums(sums[:-2], sums[-2], sums[-1], whole.counts.clips)
        return routing_loss(self.model.routing_loss, local, total), ctc

    def update(self, step: int, mistrust: str | None = None) -> tuple[float, float, str | None]:
        """Line 9. Returns (global gradient norm before clipping, factor on the peak learning rates, why the update was
        left out and all weights are as they were; None: it was not).

        `mistrust`: a reason to leave it out. One rank's is enough; a norm that is not finite is one.
        """
        mistrusted = to_device(np.float64(mistrust is not None), self.groups.device)
        sums = torch.stack([self.audio.grad_norm_sq(), self.llm.grad_norm_sq(), mistrusted])
        dist.all_reduce(sums, group=self.groups.world)
        audio_square, llm_square, num_doubts = sums.tolist()
        audio_norm, norm = audio_square**0.5, (audio_square + llm_square) ** 0.5
        scale = lr_scale(self.optim, step, self.num_steps)
        if not np.isfinite(norm) or num_doubts > 0:
            self.audio.discard()
            why = f"gradient norm is {norm}" if not np.isfinite(norm) else "another rank mistrusts the loss"
            return norm, scale, mistrust or why
        clip_coef = min(1.0, self.optim.clip_norm / (norm + 1e-6)) if self.optim.clip_norm > 0 else 1.0
        self.audio.step(clip_coef, audio_norm, scale)
        self.llm.step(clip_coef, scale)
        if self.model.experts:
            self.audio.tower.router.advance()
        return norm, scale, None

    def report(self, step: int, whole: GlobalBatch, sample_losses: Tensor, mowe: Tensor, ctc: Tensor) -> StepReport:
        """One sum over ranks of everything that is reported."""
        everything = torch.cat([sample_losses.float(), ctc.detach().float()[None]])
        dist.all_reduce(everything, group=self.groups.world)
        # Read at once. L_MoWE is the global batch's already.
        losses, ctc_sum, routing_sum = (
            torch.cat([everything, mowe.detach().float()[None]]).cpu().split([len(whole), 1, 1])
        )
        next_token = float(losses.double().sum()) / max(1, whole.counts.targets)
        terms = {"next_token": next_token}
        loss = next_token
        if self.model.experts:
            terms["routing"] = float(routing_sum)
            loss += self.model.routing_loss.weight * terms["routing"]
        if self.model.ctc_weight > 0:
            terms["ctc"] = float(ctc_sum)
            loss += self.model.ctc_weight * terms["ctc"]
        return StepReport(
            step=step + 1,
            loss=loss,
            losses=terms,
            task_losses=_by_task(whole, losses),
            num_samples=len(whole),
            num_tokens=int(whole.num_tokens.sum()),
            audio_sec=float(whole.audio_samples.sum()) / SAMPLE_RATE,
        )


def send(
    batch: Batch, embeddings: Tensor, whole: GlobalBatch, packing: PackPlan, groups: Groups
) -> tuple[Packs, Tensor]:
    """Line 6: tokens to the first and last stage, audio embeddings [ΣS, H] to the slice of the first stage that needs
    them. Returns the packs and the arrived embeddings, which carry the graph home."""
    topology, rank, device, dp = groups.topology, groups.rank, groups.device, groups.place.dp
    rows = packing.num_microbatches * packing.pack_tokens
    share = packing.pack_tokens // topology.tp
    tokens = torch.stack([batch.tokens.values, batch.labels.values - IGNORE, batch.audio_mask.long()], dim=1)
    at_ends = groups.is_first_stage or groups.is_last_stage
    token_route = route(
        token_segments(packing, whole.source_ranks, topology), rank, topology.world, rows if at_ends else 0
    )
    arrived = exchange(to_device(tokens, device), token_route, groups.world)

    flags = torch.zeros(0, dtype=torch.bool, device=device)
    if groups.is_first_stage:
        place = groups.place.tp
        flags = arrived[:, 2].view(packing.num_microbatches, topology.tp, share)[:, place].flatten().bool()
    segments = embedding_segments(packing, whole.source_ranks, topology)
    is_audio = batch.audio_mask.numpy()
    audio_tokens = np.cumsum(is_audio) - 1
    audio_route = route(segments, rank, topology.world, len(flags)).restricted(is_audio, flags.cpu().numpy())
    audio = exchange(embeddings, audio_route.renumbered(audio_tokens), groups.world)

    packs = Packs(
        lengths=tuple(packing.lengths(dp, m) for m in range(packing.num_microbatches)),
        token_ids=arrived[:, 0],
        labels=arrived[:, 1] + IGNORE,
        samples=tuple(tuple(packing.members(dp, m).tolist()) for m in range(packing.num_microbatches)),
        audio=audio,
        audio_mask=flags,
        num_samples=len(whole),
        num_targets=whole.counts.targets,
    )
    return packs, audio


def _by_task(whole: GlobalBatch, losses: Tensor) -> dict[str, tuple[float, int]]:
    sums: dict[str, tuple[float, int]] = {}
    names = task_names()
    for task, loss, targets in zip(whole.tasks.tolist(), losses.tolist(), whole.num_targets.tolist(), strict=True):
        total, tokens = sums.get(names[task], (0.0, 0))
        sums[names[task]] = (total + loss, tokens + targets)
    return sums
