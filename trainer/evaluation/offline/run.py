"""One evaluation as a folder: what was asked, predictions as they come, and what is missing when it goes on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.data.stored import ShardData, StoredData
from trainer.evaluation.offline.pool import open_workers
from trainer.evaluation.offline.worker import Request, Skipped, batches, open_wanted
from trainer.evaluation.predictions import Prediction, read_predictions, to_line, write_predictions
from trainer.telemetry.jsonl import write_atomically

PREDICTIONS, SKIPPED, ASKED = "predictions.jsonl", "skipped.jsonl", "evaluation.json"


@dataclass(frozen=True)
class Finished:
    """All samples that were asked for."""

    predictions: list[Prediction]
    """By key."""
    skipped: list[Skipped]
    num_resumed: int
    """Predictions that an earlier, stopped evaluation had made."""
    seconds: float
    """That the others took, loading the model included."""
    stored: StoredData
    """The data they are of."""


def run_evaluation(
    request: Request,
    folder: Path,
    num_processes: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Finished:
    """Predict what `folder` does not hold yet; `on_progress` is told (samples done, samples in all).

    Raises:
        UserError: the folder holds another evaluation; the data or the model cannot be used; a worker died.
    """
    started = time.perf_counter()
    stored, places = open_wanted(request)
    done = _resume(folder, asked(request, stored))
    wanted = {stored.items[place].key for place in places}
    found = [p for p in done if p.key in wanted]
    num_resumed = len(found)
    known = {p.key for p in found}
    jobs = batches(request, stored, [p for p in places if stored.items[p].key not in known])
    skipped: list[Skipped] = []
    on_progress(len(found), len(places))
    if jobs:
        with (
            (folder / PREDICTIONS).open("a", encoding="utf-8") as file,
            open_workers(request, min(num_processes, len(jobs))) as answer_jobs,
        ):
            for outcomes in answer_jobs(jobs):
                answers = [o for o in outcomes if isinstance(o, Prediction)]
                skipped += [o for o in outcomes if isinstance(o, Skipped)]
                file.write("".join(map(to_line, answers)))
                file.flush()
                found += answers
                on_progress(len(found) + len(skipped), len(places))
    found.sort(key=lambda p: p.key)
    write_predictions(folder / PREDICTIONS, found)
    lines = [json.dumps(s._asdict(), ensure_ascii=False) + "\n" for s in sorted(skipped)]
    write_atomically(folder / SKIPPED, "".join(lines))
    return Finished(found, sorted(skipped), num_resumed, time.perf_counter() - started, stored)


def asked(request: Request, stored: StoredData) -> dict[str, Any]:
    """What two evaluations must have in common for one to go on with the other's predictions."""
    if isinstance(stored, ShardData):
        content = stored.digest
    else:
        content = hashlib.sha256(Path(request.data).read_bytes()).hexdigest()
    return {
        "model": request.origin.url,
        "model_digest": request.origin.digest,
        "data": request.data,
        "data_digest": content,
        "split": request.split,
        "tasks": list(request.tasks),
        "max_samples": request.max_samples,
        "dtype": request.dtype,
        "window_sec": request.windows.window_sec,
        "overlap_sec": request.windows.overlap_sec,
        "max_new_tokens": request.decoding.max_new_tokens,
        "beams": request.decoding.beams,
    }


def _resume(folder: Path, now: dict[str, Any]) -> list[Prediction]:
    """What an evaluation of the same in `folder` has predicted; the folder is ready to be written to."""
    note, predictions = folder / ASKED, folder / PREDICTIONS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            if predictions.exists():
                raise UserError(f"{predictions}: made by something else; give another --out")
            write_atomically(note, json.dumps(now, indent=1, ensure_ascii=False) + "\n")
        before = json.loads(note.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another --out") from None
    except ValueError:
        raise UserError(f"{note}: damaged; remove {folder}, or give another --out") from None
    for key, value in now.items():
        if before.get(key) != value:
            raise UserError(
                f"{folder}: holds an evaluation with {key} = {before.get(key)}, not {value}; remove it, or give "
                "another --out"
            )
    if not predictions.exists():
        return []
    content = predictions.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]  # the last line may be torn
    if len(whole) < len(content):
        os.truncate(predictions, len(whole))
    return read_predictions(predictions) if whole else []
