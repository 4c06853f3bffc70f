"""The answers of a model to samples, and the JSONL files that store them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.scoring.meteor import Meteor
from trainer.scoring.scores import TaskScore, score
from trainer.telemetry.jsonl import write_atomically

_META_FIELDS = ("subset", "source", "language", "instruction", "choices", "references", "qtype", "slot")
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("key", "task", "reference", "hypothesis"), (str,)),
    **dict.fromkeys(("subset", "source", "language", "instruction", "qtype", "slot"), (str, type(None))),
    **dict.fromkeys(("choices", "references"), (list, type(None))),
    "finished": (bool,),
    "audio_sec": (int, float),
    "num_windows": (int,),
}
_OPTIONAL = {*_META_FIELDS, "finished", "audio_sec", "num_windows"}


@dataclass(frozen=True)
class Prediction:
    """The answer of a model to one sample."""

    key: str
    """The sample's key."""
    hypothesis: str
    """The answer."""
    finished: bool
    """True if the answer ended on its own, False if it was cut off at `eval.max_new_tokens`."""
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
    """Return a prediction as a line of JSON that contains everything needed for scoring."""
    line = {
        "key": p.key,
        "task": p.meta["task"],
        **{name: p.meta[name] for name in _META_FIELDS if p.meta.get(name) is not None},
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
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); give a predictions*.jsonl of an evaluation") from None
    predictions: dict[str, Prediction] = {}
    # splitlines() would also split at U+2028 and other characters that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            found = _parse(f"{path}, line {number}", line)
            if found.key in predictions:
                raise UserError(
                    f"{path}, line {number}: key '{found.key}' occurs twice; give the predictions of one evaluation"
                )
            predictions[found.key] = found
    if not predictions:
        raise UserError(f"{path}: contains no predictions; give a predictions*.jsonl of an evaluation")
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
        predictions: predictions of any tasks.
        meteor: the METEOR scorer; None to score captions without METEOR.
    """
    return [s for task, found in by_task(predictions).items() for s in score(task, *columns(found), meteor)]


def _parse(where: str, line: str) -> Prediction:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({error}); write one object per line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: is not a JSON object; write one object per line")
    for name, types in _TYPES.items():
        if not isinstance(row.get(name), types) and not (name in _OPTIONAL and name not in row):
            raise UserError(f"{where}: {name} = {row.get(name)!r}: must be {' or '.join(t.__name__ for t in types)}")
    for name in ("choices", "references"):
        if not all(isinstance(text, str) for text in row.get(name) or ()):
            raise UserError(f"{where}: {name} = {row[name]!r}: must be a list of strings")
    meta = {name: row[name] for name in ("task", *_META_FIELDS) if row.get(name) is not None}
    meta["answer"] = row["reference"]
    seconds, windows = float(row.get("audio_sec", 0.0)), row.get("num_windows", 1)
    return Prediction(row["key"], row["hypothesis"], row.get("finished", True), seconds, meta, windows)
