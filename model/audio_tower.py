"""Everything before the LLM: encoders, router, mixture, adapter, projector.

Parallelism comes in from outside as one callable, `encode`: given the names of encoders and the clips each must see, it
returns their features. `encode_here` computes in this process; the trainer's callable sends clips to the ranks that
hold the encoder.

Shapes: B clips, T audio samples, F frames, S slots, D width, H width of the LLM, K experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from model import lengths
from model.adapter import Adapter
from model.batch import Batch, Ragged
from model.config import EncoderConfig, ModelConfig
from model.encoders.base import AudioEncoder
from model.encoders.registry import build_encoder
from model.lengths import Windowing
from model.loss import Counts, ctc_feasible, ctc_sum
from model.mixture import Expert, mix
from model.router import Router, Routing

EncodeClips = Callable[[Sequence[str], Ragged, Tensor], Sequence[Ragged]]
"""(K names, clips [ΣT], wanted [B, K] bool) → per encoder the features [ΣF, D] of the clips wanted of it, in order."""

Part = TypeVar("Part", bound=nn.Module)


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

    The initial weights of each part follow from torch's seed and the part's name alone: adding, removing or not
    holding an encoder leaves the others' as they are.

    Args:
        config: the whole model's.
        llm_dim: H.
        vocab_size: of the tokenizer (prompt gate and CTC head).
        held: names of the experts to build here; None: all of them. What is not held cannot be run here.
    """

    def __init__(self, config: ModelConfig, llm_dim: int, vocab_size: int, held: Collection[str] | None = None) -> None:
        super().__init__()
        self.config = config
        self.expert_names = tuple(e.name for e in config.experts)
        self.primary: AudioEncoder | None = None
        width = 0
        if config.primary is not None:
            primary = config.primary
            self.primary = _seeded("primary", lambda: build_encoder(primary))
            width = self.primary.dim
        self.experts = nn.ModuleDict()
        for expert in config.experts:
            if held is None or expert.name in held:
                self.experts[expert.name] = _seeded(f"experts.{expert.name}", partial(self._expert, expert))
        if config.experts:
            router, num_experts = config.router, len(config.experts)
            self.router = _seeded("router", lambda: Router(router, num_experts, width, vocab_size, config.expert_dim))
        joined = width + (len(config.router.gates) * config.expert_dim if config.experts else 0)
        self.adapter = _seeded("adapter", lambda: Adapter(config.adapter, joined))
        self.projector = _seeded("projector", lambda: nn.Linear(self.adapter.dim, llm_dim))
        self.ctc_head: nn.Linear | None = None
        if config.ctc_weight > 0:
            self.ctc_head = _seeded("ctc_head", lambda: nn.Linear(self.adapter.dim, vocab_size + 1))

    def _expert(self, config: EncoderConfig) -> Expert:
        encoder = build_encoder(config)
        return Expert(encoder, encoder.dim, self.config.expert_dim)

    def encoder(self, name: str) -> nn.Module:
        """The primary, or the expert with its projection, of that name."""
        if self.primary is not None and self.config.primary is not None and name == self.config.primary.name:
            return self.primary
        return self.experts[name]

    def encode_here(self, names: Sequence[str], clips: Ragged, wanted: Tensor) -> list[Ragged]:
        """`EncodeClips` in this process; an encoder without clips is not called."""
        found = []
        for name, flags in zip(names, wanted.T.cpu(), strict=True):
            rows = flags.nonzero().flatten().tolist()
            if rows:
                found.append(self.encoder(name)(clips.select(rows)))
            else:
                found.append(Ragged(self.projector.weight.new_zeros(0, self.config.expert_dim), ()))
        return found

    @property
    def windowing(self) -> Windowing:
        """What a call of the encoder that pads clips most computes."""
        found = [m.windowing for m in self.modules() if isinstance(m, AudioEncoder)]
        return max(found, key=lambda w: (w.least_samples, w.silence_samples, w.window_samples))

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
        encode: EncodeClips | None = None,
    ) -> AudioOutput:
        """Embed B ≥ 1 clips.

        Args:
            clips: waveforms [ΣT] at 16 kHz.
            prompts: instruction tokens [ΣP], one sequence per clip.
            ctc_targets: [ΣC], one sequence per clip, empty where no CTC loss applies.
            noise: [B, G, K] standard normal for the router; None outside training.
            encode: the function that computes the encoders; None stands for `encode_here`.
        """
        encode = encode or self.encode_here
        frames = tuple(lengths.num_frames(n) for n in clips.lengths)
        primary = None
        if self.primary is not None:
            assert self.config.primary is not None
            everything = torch.ones(len(clips), 1, dtype=torch.bool)
            (primary,) = encode([self.config.primary.name], clips, everything)
        routing, experts = None, []
        if self.expert_names:
            routing = self.router(clips, primary, prompts, noise)
            experts = list(encode(self.expert_names, clips, routing.active))
        features = self.adapter(mix(primary, experts, routing, frames))
        ctc_loss = features.values.new_zeros(())
        if self.ctc_head is not None:
            ctc_loss = ctc_sum(Ragged(self.ctc_head(features.values), features.lengths), ctc_targets)
        return AudioOutput(Ragged(self.projector(features.values), features.lengths), routing, ctc_loss)


def _seeded(part: str, build: Callable[[], Part]) -> Part:
    """`build()` with torch's generator seeded by its own seed and the part's name; the generator is left as it was."""
    digest = hashlib.sha256(f"{torch.initial_seed()}/{part}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:7], "little"))
        return build()


def usable_ctc_targets(batch: Batch, config: ModelConfig) -> Ragged:
    """Per clip the answer tokens [ΣC] that its slots can spell; empty where they cannot, or without a CTC head."""
    none = torch.zeros(0, dtype=torch.int64)
    targets = []
    for samples, wanted in zip(batch.clips.lengths, batch.ctc_targets.split(), strict=True):
        audio_tokens = lengths.audio_tokens_of_samples(samples, config.adapter.strides)
        targets.append(wanted if config.ctc_weight > 0 and ctc_feasible(wanted, audio_tokens) else none)
    return Ragged.of(targets, like=none)


def count(batch: Batch, ctc_targets: Ragged) -> Counts:
    """What this batch adds to the divisors of the loss."""
    return Counts(sum(s.num_targets for s in batch.samples), len(ctc_targets.values), len(batch.clips))
