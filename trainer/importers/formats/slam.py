"""SLAM-LLM's data: JSON lines with `key`, `source` and `target`, or with `task`, `path` and a separate prompt file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from trainer.importers.formats.kaldi import recording_clip
from trainer.importers.row import Row, RowError
from trainer.importers.source import Source

_PROMPTS = "multiprompt.jsonl"


def rows(source: Source) -> Iterator[Row]:
    """Yield the rows of one file, or of all JSON-lines files in a folder except the prompt file.

    The file `multiprompt.jsonl` next to the data has lines with `task` and `prompt`. If a task has several prompts, the
    key of a row determines which prompt the row gets.
    """
    prompts: dict[str, list[str]] = {}
    if (source.folder / _PROMPTS).exists():
        for row in source.objects(source.folder / _PROMPTS):
            if isinstance(row.fields.get("prompt"), str):
                prompts.setdefault(str(row.fields.get("task")), []).append(row.fields["prompt"])
    for path in source.files("*.jsonl"):
        if path.name == _PROMPTS:
            continue
        for row in source.objects(path):
            try:
                yield row if row.error else Row(row.where, _fields(dict(row.fields), prompts, source))
            except RowError as error:
                yield Row(row.where, error=error)


def _fields(fields: dict[str, Any], prompts: dict[str, list[str]], source: Source) -> dict[str, Any]:
    audio = fields.pop("source", None)
    audio = fields.pop("path", None) if audio is None else audio
    task, key = fields.pop("task", None), str(fields.get("key"))
    if isinstance(audio, str):
        fields["audio"] = recording_clip(audio, source)
    if "target" in fields:
        fields["text"] = fields.pop("target")
    if task is not None:
        fields["task"] = str(task).lower()
        if (known := prompts.get(str(task))) and "prompt" not in fields:
            number = int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=4).digest(), "big")
            fields["prompt"] = known[number % len(known)]
    return fields
