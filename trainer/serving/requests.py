"""Conversion of requests in OpenAI's format to clips and the fields that the model reads.

The format is that of OpenAI's API reference for `chat/completions` and `audio/transcriptions`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from model.conversation import ConversationError, read_turns
from model.lengths import SAMPLE_RATE
from trainer.data.decode import decode_audio
from trainer.data.errors import SampleError
from trainer.data.metadata import MAX_CLIPS
from trainer.evaluation.offline.answer import Clip

MAX_AUDIO_SEC = 2 * 3600.0
"""The largest amount of audio in a request, in seconds. Hours of silence can be compressed to less than a megabyte, so
a limit on the size of requests does not limit the memory."""
_DATA_URL = "data:"


class RequestError(Exception):
    """Raised when a request cannot be served. It becomes a response with OpenAI's error object."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


def decoded(audio: bytes, param: str, others: Sequence[Clip] = ()) -> Clip:
    """Return the waveform of an audio file.

    Args:
        audio: The file.
        param: The field of the request that contains the file, for the error message.
        others: The clips of the same request that were decoded before.

    Raises:
        RequestError: If the file cannot be decoded, or the request has too much audio.
    """
    if len(others) == MAX_CLIPS:
        raise RequestError(f"more than {MAX_CLIPS} clips", param)
    used_sec = sum(len(clip) for clip in others) / SAMPLE_RATE
    try:
        return decode_audio(audio, MAX_AUDIO_SEC - used_sec)
    except SampleError as error:
        raise RequestError(f"the audio cannot be used: {error}", param) from None


def read_messages(messages: Any, max_chars: int) -> tuple[list[Clip], dict[str, Any]]:
    """Return the clips of a chat, and the fields that the model reads; see `_fields`.

    A message's content is text, or a list of blocks of type `text`, of type `input_audio` with base64 data, or of type
    `audio_url` with a `data:` URL. Other URLs are refused, because a server that fetched them could reach hosts that
    its clients cannot.

    Args:
        messages: The value of `messages`.
        max_chars: The largest number of characters of text in all messages.

    Raises:
        RequestError: If the messages have a different form, their text is too long, or their audio cannot be decoded.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError("must be a list of messages", "messages")
    clips: list[Clip] = []
    found: list[dict[str, Any]] = []
    for n, message in enumerate(messages):
        where = f"messages[{n}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError("must be an object with role and content", where)
        role = "system" if message["role"] == "developer" else message["role"]
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise RequestError("must be text or a list of blocks", f"{where}.content")
        blocks = [_block(block, f"{where}.content[{i}]", clips) for i, block in enumerate(content)]
        found.append({"role": role, "content": blocks})
    if found[-1]["role"] != "user":
        raise RequestError("the last message must be the user's", "messages")
    num_chars = sum(len(block.get("text", "")) for message in found for block in message["content"])
    if num_chars > max_chars:
        raise RequestError(f"the text has {num_chars} characters, but the limit is {max_chars}", "messages")
    return clips, _fields(clips, found)


def _fields(clips: Sequence[Clip], messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields that the model reads, which are either `instruction` or `messages`.

    A single question that follows all of its clips becomes `instruction`. Training samples with an instruction also
    begin with their clips, so the model gets the same prompt.
    """
    blocks = messages[0]["content"]
    kinds = [block["type"] for block in blocks]
    if len(messages) == 1 and kinds == ["audio"] * len(clips) + ["text"]:
        return {"instruction": blocks[-1]["text"]}
    conversation = [*messages, {"role": "assistant", "content": "?"}]
    try:
        read_turns(conversation)
    except ConversationError as error:
        raise RequestError(str(error), "messages") from None
    return {"messages": conversation}


def _block(block: Any, where: str, clips: list[Clip]) -> dict[str, Any]:
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind == "text" and isinstance(block.get("text"), str):
        if "<audio>" in block["text"]:
            raise RequestError("contains <audio>, which stands for a clip", f"{where}.text")
        return {"type": "text", "text": block["text"]}
    value = block.get(kind) if kind in ("input_audio", "audio_url") else None
    if not isinstance(value, Mapping):
        raise RequestError("must be a block of type text, input_audio or audio_url", where)
    encoded = value.get("data" if kind == "input_audio" else "url")
    if kind == "audio_url" and isinstance(encoded, str):
        if not encoded.startswith(_DATA_URL):
            raise RequestError("only data: URLs are read; send the audio itself", where)
        encoded = encoded.partition(",")[2]
    try:
        audio = base64.b64decode(encoded, validate=True) if isinstance(encoded, str) else b""
    except (binascii.Error, ValueError):
        audio = b""
    if not audio:
        raise RequestError("the audio must be base64", where)
    clips.append(decoded(audio, where, clips))
    return {"type": "audio"}
