"""Samples and batches as the model reads them: sequences of unequal length, never padded.

Shapes: B clips or samples, T audio samples (16 kHz), F frames (20 ms), S audio tokens, L tokens of a sample, D width.
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
    """Sequences of unequal length, stored end to end in `values[sum(lengths), ...]`."""

    values: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.values.shape[0] == sum(self.lengths), (self.values.shape, sum(self.lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    def split(self) -> tuple[Tensor, ...]:
        """Return the sequences, each `[length, ...]`, as views."""
        return self.values.split(list(self.lengths)) if self.lengths else ()

    @staticmethod
    def of(sequences: Sequence[Tensor], like: Tensor | None = None) -> Ragged:
        """Join `sequences` end to end.

        Args:
            sequences: The sequences, each `[length, ...]`.
            like: A tensor with the trailing shape, dtype and device of the result. It is needed if there may be no
                sequence.
        """
        if not sequences:
            assert like is not None, "an empty Ragged needs `like`"
            return Ragged(like.new_zeros((0, *like.shape[1:])), ())
        return Ragged(torch.cat(list(sequences)), tuple(s.shape[0] for s in sequences))

    def select(self, rows: Sequence[int]) -> Ragged:
        """Return the sequences at `rows`, in that order; a view if they are neighbours.

        The result is part of the autograd graph even if `rows` is empty.
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
        """Return the sequences as `[B, max length, ...]`, padded on the right with `value`."""
        longest = max(self.lengths)
        tail = (0, 0) * (self.values.dim() - 1)
        # Not pad_sequence: its backward pass copies the whole batch once per sequence.
        return torch.stack(
            [torch.nn.functional.pad(s, (*tail, 0, longest - s.shape[0]), value=value) for s in self.split()]
        )


def _runs(rows: Sequence[int]) -> list[range]:
    """Return `rows` as the longest possible ranges of consecutive numbers."""
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
    """The waveforms [T], 16 kHz."""
    token_ids: Tensor
    """[L] int64, with one placeholder for each audio token, so the length is known before any encoder runs."""
    audio_mask: Tensor
    """[L] bool, true at the placeholders."""
    labels: Tensor
    """[L] int64, already shifted: `labels[i]` is the token that position i must predict, or IGNORE.

    Only the tokens of the answer and the end token are labels. Their positions are the last ones.
    """
    prompt_ids: Tensor
    """The tokens of the instruction alone."""
    texts: Mapping[str, Tensor] = field(default_factory=dict)
    """The token ids of further fields of the manifest, by the field's name. See `Loss.text_fields`."""
    meta: dict[str, Any] = field(default_factory=dict)
    is_transcription: bool = False
    """True if the answer is the transcript of the audio."""

    @property
    def num_tokens(self) -> int:
        """The number of LLM positions, audio tokens included."""
        return self.token_ids.shape[0]

    @property
    def num_targets(self) -> int:
        """The number of positions with a label."""
        return int((self.labels != IGNORE).sum())

    @property
    def answer(self) -> Tensor:
        """The tokens of the answer without the end token; empty in evaluation."""
        return self.labels[self.labels != IGNORE][:-1]


@dataclass(frozen=True)
class Batch:
    """The samples that one rank loaded for one step, which is its part of the global batch; there may be none."""

    samples: tuple[Sample, ...]

    @cached_property
    def clips(self) -> Ragged:
        """The clips of all samples `[ΣT]`, in order."""
        return Ragged.of([c for s in self.samples for c in s.clips], like=torch.zeros(0))

    @cached_property
    def clip_owner(self) -> tuple[int, ...]:
        """The index of each clip's sample."""
        return tuple(i for i, s in enumerate(self.samples) for _ in s.clips)

    @cached_property
    def tokens(self) -> Ragged:
        """The token ids of all samples `[ΣL]`, int64."""
        return Ragged.of([s.token_ids for s in self.samples], like=torch.zeros(0, dtype=torch.int64))

    @cached_property
    def labels(self) -> Ragged:
        """The labels of all samples `[ΣL]`, int64."""
        return Ragged.of([s.labels for s in self.samples], like=torch.zeros(0, dtype=torch.int64))

    @cached_property
    def audio_mask(self) -> Tensor:
        """The positions that take an audio embedding, `[ΣL]` bool."""
        return Ragged.of([s.audio_mask for s in self.samples], like=torch.zeros(0, dtype=torch.bool)).values

    @cached_property
    def prompts(self) -> Ragged:
        """The instruction tokens `[ΣP]` of each clip's sample, one sequence per clip. The prompt gate reads them."""
        none = torch.zeros(0, dtype=torch.int64)
        return Ragged.of([self.samples[i].prompt_ids for i in self.clip_owner], like=none)
