"""An evaluation that writes its predictions to a folder, and resumes from the predictions in the folder."""

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
from trainer.files import locked, sweep_leftovers
from trainer.telemetry.jsonl import write_atomically

PREDICTIONS, SKIPPED, REQUEST = "predictions.jsonl", "skipped.jsonl", "evaluation.json"


@dataclass(frozen=True)
class Finished:
    """A complete evaluation."""

    predictions: list[Prediction]
    """The predictions, sorted by key."""
    skipped: list[Skipped]
    """The samples that have no prediction."""
    num_resumed: int
    """The number of predictions that an earlier, interrupted evaluation made."""
    seconds: float
    """The duration of this evaluation in seconds, including the time to load the model."""
    stored: StoredData
    """The data that was evaluated."""


def run_evaluation(
    request: Request,
    folder: Path,
    num_processes: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Finished:
    """Generate predictions for the samples that have no prediction in `folder` yet.

    Args:
        request: The evaluation.
        folder: The folder for predictions.jsonl, skipped.jsonl and evaluation.json.
        num_processes: The number of worker processes.
        on_progress: A function that is called with the number of finished samples and the number of all samples.

    Raises:
        UserError: If the folder contains a different evaluation, the data or the model cannot be used, or a worker
            process ended unexpectedly.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", wait=False):
            return _run(request, folder, num_processes, on_progress)
    except BlockingIOError:
        raise UserError(f"{folder}: another evaluation is writing it; wait for it, or choose another --out") from None
    except FileExistsError:
        raise UserError(f"{folder}: is a file, not a folder; choose another --out") from None


def _run(request: Request, folder: Path, num_processes: int, on_progress: Callable[[int, int], None]) -> Finished:
    started = time.perf_counter()
    sweep_leftovers(folder)
    stored, indices = open_wanted(request)
    done = _resume(folder, request_fields(request, stored))
    wanted = {stored.items[index].key for index in indices}
    found = [p for p in done if p.key in wanted]
    num_resumed = len(found)
    known = {p.key for p in found}
    jobs = batches(request, stored, [p for p in indices if stored.items[p].key not in known])
    skipped: list[Skipped] = []
    on_progress(len(found), len(indices))
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
                on_progress(len(found) + len(skipped), len(indices))
    found.sort(key=lambda p: p.key)
    write_predictions(folder / PREDICTIONS, found)
    lines = [json.dumps(s._asdict(), ensure_ascii=False) + "\n" for s in sorted(skipped)]
    write_atomically(folder / SKIPPED, "".join(lines))
    return Finished(found, sorted(skipped), num_resumed, time.perf_counter() - started, stored)


def request_fields(request: Request, stored: StoredData) -> dict[str, Any]:
    """Return the fields that determine the predictions. An evaluation is resumed only if all of them are unchanged."""
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
    """Prepare `folder`, and return the predictions that an interrupted evaluation of the same request stored there."""
    note, predictions = folder / REQUEST, folder / PREDICTIONS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            if predictions.exists():
                raise UserError(f"{predictions}: belongs to no evaluation ({REQUEST} is missing); choose another --out")
            write_atomically(note, json.dumps(now, indent=1, ensure_ascii=False) + "\n")
        before = json.loads(note.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from None
    except ValueError:
        raise UserError(f"{note}: is damaged; remove {folder}, or choose another --out") from None
    for key, value in now.items():
        if before.get(key) != value:
            raise UserError(
                f"{folder}: contains an evaluation with {key} = {before.get(key)}, not {value}; remove the folder, or "
                "choose another --out"
            )
    if not predictions.exists():
        return []
    content = predictions.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]  # The last line may be incomplete.
    if len(whole) < len(content):
        os.truncate(predictions, len(whole))
    return read_predictions(predictions) if whole else []
