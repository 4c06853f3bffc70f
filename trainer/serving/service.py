"""A model in memory that answers one request after another."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.router import Routing
from trainer.data.errors import SampleError
from trainer.data.metadata import prompt_turns
from trainer.evaluation.offline.answer import Answerer, Clip, Decoding, Question, Windows
from trainer.evaluation.offline.model import DTYPES, default_dtype, find_model, load_model

TRANSCRIBE = "Transcribe the speech."
_MOST_CHARS_PER_TOKEN = 64
"""The largest number of characters per position of the LLM. Longer text is refused before it is tokenized."""

_SETTLED_CHARS = 4
"""The length of a word at which its leading space is certain to remain. Some tokenizers remove the space before
contractions such as `'ve`, which have at most three characters."""


@dataclass(frozen=True)
class Reply:
    """The answer to a request."""

    text: str
    finished: bool
    """False if the answer was truncated at the maximum length."""
    audio_sec: float
    num_windows: int
    """The number of windows into which a long recording was cut."""
    prompt_tokens: int
    """The number of tokens of the prompt, including audio tokens."""
    answer_tokens: int
    """The number of tokens of `text` if it is tokenized again."""
    compute_sec: float
    routing: tuple[dict[str, dict[str, float]], ...]
    """For each clip or window in the order of encoding: gate → name of each chosen encoder expert → its weight. The
    tuple is empty for a model without encoder experts."""

    @property
    def details(self) -> dict[str, Any]:
        """The fields of the reply that OpenAI's format lacks, as JSON."""
        return {
            "audio_sec": round(self.audio_sec, 3),
            "compute_sec": round(self.compute_sec, 3),
            "windows": self.num_windows,
            "finished": self.finished,
            "routing": list(self.routing),
        }


class Stopped(Exception):
    """Raised when an answer is no longer wanted."""


class Service:
    """A model that answers requests, one at a time. Its methods may be called from any thread.

    Args:
        url: An exported folder, a checkpoint, or a run.
        max_new_tokens: The largest number of tokens in an answer; None for the value of the training run.
        device: The device of the model; None for a GPU if there is one, and the CPU otherwise.

    Raises:
        UserError: If there is no model at `url`, or it is damaged.
    """

    def __init__(self, url: str | Path, max_new_tokens: int | None = None, device: torch.device | None = None) -> None:
        origin = find_model(url)
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.name, self.created_sec = origin.name, int(time.time())
        self.max_new_tokens = max_new_tokens or origin.max_new_tokens
        self._loaded = load_model(origin, DTYPES[default_dtype(device)], device)
        self.max_chars = _MOST_CHARS_PER_TOKEN * self._loaded.max_positions
        self._windows = Windows.of(origin, None, None)
        self._lock = threading.Lock()
        self._routing: list[Routing] = []
        self._loaded.model.audio.register_forward_hook(self._note)
        config = self._loaded.model.audio.config
        self.experts = tuple(expert.name for expert in config.experts)

    def answer(
        self,
        clips: Sequence[Clip],
        fields: dict[str, Any],
        max_new_tokens: int | None = None,
        emit: Callable[[str], None] | None = None,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """Answer a request.

        Args:
            clips: The waveforms.
            fields: The manifest fields of the request: `instruction`, or `messages` that end with an arbitrary answer.
            max_new_tokens: The largest number of tokens in the answer. It is limited to the value of the service, which
                is also the default.
            emit: A function that is called with each part of the text when it is generated. Together, the parts are the
                whole text. A transcript of several windows is one part. Pass None if no parts are needed.
            unwanted: A function that says whether the answer is no longer wanted. It is called after every token.

        Raises:
            Stopped: If `unwanted` returned True.
            SampleError: If the model cannot use the request, for example because the prompt is too long.
        """
        longest = min(max_new_tokens or self.max_new_tokens, self.max_new_tokens)
        decoding = Decoding(longest, beams=1, batch_samples=16, batch_sec=480.0)
        in_windows = fields.get("instruction") == TRANSCRIBE
        text = _Text(emit)

        def progress(tokens: list[int] | None) -> None:
            if unwanted():
                raise Stopped
            if emit is not None and tokens is not None:
                text.extend(self._loaded.processor.batch_decode([tokens])[0])

        with self._lock:
            self._routing.clear()
            start = time.monotonic()
            (found,) = Answerer(self._loaded, self._windows, decoding)(
                [Question("request", tuple(clips), fields, in_windows)], progress
            )
            seconds = time.monotonic() - start
            routing = tuple(row for one in self._routing for row in self._weights(one))
        if isinstance(found, SampleError):
            raise found
        text.finish(found.hypothesis)
        processor = self._loaded.processor
        asked = processor.count_tokens_of(prompt_turns(fields, len(clips)))
        asked += sum(processor.count_audio_tokens(len(clip)) for clip in clips)
        said = len(processor.tokenizer.encode(found.hypothesis, add_special_tokens=False))
        return Reply(
            found.hypothesis, found.finished, found.audio_sec, found.num_windows, asked, said, seconds, routing
        )

    def _note(self, _module: Any, _inputs: Any, output: Any) -> None:
        if output.routing is not None:
            self._routing.append(output.routing)

    def _weights(self, routing: Routing) -> list[dict[str, dict[str, float]]]:
        probs, chosen = routing.on_host
        return [
            {
                gate: {name: round(float(p), 4) for name, p, here in zip(self.experts, row, mask, strict=True) if here}
                for gate, row, mask in zip(routing.gates, rows, masks, strict=True)
            }
            for rows, masks in zip(probs, chosen, strict=True)
        ]


class _Text:
    """A growing text. A new part is emitted as soon as later tokens cannot change it."""

    def __init__(self, emit: Callable[[str], None] | None) -> None:
        self._emit, self._emitted = emit, ""

    def extend(self, text: str) -> None:
        """Emit the new part of `text` that later tokens cannot change.

        A character whose bytes are incomplete is not emitted yet. Neither is the last word before it has
        `_SETTLED_CHARS` characters, because some tokenizers remove the space before punctuation and contractions.
        """
        word = text.rfind(" ")
        if len(text) - word - 1 < _SETTLED_CHARS:
            text = text[: max(word, 0)]
        if not text.endswith("\ufffd") and text.startswith(self._emitted):
            self._send(text)

    def finish(self, text: str) -> None:
        """Emit the rest of the whole text.

        With byte fallback in the tokenizer, bytes that are not valid UTF-8 may change a character that was already
        emitted. The text after the unchanged beginning is then emitted again.
        """
        self._emitted = os.path.commonprefix((text, self._emitted))
        self._send(text)

    def _send(self, text: str) -> None:
        part, self._emitted = text[len(self._emitted) :], text
        if part and self._emit is not None:
            self._emit(part)
