"""Conversations of several formats: roles, texts with a tag for each clip, and the clips."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.importers.row import Clip, RowError
from trainer.importers.source import short

TAG = "<audio>"
"""The place of a clip in a text."""
_DATA_URL = re.compile(r"data:[a-z]+/([A-Za-z0-9.+-]*)(?:;[^,;]*)*;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Turn:
    """A message of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    text: str
    """The text, with `TAG` in place of each clip."""
    loss: bool | None = None
    """Whether the message is trained; None if the source does not say so."""


def fields_of_turns(turns: Sequence[Turn], audio: Sequence[Any]) -> dict[str, Any]:
    """Return the fields of a sample: `instruction`, `answer` and `audio`.

    Clips without a tag come first in the first message of the user.

    Args:
        turns: The conversation.
        audio: The clips in the order of their tags.

    Raises:
        RowError: If the tags do not match the clips (`wrong_type`), or the conversation is not one question and one
            answer with all clips before or after the text (`conversation`).
    """
    if other := next((t.role for t in turns if t.role not in ("system", "user", "assistant")), None):
        raise RowError(
            "conversation", f"a message of the role {short(other)}; only system, user and assistant are known"
        )
    num_tags = sum(t.text.count(TAG) for t in turns)
    if num_tags not in (0, len(audio)):
        raise RowError("wrong_type", f"{num_tags} tags {TAG}, but {len(audio)} audio files")
    if any(TAG in t.text for t in turns if t.role != "user"):
        raise RowError("conversation", f"a tag {TAG} in a message that is not the user's")
    if [t.role for t in turns] != ["user", "assistant"] or turns[1].loss is False:
        roles = " ".join(t.role for t in turns[:6])
        raise RowError(
            "conversation", f"{len(turns)} messages ({roles}), but only one question and one answer are known"
        )
    text = re.sub(rf"^(\s*{TAG})+\s*|\s*({TAG}\s*)+$", "", turns[0].text)
    if TAG in text:
        raise RowError("conversation", f"a clip in the middle of the text {short(text)}")
    fields = {"instruction": text, "answer": turns[1].text}
    return {**fields, "audio": list(audio)} if audio else fields


def audio_of(value: Any) -> str | Clip:
    """Return the audio that a value of a conversation means: a path, a data URL or a mapping with one of them.

    Raises:
        RowError: If it is neither, or its base64 is damaged.
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
        raise RowError("broken", "audio that is not base64") from None
