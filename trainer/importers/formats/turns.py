"""The common form to which conversations in several formats are converted.

It consists of messages, whose text has a tag for each clip, and a list of the clips.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model.conversation import AUDIO_TAG, ConversationError, read_turns
from trainer.importers.row import Clip, RowError
from trainer.importers.source import short

_DATA_URL = re.compile(r"data:[a-z]+/([A-Za-z0-9.+-]*)(?:;[^,;]*)*;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Message:
    """A message of a conversation."""

    role: str
    text: str
    """The text, with `AUDIO_TAG` in place of each clip."""
    loss: bool | None = None
    """Whether the model is trained on the message; None if the source does not specify it."""


def fields_of_messages(messages: Sequence[Message], audio: Sequence[Any]) -> dict[str, Any]:
    """Return the fields of a conversation.

    A single question that begins with its clips, followed by one answer, becomes `instruction` and `answer`. Any other
    conversation becomes `messages`. Clips without a tag are placed at the beginning of the user's first message.

    Args:
        messages: The conversation.
        audio: The clips in the order of their tags.

    Raises:
        RowError: If the numbers of tags and clips differ (`wrong_type`), or the messages are not a conversation that
            can be used for training (`bad_messages`).
    """
    num_tags = sum(m.text.count(AUDIO_TAG) for m in messages)
    if num_tags not in (0, len(audio)):
        raise RowError("wrong_type", f"the conversation has {num_tags} tags {AUDIO_TAG}, but {len(audio)} audio files")
    first = next((place for place, message in enumerate(messages) if message.role == "user"), None)
    before = "" if num_tags or first is None else AUDIO_TAG * len(audio)
    listed = [
        {"role": m.role, "content": (before if place == first else "") + m.text}
        | ({} if m.loss is None or m.role != "assistant" else {"loss": m.loss})
        for place, m in enumerate(messages)
    ]
    try:
        turns = read_turns(listed)
    except ConversationError as error:
        raise RowError("bad_messages", str(error)) from None
    fields: dict[str, Any] = {"messages": listed}
    if [t.role for t in turns] == ["user", "assistant"] and not any(turns[0].texts[:-1]) and turns[1].loss is not False:
        fields = {"instruction": turns[0].text.strip(), "answer": turns[1].text}
    return {**fields, "audio": list(audio)} if audio else fields


def audio_of(value: Any) -> str | Clip:
    """Return the audio that a value in a conversation specifies: a path, a data URL, or a mapping with one of them.

    Raises:
        RowError: If the value is none of these, or its base64 is damaged.
    """
    if isinstance(value, dict):
        found = next((value[n] for n in ("path", "url", "audio_url", "audio", "input_audio") if value.get(n)), None)
        if found is not None:
            return audio_of(found)
        if isinstance(value.get("data"), str):
            return _decoded(value["data"], str(value.get("format") or ""))
    if isinstance(value, str):
        found = _DATA_URL.match(value)
        return value.removeprefix("file://") if found is None else _decoded(value[found.end() :], found[1])
    raise RowError("wrong_type", f"audio = {short(value)}, but must be a path")


def _decoded(text: str, kind: str) -> Clip:
    try:
        return Clip(f".{kind.removeprefix('x-')}", data=base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        raise RowError("broken", "the audio is not base64") from None
