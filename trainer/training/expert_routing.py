"""The routing of tokens to the LLM's FFN experts in training: its losses, its statistics, its biases and its jitter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.config import ModelConfig
from model.llm.mixture import Mixture
from model.losses.base import Loss
from model.losses.router import RouterLoss
from trainer.engine.expert_biases import ExpertBiases
from trainer.engine.llm import LLMEngine
from trainer.engine.packs import Packs
from trainer.engine.router_meter import RouterMeter, TokenMeter, token_kinds
from trainer.parallel.groups import Groups
from trainer.telemetry.token_load import MODALITIES, SampleKinds, TokenLoad
from trainer.training.global_batch import GlobalBatch
from trainer.training.router_noise import jitter_ids


class ExpertRouting:
    """The parts of a training step that concern the routers of an LLM with FFN experts.

    Args:
        mixture: The description of the FFN experts.
        model: The model's config.
        losses: The active losses.
        llm: The engine of the LLM.
        groups: The process groups of this rank.
        kinds: The kinds of samples whose tokens are counted separately.
        seed: The seed of the jitter.
    """

    def __init__(
        self,
        mixture: Mixture,
        model: ModelConfig,
        losses: Sequence[Loss],
        llm: LLMEngine,
        groups: Groups,
        kinds: SampleKinds,
        seed: int,
    ) -> None:
        self.mixture, self.model, self.groups, self.kinds, self.seed = mixture, model, groups, kinds, seed
        self._losses = [loss for loss in losses if isinstance(loss, RouterLoss)]
        self._meter = TokenMeter(mixture, len(kinds.pairs) * len(MODALITIES), groups.device)
        self._biases = ExpertBiases(llm) if mixture.bias_rate else None

    def begin(self, step: int, whole: GlobalBatch, packs: Packs) -> tuple[RouterMeter, Packs]:
        """Return a meter that records the routers' choices in a step, and the packs to use in the step.

        With jitter, the returned packs contain the identities of samples, from which the jitter is computed.

        Collective: every rank of the world must call it.

        Args:
            step: The number of steps completed before this one.
            whole: The global batch. With jitter, it must have the digests of samples.
            packs: The packed sequences of this rank's replica.
        """
        kinds = token_kinds(packs.lengths, packs.samples, packs.is_audio, whole.kinds, len(MODALITIES), self.groups)
        count = None
        if self._biases is not None:
            self._biases.clear()
            count = self._biases.add
        if self.mixture.jitter:
            assert whole.digests is not None
            packs = replace(packs, noise=jitter_ids(self.seed, step, whole.digests))
        return RouterMeter(self._losses, self.model, whole.counts, self._meter, kinds, count), packs

    def end(self) -> None:
        """Count one more step. It must be called after the step's backward pass."""
        self._meter.num_steps += 1

    def counts(self) -> Tensor:
        """Return this rank's counts, from which the change to the biases is computed.

        Returns:
            A flat fp64 tensor on the device. It is empty if the routers have no such biases.
        """
        if self._biases is None:
            return torch.zeros(0, dtype=torch.float64, device=self.groups.device)
        return self._biases.counts.flatten()

    def update(self, totals: Tensor, stage: int) -> None:
        """Change the biases that balance the experts, if there are any.

        Args:
            totals: The sum of `counts` over all ranks.
            stage: The index of the stage of training.
        """
        if self._biases is not None:
            self._biases.update(totals.view_as(self._biases.counts), stage)

    def take_load(self, step: int) -> TokenLoad | None:
        """Return the load of the FFN experts on all ranks since the last call. On ranks other than 0, return None.

        Collective: every rank of the world must call it.

        Args:
            step: The number of steps completed.
        """
        num_steps, sums = self._meter.take(self.groups)
        if self.groups.rank != 0 or num_steps == 0:  # There are no tokens in stages without the LLM.
            return None
        return TokenLoad.of(step, num_steps, self._meter.names, self.mixture.layers, self.kinds, sums)
