"""The checks of a sample's fields, which do not depend on where the sample is stored."""

from __future__ import annotations

from typing import Any

from trainer.data.errors import SampleError
from trainer.scoring.fields import field_problem
from trainer.scoring.tasks import TASKS, known_tasks

MAX_CLIPS = 256
"""The largest number of clips of a sample."""
_REQUIRED = ("task", "instruction", "answer")
_OTHER_NAMES = ("audio_filepath", "audio_path", "audios", "wav", "sound", "path", "file", "file_name", "filename")
"""The names that other programs give to the field `audio`."""


def check_metadata(metadata: dict[str, Any], num_clips: int) -> None:
    """Check the fields of a sample, and that it has audio if its task needs any.

    Args:
        metadata: the fields of the manifest.
        num_clips: the number of the sample's audio files.

    Raises:
        SampleError: If a field has a wrong type (`wrong_type`), the task is unknown, the answer is empty, or the sample
            has no audio although its task needs it, or too many clips.
    """
    for name in _REQUIRED:
        if metadata.get(name) is None:
            raise SampleError("wrong_type", f"{name} is missing")
    if (problem := field_problem(metadata)) is not None:
        raise SampleError("wrong_type", problem)
    if metadata["task"] not in TASKS:
        raise SampleError("unknown_task", f"task = {metadata['task']!r}; known tasks are {known_tasks()}")
    if not metadata["answer"].strip():
        raise SampleError("empty_answer", "answer is empty")
    if TASKS[metadata["task"]].needs_audio and not num_clips:
        other = next((name for name in _OTHER_NAMES if metadata.get(name)), None)
        hint = f"; the field {other} must be called audio" if other else ""
        raise SampleError("no_audio", f"no audio, which the task {metadata['task']} needs{hint}")
    if num_clips > MAX_CLIPS:
        raise SampleError("too_many_clips", f"{num_clips} clips, the limit is {MAX_CLIPS}")
