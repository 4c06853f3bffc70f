"""Evaluate an exported model, a checkpoint or a run's newest checkpoint.

    earshot evaluate out/model --data test.jsonl                              an exported model
    earshot evaluate runs/demo --data data/shards --split test --nproc 2      a run, in two processes

The command prints the scores with their 95 % intervals, including the main metrics by subset, language, source and
duration. It writes predictions.jsonl (which `earshot compare` and `earshot judge` read), scores.json, scores.csv,
report.html and plots. Rerun an interrupted command to resume it. docs/evaluation.md explains the metrics.

Exit code 0: all samples have an answer. 1: some samples have no answer; skipped.jsonl lists them with the reason.
2: invalid arguments, or data or a model that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import UserError, printable_lines
from tools.options import add_plugins, check_at_least, check_model, check_output, plain_faults
from trainer.__main__ import be_calm

if TYPE_CHECKING:
    from trainer.data.stored import StoredData
    from trainer.evaluation.offline.model import Origin
    from trainer.evaluation.offline.run import Finished
    from trainer.evaluation.offline.worker import Request
    from trainer.scoring.meteor import Meteor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 1 if samples have no answer, 2 after printing a UserError, else 0.
    """
    options = _parser().parse_args(arguments)
    be_calm()
    try:
        _check(options)
        check_model(options.model)
        with plain_faults(options.out or "the evaluation"):
            return _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from trainer.evaluation.offline.model import find_model
    from trainer.evaluation.offline.run import PREDICTIONS, SKIPPED, run_evaluation
    from trainer.evaluation.offline.worker import open_wanted
    from trainer.evaluation.scorecard.card import make_card
    from trainer.evaluation.scorecard.clips import read_clips
    from trainer.evaluation.scorecard.files import write_files
    from trainer.evaluation.scorecard.text import describe

    origin = find_model(options.model)
    request = _request(options, origin)
    stored, indices = open_wanted(request)
    _note_choice(options, stored, indices)
    meteor = _meteor(options.wordnet, any(_needs_wordnet(stored.items[i].task) for i in indices))
    folder = options.out or _default_folder(origin, options.data, options.split)
    check_output(f"--out {folder}", folder, is_folder=True)
    with tqdm(unit=" samples", desc="evaluate", disable=None) as bar:

        def on_progress(done: int, total: int) -> None:
            if bar.total is None:
                bar.reset(total)
                bar.initial = done
            bar.update(done - bar.n)

        found = run_evaluation(request, folder, options.nproc, on_progress)
    if not found.predictions:
        raise UserError(f"{options.data}: no sample could be answered; see the reasons in {folder / SKIPPED}")
    title = f"{origin.name} on {Path(options.data).name}{f', {options.split}' if options.split else ''}"
    tree = make_card(
        title,
        _about(request, options, found),
        found.predictions,
        [s.reason for s in found.skipped],
        meteor,
        lambda keys: read_clips(found.stored, keys),
        round(options.audio_mib * 2**20),
    )
    files = write_files(tree, folder)
    print(printable_lines(f"{title}: {describe(tree, options.all_metrics)}"))
    print(f"\n{', '.join([PREDICTIONS, *(f.name for f in files)])} in {folder}")
    _log(options.tracked or origin.run_dir, [folder / PREDICTIONS, *files], folder.name)
    if options.json:
        print(json.dumps(_as_json(tree, found, folder), ensure_ascii=False))
    return 1 if found.skipped else 0


def _request(options: argparse.Namespace, origin: Origin) -> Request:
    import torch

    from trainer.evaluation.offline.answer import Decoding, Windows
    from trainer.evaluation.offline.model import default_dtype
    from trainer.evaluation.offline.worker import Request

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Request(
        origin,
        options.data,
        options.split,
        tuple(options.tasks),
        options.max_samples,
        options.dtype or default_dtype(device),
        Windows.of(origin, options.window, options.overlap),
        Decoding(options.max_new_tokens or origin.max_new_tokens, options.beams, options.batch_size, options.batch_sec),
    )


def _check(options: argparse.Namespace) -> None:
    from trainer.scoring.tasks import TASKS, known_tasks

    counts = ("nproc", "beams", "batch_size", "max_new_tokens", "max_samples")
    check_at_least(1, **{name: getattr(options, name) for name in counts})
    if options.batch_sec <= 0:
        raise UserError(f"--batch-sec {options.batch_sec:g}: must be above 0")
    if options.audio_mib < 0:
        raise UserError(f"--audio-mib {options.audio_mib:g}: must be at least 0")
    for task in options.tasks:
        if task not in TASKS:
            raise UserError(f"--tasks {task}: tasks are {known_tasks()}")
    if options.tracked is not None and not options.tracked.is_dir():
        raise UserError(f"--run {options.tracked}: no such folder; use the folder of a run")


