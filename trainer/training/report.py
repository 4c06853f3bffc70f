"""The table of scores that a run prints at its end, next to the scores of a majority baseline."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.data.prepare import PreparedData
from trainer.scoring.baseline import majority_baseline
from trainer.scoring.fields import ALL
from trainer.scoring.meteor import Meteor
from trainer.scoring.scores import NO_SUBSET
from trainer.scoring.table import format_table, score_table
from trainer.scoring.tasks import find_task, is_headline
from trainer.training.evaluate import Evaluation

MAX_BASELINE_SAMPLES = 200_000
"""The largest number of training samples for which the majority baseline is computed."""
NUM_ANSWERS = 5
"""The number of answers that are printed at the end of a run."""
_MAX_CHARACTERS = 55


def final_table(found: Evaluation, prepared: PreparedData, meteor: Meteor | None) -> str:
    """Return the table of scores per task and, for the headline metrics, per subset if the samples have subsets.

    Args:
        found: The evaluation.
        prepared: The training datasets, whose most frequent answer the baseline gives to every sample. The baseline is
            omitted if the datasets have more than `MAX_BASELINE_SAMPLES` samples.
        meteor: The METEOR metric; None to score captions without it.
    """
    num_training = sum(sum(r.num_per_shard) for r in prepared.open_training())
    baseline = None
    if num_training <= MAX_BASELINE_SAMPLES:
        baseline = majority_baseline(list(_training_metas(prepared)), [p.meta for p in found.predictions], meteor)
    named = {s.task for s in found.scores if s.subset not in (ALL, NO_SUBSET)}
    scores = [
        s
        for s in found.scores
        if s.subset == ALL or (is_headline(s.task, s.metric) and (s.subset != NO_SUBSET or s.task in named))
    ]
    unfinished = sum(not p.finished for p in found.predictions)
    head = f"{found.report.split} split after step {found.report.step}: {len(found.predictions)} samples"
    note = f"\n{unfinished} answers reached eval.max_new_tokens and were cut off" if unfinished else ""
    return f"\n{head}\n{format_table(score_table(scores, baseline))}{note}"


def closing(found: Evaluation, run_dir: Path, run_url: str, data: str) -> str:
    """Return the last lines that a run prints: some of its answers, the location of its files, and the next commands.

    Args:
        found: The last evaluation.
        run_dir: The run's folder.
        run_url: The location of the run's checkpoints.
        data: The location of data with the evaluated split.
    """
    spoken = [p for p in found.predictions if find_task(p.meta["task"]).is_transcription]
    answers, words = (spoken, "spoken") if spoken else (found.predictions, "wanted")
    # Evenly spaced answers probably include every kind of text.
    shown = [answers[i * len(answers) // NUM_ANSWERS] for i in range(min(NUM_ANSWERS, len(answers)))]
    rows = [{words: _cut(p.meta["answer"]), "recognised" if spoken else "answer": _cut(p.hypothesis)} for p in shown]
    lines = [
        f"run       {run_dir}" + ("" if run_url == str(run_dir) else f", checkpoints in {run_url}"),
        f"status    earshot status {run_dir}",
        f"scores    earshot evaluate {run_url} --data {shlex.quote(data)} --split {found.report.split}",
        f"export    earshot export {run_url} OUT",
    ]
    return f"\n{format_table(rows)}\n\n" + "\n".join(lines)


def _cut(text: object) -> str:
    line = " ".join(str(text).split())
    longest = min(_MAX_CHARACTERS, shutil.get_terminal_size((120, 24)).columns // 2 - 1)  # Two texts share a line.
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _training_metas(prepared: PreparedData) -> Iterator[dict[str, Any]]:
    for reader in prepared.open_training():
        yield from reader.metadata()
