"""Encoding of one sample from its decoded clips and metadata.

The prompt contains one placeholder per audio token, and only the answer has labels. The results are NumPy arrays, since
decoding processes do not load torch; `trainer.data.loader` converts them to tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.lengths import TokenRate
from model.prompt import fill
from trainer.data.decode import SampleError
from trainer.data.tokenizer import PlaceholderInText, Tokenizer
from trainer.scoring.tasks import TASKS

Clip = NDArray[np.float32]
"""A waveform: `[T]` float32 at 16 kHz."""


@dataclass(frozen=True)
class EncodedSample:
    """A sample as NumPy arrays, which `loader.to_sample` converts to a `model.batch.Sample`. L is the number of
    tokens."""

    key: str
    meta: dict[str, Any]
    clips: tuple[Clip, ...]
    token_ids: NDArray[np.int64]
    """`[L]`: the prompt with placeholders, then the answer without its end token. For evaluation, the prompt alone."""
    audio_mask: NDArray[np.bool_]
    """`[L]`: true at placeholders."""
    target_ids: NDArray[np.int64]
    """The answer and the end token; the last token of the prompt predicts the first of them. Empty for evaluation."""
    instruction_ids: NDArray[np.int64]
    """The tokens of the instruction alone."""
    texts: dict[str, NDArray[np.int64]]
    """The tokens of further fields of the manifest, for losses; a field that the sample lacks is absent. Empty for
    evaluation."""
    is_transcription: bool
    """True if the answer is the transcript of the audio."""


def make_sample(
    key: str,
    metadata: dict[str, Any],
    clips: tuple[Clip, ...],
    tokenizer: Tokenizer,
    rate: TokenRate,
    *,
    text_fields: tuple[str, ...] = (),
    evaluate: bool = False,
) -> EncodedSample:
    """Tokenise one sample.

    Args:
        key: key of the sample, unique within its dataset.
        metadata: fields of the manifest, checked by `decode.check_metadata`.
        clips: the decoded clips.
        tokenizer: tokenizer of prompt and answer.
        rate: the adapter's rule for the number of placeholders per clip.
        text_fields: further fields of the metadata to tokenize; a field that is absent or not a string is skipped.
        evaluate: if true, encode the prompt alone, after which generation starts.

    Raises:
        SampleError: If the task needs audio and there is none (`empty`), the sample's text contains the placeholder
            token (`placeholder_in_text`), or the prompt has no token (`wrong_type`).
    """
    task = TASKS[metadata["task"]]
    if task.needs_audio and not clips:
        raise SampleError("empty", f"no audio, which the task {task.name} needs")
    try:
        pieces = tokenizer.prompt(metadata["instruction"], len(clips))
        answer = tokenizer.encode(metadata["answer"])
        instruction = tokenizer.encode(metadata["instruction"])
        given = {name: metadata.get(name) for name in (() if evaluate else text_fields)}
        texts = {name: tokenizer.encode(text) for name, text in given.items() if isinstance(text, str)}
    except PlaceholderInText as error:
        raise SampleError("placeholder_in_text", str(error)) from None
    ids, mask = fill(pieces, [rate.tokens_of_samples(c.shape[0]) for c in clips], tokenizer.placeholder_id)
    if not ids:
        raise SampleError("wrong_type", "prompt is empty: no instruction, and the tokenizer has no start token")
    targets: list[int] = []
    if not evaluate:
        ids, mask, targets = ids + answer, mask + [False] * len(answer), [*answer, tokenizer.eos_id]
    return EncodedSample(
        key=key,
        meta=metadata,
        clips=clips,
        token_ids=np.array(ids, dtype=np.int64),
        audio_mask=np.array(mask, dtype=np.bool_),
        target_ids=np.array(targets, dtype=np.int64),
        instruction_ids=np.array(instruction, dtype=np.int64),
        texts={name: np.array(tokens, dtype=np.int64) for name, tokens in texts.items()},
        is_transcription=task.is_transcription,
    )
