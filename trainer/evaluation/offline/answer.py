"""Decoded samples → what an exported model says to them, long recordings in windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError
from model.lengths import SAMPLE_RATE, num_samples
from trainer.data.decode import SampleError
from trainer.evaluation.offline.decode import decode
from trainer.evaluation.offline.model import DEFAULT_WINDOW_SEC, Loaded, Origin
from trainer.evaluation.offline.stitching import join_windows, window_spans
from trainer.evaluation.predictions import Prediction

Clip = NDArray[np.float32]
"""`[T]`, 16 kHz."""
OVERLAP_SHARE = 1 / 6
"""Of a window, unless another overlap is given: 5 s of 30 s."""


@dataclass(frozen=True)
class Windows:
    """How long recordings are cut."""

    window_sec: float
    """ASR clips that are longer are transcribed in windows of this length."""
    overlap_sec: float
    """What neighbours share, at least."""

    @staticmethod
    def of(origin: Origin, window_sec: float | None, overlap_sec: float | None) -> Windows:
        """As the user says; else what training heard, at most 30 s. Raises UserError."""
        window = min(DEFAULT_WINDOW_SEC, origin.max_audio_sec or DEFAULT_WINDOW_SEC)
        window = window if window_sec is None else window_sec
        overlap = window * OVERLAP_SHARE if overlap_sec is None else overlap_sec
        if window < 0.1:
            raise UserError(f"--window {window:g}: give at least 0.1 seconds")
        if not 0 <= overlap <= window / 2:
            raise UserError(f"--overlap {overlap:g}: give 0 to half of the window ({window / 2:g} seconds)")
        return Windows(window, overlap)

    def spans(self, num: int) -> list[tuple[int, int]]:
        """(begin, end) of the windows of a clip of `num` samples."""
        return window_spans(num, num_samples(self.window_sec), num_samples(self.overlap_sec))


@dataclass(frozen=True)
class Decoding:
    """How answers are made."""

    max_new_tokens: int
    beams: int
    batch_samples: int
    """Prompts that are decoded together."""
    batch_sec: float
    """Audio of these, counted as if all were as long as the longest."""


@dataclass(frozen=True)
class Question:
    """One sample, its audio decoded."""

    key: str
    clips: tuple[Clip, ...]
    meta: dict[str, Any]


@dataclass(frozen=True)
class _Prompt:
    """What is asked at once: a sample, or one window of it."""

    owner: int
    clips: tuple[Clip, ...]
    instruction: str

    @property
    def num_samples(self) -> int:
        return sum(len(clip) for clip in self.clips)


class Answerer:
    """Asks a model. A sample's answer does not depend on its companions.

    Args:
        loaded, windows, decoding: the model, and how it is asked.
    """

    def __init__(self, loaded: Loaded, windows: Windows, decoding: Decoding) -> None:
        self.loaded, self.windows, self.decoding = loaded, windows, decoding
        self._count_text_tokens = lru_cache(maxsize=4096)(loaded.processor.count_text_tokens)

    def __call__(self, questions: Sequence[Question]) -> list[Prediction | SampleError]:
        """An answer to each, or why there is none; nothing is ever cut off to make a sample fit."""
        failures: dict[int, SampleError] = {}
        prompts: list[_Prompt] = []
        shares: list[list[float]] = []
        for owner, question in enumerate(questions):
            own, shared = self._prompts(owner, question)
            try:
                for prompt in own:
                    self._check(prompt)
            except SampleError as error:
                failures[owner] = error
                own = []
            prompts += own
            shares.append(shared)
        said: dict[int, list[int]] = {}
        for batch in self._batches(prompts):
            for place, tokens in zip(batch, self._ask([prompts[place] for place in batch]), strict=True):
                said[place] = tokens
        answers: list[Prediction | SampleError] = []
        for owner, question in enumerate(questions):
            if owner in failures:
                answers.append(failures[owner])
                continue
            rows = [said[place] for place, prompt in enumerate(prompts) if prompt.owner == owner]
            texts = [text.strip() for text in self.loaded.processor.batch_decode(rows)] if len(rows) > 1 else []
            text = join_windows(texts, shares[owner]) if texts else self.loaded.processor.batch_decode(rows)[0]
            finished = all(len(row) < self.decoding.max_new_tokens for row in rows)
            seconds = sum(len(clip) for clip in question.clips) / SAMPLE_RATE
            answers.append(Prediction(question.key, text, finished, seconds, question.meta, len(rows)))
        return answers

    def _prompts(self, owner: int, question: Question) -> tuple[list[_Prompt], list[float]]:
        instruction = question.meta["instruction"]
        if question.meta["task"] == "asr" and len(question.clips) == 1:
            clip = question.clips[0]
            spans = self.windows.spans(len(clip))
            own = [_Prompt(owner, (clip[begin:end],), instruction) for begin, end in spans]
            pairs = zip(spans, spans[1:], strict=False)
            return own, [(a_end - b_begin) / (b_end - b_begin) for (_, a_end), (b_begin, b_end) in pairs]
        return [_Prompt(owner, question.clips, instruction)], []

    def _check(self, prompt: _Prompt) -> None:
        """Raise SampleError where the prompt and an answer exceed what the LLM can read, or cannot be made."""
        processor = self.loaded.processor
        try:
            num = self._count_text_tokens(len(prompt.clips), prompt.instruction)
        except ValueError as error:
            raise SampleError("placeholder_in_text", str(error)) from None
        num += sum(processor.count_audio_tokens(len(clip)) for clip in prompt.clips)
        room = self.loaded.max_positions
        if num + self.decoding.max_new_tokens > room:
            raise SampleError(
                "too_long",
                f"{num} tokens of prompt and {self.decoding.max_new_tokens} of answer; the LLM has {room} positions",
            )

    def _batches(self, prompts: Sequence[_Prompt]) -> list[list[int]]:
        """Places of prompts of similar length, longest first, within the limits of a batch."""
        order = sorted(range(len(prompts)), key=lambda i: (-prompts[i].num_samples, i))
        batches: list[list[int]] = []
        for place in order:
            longest = prompts[batches[-1][0]].num_samples if batches else 0
            full = not batches or len(batches[-1]) == self.decoding.batch_samples
            if full or (len(batches[-1]) + 1) * longest > num_samples(self.decoding.batch_sec):
                batches.append([])
            batches[-1].append(place)
        return batches

    def _ask(self, prompts: Sequence[_Prompt]) -> list[list[int]]:
        inputs = self.loaded.processor(audio=[list(p.clips) for p in prompts], text=[p.instruction for p in prompts])
        moved = {name: tensor.to(self.loaded.device) for name, tensor in inputs.items()}
        return decode(self.loaded, moved, self.decoding.max_new_tokens, self.decoding.beams)


Answer = Callable[[Sequence[Question]], list[Prediction | SampleError]]
