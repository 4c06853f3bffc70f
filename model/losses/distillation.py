"""Distillation of the LLM's predictions given the transcript into its predictions given the audio (as in Ultravox).

The teacher is the LLM itself, without gradient. It reads the sample with the transcript's tokens in place of the audio.
The student reads the audio. The loss is KL(teacher ‖ student) at the tokens of the answer, divided by the number of
these tokens in the global batch. It trains the audio tower to produce embeddings that affect the LLM as the transcript
does.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from model.batch import IGNORE, Sample
from model.config import ModelConfig
from model.errors import UserError
from model.losses.base import TokenLoss
from model.losses.vocabulary import Vocabulary


class Distillation(TokenLoss):
    """The divergence of the LLM's predictions from those of a teacher that reads the transcript.

    It is computed for samples with one clip whose transcript is known. The transcript is the field `transcript` of the
    manifest or, for a transcription task, the answer.
    """

    name = "distillation"
    options = {"weight": 0.0, "temperature": 1.0}
    text_fields = ("transcript",)
    has_reference = True

    def check(self, config: ModelConfig) -> None:
        """Check the temperature.

        Raises:
            UserError: If the temperature is 0.
        """
        if self.option(config, "temperature") == 0:
            raise UserError("model.losses.distillation.temperature = 0.0: must be positive")

    def reference(self, sample: Sample) -> Sample | None:
        """Return `sample` with the transcript's tokens in place of the audio; None if the loss skips the sample."""
        transcript = sample.answer if sample.is_transcription else sample.texts.get("transcript", sample.answer[:0])
        if len(sample.clips) != 1 or not len(transcript) or not sample.num_targets:
            return None
        first = int(sample.audio_mask.int().argmax())
        end = first + int(sample.audio_mask.sum())

        labels = torch.full_like(transcript, IGNORE)
        # If the answer directly follows the audio, this label is the answer's first token.
        labels[-1] = sample.labels[end - 1]

        def replaced(values: Tensor, middle: Tensor) -> Tensor:
            return torch.cat([values[:first], middle, values[end:]])

        return replace(
            sample,
            clips=(),
            token_ids=replaced(sample.token_ids, transcript),
            audio_mask=replaced(sample.audio_mask, torch.zeros(len(transcript), dtype=torch.bool)),
            labels=replaced(sample.labels, labels),
        )

    def token_losses(
        self, logits: Tensor, labels: Tensor, reference: Tensor | None, vocabulary: Vocabulary, config: ModelConfig
    ) -> Tensor:
        """Return KL(teacher ‖ student) of every row, [N], at the temperature of the recipe."""
        assert reference is not None
        temperature = self.option(config, "temperature")
        student = vocabulary.log_softmax(logits.float() / temperature)
        teacher = vocabulary.log_softmax(reference.float() / temperature).detach()
        probs = teacher.exp()
        # In both distributions, columns that pad the vocabulary have the log probability -inf.
        return vocabulary.sum(torch.where(probs > 0, probs * (teacher - student), 0.0).sum(-1))
