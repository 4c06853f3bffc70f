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
from trainer.data.errors import SampleError
from trainer.data.tokenizer import Tokenizer
from trainer.scoring.tasks import TASKS

_MAX_TOKEN_CHARACTERS = 64
"""The number of characters per token from which a text is too long without counting its tokens."""

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
    max_tokens: int | None = None,
    evaluate: bool = False,
) -> EncodedSample:
    """Tokenise one sample.

    Args:
        key: key of the sample, unique within its dataset.
        metadata: fields of the manifest, checked by `decode.check_metadata`.
        clips: the decoded clips.
        tokenizer: tokenizer of prompt and answer.
        rate: the adapter's rule for the number of placeholders per clip.
        text_fields: further fields of the metadata to tokenize; a field that is absent or null is skipped.
        max_tokens: largest number of tokens of prompt and answer, audio tokens included; None for no limit.
        evaluate: if true, encode the prompt alone, after which generation starts.

    Raises:
        SampleError: If the sample's text contains the placeholder token (`placeholder_in_text`) or another special
            token (`special_token_in_text`), a further field is not text or the prompt has no token (`wrong_type`), or
            the sample is longer than `max_tokens` (`too_many_tokens`).
    """
    given = {name: metadata[name] for name in (() if evaluate else text_fields) if metadata.get(name) is not None}
    _check_texts(metadata, given, max_tokens)
    pieces = tokenizer.prompt(metadata["instruction"], len(clips))
    answer = tokenizer.encode(metadata["answer"])
    instruction = tokenizer.encode(metadata["instruction"])
    texts = {name: tokenizer.encode(text) for name, text in given.items()}
    ids, mask = fill(pieces, [rate.tokens_of_samples(c.shape[0]) for c in clips], tokenizer.placeholder_id)
    if not ids:
        raise SampleError("wrong_type", "prompt is empty: no instruction, and the tokenizer has no start token")
    if max_tokens is not None and len(ids) + len(answer) > max_tokens:
        raise SampleError(
            "too_many_tokens",
            f"{len(ids)} tokens of prompt and {len(answer)} of answer, the limit is {max_tokens}",
        )
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
        is_transcription=TASKS[metadata["task"]].is_transcription,
    )


def _check_texts(metadata: dict[str, Any], given: dict[str, Any], max_tokens: int | None) -> None:
    """Check the texts of a sample before they are tokenized, which takes long if they are far too long.

    Raises:
        SampleError: If a further field is not text (`wrong_type`), or a text is too long (`too_many_tokens`).
    """
    for name, text in {"instruction": metadata["instruction"], "answer": metadata["answer"], **given}.items():
        if not isinstance(text, str):
            raise SampleError("wrong_type", f"{name} = {ascii(text)[:80]}, but must be text")
        if max_tokens is not None and len(text) > _MAX_TOKEN_CHARACTERS * max_tokens:
            raise SampleError("too_many_tokens", f"{name} has {len(text)} characters, the limit is {max_tokens} tokens")
