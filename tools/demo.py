"""Makes a small corpus, trains the smallest recipe on it and shows what was learned: `python -m tools.demo`."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.errors import UserError
from tools.demo_corpus import write_corpus
from trainer.config.load import load_recipe
from trainer.run.command import module_command
from trainer.scoring.baseline import majority_baseline
from trainer.scoring.scores import ALL, TaskScore, score
from trainer.scoring.table import format_table, score_table

NUM_TRANSCRIPTS = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys to change, e.g. train.steps=50")
    options = parser.parse_args(arguments)
    run_dir = Path("runs/demo")
    try:
        return run_demo(run_dir, options.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_demo(run_dir: Path, overrides: Sequence[str]) -> int:
    """Corpus, training, report; `run_dir` is relative to the current folder. Returns the exit code of the training."""
    folder = Path.cwd() / run_dir
    corpus = folder / "corpus"
    keys = [f"name={run_dir.name}", f"train.run_dir={run_dir.parent}", f"data.root={run_dir}/corpus", *overrides]
    load_recipe("demo_cpu", keys)  # before anything of an earlier demo is removed
    start_sec = time.perf_counter()
    print("1/3  corpus: speech from espeak-ng, sounds from numpy, five tasks", flush=True)
    rows = _read_jsonl(write_corpus(corpus))
    num_train = sum(row["split"] == "train" for row in rows)
    took_sec = time.perf_counter() - start_sec
    print(
        f"     {num_train} items to train on, {len(rows) - num_train} held out, in {took_sec:.0f} s: {run_dir}/corpus"
    )
    _clear(folder, keep=corpus)
    print(f"2/3  training: earshot train demo_cpu {' '.join(keys)}", flush=True)
    code = _run(module_command("trainer", "demo_cpu", *keys))
    if code != 0:
        print(f"\ntraining failed (exit code {code}); what it said is above", file=sys.stderr)
        return code
    print("3/3  what it learned, on voices and sounds it never heard\n")
    print(report(folder, run_dir, rows))
    return 0


def report(folder: Path, shown_dir: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """The text shown at the end. `folder`: the run's; `rows`: the corpus manifest.

    Raises:
        UserError: the run left no summary or no predictions.
    """
    summary_file = folder / "summary.json"
    if not summary_file.exists():
        raise UserError(f"{summary_file}: the run wrote no summary; look at the messages above")
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    predictions = _read_jsonl(_last_predictions(folder, "test"))
    metas = {row["id"]: row for row in rows}
    scores = _scores(predictions, metas)
    baseline = majority_baseline(
        [row for row in rows if row["split"] == "train"], [_meta(p, metas) for p in predictions]
    )
    others = [s for s in scores if s.metric == "accuracy" and s.subset == ALL]
    spoken = [p for p in predictions if p["task"] == "asr"]
    # Evenly spaced, so that every kind of text is among them.
    shown = [spoken[i * len(spoken) // NUM_TRANSCRIPTS] for i in range(min(NUM_TRANSCRIPTS, len(spoken)))]
    parts = [
        f"word error rate  {summary['wer_before']:.2f} before  ->  {summary['wer_after']:.2f} after",
        format_table([{"said": p["reference"], "heard": p["hypothesis"]} for p in shown]),
        format_table([_answer_row(row) for row in score_table(others, baseline)]),
        f"loss {summary['loss_first']:.2f} -> {summary['loss_last']:.2f}, {summary['num_ranks']} ranks, "
        f"{summary['seconds']:.0f} s",
        _next_steps(shown_dir),
    ]
    return "\n\n".join(part for part in parts if part)


def _next_steps(shown_dir: Path) -> str:
    return "\n".join(
        [
            f"the run       {shown_dir}/  (summary.json, metrics.jsonl, predictions, checkpoints)",
            f"its curves    mlflow ui --backend-store-uri sqlite:///{shown_dir.parent}/mlflow.db",
            "longer        earshot demo train.steps=2000",
            "real speech   earshot train kit_cpu data.root=<folder of the kit>",
            "at scale      earshot train mowe_70b --dry-run",
        ]
    )


def _answer_row(row: Mapping[str, object]) -> dict[str, object]:
    names = {"sqa": "questions on speech", "er": "emotion", "aqa": "questions on sound", "ac": "captions"}
    task = str(row["task"])
    return {
        "task": f"{task}  {names.get(task, '')}".rstrip(),
        "correct": row["value"],
        "always the commonest answer": row["majority"],
    }


def _scores(predictions: Sequence[Mapping[str, Any]], metas: Mapping[str, Any]) -> list[TaskScore]:
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for prediction in predictions:
        by_task.setdefault(prediction["task"], []).append(prediction)
    return [
        found
        for task, group in by_task.items()
        for found in score(task, [p["hypothesis"] for p in group], [_meta(p, metas) for p in group])
    ]


def _meta(prediction: Mapping[str, Any], metas: Mapping[str, Any]) -> Mapping[str, Any]:
    if prediction["key"] not in metas:
        raise UserError(
            f"prediction {prediction['key']!r} is of no item of the demo corpus; remove runs/demo and retry"
        )
    return metas[prediction["key"]]


def _last_predictions(folder: Path, split: str) -> Path:
    steps = {
        int(match[1]): path
        for path in folder.glob(f"predictions-{split}-step*.jsonl")
        if (match := re.fullmatch(rf"predictions-{split}-step(\d+)\.jsonl", path.name))
    }
    if not steps:
        raise UserError(f"{folder}: the run wrote no predictions-{split}-step*.jsonl; is its evaluation switched off?")
    return steps[max(steps)]


def _clear(folder: Path, keep: Path) -> None:
    """Remove an earlier demo's run, so that this one starts from the first step."""
    for path in folder.iterdir():
        if path == keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _run(command: Sequence[str]) -> int:
    """Run `command` and return its exit code: 128 plus the signal's number where a signal ended it."""
    process = subprocess.Popen(command)
    while True:
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:
            # The terminal sent the signal to the training too: let it stop its ranks.
            continue


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
