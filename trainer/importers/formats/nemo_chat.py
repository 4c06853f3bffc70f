"""Conversations in NeMo's formats: turns of text and audio, and ShareGPT with `sound`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from model.conversation import AUDIO_TAG
from trainer.importers.formats.turns import Message, audio_of, fields_of_messages
from trainer.importers.row import Clip, Row, RowError
from trainer.importers.source import Source, short

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_SOUND_TAGS = ("<sound>", "<speech>")


def rows(source: Source) -> Iterator[Row]:
    """Yield the conversations in one file, or in all JSON files in a folder.

    Consecutive turns of the same role are joined with a space, as in NeMo. If there is only one `sound`, every
    `<sound>` in the conversation stands for this clip.
    """
    for path in source.files("*.json", "*.jsonl", "*.json.gz", "*.jsonl.gz"):
        for row in source.objects(path):
            try:
                yield row if row.error else Row(row.where, _converted(dict(row.fields)))
            except RowError as error:
                yield Row(row.where, error=error)


def _converted(fields: dict[str, Any]) -> dict[str, Any]:
    listed = fields.pop("conversations", None)
    if not isinstance(listed, list) or not all(isinstance(m, dict) for m in listed):
        raise RowError("wrong_type", f"conversations = {short(listed)}, but must be a list of turns")
    sound, original = fields.pop("sound", None), fields.pop("ori_sound", None)
    sound = original if sound is None else sound
    sounds = sound if isinstance(sound, list) else [] if sound is None else [sound]
    audio: list[Any] = []
    turns: list[Message] = []
    for message in listed:
        role = _ROLES.get(str(message.get("from")).lower(), str(message.get("from")))
        text = message.get("value")
        if message.get("type") == "audio":
            audio.append(_clip(message))
            text = AUDIO_TAG
        if not isinstance(text, str):
            raise RowError("wrong_type", f"the text of the turn {short(message)} must be a string")
        for tag in _SOUND_TAGS:
            text = text.replace(tag, AUDIO_TAG)
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].text} {text}")
        else:
            turns.append(Message(role, text))
    if sounds and audio:
        raise RowError("wrong_type", "audio is given in the turns and also in the field sound")
    if sounds:
        num_tags = sum(turn.text.count(AUDIO_TAG) for turn in turns)
        audio = [audio_of(s) for s in (sounds * num_tags if len(sounds) == 1 and num_tags else sounds)]
    return {**fields, **fields_of_messages(turns, audio)}


def _clip(turn: dict[str, Any]) -> Clip:
    found = audio_of(turn.get("value"))
    clip = found if isinstance(found, Clip) else Clip(found)
    start, seconds = turn.get("offset"), turn.get("duration")
    if start is None:
        return clip
    if not all(isinstance(v, int | float) and 0 <= v < 1e7 for v in (start, seconds or 0)):
        raise RowError("wrong_type", f"offset = {short(start)}, duration = {short(seconds)}, but both must be seconds")
    return replace(clip, start=float(start), seconds=None if seconds is None else float(seconds))
