"""Have a language model rate open answers: python -m tools.judge PREDICTIONS.jsonl --url URL --model NAME.

URL is any OpenAI-compatible endpoint (`http://localhost:8000/v1`); its key, if it needs one, is read from the
environment variable OPENAI_API_KEY. Ratings are 0 to 5, on AudioBench's scale. They are written beside the predictions,
to PREDICTIONS.judged-NAME.jsonl, and kept in a cache, so that the same answer is paid for once.
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
from tools.options import check_output
from trainer.evaluation.predictions import Prediction, read_predictions
from trainer.scoring.endpoint import Endpoint
from trainer.scoring.judge import Item, Judge, Verdict
from trainer.scoring.metric import mean
from trainer.scoring.scores import TaskScore, score_metrics
from trainer.scoring.table import format_table, score_table

KEY_VARIABLE = "OPENAI_API_KEY"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: judged. 1: the judge failed on some answers. 2: nothing was; one line on stderr says why."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.judge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("predictions", type=Path, help="a predictions-*.jsonl of a run")
    parser.add_argument("--url", required=True, help="base address of the endpoint, ending in /v1 with most")
    parser.add_argument("--model", required=True, help="its name at the endpoint")
    parser.add_argument("--tasks", nargs="+", default=["aqa", "sqa", "ac"], help="default: aqa sqa ac")
    parser.add_argument("--cache", type=Path, default=Path("runs/judge-cache"), help="default: runs/judge-cache")
    parser.add_argument("--workers", type=int, default=8, help="requests at a time (default: 8)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one attempt (default: 60)")
    parser.add_argument("--attempts", type=int, default=5, help="per answer (default: 5)")
    parser.add_argument(
        "--prices", type=float, nargs=2, metavar=("IN", "OUT"), help="of a million tokens, to show what it cost"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.workers < 1 or args.attempts < 1 or args.timeout <= 0:
        parser.error("--workers and --attempts must be at least 1, --timeout above 0")
    try:
        predictions = [p for p in read_predictions(args.predictions) if p.meta["task"] in args.tasks]
        if not predictions:
            raise UserError(f"{args.predictions}: no prediction of {', '.join(args.tasks)}; choose other --tasks")
        items = [_item(args.predictions, p) for p in predictions]
        out = _verdicts_path(args.predictions, args.model)
        check_output(f"{out}", out)
        check_output(f"--cache {args.cache}", args.cache, is_folder=True)
        endpoint = Endpoint(args.url, os.environ.get(KEY_VARIABLE) or None, args.timeout, args.attempts)
        rated = Judge(endpoint, args.model, args.cache).rate_all(items, args.workers)
        verdicts = list(tqdm(rated, total=len(items), unit=" answers", disable=None, leave=False))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    account = take_account(predictions, verdicts, args.prices)
    written = None
    if account.scores:  # else what an earlier call wrote stays
        _write(out, args.model, predictions, verdicts)
        written = out
    print(json.dumps(_as_json(account, written)) if args.json else _as_text(account, written))
    return 1 if account.num_failures else 0


@dataclass(frozen=True)
class Account:
    """What judging gave and what it took."""

    scores: list[TaskScore]
    """Mean ratings, over what was rated."""
    num_cached: int
    num_failures: dict[str, int]
    """By kind; they are in no score."""
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    """In the currency of the prices; None: none were given."""


def take_account(
    predictions: Sequence[Prediction], verdicts: Sequence[Verdict], prices: Sequence[float] | None
) -> Account:
    """Mean rating per task and subset, failures apart; tokens of this run's requests, cached ones cost none."""
    rated: dict[str, list[tuple[dict[str, Any], float]]] = {}
    for p, v in zip(predictions, verdicts, strict=True):
        if v.rating is not None:
            rated.setdefault(p.meta["task"], []).append((p.meta, v.rating))
    scores = [
        s
        for task, pairs in rated.items()
        for s in score_metrics(task, [mean("judge", [rating for _, rating in pairs])], [meta for meta, _ in pairs])
    ]
    sent, received = sum(v.prompt_tokens for v in verdicts), sum(v.completion_tokens for v in verdicts)
    return Account(
        scores,
        sum(v.cached for v in verdicts),
        dict(Counter(v.failure for v in verdicts if v.failure)),
        sent,
        received,
        None if prices is None else (sent * prices[0] + received * prices[1]) / 1e6,
    )


def _item(path: Path, p: Prediction) -> Item:
    if not p.meta.get("instruction"):
        raise UserError(f"{path}: '{p.key}' has no instruction, which the judge needs; evaluate anew")
    return Item(p.meta["instruction"], p.meta["answer"], p.hypothesis)


def _verdicts_path(predictions: Path, model: str) -> Path:
    """One file for each judge: ratings of different ones are not comparable."""
    return predictions.with_suffix(f".judged-{re.sub(r'[^A-Za-z0-9._-]+', '-', model)[:100]}.jsonl")


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


def _as_json(account: Account, out: Path | None) -> dict[str, Any]:
    return {
        "scores": {s.name: {"value": s.value, "low": s.low, "high": s.high} for s in account.scores},
        "num_rated": {s.name: s.num_samples for s in account.scores},
        "num_cached": account.num_cached,
        "num_failures": account.num_failures,
        "prompt_tokens": account.prompt_tokens,
        "completion_tokens": account.completion_tokens,
        "cost": account.cost,
        "verdicts": None if out is None else str(out),
    }


def _as_text(account: Account, out: Path | None) -> str:
    lines = [format_table(score_table(account.scores))] if account.scores else ["nothing could be rated"]
    if account.num_failures:
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(account.num_failures.items()))
        lines.append(f"the judge failed on {sum(account.num_failures.values())} ({counts}); they are in no score")
    cost = "" if account.cost is None else f", which cost {account.cost:.4f}"
    lines.append(
        f"{account.num_cached} ratings from the cache; {account.prompt_tokens} tokens sent and "
        f"{account.completion_tokens} received for the others{cost}"
    )
    lines.append("no verdicts were written" if out is None else f"verdicts: {out}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
