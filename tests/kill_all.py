"""Kill each writer of files at random moments, and run each pair of writers at the same time.

    make kill-all                                    500 kills, and 100 trials of each pair
    python -m tests.kill_all --kills 40 --trials 10  fewer kills and trials
    python -m tests.kill_all --only export --seed 7  one writer

After a kill, the remaining files must be readable, and no complete file may be lost. The same call then completes the
work. Its result must equal that of an undisturbed call, without leftovers. Two simultaneous calls must also have this
result, although one of them may be refused.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from model.errors import UserError
from tests.tools.exportable import write_manifest, write_run
from tools import export
from trainer.checkpoint.attempt import Attempt, FencedError
from trainer.checkpoint.bucket import BucketCheckpoints
from trainer.checkpoint.catalog import Checkpoints, damage_of
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.layout import PARAM, Shard, entries_of, file_of, key_of
from trainer.checkpoint.local import LocalCheckpoints
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import MANIFEST, STATE
from trainer.checkpoint.rect import Rect
from trainer.checkpoint.writer import write_tensors, write_text
from trainer.data.sentencepiece_training import train_sentencepiece
from trainer.data.shard_build import ShardLimits, build_shards
from trainer.files import sweep_leftovers
from trainer.storage.store import LocalStore
from trainer.telemetry.events import begin_attempt, read_events
from trainer.telemetry.jsonl import StepLog, read_lines

NUM_RECORDS, NUM_STEPS = 300, 6
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Writer:
    """A call that writes files, and the functions that check them."""

    name: str
    write: Callable[[Path, Path], None]
    """The call, with the arguments (source, folder). It only reads `source`. It writes `folder`, or completes what a
    killed call left there, and raises UserError if it is refused."""
    check: Callable[[Path], object]
    """A function that reads what a killed call left in `folder`, and raises an error if it is not usable. Its result
    must never decrease from kill to kill."""
    outcome: Callable[[Path], object]
    """A function that returns the part of `folder` that must be the same after a call that was not killed."""


def write_events(_source: Path, folder: Path) -> None:
    log = begin_attempt(folder)
    for n in range(NUM_RECORDS):
        log.add("saved", n, checkpoint="x" * (n % 50))


def num_events(folder: Path) -> int:
    return len(read_events(folder))


def all_events(folder: Path) -> object:
    newest = max(e["attempt"] for e in read_events(folder))
    return [e["step"] for e in read_events(folder) if e["event"] == "saved" and e["attempt"] == newest]


def write_metrics(_source: Path, folder: Path) -> None:
    path = folder / "metrics.jsonl"
    done = max((record["step"] for _, record in read_lines(path)), default=0)
    log = StepLog(path, resume_step=done)
    for step in range(done + 1, NUM_RECORDS + 1):
        log.append({"step": step, "loss": 1 / step})
    log.close()


def metrics_of(folder: Path) -> list[int]:
    return [record["step"] for _, record in read_lines(folder / "metrics.jsonl")]


def write_shards(source: Path, folder: Path) -> None:
    out = folder / "shards"
    try:
        build_shards(source / "dev.jsonl", str(out), limits=ShardLimits(max_samples=3))
    except UserError as error:
        if "contains finished shards" not in str(error):
            raise


def write_tokenizer(_source: Path, folder: Path) -> None:
    if not (folder / "t.model").is_file():
        train_sentencepiece([f"a b c {n}" for n in range(40)], 30, folder / "t.model", "<audio>")


def write_export(source: Path, folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if not (folder / "out").exists() and export.main([str(source / "run"), str(folder / "out")]):
            raise UserError("refused")


def save_all(checkpoints: Checkpoints) -> None:
    """Save checkpoints until the last step, as a new or resumed run does."""
    attempt = checkpoints.begin_attempt()
    try:
        for step in range(max(checkpoints.steps(), default=0) + 1, NUM_STEPS + 1):
            save(checkpoints, attempt, step)
    except (FencedError, OSError) as error:  # a newer attempt has begun, and deleted the draft of this attempt
        raise UserError(str(error)) from None


def save(checkpoints: Checkpoints, attempt: Attempt, step: int) -> None:
    draft, value = checkpoints.draft(attempt, step), torch.full((64, 64), float(step))
    shard = Shard("llm.w", (64, 64), Rect(0, 0, 64, 64), {PARAM: value}, None)
    file = file_of("llm", 0)
    files = {file: write_tensors(draft, file, {key_of(shard.name, PARAM, shard.rect): value})}
    files[STATE] = write_text(draft, STATE, f'{{"step": {step}, "extra": {{}}}}')
    manifest = Manifest(step, {"world": 1, "tp": 1, "pp": 1, "ep": 1}, files, entries_of([shard], "llm", 0))
    write_text(draft, MANIFEST, manifest.dumps())
    checkpoints.commit(attempt, manifest)
    checkpoints.clean_up(CheckpointConfig(keep_last=2), step, attempt)
    checkpoints.sweep(attempt)


def newest_of(checkpoints: Checkpoints) -> int:
    for step in checkpoints.steps():
        damage = damage_of(checkpoints.folder(step))
        assert damage is None, f"step {step}: {damage}"
    return max(checkpoints.steps(), default=0)


def shards_of(folder: Path) -> dict[str, int | bytes]:
    """Return the files of finished shards. A kill at the end also leaves the state of the build, which is excluded."""
    found = contents(folder)
    return {name: value for name, value in found.items() if not name.endswith(("/building.json", ".part.json"))}


def last_two(checkpoints: Checkpoints) -> list[int]:
    """Return the two newest steps, which must be kept.

    A kill right after the last save leaves an older checkpoint as well, which does no harm.
    """
    return sorted(checkpoints.steps())[-2:]


def bucket(folder: Path) -> BucketCheckpoints:
    return BucketCheckpoints(LocalStore(folder / "bucket"))


def contents(folder: Path) -> dict[str, int | bytes]:
    """Return the content of every file by its name, or the size of a JSON file, because these differ between calls.

    The hidden files that a killed writer may leave are deleted first. A later call deletes them after an hour.
    """
    sweep_leftovers(folder, older_sec=0)
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: path.stat().st_size if name.endswith(".json") else path.read_bytes() for name, path in files.items()}


WRITERS = (
    Writer("events", write_events, num_events, all_events),
    Writer("metrics", write_metrics, lambda folder: len(metrics_of(folder)), metrics_of),
    Writer("shards", write_shards, lambda folder: (folder / "shards" / "shards.json").is_file(), shards_of),
    Writer("tokenizer", write_tokenizer, lambda folder: (folder / "t.model").is_file(), contents),
    Writer("export", write_export, lambda folder: (folder / "out").exists(), contents),
    Writer(
        "checkpoints",
        lambda _, folder: save_all(LocalCheckpoints(folder / "checkpoints")),
        lambda folder: newest_of(LocalCheckpoints(folder / "checkpoints")),
        lambda folder: last_two(LocalCheckpoints(folder / "checkpoints")),
    ),
    Writer(
        "bucket",
        lambda _, folder: save_all(bucket(folder)),
        lambda folder: newest_of(bucket(folder)),
        lambda folder: last_two(bucket(folder)),
    ),
)


def call(writer: Writer, source: Path, folder: Path) -> None:
    """Run a writer, and exit with code 3 if it is refused. This is the main function of a separate process."""
    torch.set_num_threads(1)
    try:
        writer.write(source, folder)
    except UserError:
        os._exit(3)


def started(writer: Writer, source: Path, folder: Path) -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=call, args=(writer, source, folder), daemon=True)
    process.start()
    return process


def finish(writer: Writer, source: Path, folder: Path) -> float:
    """Run a writer until its work is complete, and return the number of seconds that it took."""
    start = time.monotonic()
    process = started(writer, source, folder)
    process.join(120)
    assert process.exitcode == 0, f"{writer.name}: exit code {process.exitcode}"
    return time.monotonic() - start


def kill(writer: Writer, source: Path, scratch: Path, num_kills: int, choose: random.Random) -> int:
    """Kill a writer at random moments, and return the number of kills before the writer had finished."""
    whole = scratch / "whole"
    whole.mkdir(parents=True)
    finish(writer, source, whole)
    longest_sec, wanted, hit = finish(writer, source, fresh(scratch / "timed")), writer.outcome(whole), 0
    for n in range(num_kills):
        folder, before = fresh(scratch / "killed"), None
        for _ in range(choose.randint(1, 3)):
            process = started(writer, source, folder)
            time.sleep(choose.uniform(0, longest_sec))
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            hit += process.exitcode == -signal.SIGKILL
            after = writer.check(folder)
            assert before is None or after >= before, f"{writer.name}: {before} became {after}"  # type: ignore[operator]
            before = after
        finish(writer, source, folder)
        assert writer.outcome(folder) == wanted, (
            f"{writer.name}: kill {n + 1}: {writer.outcome(folder)} instead of {wanted}"
        )
    return hit


def pair(writer: Writer, source: Path, scratch: Path, num_trials: int) -> int:
    """Run a writer twice at the same time, and return the number of trials in which one of the two was refused."""
    whole, refused = fresh(scratch / "alone"), 0
    finish(writer, source, whole)
    wanted = writer.outcome(whole)
    for n in range(num_trials):
        folder = fresh(scratch / "pair")
        both = [started(writer, source, folder) for _ in range(2)]
        for process in both:
            process.join(120)
        codes = [process.exitcode for process in both]
        assert set(codes) <= {0, 3}, f"{writer.name}: trial {n + 1}: exit codes {codes}"
        refused += 3 in codes
        writer.check(folder)
        finish(writer, source, folder)
        assert writer.outcome(folder) == wanted, (
            f"{writer.name}: trial {n + 1}: {writer.outcome(folder)} instead of {wanted}"
        )
    return refused


def fresh(folder: Path) -> Path:
    """Empty a folder or create it, and return it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def make_source(folder: Path) -> Path:
    """Write the input of the writers, which is a manifest with recordings and a run to export."""
    write_manifest(folder, 12)
    write_run(folder / "run")
    return folder


