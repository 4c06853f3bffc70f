"""What the data gives the model: ragged, with lengths, never padded.

Shapes: B clips or samples, T audio samples (16 kHz), F frames (20 ms), S slots, L tokens of one sample, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that takes no part in the loss (the convention of `torch.nn.functional.cross_entropy`)."""


@dataclass(frozen=True)
class Ragged:
    """Sequences of unequal length, laid end to end: `values[sum(lengths), ...]`."""

    values: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.values.shape[0] == sum(self.lengths), (self.values.shape, sum(self.lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    def split(self) -> tuple[Tensor, ...]:
        """The sequences, each `[length, ...]`, as views."""
        return self.values.split(list(self.lengths)) if self.lengths else ()

    @staticmethod
    def of(sequences: Sequence[Tensor], like: Tensor | None = None) -> Ragged:
        """Lay `sequences` end to end; `like` gives trailing shape, dtype and device when there are none."""
        if not sequences:
            assert like is not None, "an empty Ragged needs `like`"
            return Ragged(like.new_zeros((0, *like.shape[1:])), ())
        return Ragged(torch.cat(list(sequences)), tuple(s.shape[0] for s in sequences))

    def select(self, rows: Sequence[int]) -> Ragged:
        """The sequences at `rows`, in that order, a view where they lie so; also of none, the result stays in the
        autograd graph."""
        lengths = tuple(self.lengths[i] for i in rows)
        if len(_runs(rows)) <= 1:
            start = sum(self.lengths[: rows[0]]) if rows else 0
            return Ragged(self.values[start : start + sum(lengths)], lengths)
        parts = self.split()
        return Ragged(torch.cat([parts[i] for i in rows]), lengths)

    def to(self, *args: Any, **kwargs: Any) -> Ragged:
        """As `Tensor.to`."""
        return Ragged(self.values.to(*args, **kwargs), self.lengths)

    def padded(self, value: float = 0.0) -> Tensor:
        """`[B, max length, ...]`, right-padded with `value`."""
        longest = max(self.lengths)
        tail = (0, 0) * (self.values.dim() - 1)
        # Not pad_sequence: its backward pass copies the whole batch once per sequence.
        return torch.stack(
            [torch.nn.functional.pad(s, (*tail, 0, longest - s.shape[0]), value=value) for s in self.split()]
        )


def _runs(rows: Sequence[int]) -> list[range]:
    """`rows` as stretches of consecutive numbers, as long as they go."""
    found: list[range] = []
    for i in rows:
        if found and found[-1].stop == i:
            found[-1] = range(found[-1].start, i + 1)
        else:
            found.append(range(i, i + 1))
    return found


@dataclass(frozen=True)
class Sample:
    """One training or evaluation example, tokenised, its audio decoded.

    `token_ids[L]` holds one placeholder per LLM slot of every clip, so the length is final before any encoder runs;
    `audio_mask[L]` marks those positions, clip after clip. `labels[L]` are already shifted: `labels[i]` is the token
    that position i must predict, or IGNORE; only answer tokens (and the end token) are labelled.
    """

    key: str
    task: str
    clips: tuple[Tensor, ...]
    token_ids: Tensor
    audio_mask: Tensor
    labels: Tensor
    prompt_ids: Tensor
    ctc_targets: Tensor
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_targets(self) -> int:
        """Positions with a label."""
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True)
class Batch:
    """The samples one rank loaded for one step (its part of the global batch). May be empty, may hold no audio."""

    samples: tuple[Sample, ...]

    @cached_property
    def clips(self) -> Ragged:
        """All clips `[ΣT]`, sample after sample."""
        return Ragged.of([c for s in self.samples for c in s.clips], like=torch.zeros(0))

    @cached_property
    def clip_owner(self) -> tuple[int, ...]:
        """For every clip the index of its sample."""
        return tuple(i for i, s in enumerate(self.samples) for _ in s.clips)

    @cached_property
    def tokens(self) -> Ragged:
        """`[ΣL]` int64."""
        return Ragged.of([s.token_ids for s in self.samples], like=torch.zeros(0, dtype=torch.int64))

    @cached_property
    def labels(self) -> Ragged:
        """`[ΣL]` int64, IGNORE where no loss."""
        return Ragged.of([s.labels for s in self.samples], like=torch.zeros(0, dtype=torch.int64))

    @cached_property
    def audio_mask(self) -> Tensor:
        """`[ΣL]` bool: positions that take an audio embedding."""
        return Ragged.of([s.audio_mask for s in self.samples], like=torch.zeros(0, dtype=torch.bool)).values

    @cached_property
    def prompts(self) -> Ragged:
        """Instruction tokens of every clip's sample `[ΣP]`, one sequence per clip (the text gate's input)."""
        none = torch.zeros(0, dtype=torch.int64)
        return Ragged.of([self.samples[i].prompt_ids for i in self.clip_owner], like=none)

    @cached_property
    def ctc_targets(self) -> Ragged:
        """Answer tokens per clip `[ΣC]`; empty for clips that take no CTC loss."""
        none = torch.zeros(0, dtype=torch.int64)
        return Ragged.of([self.samples[i].ctc_targets for i in self.clip_owner], like=none)
