"""Encode one sample from its decoded clips and metadata.

The prompt contains one placeholder per audio token, and only answers have labels. The results are NumPy arrays, since
decoding processes do not load torch; `trainer.data.loader` converts them to tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model.conversation import Turn, clip_texts
from model.errors import UserError
from model.lengths import TokenRate
from model.pieces import Pieces
from model.prompt import cut, fill
from trainer.data.errors import SampleError
from trainer.data.metadata import turns_of
from trainer.data.tokenizer import Tokenizer
from trainer.scoring.tasks import TASKS

_MAX_TOKEN_CHARACTERS = 64
"""The largest number of characters per allowed token. Longer text is rejected before it is tokenized."""

IGNORE = -100
"""The label of positions without a loss. It equals `model.batch.IGNORE`, which is not imported here since it loads
torch."""

Clip = NDArray[np.float32]
"""A waveform: `[T]` float32 at 16 kHz."""


@dataclass(frozen=True)
class EncodedSample:
    """A tokenized sample as NumPy arrays. `loader.to_sample` converts it to a `model.batch.Sample`.

    L is the number of tokens.
    """

    key: str
    meta: dict[str, Any]
    clips: tuple[Clip, ...]
    token_ids: NDArray[np.int64]
    """`[L]`: the prompt with placeholders, followed by the answer without its end token. In a conversation, the prompt
    includes all earlier turns. A sample for evaluation has only the prompt."""
    audio_mask: NDArray[np.bool_]
    """`[L]`: true at placeholders."""
    labels: NDArray[np.int64]
    """`[L]`: the next token, at each position that predicts a token of an answer with a loss. For each such answer, the
    first of these positions is the last token of its prompt, and the last one predicts the end token. All other labels
    are `IGNORE`. In a sample for evaluation, all labels are `IGNORE`."""
    instruction_ids: NDArray[np.int64]
    """The tokens of the instruction alone, or of the last question of a conversation."""
    clip_instruction_ids: tuple[NDArray[np.int64], ...]
    """For each clip, the tokens of the instruction in the turn that contains the clip."""
    texts: dict[str, NDArray[np.int64]]
    """Name → tokens of the additional fields of the manifest that losses need. A field that the sample lacks is absent.
    The mapping is empty for evaluation."""
    is_transcription: bool
    """Whether the sample has a single answer, which is the transcript of the audio."""
    answer: str
    """The answer; in a conversation, the last one. It is empty for evaluation."""
    pieces: NDArray[np.int64]
    """`[C]`: the numbers of the answer's pieces (`model.pieces`); empty if no loss reads them."""


def make_sample(
    key: str,
    metadata: dict[str, Any],
    clips: tuple[Clip, ...],
    tokenizer: Tokenizer,
    rate: TokenRate,
    *,
    text_fields: tuple[str, ...] = (),
    pieces: Pieces | None = None,
    max_tokens: int | None = None,
    loss_turns: Literal["all", "last"] = "all",
    evaluate: bool = False,
) -> EncodedSample:
    """Tokenize one sample.

    Args:
        key: The key of the sample, unique within its dataset.
        metadata: The fields of the manifest, checked by `check_metadata`.
        clips: The decoded clips.
        tokenizer: The tokenizer of the prompt and the answers.
        rate: The adapter's rule for the number of placeholders per clip.
        text_fields: The additional fields of the metadata to tokenize. A field that is absent or null is ignored.
        pieces: The pieces into which transcripts are divided for a CTC head; None if there is no such head.
        max_tokens: The largest number of tokens of prompt and answer, audio tokens included; None for no limit.
        loss_turns: The answers of a conversation that have labels. The field `loss` of a message overrides it.
        evaluate: If true, only the prompt is encoded, from which the model generates the answer.

    Raises:
        SampleError: If the sample's text contains the placeholder token (`placeholder_in_text`) or another special
            token (`special_token_in_text`), an additional field is not text or the prompt has no token (`wrong_type`),
            the sample is longer than `max_tokens` (`too_many_tokens`), or no answer has labels (`bad_messages`).
        UserError: If earlier answers of a conversation should have labels, but the chat template changes them.
    """
    given = {name: metadata[name] for name in (() if evaluate else text_fields) if metadata.get(name) is not None}
    turns = turns_of(metadata, len(clips))
    named = {f"message {n}": turn.text for n, turn in enumerate(turns, 1)} if len(turns) > 2 else {}
    named = named or {"instruction": turns[0].text, "answer": turns[1].text}
    _check_lengths({**named, **given}, max_tokens)
    segments = tokenizer.segments(turns[:-1])
    encoded = {text: tokenizer.encode(text) for text in dict.fromkeys((*named.values(), *given.values()))}
    answer = encoded[turns[-1].text]
    counts = [rate.tokens_of_samples(c.shape[0]) for c in clips]
    ids, mask = fill(cut([t for s in segments for t in s], tokenizer.placeholder_id), counts, tokenizer.placeholder_id)
    if not ids:
        raise SampleError(
            "wrong_type", "the prompt is empty: there is no instruction, and the tokenizer has no start token"
        )
    if max_tokens is not None and len(ids) + len(answer) > max_tokens:
        raise SampleError(
            "too_many_tokens",
            f"the prompt has {len(ids)} tokens and the answer {len(answer)}, but the limit is {max_tokens}",
        )
    labels = [IGNORE] * len(ids)
    if not evaluate:
        ids, mask, labels = ids + answer, mask + [False] * len(answer), labels + [IGNORE] * len(answer)
        end_id = tokenizer.eos_id if metadata.get("messages") is None else tokenizer.turn_end_id
        learned = _learned_answers(turns, loss_turns, len(segments), tokenizer)
        for start, tokens in _spans([*segments, answer], counts, tokenizer.placeholder_id, learned):
            labels[start - 1 : start + len(tokens)] = [*tokens, end_id]
    is_transcription = TASKS[metadata["task"]].is_transcription and len(turns) == 2
    divided = pieces.encode(turns[-1].text) if pieces is not None and is_transcription and not evaluate else []
    return EncodedSample(
        key=key,
        meta=metadata,
        clips=clips,
        token_ids=np.array(ids, dtype=np.int64),
        audio_mask=np.array(mask, dtype=np.bool_),
        labels=np.array(labels, dtype=np.int64),
        instruction_ids=np.array(encoded[turns[-2].text], dtype=np.int64),
        clip_instruction_ids=tuple(np.array(encoded[text], dtype=np.int64) for text in clip_texts(turns)),
        texts={name: np.array(encoded[text], dtype=np.int64) for name, text in given.items()},
        is_transcription=is_transcription,
        answer="" if evaluate else turns[-1].text,
        pieces=np.array(divided, dtype=np.int64),
    )


