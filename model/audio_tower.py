"""Everything before the LLM: encoders, router, mixture, adapter, projector.

Parallelism comes in from outside as one callable, `run`: given named encoders and the clips each must see, it returns
their features. `run_here` computes on the spot; the trainer's sends clips to the ranks that hold the encoder.

Shapes: B clips, T audio samples, F frames, S slots, D width, H width of the LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import lengths
from model.adapter import Adapter
from model.batch import Batch, Ragged
from model.config import ModelConfig
from model.encoders.base import AudioEncoder
from model.encoders.registry import build_encoder
from model.loss import Counts, ctc_feasible, ctc_sum
from model.mixture import Expert, mix
from model.router import Router, Routing

RunEncoders = Callable[[Mapping[str, nn.Module], Mapping[str, Ragged]], Mapping[str, Ragged]]


def run_here(encoders: Mapping[str, nn.Module], clips: Mapping[str, Ragged]) -> dict[str, Ragged]:
    """Compute each encoder on its clips [ΣT] in this process; an encoder without clips is not called."""
    return {name: encoders[name](c) for name, c in clips.items() if len(c)}


@dataclass(frozen=True)
class AudioOutput:
    """What the LLM and the loss need of the audio."""

    embeddings: Ragged
    """[ΣS, H], clip after clip"""
    routing: Routing | None
    """None: the model has no experts."""
    ctc_loss_sum: Tensor
    """Σ over this batch's clips; 0 without a CTC head"""


class AudioTower(nn.Module):
    """The audio side of the model.

    Args:
        config: the whole model's.
        llm_dim: H.
        vocab_size: of the tokenizer (prompt gate and CTC head).
    """

    def __init__(self, config: ModelConfig, llm_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        primary = None if config.primary is None else build_encoder(config.primary)
        self.primary = primary
        width = 0 if primary is None else primary.dim
        self.experts = nn.ModuleDict()
        for expert in config.experts:
            encoder = build_encoder(expert)
            self.experts[expert.name] = Expert(encoder, encoder.dim, config.expert_dim)
        if self.experts:
            self.router = Router(config.router, len(self.experts), width, vocab_size, config.expert_dim)
            width += len(config.router.gates) * config.expert_dim
        self.adapter = Adapter(config.adapter, width)
        self.projector = nn.Linear(self.adapter.dim, llm_dim)
        self.ctc_head = nn.Linear(self.adapter.dim, vocab_size + 1) if config.ctc_weight > 0 else None

    def set_recompute(self, enabled: bool) -> None:
        """Activation checkpointing of all encoders' layers."""
        for module in self.modules():
            if isinstance(module, AudioEncoder):
                module.set_recompute(enabled)

    def forward(
        self,
        clips: Ragged,
        prompts: Ragged,
        ctc_targets: Ragged,
        noise: Tensor | None = None,
        run: RunEncoders = run_here,
    ) -> AudioOutput:
        """Embed B ≥ 1 clips.

        Args:
            clips: waveforms [ΣT] at 16 kHz.
            prompts: instruction tokens [ΣP], one sequence per clip.
            ctc_targets: [ΣC], one sequence per clip, empty where no CTC loss applies.
            noise: [B, G, K] standard normal for the router; None outside training.
            run: who computes the encoders.
        """
        frames = tuple(lengths.num_frames(n) for n in clips.lengths)
        primary = None
        if self.primary is not None:
            assert self.config.primary is not None
            name = self.config.primary.name
            primary = run({name: self.primary}, {name: clips})[name]
        routing = self.router(clips, primary, prompts, noise) if self.experts else None
        experts = [] if routing is None else self._run_experts(clips, routing, run)
        features = self.adapter(mix(primary, experts, routing, frames))
        ctc_loss = features.values.new_zeros(())
        if self.ctc_head is not None:
            ctc_loss = ctc_sum(Ragged(self.ctc_head(features.values), features.lengths), ctc_targets)
        return AudioOutput(Ragged(self.projector(features.values), features.lengths), routing, ctc_loss)

    def _run_experts(self, clips: Ragged, routing: Routing, run: RunEncoders) -> list[Ragged]:
        runs = routing.runs.cpu()
        wanted = {name: clips.select(runs[:, k].nonzero().flatten().tolist()) for k, name in enumerate(self.experts)}
        found = run(dict(self.experts.items()), wanted)
        none = clips.values.new_zeros(0, self.config.expert_dim).to(self.projector.weight.dtype)
        return [found.get(name, Ragged(none, ())) for name in self.experts]


def usable_ctc_targets(batch: Batch, config: ModelConfig) -> Ragged:
    """Per clip the answer tokens [ΣC] that its slots can spell; empty where they cannot, or without a CTC head."""
    none = torch.zeros(0, dtype=torch.int64)
    targets = []
    for samples, wanted in zip(batch.clips.lengths, batch.ctc_targets.split(), strict=True):
        slots = lengths.slots_of_samples(samples, config.adapter.strides)
        targets.append(wanted if config.ctc_weight > 0 and ctc_feasible(wanted, slots) else none)
    return Ragged.of(targets, like=none)


def count(batch: Batch, ctc_targets: Ragged) -> Counts:
    """What this batch adds to the divisors of the loss."""
    return Counts(sum(s.num_targets for s in batch.samples), len(ctc_targets.values), len(batch.clips))
