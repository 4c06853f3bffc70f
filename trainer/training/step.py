"""One training step, as the sequence of operations that a global batch passes through.

    1 load     each rank takes its share of the global batch               (trainer.data.loader, before this)
    2 encode   the primary encoder reads every clip                        ┐
    3 route    the router chooses experts for each clip                    │ AudioEngine.forward:
    4 encode   the chosen experts read the clips                           │ DeepSpeed ZeRO-3
    5 adapt    features become audio embeddings on the source rank         ┘
    6 pack     tokens and embeddings are sent to the LLM, as planned       exchange
    7 llm      1F1B over the packs, with the token losses                  LLMEngine: Megatron-core
    8 back     gradients of the embeddings are sent back to the encoders   exchange, AudioEngine.backward
    9 update   one norm, one clip coefficient, both optimizers

For every topology, the loss and the gradients equal those of `model.speech_llm.SpeechLLM` on the global batch.
`docs/architecture.md` contains an overview.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.audio_output import AudioOutput
from model.batch import Batch
from model.config import ModelConfig
from model.lengths import SAMPLE_RATE
from model.llm.families import mixture_of
from model.losses.base import LossTerm, TokenLoss, audio_terms
from model.losses.table import active_losses
from model.transfer import to_device
from trainer.config.spike import SpikeConfig
from trainer.engine.encoders import AudioEngine
from trainer.engine.llm import LLMEngine
from trainer.engine.optim import OptimConfig, lr_scale
from trainer.engine.packs import Packs
from trainer.engine.token_losses import PackedLoss
from trainer.parallel.balance import Floats
from trainer.parallel.exchange import FIRST, check_same_plan
from trainer.parallel.groups import Groups
from trainer.parallel.packs import PackPlan
from trainer.parallel.values import gather_values
from trainer.run.lifecycle import StopRequest, signal_counts
from trainer.scoring.tasks import task_names
from trainer.telemetry.load_history import RANK_LOAD_KINDS, LoadInterval, LoadMeter
from trainer.telemetry.metrics import PhaseTimer, StepReport
from trainer.telemetry.token_load import SampleKinds, TokenLoad
from trainer.training.expert_routing import ExpertRouting
from trainer.training.global_batch import GlobalBatch, References, Shared, gather, plan, references_of
from trainer.training.reference_logits import reference_logits
from trainer.training.router_noise import RouterNoise, router_noise
from trainer.training.send import send
from trainer.training.spike_guard import SpikeGuard
from trainer.training.stage_switch import StageSwitch


@dataclass(frozen=True)
class Update:
    """The result of an update, which is the same on every rank."""

    grad_norm: float
    """The global gradient norm before clipping."""
    lr_scale: float
    """The factor by which the peak learning rates are multiplied."""
    skip_reason: str | None
    """The reason why the update was skipped; None if it was applied."""
    signals: Mapping[str, int]
    """The number of ranks that received a signal to stop, by the signal's name."""


@dataclass(frozen=True)
class Embedded:
    """The part of a global batch that one rank holds after the exchange, as input to the LLM."""

    whole: GlobalBatch
    packing: PackPlan
    references: References
    audio: AudioOutput
    """The audio side's output for this rank's clips."""
    packs: Packs
    """The packs of this rank's replica. The autograd graph of `packs.audio` leads back to the source ranks."""


