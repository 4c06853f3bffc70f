"""Generation of a model's answers to decoded samples. Long recordings are transcribed in windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.chat import ChatError
from model.conversation import ConversationError, Turn
from model.errors import UserError
from model.lengths import SAMPLE_RATE, num_samples
from trainer.data.errors import Reason, SampleError
from trainer.data.metadata import prompt_turns
from trainer.evaluation.offline.decode import Progress, decode
from trainer.evaluation.offline.model import DEFAULT_WINDOW_SEC, Loaded, Origin
from trainer.evaluation.offline.stitching import join_windows, window_spans
from trainer.evaluation.predictions import Prediction

Clip = NDArray[np.float32]
"""A waveform `[T]` at 16 kHz."""
OVERLAP_SHARE = 1 / 6
"""The default overlap as a fraction of a window: 5 s of 30 s."""


@dataclass(frozen=True)
class Windows:
    """The windows into which long recordings are cut."""

    window_sec: float
    """The length of a window, in seconds. Longer ASR clips are transcribed in windows of this length."""
    overlap_sec: float
    """The minimum overlap of neighboring windows, in seconds."""

    @staticmethod
    def of(origin: Origin, window_sec: float | None, overlap_sec: float | None) -> Windows:
        """Return the windows that the user chose, with the model's defaults for values that are None.

        Args:
            origin: The model.
            window_sec: The length of a window, in seconds; None selects the length of the longest clip in training, but
                at most 30 s.
            overlap_sec: The minimum overlap, in seconds; None selects `OVERLAP_SHARE` of a window.

        Raises:
            UserError: If a value is out of range.
        """
        window = min(DEFAULT_WINDOW_SEC, origin.max_audio_sec or DEFAULT_WINDOW_SEC)
        window = window if window_sec is None else window_sec
        overlap = window * OVERLAP_SHARE if overlap_sec is None else overlap_sec
        if window < 0.1:
            raise UserError(f"--window {window:g}: must be at least 0.1 seconds")
        if not 0 <= overlap <= window / 2:
            raise UserError(f"--overlap {overlap:g}: must be between 0 and half a window ({window / 2:g} seconds)")
        return Windows(window, overlap)

    def spans(self, num: int) -> list[tuple[int, int]]:
        """Return the first sample and the end of each window of a clip of `num` samples."""
        return window_spans(num, num_samples(self.window_sec), num_samples(self.overlap_sec))


@dataclass(frozen=True)
class Decoding:
    """Settings of text generation."""

    max_new_tokens: int
    """The largest number of tokens in an answer."""
    beams: int
    """The number of beams; 1 is greedy decoding."""
    batch_samples: int
    """The largest number of prompts that are decoded together."""
    batch_sec: float
    """The largest amount of audio in a batch of prompts, in seconds, after padding to the longest prompt."""


@dataclass(frozen=True)
class Question:
    """A sample with its decoded audio."""

    key: str
    clips: tuple[Clip, ...]
    meta: dict[str, Any]
    """The manifest fields. The model reads `messages` without the last answer, or `instruction` if there are no
    messages."""
    in_windows: bool = False
    """Whether a single long clip may be cut into windows whose answers are joined. This is correct only for
    transcripts."""


@dataclass(frozen=True)
class _Prompt:
    """One prompt for the model: a sample, or one window of a sample."""

    owner: int
    """The index of the sample among the questions."""
    clips: tuple[Clip, ...]
    turns: tuple[Turn, ...]
    """The conversation up to the question."""

    @property
    def num_samples(self) -> int:
        """The number of audio samples in all clips."""
        return sum(len(clip) for clip in self.clips)


class Answerer:
    """A model that answers questions. An answer does not depend on the other questions in the same batch.

    Args:
        loaded: The model.
        windows: The windows into which long recordings are cut.
        decoding: The settings of text generation.
    """

    def __init__(self, loaded: Loaded, windows: Windows, decoding: Decoding) -> None:
        self.loaded, self.windows, self.decoding = loaded, windows, decoding
        self._count_tokens_of = lru_cache(maxsize=4096)(loaded.processor.count_tokens_of)

    def __call__(
        self, questions: Sequence[Question], progress: Callable[[list[int] | None], None] | None = None
    ) -> list[Prediction | SampleError]:
        """Return an answer to each question, or the reason why the question has no answer.

        Audio is never truncated to make a sample fit.

        Args:
            questions: The questions.
            progress: A function that is called after every step of greedy decoding; None for none. Its argument is the
                list of tokens of the answer so far if there is only one prompt, and None otherwise. It may raise an
                exception to stop the decoding.
        """
        failures: dict[int, SampleError] = {}
        prompts: list[_Prompt] = []
        overlaps: list[list[float]] = []
        for owner, question in enumerate(questions):
            own, overlap = self._prompts(owner, question)
            try:
                for prompt in own:
                    self._check(prompt)
            except SampleError as error:
                failures[owner] = error
                own = []
            prompts += own
            overlaps.append(overlap)
        generated: dict[int, list[int]] = {}

        def observe(rows: list[list[int]]) -> None:
            if progress is not None:
                progress(rows[0] if len(prompts) == 1 else None)

        for batch in self._batches(prompts):
            for index, tokens in zip(batch, self._ask([prompts[index] for index in batch], observe), strict=True):
                generated[index] = tokens
        answers: list[Prediction | SampleError] = []
        for owner, question in enumerate(questions):
            if owner in failures:
                answers.append(failures[owner])
                continue
            rows = [generated[index] for index, prompt in enumerate(prompts) if prompt.owner == owner]
            texts = [text.strip() for text in self.loaded.processor.batch_decode(rows)] if len(rows) > 1 else []
            text = join_windows(texts, overlaps[owner]) if texts else self.loaded.processor.batch_decode(rows)[0]
            finished = all(len(row) < self.decoding.max_new_tokens for row in rows)
            seconds = sum(len(clip) for clip in question.clips) / SAMPLE_RATE
            answers.append(Prediction(question.key, text, finished, seconds, question.meta, len(rows)))
        return answers

    def _prompts(self, owner: int, question: Question) -> tuple[list[_Prompt], list[float]]:
        turns = prompt_turns(question.meta, len(question.clips))
        if question.in_windows and len(question.clips) == 1 and len(turns) == 1:
            clip = question.clips[0]
            spans = self.windows.spans(len(clip))
            own = [_Prompt(owner, (clip[begin:end],), turns) for begin, end in spans]
            pairs = zip(spans, spans[1:], strict=False)
            return own, [(a_end - b_begin) / (b_end - b_begin) for (_, a_end), (b_begin, b_end) in pairs]
        return [_Prompt(owner, question.clips, turns)], []

    def _check(self, prompt: _Prompt) -> None:
        """Raise SampleError if the prompt is invalid, or if the prompt and an answer exceed the LLM's positions."""
        processor = self.loaded.processor
        try:
            num = self._count_tokens_of(prompt.turns)
        except ChatError as error:
            raise SampleError("unexpected", error.reason) from None
        except ConversationError as error:
            raise SampleError("unexpected", str(error)) from None
        except ValueError as error:
            has_placeholder = any(processor.placeholder in text for turn in prompt.turns for text in turn.texts)
            reason: Reason = "placeholder_in_text" if has_placeholder else "special_token_in_text"
            raise SampleError(reason, str(error)) from None
        num += sum(processor.count_audio_tokens(len(clip)) for clip in prompt.clips)
        limit = self.loaded.max_positions
        if num + self.decoding.max_new_tokens > limit:
            raise SampleError(
                "too_long",
                f"{num} tokens of prompt and {self.decoding.max_new_tokens} of answer exceed the {limit} positions of "
                "the LLM",
            )

    def _batches(self, prompts: Sequence[_Prompt]) -> list[list[int]]:
        """Return batches of indices of prompts of similar length, longest first."""
        order = sorted(range(len(prompts)), key=lambda i: (-prompts[i].num_samples, i))
        batches: list[list[int]] = []
        for index in order:
            longest = prompts[batches[-1][0]].num_samples if batches else 0
            full = not batches or len(batches[-1]) == self.decoding.batch_samples
            if full or (len(batches[-1]) + 1) * longest > num_samples(self.decoding.batch_sec):
                batches.append([])
            batches[-1].append(index)
        return batches

    def _ask(self, prompts: Sequence[_Prompt], progress: Progress) -> list[list[int]]:
        inputs = self.loaded.processor.inputs([p.turns for p in prompts], [p.clips for p in prompts])
        moved = {name: tensor.to(self.loaded.device) for name, tensor in inputs.items()}
        return decode(self.loaded, moved, self.decoding.max_new_tokens, self.decoding.beams, progress)
