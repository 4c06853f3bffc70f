"""The whole model in one process, in plain PyTorch.

This module specifies the model. It is the reference in all parity tests, and exports contain it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from model.audio_output import AudioOutput
from model.audio_tower import AudioTower
from model.batch import IGNORE, Batch, Ragged, Sample
from model.config import ModelConfig
from model.llm.experts import Choice, jittered, observed
from model.llm.reference import build_reference, weight_source
from model.llm.weights import embedding_rms
from model.losses.base import LossTerm, TokenLoss, alone, audio_terms, labelled_losses
from model.losses.router import RoutedTokens, RouterLoss
from model.losses.table import active_losses
from model.losses.vocabulary import Vocabulary
from model.router import Routing
from model.splice import splice


@dataclass(frozen=True)
class Losses:
    """The loss of one global batch."""

    terms: tuple[LossTerm, ...]
    """The terms of all active losses."""
    decisions: Routing | None
    """The decisions of the router; None if the batch has no audio or the model has no experts."""
    choices: tuple[Choice, ...] = ()
    """The choices of the routers in the LLM for all tokens of the batch, for each layer with experts."""

    @property
    def total(self) -> Tensor:
        """The weighted sum of all terms, a scalar."""
        return sum((t.weight * self[t.name] for t in self.terms), torch.zeros(()))

    def __getitem__(self, name: str) -> Tensor:
        """Return the mean of the term called `name`, without its weight, as a scalar."""
        term = next(t for t in self.terms if t.name == name)
        return term.sum / max(1, term.count)


class SpeechLLM(nn.Module):
    """The audio tower and the LLM.

    Parameters are named `audio.…` and `llm.…`. The Hugging Face name of a parameter of the LLM follows `llm.`.

    Args:
        config: The model's config.
        vocab_size: The size of the tokenizer's vocabulary.
        seed: The seed for the parts that have no pre-trained weights.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int) -> None:
        super().__init__()
        self.config = config
        self.losses = active_losses(config)
        torch.manual_seed(seed)
        self.llm = build_reference(config.llm, seed)
        torch.manual_seed(seed)
        rms = embedding_rms(weight_source(config.llm, self.llm.config, seed), self.llm.config)
        self.audio = AudioTower(config, self.llm.config.hidden_size, vocab_size, embedding_rms=rms)

    def embed_audio(self, batch: Batch, noise: Tensor | None = None) -> AudioOutput | None:
        """Return the output of the audio tower for the clips of `batch`; None if there is no clip.

        Args:
            batch: The batch.
            noise: Standard normal noise [B, G, K] for the router; None outside training.
        """
        return self.audio(batch.clips, batch.prompts, noise) if batch.clips.lengths else None

    def logits(self, batch: Batch, audio: AudioOutput | None) -> Tensor:
        """Return the next-token logits [B, max L, vocabulary]. Logits past the end of a sample are meaningless."""
        text = self.llm.get_input_embeddings()(batch.tokens.values)
        if audio is not None:
            text = splice(text, batch.audio_mask, audio.embeddings.values)
        # Padding on the right needs no mask under causal attention.
        return self.llm(inputs_embeds=Ragged(text, batch.tokens.lengths).padded(), use_cache=False).logits

    def forward(self, batch: Batch, noise: Tensor | None = None, jitter: Tensor | None = None) -> Losses:
        """Return all terms of the loss, with `batch` as the global batch.

        Args:
            batch: The batch.
            noise: Standard normal noise [B, G, K] for the router of encoders; None outside training.
            jitter: A number that identifies each sample within the step, [number of samples] int64, from which the
                jitter of the LLM's routers is computed; None for no jitter, as outside training.
        """
        audio = self.embed_audio(batch, noise)
        lengths = torch.tensor(batch.tokens.lengths)
        with observed(self.llm) as padded, jittered(self.llm, jitter, int(lengths.max())):
            logits = self.logits(batch, audio)
        real = (torch.arange(int(lengths.max())) < lengths[:, None]).flatten()
        choices = tuple(choice.rows(real) for choice in padded)
        router_terms = self._router_terms(batch, choices)
        token_terms = [self._token_term(loss, batch, logits) for loss in self.losses if isinstance(loss, TokenLoss)]
        terms = (*token_terms, *router_terms, *audio_terms(self.losses, audio, batch, self.config))
        return Losses(terms, None if audio is None else audio.routing, choices)

    def _router_terms(self, batch: Batch, choices: Sequence[Choice]) -> list[LossTerm]:
        """Return the terms of the router losses, given the choices of each layer's router for all tokens."""
        lengths = torch.tensor(batch.tokens.lengths)
        samples = torch.arange(len(lengths)).repeat_interleave(lengths)
        layers = [RoutedTokens(choice, samples, lengths, alone) for choice in choices]
        terms = []
        for loss in self.losses:
            if isinstance(loss, RouterLoss):
                total = sum((loss.sum(tokens, self.config) for tokens in layers), torch.zeros(()))
                count = loss.count(batch, self.config)
                terms.append(LossTerm(loss.name, loss.weight(self.config), total / max(1, len(layers)), count))
        return terms

    def _token_term(self, loss: TokenLoss, batch: Batch, logits: Tensor) -> LossTerm:
        labels, reference, samples = batch.labels.padded(IGNORE), None, batch.samples
        if loss.has_reference:
            pairs = [(i, r) for i, s in enumerate(samples) if (r := loss.reference(s)) is not None]
            kept = [i for i, _ in pairs]
            logits, labels = logits[kept][labels[kept] != IGNORE], labels[kept][labels[kept] != IGNORE]
            reference = self._reference_logits([r for _, r in pairs], logits)
        losses = labelled_losses(loss, logits.flatten(0, -2), labels.flatten(), reference, Vocabulary(), self.config)
        weights = loss.sample_weights(np.array([s.num_targets for s in samples]), self.config)
        if weights is not None:
            losses = losses.view(len(samples), -1) * torch.from_numpy(weights).float()[:, None]
        return LossTerm(loss.name, loss.weight(self.config), losses.sum(), loss.count(batch, self.config))

    @torch.no_grad()
    def _reference_logits(self, samples: Sequence[Sample], like: Tensor) -> Tensor:
        """Return the logits [N, vocabulary] of text-only samples at the positions with a label."""
        if not samples:
            return like[:0]
        batch = Batch(tuple(samples))
        return self.logits(batch, None)[batch.labels.padded(IGNORE) != IGNORE]
