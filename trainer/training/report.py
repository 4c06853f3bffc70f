"""The table of scores that a run prints at its end, next to the scores of a majority baseline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.data.prepare import PreparedData
from trainer.scoring.baseline import majority_baseline
from trainer.scoring.meteor import Meteor
from trainer.scoring.scores import ALL
from trainer.scoring.table import format_table, score_table
from trainer.scoring.tasks import is_headline
from trainer.training.evaluate import Evaluation

MAX_BASELINE_SAMPLES = 200_000
"""The largest number of training samples that are read again for the majority baseline."""


def final_table(found: Evaluation, prepared: PreparedData, meteor: Meteor | None) -> str:
    """Return the table of scores per task and, for the headline metrics, per subset.

    Args:
        found: The evaluation.
        prepared: The training datasets. The baseline gives their most frequent answer to every sample. It is omitted if
            the datasets have more than `MAX_BASELINE_SAMPLES` samples.
        meteor: The METEOR metric; None to score captions without it.
    """
    num_training = sum(sum(r.num_per_shard) for r in prepared.open_training())
    baseline = None
    if num_training <= MAX_BASELINE_SAMPLES:
        baseline = majority_baseline(list(_training_metas(prepared)), [p.meta for p in found.predictions], meteor)
    scores = [s for s in found.scores if s.subset == ALL or is_headline(s.task, s.metric)]
    unfinished = sum(not p.finished for p in found.predictions)
    head = f"{found.report.split} split after step {found.report.step}: {len(found.predictions)} samples"
    note = f"\n{unfinished} answers reached eval.max_new_tokens and were cut off" if unfinished else ""
    return f"\n{head}\n{format_table(score_table(scores, baseline))}{note}"


def _training_metas(prepared: PreparedData) -> Iterator[dict[str, Any]]:
    for reader in prepared.open_training():
        yield from reader.metadata()