def earlier_answers_error(tokenizer: Tokenizer, loss_turns: str) -> UserError:
    """Return the error for earlier answers that should have labels although the chat template changes them."""
    return UserError(
        f"data.loss_turns = {loss_turns}: the chat template of {tokenizer.config.path or 'the tokenizer'} changes "
        "earlier answers of a conversation, so only the last one can have labels; set data.loss_turns: last (and "
        "remove loss: true from earlier messages), or data.tokenizer.chat_template: false"
    )


def _learned_answers(
    turns: Sequence[Turn], loss_turns: Literal["all", "last"], num_segments: int, tokenizer: Tokenizer
) -> list[bool]:
    """Return, for each answer that is a separate segment, whether it has labels.

    Raises:
        SampleError: If no answer has labels (`bad_messages`), or the chat template changes an earlier answer that
            should have labels (`unexpected`).
        UserError: If the chat template changes all earlier answers.
    """
    answers = [turn for turn in turns if turn.role == "assistant"]
    wanted = [loss_turns == "all" if turn.loss is None else turn.loss for turn in answers]
    wanted[-1] = answers[-1].loss is not False
    if not any(wanted):
        raise SampleError("bad_messages", "no answer has a loss; remove loss: false from one of them")
    if num_segments == 1 < len(answers):
        if not any(wanted[:-1]):
            return wanted[-1:]
        if not tokenizer.keeps_answers:
            raise earlier_answers_error(tokenizer, loss_turns)
        raise SampleError("unexpected", "the chat template changes an earlier answer, which therefore has no labels")
    return wanted


def _spans(
    segments: Sequence[Sequence[int]], audio_tokens: Sequence[int], placeholder_id: int, learned: Sequence[bool]
) -> Iterator[tuple[int, Sequence[int]]]:
    """Yield the first position and the tokens of each answer with labels. Every second segment is an answer."""
    start, used = 0, 0
    for number, segment in enumerate(segments):
        if number % 2 and learned[number // 2]:
            yield start, segment
        num_clips = segment.count(placeholder_id) if number % 2 == 0 else 0
        start += len(segment) - num_clips + sum(audio_tokens[used : used + num_clips])
        used += num_clips


def _check_lengths(texts: dict[str, Any], max_tokens: int | None) -> None:
    """Check the text of a sample before it is tokenized, because tokenizing very long text takes a long time.

    Raises:
        SampleError: If a value is not text (`wrong_type`) or is too long (`too_many_tokens`).
    """
    for name, text in texts.items():
        if not isinstance(text, str):
            raise SampleError("wrong_type", f"{name} = {ascii(text)[:80]}, but must be text")
        if max_tokens is not None and len(text) > _MAX_TOKEN_CHARACTERS * max_tokens:
            raise SampleError(
                "too_many_tokens", f"{name} has {len(text)} characters, but the limit is {max_tokens} tokens"
            )
