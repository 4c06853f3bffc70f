"""The audio tower, which contains the model's parts before the LLM: encoders, router, mixture, adapter and projector.

The callable `encode` is the only part that depends on parallelism. It receives the names of encoders and the clips that
each of them must encode, and returns the features. `encode_here` computes them in this process. The trainer passes a
callable that sends clips to the encoder ranks.

Shapes: B clips, T audio samples, F frames, S audio tokens, D width, H width of the LLM, K experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import lengths
from model.audio_output import AudioOutput
from model.batch import Ragged
from model.config import EncoderConfig, ModelConfig
from model.connectors.base import build_adapter
from model.encoders.base import AudioEncoder
from model.encoders.registry import build_encoder
from model.lengths import Windowing
from model.losses.base import AudioLoss
from model.losses.ctc import CTC, CTCFeedback, num_symbols
from model.losses.table import active_losses
from model.mixture import Expert, mix
from model.router import Router, Routing

EncodeClips = Callable[[Sequence[str], Ragged, Tensor], Sequence[Ragged]]
"""A function that computes features, given K encoder names, clips [ΣT] and `wanted` [B, K] bool.

For each encoder k, it returns the features [ΣF, D] of the clips b with `wanted[b, k]`, in the order of the clips.
"""

Part = TypeVar("Part", bound=nn.Module | None)


class AudioTower(nn.Module):
    """The part of the model before the LLM.

    The initial weights of each part depend only on torch's seed and the name of the part. They therefore do not change
    if other encoders are added, removed, or not built on this rank.

    Args:
        config: The config of the whole model.
        llm_dim: The width H of the LLM.
        vocab_size: The size of the tokenizer's vocabulary, for the prompt gate and the loss heads.
        held: The names of the experts to build in this process; None for all experts. Other experts cannot be called in
            this process.
        embedding_rms: The root mean square of the LLM's token embeddings, to which `model.adapter.normalize` initially
            scales the audio embeddings.
        symbol_embeddings: The LLM's token embeddings [symbols, H] of the symbols of the CTC head, with which
            `model.ctc_feedback` starts, divided by their root mean square; None for random weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        llm_dim: int,
        vocab_size: int,
        held: Collection[str] | None = None,
        embedding_rms: float = 1.0,
        symbol_embeddings: Tensor | None = None,
    ) -> None:
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
        streams = len(config.router.gates) * config.expert_dim if config.experts else 0
        joined = width + streams
        self.stream_projection: nn.Linear | None = None
        if streams and config.router.join == "add":
            joined = width
            self.stream_projection = nn.Linear(streams, width, bias=False)
            nn.init.zeros_(self.stream_projection.weight)  # Added encoders then do not change the initial loss.
        self.adapter = _seeded("adapter", lambda: build_adapter(config.adapter, joined))
        self.projector = _seeded("projector", lambda: nn.Linear(self.adapter.dim, llm_dim, config.adapter.bias))
        self.feature_norm: nn.Module | None = None
        self.output_norm: nn.RMSNorm | None = None
        if config.adapter.normalize:
            self.feature_norm = nn.LayerNorm(joined)
        if config.adapter.normalize or self.adapter.normalizes_embeddings:
            self.output_norm = nn.RMSNorm(llm_dim, eps=1e-6)
            nn.init.constant_(self.output_norm.weight, embedding_rms)
        self.loss_heads: tuple[str, ...] = tuple(
            loss.name
            for loss in active_losses(config)
            if isinstance(loss, AudioLoss) and self._add_head(loss, vocab_size)
        )
        """The names of the losses that have a head."""
        self.ctc_feedback: CTCFeedback | None = None
        if config.ctc_feedback:
            symbols = num_symbols(config, vocab_size)
            self.ctc_feedback = _seeded(
                "ctc_feedback", lambda: CTCFeedback(config.ctc_outputs, symbols, llm_dim, symbol_embeddings)
            )
        self.recompute_joined = False
        """Whether the modules after the encoders (mixture, adapter, projector, heads) are recomputed in the backward
        pass."""

    def _add_head(self, loss: AudioLoss, vocab_size: int) -> bool:
        name = f"{loss.name}_head"
        head = _seeded(name, lambda: loss.head(self.config, self.adapter.dim, vocab_size))
        if head is not None:
            self.add_module(name, head)
        return head is not None

    def head_of(self, loss: str) -> nn.Module:
        """Return the head of the loss named `loss`."""
        return self.get_submodule(f"{loss}_head")

    def _expert(self, config: EncoderConfig) -> Expert:
        encoder = build_encoder(config)
        return Expert(encoder, encoder.dim, self.config.expert_dim)

    def encoder(self, name: str) -> nn.Module:
        """Return the encoder called `name`: the primary encoder, or an expert including its projection."""
        if self.primary is not None and self.config.primary is not None and name == self.config.primary.name:
            return self.primary
        return self.experts[name]

    def encode_here(self, names: Sequence[str], clips: Ragged, wanted: Tensor) -> list[Ragged]:
        """Encode clips in this process; see `EncodeClips`. An encoder without clips is not called."""
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
        """The windowing of the encoder that pads short clips the most."""
        found = [m.windowing for m in self.modules() if isinstance(m, AudioEncoder)]
        return max(found, key=lambda w: (w.least_samples, w.silence_samples, w.window_samples))

    def set_recompute(self, enabled: bool) -> None:
        """Switch activation checkpointing on or off in the layers of all encoders."""
        for module in self.modules():
            if isinstance(module, AudioEncoder):
                module.set_recompute(enabled)

    def forward(
        self,
        clips: Ragged,
        prompts: Ragged,
        noise: Tensor | None = None,
        encode: EncodeClips | None = None,
    ) -> AudioOutput:
        """Compute the audio embeddings of B ≥ 1 clips.

        Args:
            clips: The waveforms [ΣT] at 16 kHz.
            prompts: The instruction tokens [ΣP], one sequence per clip.
            noise: Standard normal noise [B, G, K] for the router; None outside training.
            encode: The function that computes the features; None for `encode_here`.
        """
        encode = encode or self.encode_here
        frames = tuple(lengths.num_frames(n) for n in clips.lengths)
        kept = tuple(map(self.adapter.rate.frames_of_samples, clips.lengths))
        primary = None
        if self.primary is not None:
            assert self.config.primary is not None
            everything = torch.ones(len(clips), 1, dtype=torch.bool)
            (primary,) = encode([self.config.primary.name], clips, everything)
        routing, experts = None, []
        if self.expert_names:
            routing = self.router(clips, primary, prompts, noise)
            experts = list(encode(self.expert_names, clips, routing.active))
        join = self._join_recomputed if self.recompute_joined and torch.is_grad_enabled() else self._join
        return join(primary, experts, routing, frames, kept)

    def _join(
        self,
        primary: Ragged | None,
        experts: Sequence[Ragged],
        routing: Routing | None,
        frames: tuple[int, ...],
        kept: tuple[int, ...],
    ) -> AudioOutput:
        """Compute the output from the features of all encoders.

        Args:
            primary: See `mix`.
            experts: See `mix`.
            routing: See `mix`.
            frames: The number of frames of each clip.
            kept: The number of frames of each clip that the adapter reads, from the first frame on.
        """
        joined = mix(primary, experts, routing, frames)
        if self.stream_projection is not None:
            assert primary is not None
            streams = joined.values[:, primary.values.shape[1] :]
            joined = Ragged(primary.values + self.stream_projection(streams), joined.lengths)
        if self.feature_norm is not None:
            joined = Ragged(self.feature_norm(joined.values), joined.lengths)
        if kept != frames:
            joined = Ragged.of([clip[:n] for clip, n in zip(joined.split(), kept, strict=True)])
        features = self.adapter(joined)
        heads = {name: Ragged(self.head_of(name)(features.values), features.lengths) for name in self.loss_heads}
        embeddings = self.projector(features.values)
        if self.ctc_feedback is not None:
            embeddings = embeddings + self.ctc_feedback(heads[CTC.name].values)
        if self.output_norm is not None:
            embeddings = self.output_norm(embeddings)
        return AudioOutput(Ragged(embeddings, features.lengths), routing, features, heads)

    def _join_recomputed(
        self,
        primary: Ragged | None,
        experts: Sequence[Ragged],
        routing: Routing | None,
        frames: tuple[int, ...],
        kept: tuple[int, ...],
    ) -> AudioOutput:
        """Compute the result of `_join`, keeping only its arguments and its result for the backward pass."""
        given = [] if primary is None else [primary]
        given += experts
        lengths: list[tuple[int, ...]] = []

        def run(_: Tensor, probs: Tensor | None, *values: Tensor) -> tuple[Tensor, ...]:
            parts = [Ragged(v, part.lengths) for v, part in zip(values, given, strict=True)]
            first = parts.pop(0) if primary is not None else None
            decided = None if routing is None or probs is None else routing.with_probs(probs)
            output = self._join(first, parts, decided, frames, kept)
            found = (output.embeddings, output.features, *output.heads.values())
            lengths[:] = [part.lengths for part in found]
            return tuple(part.values for part in found)

        # Reentrant checkpointing needs an input that requires a gradient, even if the features do not require one.
        through = torch.zeros((), device=self.projector.weight.device, requires_grad=True)
        probs = None if routing is None else routing.probs
        values = checkpoint(run, through, probs, *(part.values for part in given), use_reentrant=True)
        embeddings, features, *heads = (Ragged(v, n) for v, n in zip(values, lengths, strict=True))
        return AudioOutput(embeddings, routing, features, dict(zip(self.loss_heads, heads, strict=True)))


def _seeded(part: str, build: Callable[[], Part]) -> Part:
    """Call `build` with torch's generator seeded from the current seed and the name of the part, and return its result.

    The state of the generator is restored afterwards.
    """
    digest = hashlib.sha256(f"{torch.initial_seed()}/{part}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:7], "little"))
        return build()
