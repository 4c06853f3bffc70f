"""The whole model in one process and plain PyTorch: specification, oracle of all parity tests, and export."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.audio_tower import AudioTower, count, usable_ctc_targets
from model.batch import IGNORE, Batch, Ragged
from model.config import ModelConfig
from model.llm.reference import build_reference
from model.loss import next_token_sum
from model.router import Routing
from model.routing_loss import RoutingSums, routing_loss
from model.splice import splice


@dataclass(frozen=True)
class Losses:
    """The terms of one (global) batch, each a scalar mean."""

    total: Tensor
    next_token: Tensor
    routing: Tensor
    ctc: Tensor
    decisions: Routing | None


class SpeechLLM(nn.Module):
    """Audio tower and LLM. Parameters are named `audio.…` and `llm.…` (Hugging Face's names there).

    Args:
        config: the model.
        vocab_size: of the tokenizer.
        seed: of random initialisation where a part has no pre-trained weights.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int) -> None:
        super().__init__()
        self.config = config
        torch.manual_seed(seed)
        self.llm = build_reference(config.llm, seed)
        torch.manual_seed(seed)
        self.audio = AudioTower(config, self.llm.config.hidden_size, vocab_size)

    def embed_audio(self, batch: Batch, noise: Tensor | None = None) -> tuple[Ragged | None, Routing | None, Tensor]:
        """(embeddings [ΣS, H] clip after clip, routing, Σ CTC loss); no audio: (None, None, 0)."""
        if not batch.clips.lengths:
            return None, None, torch.zeros(())
        out = self.audio(batch.clips, batch.prompts, usable_ctc_targets(batch, self.config), noise)
        return out.embeddings, out.routing, out.ctc_loss_sum

    def logits(self, batch: Batch, audio: Ragged | None) -> Tensor:
        """Next-token logits [B, max L, vocabulary]; rows past a sample's end mean nothing."""
        text = self.llm.get_input_embeddings()(batch.tokens.values)
        if audio is not None:
            text = splice(text, batch.audio_mask, audio.values)
        # Right padding needs no mask under causal attention.
        return self.llm(inputs_embeds=Ragged(text, batch.tokens.lengths).padded(), use_cache=False).logits

    def forward(self, batch: Batch, noise: Tensor | None = None) -> Losses:
        """Every loss term of `batch`, taken as a global batch."""
        audio, routing, ctc_sum = self.embed_audio(batch, noise)
        counts = count(batch, usable_ctc_targets(batch, self.config))
        logits = self.logits(batch, audio)
        labels = batch.labels.padded(IGNORE)
        next_token = next_token_sum(logits.flatten(0, 1), labels.flatten()) / max(1, counts.targets)
        ctc = ctc_sum / max(1, counts.ctc_targets)
        mowe = torch.zeros(())
        if routing is not None:
            mowe = routing_loss(self.config.routing_loss, RoutingSums.of(routing))
        total = next_token + self.config.routing_loss.weight * mowe + self.config.ctc_weight * ctc
        return Losses(total, next_token, mowe, ctc, routing)
