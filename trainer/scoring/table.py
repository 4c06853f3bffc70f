"""Tables of scores as aligned text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from model.errors import printable
from trainer.scoring.scores import TaskScore
from trainer.scoring.tasks import find_task


def format_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Format rows as a table with aligned columns. The header consists of the first row's keys.

    Numbers are aligned to the right, and floats have three decimals.
    """
    if not rows:
        return ""
    keys = list(rows[0])
    head = [printable(key) for key in keys]
    cells = [[_cell(row.get(key)) for key in keys] for row in rows]
    is_number = [all(isinstance(row.get(key), int | float | None) for row in rows) for key in keys]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]

    def line(values: Sequence[str]) -> str:
        padded = [v.rjust(w) if n else v.ljust(w) for v, w, n in zip(values, widths, is_number, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, cells)])


def score_table(scores: Iterable[TaskScore], baseline: Iterable[TaskScore] | None = None) -> list[dict[str, object]]:
    """Return rows for `format_table`, one per score, with the score's majority baseline if there is one.

    Transcription has no baseline, since the most frequent transcript says nothing about speech recognition.
    """
    guessed = {s.name: s.value for s in baseline or () if not find_task(s.task).is_transcription}
    rows: list[dict[str, object]] = []
    for s in scores:
        row: dict[str, object] = {"task": s.task, "subset": s.subset, "samples": s.num_samples, "metric": s.metric}
        row |= {"value": s.value, "low": s.low, "high": s.high}
        if baseline is not None:
            row["majority"] = guessed.get(s.name)
        rows.append(row)
    return rows


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else printable(str(value))
