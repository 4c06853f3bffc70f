"""Conversations in the formats of OpenAI, Qwen2-Audio, transformers and ms-swift, which are JSON with `messages`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from model.conversation import AUDIO_TAG
from trainer.importers.formats.turns import Message, audio_of, fields_of_messages
from trainer.importers.row import Row, RowError
from trainer.importers.source import Source, short

_AUDIO_TYPES = ("audio", "audio_url", "input_audio")


def rows(source: Source) -> Iterator[Row]:
    """Yield the conversations in one file, or in all JSON files in a folder.

    The content of a message is text, or a list of parts. `audios` or `audio` contains the clips for the tags `<audio>`.
    ms-swift's fields `query`, `response`, `history` and `system`, and alpaca's fields `instruction`, `input` and
    `output` are also read.
    """
    for path in source.files("*.jsonl", "*.json", "*.jsonl.gz", "*.json.gz"):
        for row in source.objects(path):
            try:
                yield row if row.error else Row(row.where, _converted(dict(row.fields)))
            except RowError as error:
                yield Row(row.where, error=error)


def _converted(fields: dict[str, Any]) -> dict[str, Any]:
    listed = fields.pop("audios", None)
    single = fields.pop("audio", None)
    listed = single if listed is None else listed
    audio = [audio_of(item) for item in (listed if isinstance(listed, list) else [] if listed is None else [listed])]
    messages = fields.pop("messages", None)
    if messages is None:
        turns = alpaca_turns(fields)
    elif isinstance(messages, list):
        turns, inner = [], []
        for message in messages:
            turn, clips = _turn(message)
            turns.append(turn)
            inner += clips
        if inner and audio:
            raise RowError("wrong_type", "audio is given in the messages and also in the field audios")
        audio = inner or audio
    else:
        raise RowError("wrong_type", f"messages = {short(messages)}, but must be a list")
    return {**fields, **fields_of_messages(turns, audio)}


def alpaca_turns(fields: dict[str, Any]) -> list[Message]:
    """Remove the fields in ms-swift's or alpaca's format, and return the messages that they describe.

    Raises:
        RowError: If there is no question or no answer.
    """
    system, history = fields.pop("system", None), fields.pop("history", None) or []
    question = fields.pop("query", None)
    if question is None:
        parts = [fields.pop("instruction", None), fields.pop("input", None)]
        question = "\n".join(p for p in parts if isinstance(p, str) and p)
    answer = fields.pop("response", None)
    answer = fields.pop("output", None) if answer is None else answer
    if not isinstance(question, str) or not isinstance(answer, str):
        raise RowError(
            "wrong_type",
            "there are no messages, no query with response, and no instruction with output "
            f"(the other fields are {short(list(fields))})",
        )
    turns = [Message("system", str(system))] if system else []
    if not isinstance(history, list) or not all(isinstance(h, list) and len(h) == 2 for h in history):
        raise RowError("wrong_type", f"history = {short(history)}, but must be a list of pairs")
    for asked, said in history:
        turns += [Message("user", str(asked)), Message("assistant", str(said))]
    return [*turns, Message("user", question), Message("assistant", answer)]


def _turn(message: Any) -> tuple[Message, list[Any]]:
    """Return a message and its clips."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowError("wrong_type", f"the message {short(message)} must have a role and a content")
    content, loss = message.get("content"), message.get("loss")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    text, clips = "", []
    for part in parts:
        kind, words = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind == "text" and isinstance(words, str):
            text += words
        elif kind in _AUDIO_TYPES:
            clips.append(audio_of({k: v for k, v in part.items() if k != "type"}))
            text += AUDIO_TAG
        else:
            raise RowError("bad_messages", f"the part {short(part)} of a message is neither text nor audio")
    return Message(message["role"], text, None if loss is None else bool(loss)), clips
