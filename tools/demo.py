"""Create a small corpus, train a small model on it and show the results.

earshot demo                       takes a few minutes on two CPU cores
earshot demo train.steps=2000      trains for more steps

The first run is stored in runs/demo, and later runs in runs/demo-2, runs/demo-3 and so on. A run is never overwritten.
"""

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
from trainer.scoring.tasks import find_task
from trainer.telemetry.events import EVENTS_NAME

NUM_TRANSCRIPTS = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 after printing a UserError, else the exit code of the training run.
    """
    parser = argparse.ArgumentParser(
        prog="earshot demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="keys of the recipe demo_cpu to change, e.g. train.steps=50"
    )
    options = parser.parse_args(arguments)
    try:
        return run_demo(_free_run(Path("runs")), options.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_demo(run_dir: Path, overrides: Sequence[str]) -> int:
    """Create the corpus, train and print the report.

    Args:
        run_dir: The run folder, relative to the current folder.
        overrides: Recipe keys to change, as `key=value`.

    Returns:
        The exit code of the training run.

    Raises:
        UserError: If an override is invalid, the corpus cannot be created, or the run wrote no results.
    """
    folder = Path.cwd() / run_dir
    shown = run_dir.parent / "demo" / "corpus"  # All runs share the corpus.
    corpus = Path.cwd() / shown
    keys = [f"name={run_dir.name}", f"train.run_dir={run_dir.parent}", f"data.root={shown}", *overrides]
    load_recipe("demo_cpu", keys)  # Report an invalid key before creating the corpus.
    start_sec = time.perf_counter()
    print("1/3  corpus: speech from espeak-ng and sounds from numpy for five tasks", flush=True)
    rows = read_jsonl(write_corpus(corpus))
    num_train = sum(row["split"] == "train" for row in rows)
    took_sec = time.perf_counter() - start_sec
    print(f"     {num_train} training and {len(rows) - num_train} held-out items in {shown} ({took_sec:.0f} s)")
    print(f"2/3  training: earshot train demo_cpu {' '.join(keys)}", flush=True)
    code = run_command(module_command("trainer", "demo_cpu", *keys))
    if code != 0:
        again = f"resume it with: earshot train demo_cpu {' '.join(keys)}"
        if not any((folder / "checkpoints").glob("step-*")):
            _clear(folder, keep=corpus)
            again = "its files were removed"
        print(f"\ntraining failed (exit code {code}); its messages are above; {again}", file=sys.stderr)
        return code
    print("3/3  results on voices and sounds that were not in the training data\n")
    print(report(folder, rows, _next_steps(run_dir)))
    return 0


def report(folder: Path, rows: Sequence[Mapping[str, Any]], next_steps: str, split: str = "test") -> str:
    """Return a text with the scores of a run before and after training.

    Args:
        folder: The run folder.
        rows: The rows of the manifests, which include all evaluated samples.
        next_steps: The last paragraph.
        split: The split that was evaluated before and after training.

    Raises:
        UserError: If the run wrote no summary or no predictions.
    """
    summary_file = folder / "summary.json"
    if not summary_file.exists():
        raise UserError(f"{summary_file}: the run did not write this file; see the run's messages above")
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    predictions = read_jsonl(last_predictions(folder, split))
    metas = {row["id"]: row for row in rows}
    scores = _scores(predictions, metas)
    baseline = majority_baseline(
        [row for row in rows if row["split"] == "train"], [_meta(p, metas) for p in predictions]
    )
    others = [s for s in scores if s.metric == "accuracy" and s.subset == ALL]
    spoken = [p for p in predictions if find_task(p["task"]).is_transcription]
    # Evenly spaced transcripts include every kind of text.
    shown = [spoken[i * len(spoken) // NUM_TRANSCRIPTS] for i in range(min(NUM_TRANSCRIPTS, len(spoken)))]
    # A run with eval.before=false is evaluated only after training.
    before = f"{summary['wer_before']:.2f} before  ->  " if "wer_before" in summary else ""
    parts = [
        f"word error rate  {before}{summary['wer_after']:.2f} after",
        format_table([{"spoken": p["reference"], "recognised": p["hypothesis"]} for p in shown]),
        format_table([_answer_row(row) for row in score_table(others, baseline)]),
        f"loss {summary['loss_first']:.2f} -> {summary['loss_last']:.2f}, {summary['num_ranks']} ranks, "
        f"{summary['seconds']:.0f} s",
        next_steps,
    ]
    return "\n\n".join(part for part in parts if part)


def _next_steps(shown_dir: Path) -> str:
    return "\n".join(
        [
            f"files           {shown_dir}/  (summary.json, metrics.jsonl, predictions, checkpoints)",
            f"your audio      earshot transcribe {shown_dir} FILE.wav",
            "your data       docs/tutorial_recordings.md explains how to train on your own recordings",
            f"what happened   earshot status {shown_dir}",
            f"curves          mlflow ui --backend-store-uri sqlite:///{shown_dir.parent}/mlflow.db",
            "train longer    earshot demo train.steps=2000",
            "real speech     earshot train kit_cpu data.root=<folder of the kit>",
            "large models    earshot train mowe_70b --dry-run",
        ]
    )


def _answer_row(row: Mapping[str, object]) -> dict[str, object]:
    task = find_task(str(row["task"]))
    return {
        "task": f"{task.name}  {task.title}",
        "correct": row["value"],
        "baseline: most frequent answer": row["majority"],
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
            f"prediction {prediction['key']!r} belongs to no item of the data; remove the run's folder and run it again"
        )
    return metas[prediction["key"]]


def last_predictions(folder: Path, split: str) -> Path:
    """Return the file with the predictions of a run's last evaluation of a split.

    Raises:
        UserError: If the run has not evaluated the split.
    """
    steps = {
        int(match[1]): path
        for path in folder.glob(f"predictions-{split}-step*.jsonl")
        if (match := re.fullmatch(rf"predictions-{split}-step(\d+)\.jsonl", path.name))
    }
    if not steps:
        raise UserError(
            f"{folder}: contains no predictions-{split}-step*.jsonl; do not disable the evaluation (eval.final_split)"
        )
    return steps[max(steps)]


def _free_run(root: Path) -> Path:
    """Return the folder for a new run: the first of `demo`, `demo-2`, `demo-3` and so on that contains no run."""
    number = 1
    while True:
        folder = root / ("demo" if number == 1 else f"demo-{number}")
        if not any((folder / name).exists() for name in (EVENTS_NAME, "summary.json", "checkpoints")):
            return folder
        number += 1


def _clear(folder: Path, keep: Path) -> None:
    """Remove the files of a failed run from its folder, and the folder itself if it is then empty.

    Args:
        folder: The run folder.
        keep: A path within the folder that is not removed.
    """
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path == keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def run_command(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run `command` and return its exit code.

    If a signal ended it, the code is 128 + the signal's number, as in a shell.
    """
    process = subprocess.Popen(command, env=environment)
    while True:
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:
            # The terminal also sends the signal to the training run, which then stops its ranks.
            continue


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