def _note_choice(options: argparse.Namespace, stored: StoredData, indices: Sequence[int]) -> None:
    """Print a note if fewer samples, or samples of more splits, are evaluated than the user may expect."""
    if options.max_samples is not None and len(indices) < options.max_samples:
        print(
            f"note: --max-samples {options.max_samples}: the data contains only {len(indices)} samples", file=sys.stderr
        )
    splits = Counter(stored.items[i].split or "none" for i in indices) if options.split is None else Counter[str]()
    if len(splits) > 1:
        listed = ", ".join(f"{num} of {name}" for name, num in splits.most_common())
        advice = "which include training data; name one with --split" if "train" in splits else "name one with --split"
        print(f"note: no --split: all splits are evaluated ({listed}), {advice}", file=sys.stderr)


def _meteor(wordnet: str | None, needed: bool) -> Meteor | None:
    from trainer.scoring.meteor import Meteor
    from trainer.scoring.wordnet import wordnet_if_any

    # Report a missing WordNet before decoding, which may take hours.
    folder = wordnet_if_any(wordnet, "captions are scored") if needed else None
    return None if folder is None else Meteor(folder)


def _needs_wordnet(task: str) -> bool:
    from trainer.scoring.tasks import TASKS

    return task in TASKS and TASKS[task].needs_wordnet


def _default_folder(origin: Origin, data: str, split: str | None) -> Path:
    words = ["evaluation", Path(data.rstrip("/")).stem, *([split] if split else [])]
    if origin.run_dir is not None:
        return origin.run_dir / "-".join([*words, origin.last_part])
    return Path(origin.url).parent / "-".join([origin.last_part, *words])


def _about(request: Request, options: argparse.Namespace, found: Finished) -> dict[str, str]:
    decoding, windows = request.decoding, request.windows
    search = "greedy" if decoding.beams == 1 else f"{decoding.beams} beams"
    return {
        "model": request.origin.name,
        "data": options.data + (f", split {options.split}" if options.split else ""),
        "decoding": f"{search}, at most {decoding.max_new_tokens} tokens, {request.dtype}",
        "long speech": f"windows of {windows.window_sec:.3g} s that overlap by {windows.overlap_sec:.2g} s",
    }


def _log(run_dir: Path | None, files: Sequence[Path], name: str) -> None:
    from trainer.telemetry.trackers.table import add_files

    for failure in add_files(run_dir, files, name) if run_dir is not None else ():
        print(f"not added to {failure}", file=sys.stderr)


def _as_json(tree: dict[str, Any], found: Finished, folder: Path) -> dict[str, Any]:
    num_new = len(found.predictions) - found.num_resumed
    kept = ("num_samples", "num_skipped", "num_unfinished", "num_windowed", "audio_sec", "headlines", "scores")
    return {
        "folder": str(folder),
        "num_resumed": found.num_resumed,
        "seconds": round(found.seconds, 3),
        "samples_per_sec": round(num_new / found.seconds, 3) if num_new else None,
        **{key: tree[key] for key in kept},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="earshot evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="an exported folder, a checkpoint, or a run (its newest checkpoint)")
    add("--data", required=True, help="a manifest (JSONL), or a folder or bucket of shards")
    add("--split", help="evaluate only this split (default: all splits, with a note if there are several)")
    add("--tasks", nargs="+", default=[], metavar="TASK", help="evaluate only these tasks (default: all tasks)")
    add(
        "--max-samples",
        type=int,
        metavar="N",
        help="evaluate N samples from a random choice with a fixed seed (default: all samples)",
    )
    add("--out", type=Path, help="folder for the files (default: in the run's folder, or next to the export)")
    add(
        "--nproc",
        type=int,
        default=1,
        metavar="N",
        help="number of processes among which the samples are divided (default: 1)",
    )
    add("--dtype", choices=("fp32", "bf16"), help="type of weights and activations (default: bf16 on GPUs, else fp32)")
    add(
        "--beams", type=int, default=1, metavar="N", help="number of beams of beam search (default: 1, which is greedy)"
    )
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="maximum number of tokens of an answer (default: as in the training run)",
    )
    add(
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="maximum number of samples that are decoded together (default: 64)",
    )
    add(
        "--batch-sec",
        type=float,
        default=600.0,
        metavar="SEC",
        help="maximum seconds of padded audio that are decoded together (default: 600)",
    )
    add(
        "--window",
        type=float,
        metavar="SEC",
        help="transcribe longer recordings in windows of this length (default: the longest clip in training, at most "
        "30 seconds)",
    )
    add("--overlap", type=float, metavar="SEC", help="minimum overlap of windows (default: a sixth of a window)")
    add(
        "--wordnet",
        help="folder of WordNet 3.0, for METEOR of captions (default: where the system's packages install it)",
    )
    add("--audio-mib", type=float, default=12.0, help="audio to include in report.html, in MiB (default: 12)")
    add(
        "--run",
        "--mlflow",
        dest="tracked",
        type=Path,
        metavar="RUN",
        help="add the files to this run in its trackers (default: the model's run)",
    )
    add("--all-metrics", action="store_true", help="print every metric of every group (default: the main ones)")
    add("--json", action="store_true", help="print one JSON object on the last line")
    add_plugins(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
