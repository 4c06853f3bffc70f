"""The samples and batches that the model reads. Sequences of unequal length are stored without padding.

Shapes: B clips or samples, T audio samples of a clip (16 kHz), L tokens of a sample, P instruction tokens of a sample.
Σ denotes the sum over all sequences, for example ΣT the total number of audio samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""The label of a position without a loss, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class Ragged:
    """Sequences of unequal length, concatenated in `values` of shape `[sum(lengths), ...]`."""

    values: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.values.shape[0] == sum(self.lengths), (self.values.shape, sum(self.lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    def split(self) -> tuple[Tensor, ...]:
        """Return one view `[length, ...]` of `values` for each sequence."""
        return self.values.split(list(self.lengths)) if self.lengths else ()

    @staticmethod
    def of(sequences: Sequence[Tensor], like: Tensor | None = None) -> Ragged:
        """Concatenate `sequences`.

        Args:
            sequences: The sequences, each `[length, ...]`.
            like: A tensor with the trailing shape, dtype and device of the result. It is required if `sequences` may be
                empty.
        """
        if not sequences:
            assert like is not None, "an empty Ragged needs `like`"
            return Ragged(like.new_zeros((0, *like.shape[1:])), ())
        return Ragged(torch.cat(list(sequences)), tuple(s.shape[0] for s in sequences))

    def select(self, rows: Sequence[int]) -> Ragged:
        """Return the sequences at the indices `rows`, in that order.

        The result is a view if `rows` are consecutive and ascending, and a copy otherwise. It is part of the autograd
        graph even if `rows` is empty.
        """
        lengths = tuple(self.lengths[i] for i in rows)
        if len(_runs(rows)) <= 1:
            start = sum(self.lengths[: rows[0]]) if rows else 0
            return Ragged(self.values[start : start + sum(lengths)], lengths)
        parts = self.split()
        return Ragged(torch.cat([parts[i] for i in rows]), lengths)

    def to(self, *args: Any, **kwargs: Any) -> Ragged:
        """Apply `Tensor.to` to the values."""
        return Ragged(self.values.to(*args, **kwargs), self.lengths)

    def padded(self, value: float = 0.0) -> Tensor:
        """Return the sequences as one tensor `[B, max length, ...]`, padded on the right with `value`."""
        longest = max(self.lengths)
        tail = (0, 0) * (self.values.dim() - 1)
        # The backward pass of pad_sequence would copy the whole batch once per sequence.
        return torch.stack(
            [torch.nn.functional.pad(s, (*tail, 0, longest - s.shape[0]), value=value) for s in self.split()]
        )


def _runs(rows: Sequence[int]) -> list[range]:
    """Split `rows` into as few ranges of consecutive, ascending numbers as possible."""
    found: list[range] = []
    for i in rows:
        if found and found[-1].stop == i:
            found[-1] = range(found[-1].start, i + 1)
        else:
            found.append(range(i, i + 1))
    return found


@dataclass(frozen=True)
class Sample:
    """One example for training or evaluation, with tokens and decoded audio."""

    key: str
    task: str
    clips: tuple[Tensor, ...]
    """The waveforms, each [T] at 16 kHz."""
    token_ids: Tensor
    """The tokens of the whole sample, [L] int64.

    They contain one placeholder for each audio token, so L is known before any encoder runs.
    """
    audio_mask: Tensor
    """The positions of the placeholders, [L] bool."""
    labels: Tensor
    """The token that each position must predict, [L] int64; IGNORE for positions without a loss. The labels are already
    shifted by one position.

    Only the tokens of answers, and the end token after each answer, are labels. A conversation may have several
    answers.
    """
    prompt_ids: Tensor
    """The tokens of the instruction, [P] int64. In a conversation, the instruction is the last question."""
    clip_prompt_ids: tuple[Tensor, ...] | None = None
    """For each clip, the tokens [P] int64 of the question that the clip belongs to; None if all clips have
    `prompt_ids`."""
    texts: Mapping[str, Tensor] = field(default_factory=dict)
    """The token ids of other manifest fields that a loss reads (see `Loss.text_fields`), by the field's name."""
    meta: dict[str, Any] = field(default_factory=dict)
    answer_text: str = ""
    """The text of the answer or, in a conversation, of the last answer. It is empty in evaluation."""
    pieces: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """The numbers of the answer's pieces (`model.pieces`), [C] int64; empty if no loss reads them."""
    is_transcription: bool = False
    """Whether the sample has a single answer, which is the transcript of the audio."""

    @property
    def num_tokens(self) -> int:
        """The number of LLM positions, including audio tokens."""
        return self.token_ids.shape[0]

    @property
    def num_targets(self) -> int:
        """The number of positions with a label."""
        return int((self.labels != IGNORE).sum())

    @property
    def answer(self) -> Tensor:
        """The tokens of the only answer, without the end token; empty in evaluation."""
        return self.labels[self.labels != IGNORE][:-1]


@dataclass(frozen=True)
class Batch:
    """One rank's part of the global batch, which consists of the samples that the rank loads for one step.

    It may be empty.
    """

    samples: tuple[Sample, ...]

    @cached_property
    def clips(self) -> Ragged:
        """The clips of all samples, `[ΣT]`, in the order of the samples."""
        return Ragged.of([c for s in self.samples for c in s.clips], like=torch.zeros(0))

    @cached_property
    def clip_owner(self) -> tuple[int, ...]:
        """The index in `samples` of the sample that each clip belongs to."""
        return tuple(i for i, s in enumerate(self.samples) for _ in s.clips)

    @cached_property
    def tokens(self) -> Ragged:
        """The token ids of all samples, `[ΣL]` int64."""
        return Ragged.of([s.token_ids for s in self.samples], like=torch.zeros(0, dtype=torch.int64))

    @cached_property
    def labels(self) -> Ragged:
        """The labels of all samples, `[ΣL]` int64."""
        return Ragged.of([s.labels for s in self.samples], like=torch.zeros(0, dtype=torch.int64))

    @cached_property
    def audio_mask(self) -> Tensor:
        """The positions whose embedding is replaced by an audio embedding, `[ΣL]` bool."""
        return Ragged.of([s.audio_mask for s in self.samples], like=torch.zeros(0, dtype=torch.bool)).values

    @cached_property
    def prompts(self) -> Ragged:
        """For each clip, the tokens of the question that the clip belongs to, `[ΣP]` int64.

        The prompt gate reads them.
        """
        none = torch.zeros(0, dtype=torch.int64)
        of_clips = (s.clip_prompt_ids or (s.prompt_ids,) * len(s.clips) for s in self.samples)
        return Ragged.of([ids for own in of_clips for ids in own], like=none)
