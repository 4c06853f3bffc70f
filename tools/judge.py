"""Rate open answers with an LLM as the judge.

    earshot judge runs/demo/predictions-test-step500.jsonl --url http://localhost:8000/v1 --model llama-3-70b

URL is the address of an OpenAI-compatible endpoint. The API key, if the endpoint needs one, is read from the
environment variable OPENAI_API_KEY. Ratings are from 0 to 5 on AudioBench's scale. They are written to
PREDICTIONS.judged-NAME.jsonl, and cached so that no answer is paid for twice.

    earshot judge runs/b/predictions-test.jsonl --against runs/a/predictions-test.jsonl --url … --model NAME

With --against, the judge compares the answers with those of another evaluation of the same samples. Each pair of
answers is compared in both orders. The score is the fraction of pairs in which the answer from PREDICTIONS is better,
where a tie counts as one half.

Exit code 0: all answers were rated. 1: the judge failed on some answers. 2: invalid arguments, or predictions that
cannot be rated.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.errors import UserError
from tools import judge_pairs
from tools.options import add_plugins, check_output
from trainer.evaluation.predictions import Prediction, read_predictions
from trainer.scoring.endpoint import Endpoint
from trainer.scoring.judge import Item, Judge, Judged, Verdict
from trainer.scoring.scores import TaskScore
from trainer.scoring.table import format_table, score_table
from trainer.scoring.tasks import TASKS

KEY_VARIABLE = "OPENAI_API_KEY"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 1 if the judge failed on an answer, 2 after printing a UserError, else 0.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    tasks = args.tasks or _judged()
    if args.workers < 1 or args.attempts < 1 or args.timeout <= 0:
        parser.error("--workers and --attempts must be at least 1, and --timeout must be above 0")
    try:
        predictions = [p for p in read_predictions(args.predictions) if p.meta["task"] in tasks]
        if not predictions:
            raise UserError(f"{args.predictions}: contains no prediction of {', '.join(tasks)}; choose other --tasks")
        check_output(f"--cache {args.cache}", args.cache, is_folder=True)
        endpoint = Endpoint(args.url, os.environ.get(KEY_VARIABLE) or None, args.timeout, args.attempts)
        judge = Judge(endpoint, args.model, args.cache)
        return (_rate if args.against is None else _compare)(args, judge, predictions)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="earshot judge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS", help="a predictions*.jsonl of an evaluation")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="PREDICTIONS",
        help="compare the answers with this evaluation instead of rating them",
    )
    parser.add_argument("--url", required=True, help="base address of the endpoint, which usually ends in /v1")
    parser.add_argument("--model", required=True, metavar="NAME", help="name of the judge's model at the endpoint")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help=f"tasks whose answers are rated (default: {' '.join(_judged())})",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("runs/judge-cache"),
        metavar="DIR",
        help="folder of the cache of ratings (default: runs/judge-cache)",
    )
    parser.add_argument("--workers", type=int, default=8, metavar="N", help="concurrent requests (default: 8)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SEC", help="time limit of each attempt in seconds (default: 60)"
    )
    parser.add_argument(
        "--attempts", type=int, default=5, metavar="N", help="maximum number of attempts for each answer (default: 5)"
    )
    parser.add_argument(
        "--prices",
        type=float,
        nargs=2,
        metavar=("IN", "OUT"),
        help="prices of a million sent and a million received tokens, to report the cost",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_plugins(parser)
    return parser


def _rate(args: argparse.Namespace, judge: Judge, predictions: Sequence[Prediction]) -> int:
    """Rate the predictions, and return the exit code."""
    items = [_item(args.predictions, p) for p in predictions]
    out = _verdicts_path(args.predictions, args.model)
    check_output(f"{out}", out)
    verdicts = _verdicts(judge, items, args.workers)
    scores = judge_pairs.mean_scores("judge", predictions, [v.rating for v in verdicts])
    summary = summarise(scores, verdicts, args.prices)
    written = None
    if summary.scores:  # If no answer could be rated, the file of an earlier call is kept.
        _write(out, args.model, predictions, verdicts)
        written = out
    print(json.dumps(_as_json(summary, written)) if args.json else _as_text(summary, written))
    return 1 if summary.num_failures else 0


def _compare(args: argparse.Namespace, judge: Judge, predictions: Sequence[Prediction]) -> int:
    """Compare the predictions with another evaluation, and return the exit code."""
    tasks = {p.meta["task"] for p in predictions}
    others = [p for p in read_predictions(args.against) if p.meta["task"] in tasks]
    pairs = judge_pairs.align(args.predictions, predictions, args.against, others)
    for ours, _ in pairs:
        _item(args.predictions, ours)
    other = f".against-{_file_part('-'.join(args.against.absolute().with_suffix('').parts[-2:]))}"
    out = _verdicts_path(args.predictions.with_suffix(f"{other}.jsonl"), args.model)
    check_output(f"{out}", out)
    found = judge_pairs.comparisons(pairs, _verdicts(judge, judge_pairs.questions(pairs), args.workers))
    written = None
    summary = summarise(judge_pairs.preferences(found), judge_pairs.asked(found), args.prices)
    if summary.scores:
        judge_pairs.write(out, args.model, (args.predictions, args.against), found)
        written = out
    num_ignored = (len(predictions) - len(pairs), len(others) - len(pairs))
    if args.json:
        print(json.dumps(_as_json(summary, written) | judge_pairs.outcomes(found) | {"num_ignored": num_ignored}))
    else:
        ignored = (
            f"{sum(num_ignored)} answers are ignored, since the other file lacks their samples\n"
            if any(num_ignored)
            else ""
        )
        print(ignored + judge_pairs.as_text(summary.scores, found) + "\n" + _requests(summary, written))
    return 1 if summary.num_failures else 0


def _verdicts(judge: Judge, items: Sequence[Judged], num_workers: int) -> list[Verdict]:
    rated = judge.rate_all(items, num_workers)
    return list(tqdm(rated, total=len(items), unit=" answers", disable=None, leave=False))


def _judged() -> list[str]:
    """Return the names of the tasks whose answers are rated by default."""
    return [task.name for task in TASKS.values() if task.is_judged]


@dataclass(frozen=True)
class Summary:
    """The mean ratings and the cost of judging."""

    scores: list[TaskScore]
    """The mean rating or preference of every task and subset, over the answers that were rated."""
    num_cached: int
    """The number of ratings that were in the cache."""
    num_failures: dict[str, int]
    """The number of answers without a rating, by the kind of failure. These answers are not included in any score."""
    prompt_tokens: int
    """The number of tokens that were sent."""
    completion_tokens: int
    """The number of tokens that were received."""
    cost: float | None
    """The cost in the currency of the prices; None if no prices were given."""


def summarise(scores: list[TaskScore], verdicts: Sequence[Verdict], prices: Sequence[float] | None) -> Summary:
    """Summarize one run of the command.

    Args:
        scores: The scores.
        verdicts: The judge's verdicts.
        prices: The prices of a million sent and a million received tokens; None if no prices were given.
    """
    sent, received = sum(v.prompt_tokens for v in verdicts), sum(v.completion_tokens for v in verdicts)
    return Summary(
        scores,
        sum(v.cached for v in verdicts),
        dict(Counter(v.failure for v in verdicts if v.failure)),
        sent,
        received,
        None if prices is None else (sent * prices[0] + received * prices[1]) / 1e6,
    )


def _item(path: Path, p: Prediction) -> Item:
    if not p.meta.get("instruction"):
        raise UserError(f"{path}: '{p.key}' has no instruction, which the judge needs; repeat the evaluation")
    return Item(p.meta["instruction"], p.meta["answer"], p.hypothesis, judge_pairs.history(p.meta))


def _verdicts_path(predictions: Path, model: str) -> Path:
    """Return the path for the verdicts of a judge. It contains the judge's name, since the ratings of judges differ."""
    return predictions.with_suffix(f".judged-{_file_part(model)}.jsonl")


