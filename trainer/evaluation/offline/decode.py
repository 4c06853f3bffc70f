"""Decoding an exported model for many prompts at once: greedy with a cache that shrinks as sequences end, or beams.

Shapes: B prompts, L tokens of the longest, H width of the LLM, G key-value heads, D width of a head.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from model.batch import Ragged
from model.hub.modeling import EarshotForCausalLM
from model.lengths import num_samples
from trainer.evaluation.offline.model import Loaded
from trainer.parallel.dispatch import CALL_COST_SAMPLES, group_by_length

_GONE_SHARE = 0.25
"""Part of a batch's sequences that must have ended before the others are moved together: moving costs a copy."""


_ENCODE_SEC = 480.0
"""Padded audio of one call of the encoders (a single longer clip is a call of its own)."""


class RoomyLayer(DynamicLayer):
    """A layer's keys and values, `[B, G, L, D]`, in memory that was taken once: a token costs no copy of the rest."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self.max_tokens, self.num_tokens = max_tokens, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, with the new ones at the end, as views."""
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
        """Tokens so far."""
        return self.num_tokens

    def keep(self, rows: Tensor) -> None:
        """Only the sequences `rows` stay."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]


@torch.inference_mode()
def decode(loaded: Loaded, inputs: dict[str, Tensor], max_new_tokens: int, beams: int = 1) -> list[list[int]]:
    """New tokens of every prompt without its end token. One that has `max_new_tokens` of them did not end by itself.

    Args:
        loaded: the model.
        inputs: of its processor, on its device: prompts padded on the left, and their audio.
        max_new_tokens: per prompt.
        beams: 1: the likeliest token each time; more: beam search, as transformers' `generate` does it.
    """
    ends = _ends(loaded.settings)
    if beams > 1:
        settings = copy.deepcopy(loaded.settings)
        settings.num_beams, settings.max_new_tokens = beams, max_new_tokens
        rows = loaded.model.generate(**inputs, generation_config=settings).tolist()
        return [_until(row, ends) for row in rows]
    return _greedy(loaded, inputs, max_new_tokens, ends)


def _greedy(loaded: Loaded, inputs: dict[str, Tensor], max_new_tokens: int, ends: set[int]) -> list[list[int]]:
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
        # An LLM may have more rows than its tokenizer has tokens.
        chosen = logits[:, -1, :vocab_size].argmax(-1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            # -1: a sequence that has ended and waits for others
            if row >= 0 and token not in ends:
                found[row].append(token)
        rows = [
            row if row >= 0 and token not in ends and len(found[row]) < max_new_tokens else -1
            for row, token in zip(rows, chosen.tolist(), strict=True)
        ]
        going = [i for i, row in enumerate(rows) if row >= 0]
        if not going:
            return found
        if len(rows) - len(going) > _GONE_SHARE * len(rows):
            kept = torch.tensor(going, device=mask.device)
            for layer in layers:
                layer.keep(kept)
            rows = [rows[i] for i in going]
            chosen, mask, next_positions = chosen[kept], mask[kept], next_positions[kept]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        arguments = {"input_ids": chosen[:, None], "position_ids": next_positions}
        next_positions = next_positions + 1


def _embed(model: EarshotForCausalLM, inputs: dict[str, Tensor]) -> Tensor:
    """What the LLM reads, [B, L, H], as the model embeds it, but clips of unequal length are encoded apart."""
    text = model.get_input_embeddings()(inputs["input_ids"])
    if "audio_values" not in inputs:
        return text
    clips = Ragged(inputs["audio_values"], tuple(inputs["audio_lengths"].tolist()))
    instructions = Ragged(inputs["instruction_ids"], tuple(inputs["instruction_lengths"].tolist()))
    nothing = inputs["input_ids"].new_zeros(0)
    budget, call_cost = num_samples(_ENCODE_SEC), CALL_COST_SAMPLES[text.device.type]
    embedded: list[Tensor] = [nothing] * len(clips)
    for group in group_by_length(clips.lengths, budget, call_cost, model.audio.windowing):
        found = model.audio(clips.select(group), instructions.select(group), Ragged(nothing, (0,) * len(group)))
        for place, audio_tokens in zip(group, found.embeddings.split(), strict=True):
            embedded[place] = audio_tokens
    return text.masked_scatter(inputs["audio_mask"][..., None], torch.cat(embedded).to(text.dtype))


def _ends(settings: Any) -> set[int]:
    ends = settings.eos_token_id
    return set(ends) if isinstance(ends, list | tuple) else {ends}


def _until(row: list[int], ends: set[int]) -> list[int]:
    return next((row[:i] for i, token in enumerate(row) if token in ends), row)
