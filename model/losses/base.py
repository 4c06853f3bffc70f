"""The interface of a loss, and the value that it adds to the total loss.

The total is Σ weight · (sum over all ranks of `sum`) / (sum over all ranks of `count`), over the active losses. The
rank that loaded the samples computes an `AudioLoss` from the output of the audio tower. The last pipeline stage of the
LLM replica to which the samples were sent computes a `TokenLoss` from the LLM's logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.audio_output import AudioOutput
from model.batch import IGNORE, Batch, Ragged, Sample
from model.config import ModelConfig
from model.losses.vocabulary import Vocabulary
from model.transfer import to_device

Reduce = Callable[[Tensor], Tensor]
"""A function that returns the sum of a detached tensor over all ranks. In one process, this is the tensor itself.
Collective: every rank of the world must call it."""


def alone(tensor: Tensor) -> Tensor:
    """Return `tensor`. This is the `Reduce` function for a single process."""
    return tensor


@dataclass(frozen=True)
class LossTerm:
    """One rank's contribution to one term of the total loss."""

    name: str
    """The name of the loss. The metric is `train/loss_<name>`."""
    weight: float
    """The factor of the term in the total loss."""
    sum: Tensor
    """This rank's contribution to the sum over the global batch, a scalar. It requires a gradient if the backward pass
    of the term has yet to run."""
    count: int
    """This rank's contribution to the number by which the sum over the global batch is divided."""


class Loss(ABC):
    """One loss of the table `model.losses.table.LOSSES`."""

    name: ClassVar[str]
    """The key in the table, in metrics and in the recipe (`model.losses.<name>`)."""
    options: ClassVar[Mapping[str, float]] = {"weight": 0.0}
    """The keys of `model.losses.<name>` and their defaults."""
    text_fields: ClassVar[tuple[str, ...]] = ()
    """The fields of the manifests that the loss reads as token ids, from `Sample.texts`."""

    def option(self, config: ModelConfig, key: str) -> float:
        """Return the value of `model.losses.<name>.<key>`."""
        return config.losses.get(self.name, {}).get(key, self.options[key])

    def weight(self, config: ModelConfig) -> float:
        """Return the weight of this loss in the total loss."""
        return self.option(config, "weight")

    def is_active(self, config: ModelConfig) -> bool:
        """Return whether the loss is computed and reported."""
        return self.weight(config) > 0

    def check(self, config: ModelConfig) -> None:  # noqa: B027 - most losses need no further checks
        """Check the options in the recipe.

        `check_losses` has already checked their names, and that no value is negative.

        Raises:
            UserError: If a value is invalid.
        """

    @abstractmethod
    def count(self, batch: Batch, config: ModelConfig) -> int:
        """Return the contribution of `batch` to the number by which the loss is divided."""


class AudioLoss(Loss):
    """A loss that is computed from the output of the audio tower."""

    def head(self, config: ModelConfig, dim: int, vocab_size: int) -> nn.Module | None:
        """Return a new layer that is applied to the adapter's output; None if the loss needs no layer.

        Its parameters are named `audio.<name>_head.…`, and its output is `AudioOutput.heads[name]`.

        Args:
            config: The model's config.
            dim: The width of the adapter's output.
            vocab_size: The size of the tokenizer's vocabulary.
        """
        return None

    def targets(self, batch: Batch, config: ModelConfig) -> Ragged | None:
        """Return the targets of the loss in `batch`, on the host, one sequence per clip; None if it has no targets."""
        return None

    @abstractmethod
    def sum(self, audio: AudioOutput, targets: Ragged | None, config: ModelConfig, reduce: Reduce) -> Tensor:
        """Return this rank's contribution to the sum over the clips of the global batch, a scalar with gradient.

        Collective: every rank of the world must call it, because it may call `reduce`. A rank may have no clips.

        Args:
            audio: The output of the audio tower for this rank's clips.
            targets: The result of `targets`, on the device of `audio`.
            config: The model's config.
            reduce: A function that returns the sum over ranks, for a loss that is not linear in the samples.
        """


class TokenLoss(Loss):
    """A loss that is computed from the LLM's logits at the positions with a label."""

    has_reference: ClassVar[bool] = False
    """True if the logits are compared with the logits of `reference`. Samples without a reference are then skipped."""
    by_task: ClassVar[bool] = False
    """True if the mean over the tokens of each task is reported as `train/loss/<task>`."""

    def reference(self, sample: Sample) -> Sample | None:
        """Return a sample without audio, whose logits are computed without gradient; None to skip `sample`.

        The labels of the result must be those of `sample`, in the same order, and must be at its last positions.
        """
        return None

    def count(self, batch: Batch, config: ModelConfig) -> int:
        """Return the number of labelled positions in the samples that are not skipped."""
        return sum(s.num_targets for s in batch.samples if not self.has_reference or self.reference(s) is not None)

    def sample_weights(self, num_targets: NDArray[np.int64], config: ModelConfig) -> NDArray[np.float64] | None:
        """Return the factor of the token losses of each sample, [n]; None if all are 1.

        The factors must satisfy Σ weights · num_targets = Σ num_targets. A loss with a reference must return None.

        Args:
            num_targets: The number [n] of labelled positions of each sample of the global batch.
            config: The model's config.
        """
        return None

    @abstractmethod
    def token_losses(
        self, logits: Tensor, labels: Tensor, reference: Tensor | None, vocabulary: Vocabulary, config: ModelConfig
    ) -> Tensor:
        """Return the loss of every row, [N] in fp32.

        Args:
            logits: The columns [N, V] of the logits that this rank holds. They must not be changed in place.
            labels: The token ids [N] that the rows must predict. A row without a label has an arbitrary id.
            reference: The logits [N, V] of the reference at the same labels; None without `has_reference`.
            vocabulary: Operations over the whole vocabulary, whose columns may be divided among ranks.
            config: The model's config.
        """


def audio_terms(
    losses: Sequence[Loss], audio: AudioOutput | None, batch: Batch, config: ModelConfig, reduce: Reduce = alone
) -> tuple[LossTerm, ...]:
    """Return the terms of the `AudioLoss`es among `losses`.

    Collective: every rank of the world must call it, with the same losses.

    Args:
        losses: The active losses.
        audio: The output of the audio tower for the clips of `batch`; None if there is no clip in the global batch.
        batch: This rank's part of the global batch.
        config: The model's config.
        reduce: A function that returns the sum over ranks.
    """
    terms = []
    for loss in losses:
        if not isinstance(loss, AudioLoss):
            continue
        if audio is None:
            total = torch.zeros(())
        else:
            targets = loss.targets(batch, config)
            device = audio.embeddings.values.device
            if targets is not None:
                targets = Ragged(to_device(targets.values, device), targets.lengths)
            total = loss.sum(audio, targets, config, reduce)
            if loss.name in audio.heads:
                # With this addend, the head takes part in the backward pass on every rank.
                total = total + audio.heads[loss.name].values[:0].sum()
        terms.append(LossTerm(loss.name, loss.weight(config), total, loss.count(batch, config)))
    return tuple(terms)


def labelled_losses(
    loss: TokenLoss,
    logits: Tensor,
    labels: Tensor,
    reference: Tensor | None,
    vocabulary: Vocabulary,
    config: ModelConfig,
) -> Tensor:
    """Return `loss.token_losses` [N], with zero where a row has no label."""
    return loss.token_losses(logits, labels.clamp(min=0), reference, vocabulary, config) * (labels != IGNORE)
