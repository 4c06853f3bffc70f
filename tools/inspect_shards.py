r"""Summarize a dataset of shards, and compare it with its index.

    earshot shards inspect data/shards
    earshot shards inspect s3://bucket/foreign --build-index --set task=asr --set split=train \
        --set "instruction=Transcribe the speech."

URL is a folder or s3://BUCKET/PREFIX (also gs:// and az://). --build-index creates the index of WebDataset shards that
other programs wrote. A sample in such a shard consists of `<key>.<audio type>` and of `<key>.json` (the fields of a
manifest) or `<key>.txt` (the answer). --set adds a field to all samples that lack it.

Exit code 0: everything matches the index, or --no-check was given. 1: something does not match. 2: invalid arguments,
or shards that cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.errors import UserError, printable_lines
from tools.options import check_output
from trainer.data.metadata import conversation_of
from trainer.data.shard_check import SkippedSample, build_index, check_shard, summary_of
from trainer.data.shards import Entry, RawSample, ShardSet
from trainer.storage.open import open_store

EDGES_SEC = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0, 60.0, float("inf"))
_BAR_CHARS = 40


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 1 if a shard does not match the index, 2 after printing a UserError, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="earshot shards inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", metavar="URL", help="folder or bucket URL")
    parser.add_argument("--build-index", action="store_true", help="create the index and write it next to the shards")
    parser.add_argument(
        "--set",
        dest="defaults",
        action="append",
        default=[],
        metavar="FIELD=TEXT",
        help="with --build-index: add this field to all samples that lack it",
    )
    parser.add_argument("--no-check", action="store_true", help="read only the index and offset tables, not the shards")
    parser.add_argument("--png", type=Path, help="write a histogram of durations to this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    if args.png:
        if not args.png.parent.is_dir():
            raise UserError(f"--png {args.png}: {args.png.parent} is not a folder; create it or choose another path")
        check_output(f"--png {args.png}", args.png)
    store = open_store(args.url)
    skipped: list[SkippedSample] = []
    if args.build_index:
        defaults = dict(_field(text) for text in args.defaults)
        with tqdm(unit=" shards", disable=None, leave=False) as bar:
            skipped = build_index(store, defaults, on_shard=bar.update)
    elif args.defaults:
        raise UserError("--set: needs --build-index; add it, or remove --set")
    shards = ShardSet(store, num_cached_tables=1)
    damage: list[str] = []
    seconds: list[float] = []
    conversations = Conversations()
    with tqdm(total=shards.index.num_bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for shard, info in enumerate(shards.shards):
            if not args.no_check:
                damage += check_shard(shards, shard, conversations.add)
            seconds += (e.seconds for e in _entries(shards, shard, damage) if e.num_clips)
            bar.update(info.num_bytes)
    report = summary(shards, seconds)
    report |= {"checked": not args.no_check, "damage": damage}
    report["conversations"] = None if args.no_check else conversations.counts()
    report |= {"skipped": summary_of(skipped), "skipped_samples": [str(s) for s in skipped]}
    if args.png:
        draw(seconds, args.png, f"{args.url}: {len(seconds)} clips")
    print(json.dumps(report) if args.json else printable_lines(as_text(report)))
    return 1 if damage else 0


class Conversations:
    """The number of conversations (samples with `messages`) in shards, by their properties."""

    def __init__(self) -> None:
        self._answers: Counter[int] = Counter()
        self._forms: Counter[str] = Counter()

    def add(self, sample: RawSample) -> None:
        """Count a sample if it is a conversation."""
        turns = conversation_of(sample.metadata)
        if not turns:
            return
        users = [turn for turn in turns if turn.role == "user"]
        self._answers[len(users)] += 1
        self._forms["num_with_system_prompt"] += turns[0].role == "system"
        self._forms["num_with_later_audio"] += any(turn.num_clips for turn in users[1:])

    def counts(self) -> dict[str, Any]:
        """Return the number of conversations, of their answers, and of conversations with each property."""
        return {
            "num_samples": self._answers.total(),
            "num_answers": sum(num * count for num, count in self._answers.items()),
            "num_with_system_prompt": self._forms["num_with_system_prompt"],
            "num_with_later_audio": self._forms["num_with_later_audio"],
            "answers": {str(num): self._answers[num] for num in sorted(self._answers)},
        }


def _entries(shards: ShardSet, shard: int, damage: list[str]) -> Iterator[Entry]:
    try:
        yield from shards.table(shard)
    except UserError as error:
        if str(error) not in damage:
            damage.append(str(error))


def _field(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise UserError(f"--set {text}: must be FIELD=TEXT")
    return name, value


def summary(shards: ShardSet, seconds: Sequence[float]) -> dict[str, Any]:
    """Return the counts, the hours for each task, language, source, split and subset, and the histogram of durations.

    Args:
        shards: The shards.
        seconds: The duration of every clip in seconds.
    """
    groups = shards.index.groups
    hours: dict[str, dict[str, dict[str, float]]] = {}
    for kind in ("task", "language", "source", "split", "subset"):
        table = hours.setdefault(kind, {})
        for group in groups:
            line = table.setdefault(getattr(group, kind) or "(none)", {"num_samples": 0, "hours": 0.0})
            line["num_samples"] += group.num_samples
            line["hours"] += group.seconds / 3600
    counts = [sum(low <= s < high for s in seconds) for low, high in zip(EDGES_SEC, EDGES_SEC[1:], strict=False)]
    return {
        "url": shards.store.url,
        "num_shards": len(shards.shards),
        "num_samples": shards.index.num_samples,
        "num_bytes": shards.index.num_bytes,
        "hours": sum(g.seconds for g in groups) / 3600,
        "by": hours,
        "duration_edges_sec": list(EDGES_SEC[:-1]),
        "duration_counts": counts,
    }


def as_text(report: dict[str, Any]) -> str:
    """Format the report of the command for the terminal."""
    lines = [
        f"{report['url']}: {report['num_samples']} samples, {report['hours']:.3f} h, {report['num_shards']} shard(s), "
        f"{report['num_bytes'] / 1e6:.1f} MB"
    ]
    for kind, table in report["by"].items():
        lines.append("")
        width = max(map(len, [kind, *table]))
        lines.append(f"{kind:{width}}  {'samples':>9}  {'hours':>9}")
        for name, line in sorted(table.items(), key=lambda item: -item[1]["hours"]):
            lines.append(f"{name:{width}}  {line['num_samples']:9d}  {line['hours']:9.3f}")
    lines += ["", "seconds"]
    edges, counts = [*report["duration_edges_sec"], None], report["duration_counts"]
    most = max([*counts, 1])
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        name = f"{low:g} to {high:g}" if high is not None else f"from {low:g}"
        lines.append(f"{name:>10}  {count:8d}  {'#' * round(_BAR_CHARS * count / most)}")
    lines.append("")
    found = report["conversations"]
    if found and found["num_samples"]:
        by_answers = ", ".join(f"{count} with {num}" for num, count in found["answers"].items())
        lines.append(
            f"conversations: {found['num_samples']} with {found['num_answers']} answers ({by_answers}); "
            f"{found['num_with_system_prompt']} with a system prompt, {found['num_with_later_audio']} with audio after "
            "the first question"
        )
    if report["skipped"]:
        lines.append(f"skipped samples: {report['skipped']}")
    lines += [f"damaged: {text}" for text in report["damage"]]
    if report["checked"] and not report["damage"]:
        lines.append("all shards and samples match the index")
    return "\n".join(lines)


def draw(seconds: Sequence[float], path: Path, title: str) -> None:
    """Write a histogram of durations as PNG.

    Args:
        seconds: The duration of every clip in seconds.
        path: The file to write.
        title: The title of the figure.
    """
    from matplotlib.figure import Figure  # The import is slow, so it is only done when a figure is drawn.

    from trainer.page.figure import plain

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(seconds, bins=60)
    axes.set(xlabel="seconds", ylabel="clips", title=plain(title))
    figure.savefig(path, format="png", dpi=120)


if __name__ == "__main__":
    sys.exit(main())
