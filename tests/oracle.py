"""Greedy decoding with the single-process model, without a cache, packing or ranks."""

from __future__ import annotations

from dataclasses import replace

import torch

from model.batch import IGNORE, Batch, Sample
from model.speech_llm import SpeechLLM


def prompt_of(sample: Sample) -> Sample:
    """Return the sample without its answer."""
    length = int((sample.labels != IGNORE).nonzero()[0]) + 1
    ids, mask = sample.token_ids[:length], sample.audio_mask[:length]
    return replace(sample, token_ids=ids, audio_mask=mask, labels=torch.full((length,), IGNORE))


@torch.no_grad()
def greedy(oracle: SpeechLLM, sample: Sample, eos_id: int, vocab_size: int, max_new_tokens: int) -> list[int]:
    """Return the ids of the tokens that the model generates after a sample's prompt, without the end token."""
    found: list[int] = []
    audio = oracle.embed_audio(Batch((sample,)))
    while len(found) < max_new_tokens:
        more = torch.tensor(found, dtype=torch.int64)
        ids = torch.cat([sample.token_ids, more])
        mask = torch.cat([sample.audio_mask, torch.zeros(len(found), dtype=torch.bool)])
        whole = replace(sample, token_ids=ids, audio_mask=mask, labels=torch.full((len(ids),), IGNORE))
        token = int(oracle.logits(Batch((whole,)), audio)[0, -1, :vocab_size].argmax())
        if token == eos_id:
            break
        found.append(token)
    return found