def _file_part(text: str) -> str:
    """Return text in a form that can be part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:100]


def _write(path: Path, model: str, predictions: Sequence[Prediction], verdicts: Sequence[Verdict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for p, v in zip(predictions, verdicts, strict=True):
            line = {
                "key": p.key,
                "judge": model,
                "task": p.meta["task"],
                "instruction": p.meta["instruction"],
                "reference": p.meta["answer"],
                "hypothesis": p.hypothesis,
                "rating": v.rating,
                "failure": v.failure,
                "explanation": v.explanation,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _as_json(summary: Summary, out: Path | None) -> dict[str, Any]:
    return {
        "scores": {s.name: {"value": s.value, "low": s.low, "high": s.high} for s in summary.scores},
        "num_rated": {s.name: s.num_samples for s in summary.scores},
        "num_cached": summary.num_cached,
        "num_failures": summary.num_failures,
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.completion_tokens,
        "cost": summary.cost,
        "verdicts": None if out is None else str(out),
    }


def _as_text(summary: Summary, out: Path | None) -> str:
    table = format_table(score_table(summary.scores)) if summary.scores else "no answer could be rated"
    return f"{table}\n{_requests(summary, out)}"


def _requests(summary: Summary, out: Path | None) -> str:
    """Return the lines about failures, tokens and the file of verdicts."""
    lines = []
    if summary.num_failures:
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(summary.num_failures.items()))
        lines.append(
            f"the judge failed on {sum(summary.num_failures.values())} answers ({counts}), which are not in any score"
        )
    cost = "" if summary.cost is None else f", which cost {summary.cost:.4f}"
    lines.append(
        f"{summary.num_cached} ratings from the cache; {summary.prompt_tokens} tokens sent and "
        f"{summary.completion_tokens} received for the others{cost}"
    )
    lines.append("no verdicts were written" if out is None else f"verdicts: {out}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
