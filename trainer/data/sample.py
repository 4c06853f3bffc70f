"""Decoded clips and metadata → `model.batch.Sample`: placeholders counted, labels shifted, loss on the answer only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.batch import IGNORE, Sample
from model.lengths import slots_of_samples
from model.prompt import fill
from trainer.data.decode import SampleError
from trainer.data.tokenizer import PlaceholderInText, Tokenizer


def make_sample(
    key: str,
    metadata: dict[str, Any],
    clips: tuple[Tensor, ...],
    tokenizer: Tokenizer,
    strides: tuple[int, ...],
    *,
    ctc: bool,
    evaluate: bool = False,
) -> Sample:
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
    prompt, mask = fill(pieces, [slots_of_samples(c.shape[0], strides) for c in clips], tokenizer.placeholder_id)
    if not prompt:
        raise SampleError("wrong_type", "instruction is empty, and the tokenizer has no token to begin with")
    if evaluate:
        ids, labels = prompt, [IGNORE] * len(prompt)
    else:
        # Position i predicts token i + 1: the prompt's last token predicts the answer's first.
        ids = prompt + answer
        labels = [IGNORE] * (len(prompt) - 1) + answer + [tokenizer.eos_id]
        mask += [False] * len(answer)
    aligned = ctc and not evaluate and metadata["task"] == "asr" and len(clips) == 1
    return Sample(
        key=key,
        task=metadata["task"],
        clips=clips,
        token_ids=torch.tensor(ids, dtype=torch.int64),
        audio_mask=torch.tensor(mask, dtype=torch.bool),
        labels=torch.tensor(labels, dtype=torch.int64),
        prompt_ids=torch.tensor(instruction, dtype=torch.int64),
        ctc_targets=torch.tensor(answer if aligned else [], dtype=torch.int64),
        meta=metadata,
    )