class Step:
    """The training step, which runs both engines and the exchanges between them.

    Args:
        model: The model's config.
        optim: The optimizer settings, including the stages of the run.
        audio: The engine of the audio side.
        llm: The engine of the LLM.
        groups: The process groups of this rank.
        num_steps: The number of steps in the run, which is the length of the learning-rate schedule.
        tokens_per_microbatch: The largest number of rows in a pack.
        pack_multiple_tokens: The number of rows in a pack is a multiple of this; None for `Topology.row_multiple`.
        seed: The seed of the router's noise.
        debug_plan: If true, the plans of all ranks are compared before the exchanges of each step.
        spike: The recipe's `spike` section, which determines when updates are skipped; None for the defaults.
        kinds: The kinds of samples whose tokens are counted separately; None to count tokens only by task.
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
        kinds: SampleKinds | None = None,
    ) -> None:
        self.debug_plan = debug_plan
        self.guard = SpikeGuard(spike or SpikeConfig())
        self.model, self.optim = model, optim
        self.losses = active_losses(model)
        self.audio, self.llm, self.groups = audio, llm, groups
        self.num_steps, self.tokens_per_microbatch, self.seed = num_steps, tokens_per_microbatch, seed
        self.pack_multiple_tokens = pack_multiple_tokens
        self.meter = LoadMeter([e.name for e in model.experts], None if model.primary is None else model.primary.name)
        self.stages = StageSwitch(optim, num_steps, audio, llm)
        self.kinds = kinds or SampleKinds.of(task_names(), {})
        mixture = mixture_of(llm.hf_config)
        self.routing: ExpertRouting | None = None
        if mixture is not None:
            self.routing = ExpertRouting(mixture, model, self.losses, llm, groups, self.kinds, seed)
        self.timer = PhaseTimer(torch.cuda.synchronize if groups.device.type == "cuda" else None)
        self.router_noise: RouterNoise = partial(router_noise, model, seed)
        self._expected_values = FIRST

    def __call__(
        self, step: int, batch: Batch, shared: Shared | None = None, stop: StopRequest | None = None
    ) -> StepReport:
        """Train on one global batch, and return the report of the step, which is the same on every rank.

        Collective: every rank of the world must call it.

        Args:
            step: The number of steps completed before this one.
            batch: This rank's part of the global batch.
            shared: The result of `share` for the batch; None to call it.
            stop: This rank's request to stop, which is shared with all ranks together with the gradient norm;
                None if there is none.
        """
        self.audio.take_costs()  # This discards the costs of an evaluation.
        index, stage = self.stages.enter(step)
        self.guard.forget_until(stage.start)
        report = self.forward_backward(step, batch, shared)
        with self.timer("update"):
            done = self.update(step, self.guard.judge(report.loss), stop or StopRequest())
        self.guard.note(report.step, report.loss, done.skip_reason is not None, done.grad_norm)
        report = replace(report, grad_norm=done.grad_norm, lr=stage.optim.lr * done.lr_scale)
        report = replace(report, skip_reason=done.skip_reason, signals=done.signals)
        report = replace(report, stage=index if stage.name else None)
        report = replace(report, num_skipped_updates=self.guard.num_skipped_updates, phase_sec=self.timer.take())
        costs = {name: astuple(cost) for name, cost in self.audio.take_costs().items()}
        self.meter.add_step(costs, report.seconds)
        return report

    def take_load(self, step: int) -> LoadInterval | None:
        """Return the load of the encoders on all ranks since the last call. On ranks other than 0, return None.

        Collective: every rank of the world must call it.

        Args:
            step: The number of steps completed.
        """
        parts = gather_values(self.meter.take(), self.groups.world, RANK_LOAD_KINDS)
        return None if parts is None else self.meter.merge(step, parts)

    def take_token_load(self, step: int) -> TokenLoad | None:
        """Return the load of the FFN experts on all ranks since the last call.

        Collective: every rank of the world must call it.

        Args:
            step: The number of steps completed.

        Returns:
            The load; None on ranks other than 0, and if the LLM has no FFN experts.
        """
        return None if self.routing is None else self.routing.take_load(step)

    def share(self, batch: Batch, notes: Sequence[float] | Floats = (), *, training: bool = True) -> Shared:
        """Gather the descriptions of the ranks' parts of a global batch, and return a description of the whole batch.

        Collective: every rank of the world must call it.

        Args:
            batch: This rank's part of the global batch.
            notes: Additional numbers to share in the same exchange. Every rank must pass the same number of them.
            training: Whether to include the counts by which the losses are divided, and the references (see
                `TokenLoss.reference`).
        """
        losses = self.losses if training else ()
        references = references_of(batch, losses)
        whole = gather(
            batch,
            losses,
            references,
            self.model,
            self.groups,
            self.kinds,
            notes,
            self._expected_values,
            with_digests=training and self.routing is not None and self.routing.mixture.jitter > 0,
        )
        # The next batch probably needs about as many values as this one.
        self._expected_values = -(-whole.num_values // FIRST) * FIRST
        return Shared(whole, references)

    def forward_backward(self, step: int, batch: Batch, shared: Shared | None = None) -> StepReport:
        """Compute the gradients of the global batch's loss in both engines (lines 2 to 8 of the module's docstring).

        Collective: every rank of the world must call it.

        Args:
            step: The number of steps completed before this one.
            batch: This rank's part of the global batch.
            shared: The result of `share` for the batch; None to call it.
        """
        timer = self.timer
        if not self.stages.at(step)[1].runs_llm:
            return self._audio_gradients(step, batch, shared)
        embedded = self.embed(batch, self.router_noise(step, batch), shared, training=True)
        whole, audio, packs = embedded.whole, embedded.audio, embedded.packs
        with timer("llm"):
            packed = [self._packed(loss, embedded) for loss in self.losses if isinstance(loss, TokenLoss)]
            router = None
            if self.routing is not None:
                router, packs = self.routing.begin(step, whole, packs)
            sample_losses, grad = self.llm.forward_backward(packs, packed, router)
        with timer("backward"):
            terms = audio_terms(self.losses, audio, batch, self.model, self._sum_over_ranks)
            self.audio.backward((packs.audio * grad).sum() + _total(terms, whole))
        with timer("report"):
            token_terms = (
                LossTerm(p.loss.name, p.loss.weight(self.model), p.total(losses), p.loss.count(batch, self.model))
                for p, losses in zip(packed, sample_losses, strict=True)
            )
            by_task = sum(
                (losses for p, losses in zip(packed, sample_losses, strict=True) if p.loss.by_task),
                torch.zeros(len(whole), device=self.groups.device),
            )
            router_terms = () if router is None else router.terms(batch)
            report = self.report(step, whole, (*token_terms, *router_terms, *terms), by_task)
            if np.isfinite(report.loss):
                self.meter.add_clips(batch, audio.routing)
            if self.routing is not None:
                self.routing.end()
            return report

    def _audio_gradients(self, step: int, batch: Batch, shared: Shared | None) -> StepReport:
        """Compute the gradients of the losses of the audio side, in a stage that does not run the LLM.

        Collective: every rank of the world must call it.
        """
        timer = self.timer
        with timer("plan"):
            whole = (shared or self.share(batch)).whole
        with timer("encode"):
            audio = self.audio.forward(batch.clips, batch.prompts, self.router_noise(step, batch), whole.clips)
        with timer("backward"):
            self.llm.zero_grad()
            terms = audio_terms(self.losses, audio, batch, self.model, self._sum_over_ranks)
            # As in other steps, every parameter gets a gradient. It is zero for those on which only the LLM depends.
            self.audio.backward(0.0 * audio.embeddings.values.sum() + _total(terms, whole))
        with timer("report"):
            report = self.report(step, whole, terms, None)
            if np.isfinite(report.loss):
                self.meter.add_clips(batch, audio.routing)
            return report

    def embed(
        self, batch: Batch, noise: Tensor | None = None, shared: Shared | None = None, *, training: bool = False
    ) -> Embedded:
        """Encode the clips of a global batch, and send tokens and embeddings to the LLM (lines 2 to 6).

        Collective: every rank of the world must call it.

        Args:
            batch: This rank's part of the global batch.
            noise: Standard normal noise for the router; None outside training.
            shared: The result of `share` for the batch; None to call it.
            training: If true, the counts by which the losses are divided and the references (see `TokenLoss.reference`)
                are included, packs have the size that training uses, and phases are timed. If false,
                each copy of the LLM's weights gets one pack that is not divided among context-parallel ranks.
        """
        groups = self.groups if training else self.groups.without_context
        phase: Callable[[str], AbstractContextManager[None]] = self.timer if training else lambda name: nullcontext()
        with phase("plan"):
            shared = shared or self.share(batch, training=training)
            whole = shared.whole
            if training:
                packing = plan(whole, groups, self.tokens_per_microbatch, self.pack_multiple_tokens)
            else:
                packing = plan(whole, groups, None)
            if self.debug_plan:
                check_same_plan("packs", (packing.pack, packing.row, packing.num_tokens), self.groups.world)
        with phase("encode"):
            audio = self.audio.forward(batch.clips, batch.prompts, noise, whole.clips)
        with phase("exchange"):
            packs = send(batch, audio.embeddings.values, whole, packing, groups)
        return Embedded(whole, packing, shared.references, audio, packs)

    def _packed(self, loss: TokenLoss, embedded: Embedded) -> PackedLoss:
        """Return a loss with its factor and, if any sample has a reference, the rows to compare and the LLM's logits of
        the references.

        Collective: every rank of the world must call it.
        """
        whole = embedded.whole
        factor = loss.weight(self.model) / max(1, whole.counts[loss.name])
        if not loss.has_reference or not whole.reference_tokens[loss.name].any():
            weights = loss.sample_weights(whole.num_targets, self.model)
            return PackedLoss(loss, self.model, factor, sample_weights=weights)
        multiple = self.pack_multiple_tokens or self.groups.topology.row_multiple
        rows, logits = reference_logits(
            self.llm, loss.name, whole, embedded.packing, embedded.references[loss.name], multiple
        )
        return PackedLoss(loss, self.model, factor, rows, logits)

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks in place.

        Collective: every rank of the world must call it.
        """
        dist.all_reduce(tensor, group=self.groups.world)
        return tensor

    def update(self, step: int, skip_reason: str | None, stop: StopRequest) -> Update:
        """Clip the gradients and update all weights (line 9), and count the ranks that were asked to stop.

        Collective: every rank of the world must call it.

        Args:
            step: The number of steps completed before this one.
            skip_reason: The reason why this rank wants to skip the update; None if it does not. The update is skipped
                if any rank has a reason or if the gradient norm is not finite.
            stop: This rank's request to stop.
        """
        votes = to_device(np.array([skip_reason is not None, *stop.votes], dtype=np.float64), self.groups.device)
        sums = torch.cat([torch.stack([self.audio.grad_norm_sq(), self.llm.grad_norm_sq()]), votes])
        num_sums, routing = len(sums), self.routing
        if routing is not None:
            sums = torch.cat([sums, routing.counts()])
        dist.all_reduce(sums, group=self.groups.world)
        audio_square, llm_square, num_skipping, *votes_of_all = sums[:num_sums].tolist()
        signals = signal_counts(votes_of_all)
        audio_norm, norm = audio_square**0.5, (audio_square + llm_square) ** 0.5
        index, stage = self.stages.at(step)
        scale = lr_scale(stage.optim, step - stage.start, stage.steps)
        if not np.isfinite(norm) or num_skipping > 0:
            self.audio.discard()
            why = f"gradient norm is {norm}" if not np.isfinite(norm) else "another rank rejects the loss"
            return Update(norm, scale, skip_reason or why, signals)
        clip_coef = min(1.0, self.optim.clip_norm / (norm + 1e-6)) if self.optim.clip_norm > 0 else 1.0
        self.audio.step(clip_coef, audio_norm, scale, index)
        self.llm.step(clip_coef, scale, index)
        if routing is not None:
            routing.update(sums[num_sums:], index)
        self.stages.updated = step + 1
        if self.model.experts:
            self.audio.tower.router.advance()
        return Update(norm, scale, None, signals)

    def report(
        self, step: int, whole: GlobalBatch, terms: tuple[LossTerm, ...], sample_losses: Tensor | None
    ) -> StepReport:
        """Return the report of a step.

        Collective: every rank of the world must call it.

        Args:
            step: The number of steps completed before this one.
            whole: The global batch.
            terms: This rank's contributions to all terms of the loss.
            sample_losses: This rank's contribution to the sum of the token losses of each sample, from which the losses
                by task are computed; None if the LLM was not run.
        """
        sums = torch.stack([term.sum.detach().float() for term in terms])
        everything = sums if sample_losses is None else torch.cat([sums, sample_losses.float()])
        dist.all_reduce(everything, group=self.groups.world)
        totals, by_sample = everything.cpu().tensor_split([len(terms)])  # A single copy from the device.
        means = {t.name: total / max(1, whole.counts[t.name]) for t, total in zip(terms, totals.tolist(), strict=True)}
        return StepReport(
            step=step + 1,
            loss=sum(t.weight * means[t.name] for t in terms),
            losses=means,
            task_losses={} if sample_losses is None else whole.losses_by_task(by_sample),
            ran_llm=sample_losses is not None,
            num_samples=len(whole),
            num_tokens=0 if sample_losses is None else int(whole.num_tokens.sum()),
            audio_sec=float(whole.audio_samples.sum()) / SAMPLE_RATE,
        )


def _total(terms: Sequence[LossTerm], whole: GlobalBatch) -> Tensor | float:
    """Return this rank's contribution to the sum of the terms' weighted means over the global batch."""
    return sum((t.weight / max(1, whole.counts[t.name]) * t.sum for t in terms), 0.0)
