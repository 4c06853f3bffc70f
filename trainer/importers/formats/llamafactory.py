"""LLaMA-Factory's data: `conversations` or `messages` with `<audio>` and `audios`, or alpaca's fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.importers.formats.messages import alpaca_turns
from trainer.importers.formats.turns import Message, audio_of, fields_of_messages
from trainer.importers.row import Row, RowError
from trainer.importers.source import Source, short

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


def rows(source: Source) -> Iterator[Row]:
    """Yield the samples of one file, or of all JSON files in a folder except `dataset_info.json`."""
    for path in source.files("*.json", "*.jsonl"):
        if path.name == "dataset_info.json":
            continue
        for row in source.objects(path):
            try:
                yield row if row.error else Row(row.where, _converted(dict(row.fields)))
            except RowError as error:
                yield Row(row.where, error=error)


def _converted(fields: dict[str, Any]) -> dict[str, Any]:
    audio = fields.pop("audios", None) or []
    audio = [audio_of(item) for item in (audio if isinstance(audio, list) else [audio])]
    listed = fields.pop("conversations", None)
    listed = fields.pop("messages", None) if listed is None else listed
    if listed is None:
        return {**fields, **fields_of_messages(alpaca_turns(fields), audio)}
    if not isinstance(listed, list) or not all(isinstance(m, dict) for m in listed):
        raise RowError("wrong_type", f"conversations = {short(listed)}, but must be a list of messages")
    turns = [Message("system", str(system))] if (system := fields.pop("system", None)) else []
    for message in listed:
        role, text = message.get("from", message.get("role")), message.get("value", message.get("content"))
        if not isinstance(text, str):
            raise RowError("wrong_type", f"the text of the message {short(message)} must be a string")
        turns.append(Message(_ROLES.get(str(role), str(role)), text))
    return {**fields, **fields_of_messages(turns, audio)}
