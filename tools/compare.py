"""Compare runs, or evaluations of the same samples.

    earshot compare runs/a runs/b --html comparison.html
    earshot compare runs/a/predictions-test-step500.jsonl runs/b/predictions-test-step500.jsonl

Given the folders of runs, the command compares their recipes, losses, last scores and throughput, as text and as one
HTML page. Otherwise, each argument is a file predictions*.jsonl of a run or of `earshot evaluate`, and the command
compares the first file with each other file. For every metric of every task and subset, the command prints both values
and their difference with its 95 % interval by paired bootstrap. It also lists the samples that became worse.

Exit code 0: success. 2: the runs or evaluations could not be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError, printable_lines
from tools.options import add_plugins
from tools.run_status import is_run
from trainer.evaluation.predictions import Prediction, by_task, columns, read_predictions
from trainer.scoring.meteor import Meteor
from trainer.scoring.metric import Difference, paired_difference
from trainer.scoring.scores import ALL, by_subset, task_metrics
from trainer.scoring.table import format_table
from trainer.scoring.tasks import find_task, is_headline
from trainer.scoring.wordnet import wordnet_if_any


@dataclass(frozen=True)
class Change:
    """The change in one metric on one subset from the first evaluation to another evaluation."""

    task: str
    subset: str
    metric: str
    num_samples: int
    first: float
    """The value of the first evaluation."""
    other: float
    """The value of the other evaluation."""
    difference: Difference
    verdict: str
    """`better`, `worse`, or empty if the 95 % interval of the difference contains 0."""


@dataclass(frozen=True)
class Regression:
    """A sample for which the main metric of its task is worse in the other evaluation."""

    key: str
    task: str
    metric: str
    first: float
    """The value of the first evaluation."""
    other: float
    """The value of the other evaluation."""
    reference: str
    first_said: str
    """The answer of the first evaluation."""
    other_said: str
    """The answer of the other evaluation."""

    @property
    def loss(self) -> float:
        """The absolute difference between `first` and `other`."""
        return abs(self.other - self.first)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 after printing a UserError, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="earshot compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="RUN|PREDICTIONS",
        help="two or more folders of runs, or predictions*.jsonl",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="for runs: write the comparison as a page")
    parser.add_argument(
        "--wordnet", help="folder of WordNet 3.0, for METEOR (default: where the system's packages install it)"
    )
    parser.add_argument(
        "--all-metrics", action="store_true", help="show every metric of every subset (default: the main ones)"
    )
    parser.add_argument(
        "--regressions",
        type=int,
        default=10,
        metavar="N",
        help="list the N samples that became worse by the largest amounts (default: 10)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, with all metrics and regressions")
    add_plugins(parser)
    args = parser.parse_args(argv)
    if len(args.files) < 2:
        parser.error("at least two files are required")
    try:
        if any(path.is_dir() for path in args.files):
            return _compare_runs(args)
        evaluations = [read_predictions(path) for path in args.files]
        names, common = _names(args.files), common_keys(args.files, evaluations)
        shared = [_only(common, predictions) for predictions in evaluations]
        meteor = None
        if any(find_task(p.meta["task"]).needs_wordnet for p in shared[0]):
            folder = wordnet_if_any(args.wordnet, "captions are compared")
            meteor = None if folder is None else Meteor(folder)
        found = [compare(shared[0], other, meteor) for other in shared[1:]]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    skipped_samples = {name: len(all_) - len(common) for name, all_ in zip(names, evaluations, strict=True)}
    if args.json:
        print(json.dumps(_as_json(names, skipped_samples, len(common), found), ensure_ascii=False))
    else:
        print(printable_lines(_as_text(names, skipped_samples, len(common), found, args.all_metrics, args.regressions)))
    return 0


def _compare_runs(args: argparse.Namespace) -> int:
    from tools.compare_runs import compare_runs, describe, load_plugins_of, write_page

    other = next((path for path in args.files if not is_run(path)), None)
    if other is not None:
        raise UserError(f"{other}: is not a run folder; specify only run folders, or only prediction files")
    load_plugins_of(args.files)
    tree = compare_runs(args.files, time.time())
    print(describe(tree))
    if args.html is not None:
        write_page(tree, args.html)
        print(f"\n{args.html}")
    if args.json:
        print(json.dumps(tree, ensure_ascii=False))
    return 0


def common_keys(files: Sequence[Path], evaluations: Sequence[Sequence[Prediction]]) -> list[str]:
    """Return the keys of the samples that all evaluations have in common, in the order of the first evaluation.

    Raises:
        UserError: If there are no such keys, or a key belongs to different samples.
    """
    by_key = [{p.key: p for p in predictions} for predictions in evaluations]
    common = [p.key for p in evaluations[0] if all(p.key in other for other in by_key[1:])]
    if not common:
        raise UserError(f"{files[0]}: has no key in common with all other files; compare evaluations of the same split")
    for path, other in zip(files[1:], by_key[1:], strict=True):
        for key in common:
            for field in ("task", "answer", "subset", "choices", "references", "language"):
                ours, theirs = by_key[0][key].meta.get(field), other[key].meta.get(field)
                if ours != theirs:
                    raise UserError(
                        f"{path}: {field} of '{key}' is {theirs!r}, but {ours!r} in {files[0]}; compare evaluations "
                        "of the same data"
                    )
    return common


def compare(
    first: Sequence[Prediction], other: Sequence[Prediction], meteor: Meteor | None
) -> tuple[list[Change], list[Regression]]:
    """Compare two evaluations of the same samples in the same order.

    Args:
        first: The predictions of the first evaluation.
        other: The predictions of the other evaluation.
        meteor: The METEOR scorer; None to score captions without METEOR.

    Returns:
        The change in every metric, and the samples that became worse, worst first.
    """
    changes: list[Change] = []
    regressions: list[Regression] = []
    theirs = by_task(other)
    for task, ours in by_task(first).items():
        metas = columns(ours)[1]
        before = task_metrics(task, *columns(ours), meteor)
        after = task_metrics(task, *columns(theirs[task]), meteor)
        for subset, members in by_subset(metas).items():
            for a, b in zip(before, after, strict=True):
                if len(rows := a.rows(members)):
                    x, y = (float(m.value(m.statistics[rows].sum(0))) for m in (a, b))
                    difference = paired_difference(a, b, rows)
                    verdict = _verdict(difference, a.lower_is_better)
                    changes.append(Change(task, subset, a.name, len(rows), x, y, difference, verdict))
        a, b = before[0], after[0]
        values_a, values_b = a.value(a.statistics), b.value(b.statistics)
        for p, q, x, y in zip(ours, theirs[task], values_a, values_b, strict=True):
            if y > x if a.lower_is_better else y < x:
                said = (p.meta["answer"], p.hypothesis, q.hypothesis)
                regressions.append(Regression(p.key, task, a.name, float(x), float(y), *said))
    return changes, sorted(regressions, key=lambda r: (-r.loss, r.key))


def _verdict(difference: Difference, lower_is_better: bool) -> str:
    if not difference.is_significant:
        return ""
    return "better" if (difference.value < 0) == lower_is_better else "worse"


def _only(keys: Sequence[str], predictions: Sequence[Prediction]) -> list[Prediction]:
    by_key = {p.key: p for p in predictions}
    return [by_key[key] for key in keys]


def _names(files: Sequence[Path]) -> list[str]:
    """Return a short name for each file: the last parts of its path, as many as needed to make all names unique."""
    parts = [path.with_suffix("").parts for path in files]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _as_json(
    names: Sequence[str],
    skipped_samples: dict[str, int],
    num: int,
    found: Sequence[tuple[list[Change], list[Regression]]],
) -> dict[str, Any]:
    return {
        "first": names[0],
        "num_samples": num,
        "num_skipped_samples": skipped_samples,
        "comparisons": [
            {"other": name, "changes": [asdict(c) for c in changes], "regressions": [asdict(r) for r in regressions]}
            for name, (changes, regressions) in zip(names[1:], found, strict=True)
        ],
    }


def _as_text(
    names: Sequence[str],
    skipped_samples: dict[str, int],
    num: int,
    found: Sequence[tuple[list[Change], list[Regression]]],
    all_metrics: bool,
    num_regressions: int,
) -> str:
    blocks = [f"{num} samples are in all {len(names)} evaluations"]
    blocks += [
        f"{name}: {count} samples are ignored, since they are not in all other evaluations"
        for name, count in skipped_samples.items()
        if count
    ]
    for name, (changes, regressions) in zip(names[1:], found, strict=True):
        shown = [c for c in changes if all_metrics or c.subset == ALL or is_headline(c.task, c.metric)]
        blocks.append(f"{name} against {names[0]}\n{format_table([_row(c) for c in shown])}")
        worse = [c for c in changes if c.verdict == "worse"]
        blocks.append(f"{len(worse)} of {len(changes)} metrics and {len(regressions)} samples are worse")
        if regressions[:num_regressions]:
            blocks.append(format_table([_listed(r) for r in regressions[:num_regressions]]))
    return "\n\n".join(blocks)


def _row(change: Change) -> dict[str, object]:
    d = change.difference
    return {
        "task": change.task,
        "subset": change.subset,
        "samples": change.num_samples,
        "metric": change.metric,
        "first": change.first,
        "other": change.other,
        "difference": d.value,
        "low": d.low,
        "high": d.high,
        "p": d.p,
        "": change.verdict,
    }


def _listed(r: Regression) -> dict[str, object]:
    return {
        "key": r.key,
        "metric": f"{r.task}/{r.metric}",
        "first": r.first,
        "other": r.other,
        "reference": r.reference,
        "first answer": r.first_said,
        "other answer": r.other_said,
    }


if __name__ == "__main__":
    sys.exit(main())