PAIRS = tuple(w for w in WRITERS if w.name not in ("events", "metrics"))
"""The writers that are also run in pairs.

Two attempts write their events to the same file by design, and only one attempt writes metrics.
"""


def main() -> int:
    """Run the command, and return the exit code: 1 if something was lost, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500, help="kills of all writers together (default: 500)")
    parser.add_argument("--trials", type=int, default=100, help="trials of each pair (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[w.name for w in WRITERS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    choose, failed = random.Random(options.seed), False
    chosen = [w for w in WRITERS if options.only in (None, w.name)]
    with tempfile.TemporaryDirectory(prefix="kill-all-") as name:
        source = make_source(fresh(Path(name) / "source"))
        for writer in chosen:
            try:
                rounds, hit = max(1, options.kills // len(chosen)), 0
                while hit < rounds:
                    hit += kill(writer, source, fresh(Path(name) / writer.name), rounds - hit, choose)
                print(f"{writer.name:12} {hit:4} kills, nothing lost", flush=True)
                if writer in PAIRS and options.trials:
                    refused = pair(writer, source, fresh(Path(name) / writer.name), options.trials)
                    print(f"{writer.name:12} {options.trials:4} pairs, {refused} times one was refused", flush=True)
            except AssertionError as error:
                failed = True
                print(f"{writer.name:12} FAILED: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
