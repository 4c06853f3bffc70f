"""The answers of a model to samples, and the JSONL files that store them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.conversation import plain_messages
from model.errors import UserError
from model.json_text import parse_json
from trainer.data.metadata import conversation_of
from trainer.scoring.fields import field_problem, is_amount
from trainer.scoring.meteor import Meteor
from trainer.scoring.scores import TaskScore, score
from trainer.telemetry.jsonl import write_atomically

_META_FIELDS = (
    "subset",
    "source",
    "language",
    "target_language",
    "instruction",
    "choices",
    "references",
    "qtype",
    "slot",
)
_REQUIRED = ("key", "task", "reference", "hypothesis")


@dataclass(frozen=True)
class Prediction:
    """The answer of a model to one sample."""

    key: str
    """The sample's key."""
    hypothesis: str
    """The answer."""
    finished: bool
    """True if the answer ended with an end token, False if it was truncated at the largest number of new tokens."""
    audio_sec: float
    """The duration of the sample's audio in seconds."""
    meta: dict[str, Any]
    """The manifest fields of the sample. A prediction that was read from a file has only the fields used in scoring."""
    num_windows: int = 1
    """The number of overlapping windows in which a long recording was transcribed."""


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions as one JSON object per line, replacing the file."""
    write_atomically(path, "".join(map(to_line, predictions)))


def to_line(p: Prediction) -> str:
    """Return a prediction as a line of JSON with all fields that scoring needs."""
    line = {
        "key": p.key,
        "task": p.meta["task"],
        **{name: p.meta[name] for name in _META_FIELDS if p.meta.get(name) is not None},
        **({"messages": plain_messages(turns)} if (turns := conversation_of(p.meta)) else {}),
        "reference": p.meta["answer"],
        "hypothesis": p.hypothesis,
        "finished": p.finished,
        "audio_sec": round(p.audio_sec, 3),
        **({"num_windows": p.num_windows} if p.num_windows > 1 else {}),
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def read_predictions(path: Path) -> list[Prediction]:
    """Read the predictions that `write_predictions` wrote.

    Raises:
        UserError: If the file cannot be read, a line is not a prediction, or a key occurs twice.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); use the predictions*.jsonl of an evaluation"
        ) from None
    predictions: dict[str, Prediction] = {}
    # splitlines() would also split at characters that JSON strings may contain.
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            found = _parse(f"{path}, line {number}", line)
            if found.key in predictions:
                raise UserError(
                    f"{path}, line {number}: key '{found.key}' occurs twice; use the predictions of a single evaluation"
                )
            predictions[found.key] = found
    if not predictions:
        raise UserError(f"{path}: contains no predictions; use the predictions*.jsonl of an evaluation")
    return list(predictions.values())


def by_task(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Return the predictions of each task, with the tasks in order of appearance."""
    found: dict[str, list[Prediction]] = {}
    for p in predictions:
        found.setdefault(p.meta["task"], []).append(p)
    return found


def columns(predictions: Sequence[Prediction]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the hypotheses and the manifest fields as two lists, in the form that the scoring functions take."""
    return [p.hypothesis for p in predictions], [p.meta for p in predictions]


def score_predictions(predictions: Sequence[Prediction], meteor: Meteor | None = None) -> list[TaskScore]:
    """Return the scores of every task that occurs among the predictions.

    Args:
        predictions: Predictions of any tasks.
        meteor: The METEOR scorer; None to score captions without METEOR.
    """
    return [s for task, found in by_task(predictions).items() for s in score(task, *columns(found), meteor)]


def _parse(where: str, line: bytes) -> Prediction:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({error}); write one object per line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: is not a JSON object; write one object per line")
    problem = field_problem(row)
    for name in _REQUIRED:
        if not isinstance(row.get(name), str):
            problem = f"{name} = {ascii(row.get(name))[:80]}, but must be text"
    finished, seconds, windows = row.get("finished", True), row.get("audio_sec", 0.0), row.get("num_windows", 1)
    if not isinstance(finished, bool):
        problem = f"finished = {finished!r}, but must be true or false"
    if not is_amount(seconds):
        problem = f"audio_sec = {seconds!r}, but must be a number, at least 0"
    if isinstance(windows, bool) or not isinstance(windows, int) or windows < 1:
        problem = f"num_windows = {windows!r}, but must be a whole number, at least 1"
    if problem is not None:
        raise UserError(f"{where}: {problem}; write predictions as `earshot evaluate` does")
    meta = {name: row[name] for name in ("task", *_META_FIELDS) if row.get(name) is not None}
    meta["answer"] = row["reference"]
    if row.get("messages") is not None:
        if not conversation_of(row):
            raise UserError(f"{where}: messages is not a conversation; write predictions as `earshot evaluate` does")
        meta["messages"] = row["messages"]
    return Prediction(row["key"], row["hypothesis"], finished, float(seconds), meta, windows)
