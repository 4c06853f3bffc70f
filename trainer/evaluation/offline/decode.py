"""Batched text generation by greedy decoding or beam search. The cache of greedy decoding shrinks when answers end.

In shapes, B is the number of prompts, L the number of tokens in the longest prompt, H the LLM's width, G the number of
key-value heads and D the width of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from model.batch import Ragged
from model.hub.modeling import EarshotForCausalLM
from model.lengths import num_samples
from trainer.evaluation.offline.model import Loaded
from trainer.parallel.dispatch import CALL_COST_SAMPLES, group_by_length

Progress = Callable[[list[list[int]]], None]
"""A function that is called after every step of greedy decoding with the tokens of every answer so far. It may raise an
exception to stop the decoding."""
_COMPACT_SHARE = 0.25
"""The fraction of the sequences in a batch that must have ended before they are removed. Each removal copies the
cache."""
_ENCODE_SEC = 480.0
"""The largest amount of padded audio in one call of the encoders, in seconds. A longer clip is encoded in a separate
call."""


class RoomyLayer(DynamicLayer):
    """The cached keys and values of a layer, `[B, G, L, D]`, in preallocated memory.

    Appending a token does not copy the keys and values of earlier tokens.

    Args:
        max_tokens: The number of tokens for which memory is allocated.
    """

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self.max_tokens, self.num_tokens = max_tokens, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return views of all of them."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            batch, heads, _, width = key_states.shape
            self.keys = key_states.new_empty(batch, heads, self.max_tokens, width)
            self.values = value_states.new_empty(batch, heads, self.max_tokens, value_states.shape[-1])
            self.is_initialized = True
        assert self.keys is not None and self.values is not None
        end = self.num_tokens + key_states.shape[2]
        self.keys[:, :, self.num_tokens : end] = key_states
        self.values[:, :, self.num_tokens : end] = value_states
        self.num_tokens = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Return the number of cached tokens."""
        return self.num_tokens

    def keep(self, rows: Tensor) -> None:
        """Keep only the sequences with the indices `rows`."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]


@torch.inference_mode()
def decode(
    loaded: Loaded, inputs: dict[str, Tensor], max_new_tokens: int, beams: int = 1, progress: Progress | None = None
) -> list[list[int]]:
    """Generate an answer to every prompt.

    Args:
        loaded: The model.
        inputs: The output of the model's processor, on the model's device. Prompts are padded on the left.
        max_new_tokens: The largest number of tokens in an answer.
        beams: The number of beams; 1 selects greedy decoding, more select the beam search of transformers' `generate`.
        progress: A function that is called after every step of greedy decoding; None for none.

    Returns:
        The tokens of every answer, without the end token. An answer with `max_new_tokens` tokens was truncated.
    """
    ends = _ends(loaded.settings)
    if beams > 1:
        settings = copy.deepcopy(loaded.settings)
        settings.num_beams, settings.max_new_tokens = beams, max_new_tokens
        rows = loaded.model.generate(**inputs, generation_config=settings).tolist()
        return [_until(row, ends) for row in rows]
    return _greedy(loaded, inputs, max_new_tokens, ends, progress)


def _greedy(
    loaded: Loaded, inputs: dict[str, Tensor], max_new_tokens: int, ends: set[int], progress: Progress | None
) -> list[list[int]]:
    model, vocab_size = loaded.model, loaded.model.config.vocab_size
    mask, embedded = inputs["attention_mask"], _embed(model, inputs)
    num, length = mask.shape
    num_layers = model.config.text_config.num_hidden_layers
    layers = [RoomyLayer(length + max_new_tokens) for _ in range(num_layers)]
    cache = Cache(layers=[*layers])
    is_padded = bool((mask == 0).any())
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    next_positions = positions[:, -1:] + 1
    arguments: dict[str, Any] = {"inputs_embeds": embedded, "position_ids": positions}
    found: list[list[int]] = [[] for _ in range(num)]
    rows = list(range(num))
    while True:
        logits = model.llm(
            **arguments,
            attention_mask=mask if is_padded else None,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        # An LLM may have more embedding rows than its tokenizer has tokens.
        chosen = logits[:, -1, :vocab_size].argmax(-1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            # A row of -1 marks a sequence that has ended but is still in the batch.
            if row >= 0 and token not in ends:
                found[row].append(token)
        if progress is not None:
            progress(found)
        rows = [
            row if row >= 0 and token not in ends and len(found[row]) < max_new_tokens else -1
            for row, token in zip(rows, chosen.tolist(), strict=True)
        ]
        active = [i for i, row in enumerate(rows) if row >= 0]
        if not active:
            return found
        if len(rows) - len(active) > _COMPACT_SHARE * len(rows):
            kept = torch.tensor(active, device=mask.device)
            for layer in layers:
                layer.keep(kept)
            rows = [rows[i] for i in active]
            chosen, mask, next_positions = chosen[kept], mask[kept], next_positions[kept]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        arguments = {"input_ids": chosen[:, None], "position_ids": next_positions}
        next_positions = next_positions + 1


def _embed(model: EarshotForCausalLM, inputs: dict[str, Tensor]) -> Tensor:
    """Return the LLM's input embeddings, `[B, L, H]`. Clips of different lengths are encoded in separate calls."""
    text = model.get_input_embeddings()(inputs["input_ids"])
    if "audio_values" not in inputs:
        return text
    clips = Ragged(inputs["audio_values"], tuple(inputs["audio_lengths"].tolist()))
    instructions = Ragged(inputs["instruction_ids"], tuple(inputs["instruction_lengths"].tolist()))
    nothing = inputs["input_ids"].new_zeros(0)
    budget, call_cost = num_samples(_ENCODE_SEC), CALL_COST_SAMPLES[text.device.type]
    embedded: list[Tensor] = [nothing] * len(clips)
    for group in group_by_length(clips.lengths, budget, call_cost, model.audio.windowing):
        found = model.audio(clips.select(group), instructions.select(group))
        for index, audio_tokens in zip(group, found.embeddings.split(), strict=True):
            embedded[index] = audio_tokens
    return text.masked_scatter(inputs["audio_mask"][..., None], torch.cat(embedded).to(text.dtype))


def _ends(settings: Any) -> set[int]:
    ends = settings.eos_token_id
    return set(ends) if isinstance(ends, list | tuple) else {ends}


def _until(row: list[int], ends: set[int]) -> list[int]:
    return next((row[:i] for i, token in enumerate(row) if token in ends), row)
