"""Decoded clips and metadata → one sample: placeholders counted, labels shifted, loss on the answer only.

Arrays only: the processes that decode do not load torch. `trainer.data.loader` makes tensors of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.lengths import audio_tokens_of_samples
from model.prompt import fill
from trainer.data.decode import SampleError
from trainer.data.tokenizer import PlaceholderInText, Tokenizer

Clip = NDArray[np.float32]
"""`[T]`, 16 kHz."""


@dataclass(frozen=True)
class EncodedSample:
    """What `model.batch.Sample` is made of; L tokens."""

    key: str
    meta: dict[str, Any]
    clips: tuple[Clip, ...]
    token_ids: NDArray[np.int64]
    """[L] prompt with placeholders, then the answer without its end token (evaluation: the prompt alone)."""
    audio_mask: NDArray[np.bool_]
    """[L] true at placeholders."""
    target_ids: NDArray[np.int64]
    """Answer and end token; the first is predicted by the prompt's last token. Empty for evaluation."""
    instruction_ids: NDArray[np.int64]
    ctc: bool
    """Whether the answer is also the CTC target."""


def make_sample(
    key: str,
    metadata: dict[str, Any],
    clips: tuple[Clip, ...],
    tokenizer: Tokenizer,
    strides: tuple[int, ...],
    *,
    ctc: bool,
    evaluate: bool = False,
) -> EncodedSample:
    """Tokenise one sample.

    Args:
        key: unique within its set.
        metadata: the manifest's fields; needs task, instruction and answer (see `decode.check_metadata`).
        clips: each `[T]` float32, 16 kHz.
        tokenizer: gives prompt and answer tokens.
        strides: of the adapter; they decide how many placeholders a clip takes.
        ctc: give ASR samples with exactly one clip their answer as CTC targets.
        evaluate: the prompt alone, nothing labelled; generation starts after it.

    Raises:
        SampleError: `placeholder_in_text` if the sample's own text contains the placeholder token, `wrong_type` if
            there is nothing to begin with.
    """
    try:
        pieces = tokenizer.prompt(metadata["instruction"], len(clips))
        answer = tokenizer.encode(metadata["answer"])
        instruction = tokenizer.encode(metadata["instruction"])
    except PlaceholderInText as error:
        raise SampleError("placeholder_in_text", str(error)) from None
    ids, mask = fill(pieces, [audio_tokens_of_samples(c.shape[0], strides) for c in clips], tokenizer.placeholder_id)
    if not ids:
        raise SampleError("wrong_type", "instruction is empty, and the tokenizer has no token to begin with")
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
        ctc=ctc and not evaluate and metadata["task"] == "asr" and len(clips) == 1,
    )
