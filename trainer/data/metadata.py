"""Check a sample's fields, in the same way for manifests and for shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.conversation import AUDIO_TAG, ConversationError, Turn, question, read_turns
from trainer.data.errors import SampleError
from trainer.scoring.fields import field_problem
from trainer.scoring.tasks import TASKS, known_tasks

MAX_CLIPS = 256
"""The largest number of clips of a sample."""
_REQUIRED = ("task", "instruction", "answer")
_OTHER_NAMES = ("audio_filepath", "audio_path", "audios", "wav", "sound", "path", "file", "file_name", "filename")
"""The names that other programs use for the field `audio`."""


def with_last_turn(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a sample, with the last question and answer of a conversation as `instruction` and `answer`.

    Evaluation, scores and reports read these two fields, and existing values of them are kept. The fields are returned
    unchanged if the sample has no `messages`, or if `check_metadata` refuses its messages.
    """
    turns = conversation_of(metadata)
    if not turns:
        return metadata
    last = {"instruction": turns[-2].text, "answer": turns[-1].text}
    return {**metadata, **{name: text for name, text in last.items() if metadata.get(name) is None}}


def conversation_of(metadata: Mapping[str, Any]) -> tuple[Turn, ...]:
    """Return the turns of `messages` if they are a conversation that ends with an answer; otherwise an empty tuple."""
    try:
        turns = read_turns(metadata.get("messages"))
    except ConversationError:
        return ()
    return turns if turns[-1].role == "assistant" else ()


def prompt_turns(metadata: Mapping[str, Any], num_clips: int) -> tuple[Turn, ...]:
    """Return the turns of a sample up to its last question; see `turns_of`. The sample needs no answer."""
    if metadata.get("messages") is not None:
        return read_turns(metadata["messages"])[:-1]
    return (question(metadata["instruction"], num_clips),)


def turns_of(metadata: Mapping[str, Any], num_clips: int) -> tuple[Turn, ...]:
    """Return the turns of a sample, including its last answer.

    Args:
        metadata: The fields of the manifest, checked by `check_metadata`.
        num_clips: The number of the sample's clips.
    """
    if metadata.get("messages") is not None:
        return read_turns(metadata["messages"])
    return *prompt_turns(metadata, num_clips), Turn("assistant", (metadata["answer"],))


def earlier_texts(metadata: Mapping[str, Any]) -> list[str]:
    """Return the non-empty texts of a conversation before its last question; an empty list if there are none."""
    try:
        turns = read_turns(metadata.get("messages"))
    except ConversationError:
        return []
    return [text for turn in turns[:-2] for text in turn.texts if text]


def has_earlier_answers(metadata: Mapping[str, Any]) -> bool:
    """Return whether a sample is a conversation with several answers."""
    try:
        turns = read_turns(metadata.get("messages"))
    except ConversationError:
        return False
    return sum(turn.role == "assistant" for turn in turns) > 1


def check_metadata(metadata: dict[str, Any], num_clips: int) -> None:
    """Check the fields of a sample, and check that it has audio if its task needs audio.

    Args:
        metadata: The fields of the manifest.
        num_clips: The number of the sample's audio files.

    Raises:
        SampleError: If a field is missing or has a wrong type (`wrong_type`), the task is unknown (`unknown_task`), the
            answer is empty (`empty_answer`), the task needs audio and there is none (`no_audio`), there are more than
            `MAX_CLIPS` clips (`too_many_clips`), the messages are not a conversation with `num_clips` clips
            (`bad_messages`), or the messages differ from the instruction or answer (`ambiguous`).
    """
    if metadata.get("messages") is not None:
        _check_messages(metadata, num_clips)
    for name in _REQUIRED:
        if metadata.get(name) is None:
            raise SampleError("wrong_type", f"{name} is missing")
    if (problem := field_problem(metadata)) is not None:
        raise SampleError("wrong_type", problem)
    if metadata["task"] not in TASKS:
        others = "declare others in the recipe (tasks) or in a plug-in (plugins)"
        raise SampleError("unknown_task", f"task = {metadata['task']!r}; known tasks are {known_tasks()}; {others}")
    if not metadata["answer"].strip():
        raise SampleError("empty_answer", "answer is empty")
    if TASKS[metadata["task"]].needs_audio and not num_clips:
        other = next((name for name in _OTHER_NAMES if metadata.get(name)), None)
        hint = f"; the field {other} must be called audio" if other else ""
        raise SampleError("no_audio", f"the task {metadata['task']} needs audio, but the sample has none{hint}")
    if num_clips > MAX_CLIPS:
        raise SampleError("too_many_clips", f"there are {num_clips} clips, but the limit is {MAX_CLIPS}")


def _check_messages(metadata: dict[str, Any], num_clips: int) -> None:
    try:
        turns = read_turns(metadata["messages"])
    except ConversationError as error:
        raise SampleError("bad_messages", str(error)) from None
    if turns[-1].role != "assistant":
        raise SampleError("bad_messages", "the last message is from the user, but must be the assistant's answer")
    places = sum(turn.num_clips for turn in turns)
    if places != num_clips:
        raise SampleError(
            "bad_messages",
            f"there are {num_clips} clips, but {places} places for them ({AUDIO_TAG} or blocks of type audio)",
        )
    for name, text in (("instruction", turns[-2].text), ("answer", turns[-1].text)):
        if metadata.get(name) not in (None, text):
            raise SampleError("ambiguous", f"{name} differs from the last messages; remove {name} or messages")
