"""The text of a scorecard for a terminal."""

from __future__ import annotations

from typing import Any

from trainer.scoring.table import format_table

_TITLES = {"": "all samples", "subset": "by subset", "language": "by language", "source": "by source",
           "duration": "by duration"}  # fmt: skip


def describe(tree: dict[str, Any], all_metrics: bool) -> str:
    """Format a scorecard as tables.

    Args:
        tree: The result of `make_card`.
        all_metrics: True to show every metric of every group, False to show only the main metric of each task by group.
    """
    lines = [f"{tree['num_samples']:,} samples, {tree['audio_sec'] / 3600:.2f} h of audio"]
    if tree["num_windowed"]:
        lines.append(
            f"{tree['num_windowed']:,} recordings were longer than a window; they were transcribed in overlapping "
            "windows and joined, and no audio was cut off"
        )
    if tree["num_unfinished"]:
        lines.append(f"{tree['num_unfinished']:,} answers reached the maximum length and were cut off there")
    if tree["num_skipped"]:
        reasons = ", ".join(f"{num} {reason}" for reason, num in tree["num_skipped"].items())
        lines.append(f"samples without an answer: {reasons}")
    blocks = ["\n".join(lines)]
    for dimension, title in _TITLES.items():
        own = [s for s in tree["scores"] if s["dimension"] == dimension]
        several = {s["task"] for s in own if len({o["group"] for o in own if o["task"] == s["task"]}) > 1}
        shown = [
            s
            for s in own
            if not dimension or ((all_metrics or s["metric"] == tree["headlines"][s["task"]]) and s["task"] in several)
        ]
        if shown:
            blocks.append(f"{title}\n{format_table([_row(s) for s in shown])}")
    return "\n\n".join(blocks)


def _row(score: dict[str, Any]) -> dict[str, object]:
    row: dict[str, object] = {"task": score["task"]}
    if score["dimension"]:
        row[score["dimension"]] = score["group"]
    row |= {"samples": score["num_samples"], "metric": score["metric"]}
    return row | {name: score[name] for name in ("value", "low", "high")}
