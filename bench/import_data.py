"""Compare the throughput of `earshot import` with a loop that only decodes and encodes.

    python -m bench.import_data [--clips 2400]

The input is speech of realistic lengths from the kit (a set of small public recordings, in the folder $KIT_DIR), stored
as AIFF files. Shards cannot contain AIFF, so every file is converted to FLAC. `earshot import --jobs 2` reads
files listed in a table and writes a manifest. The loop reads each file and writes it as FLAC with soundfile, in two
processes, without checks, ids or a manifest. Both times include the start of the processes. The import and the loop
take turns, and the best round of each counts.

Goal: the import reaches at least 0.9 times the throughput of the loop. The exit code is 1 if the goal is missed, and 3
without the kit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import soundfile

from bench.loader_corpus import KIT, utterances

GOAL, JOBS = 0.9, 2


def convert(path: Path, out: Path) -> None:
    """Decode a file and encode it as FLAC."""
    values, rate = soundfile.read(path, dtype="int16")
    soundfile.write(out / f"{path.stem}.flac", values, rate, format="FLAC", subtype="PCM_16")


@dataclass
class Taken:
    """The duration and the CPU time of child processes."""

    seconds: float = 0.0
    cpu_sec: float = 0.0
    """The CPU seconds of all processes. Other load on the machine affects them less than the wall time."""


@contextmanager
def timed() -> Iterator[Taken]:
    """Measure the time of the child processes that begin and end within the `with` block."""
    taken, before, started = Taken(), resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    yield taken
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken.seconds = time.perf_counter() - started
    taken.cpu_sec = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def loop_time(folder: Path, out: Path) -> Taken:
    """Return the time of one run of the loop."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with timed() as taken:
        pool = multiprocessing.get_context("spawn").Pool(JOBS)
        pool.map(partial(convert, out=out), sorted(folder.glob("*.aiff")))
        pool.close()
        pool.join()
    return taken


def import_time(folder: Path, out: Path) -> Taken:
    """Return the time of one run of the import."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "tools.import_data", "--from", "csv", str(folder / "set.csv"), str(out)]
    with timed() as taken:
        subprocess.run([*command, "--jobs", str(JOBS)], check=True, stdout=subprocess.DEVNULL)
    return taken


def write_corpus(folder: Path, num: int) -> float:
    """Write `num` AIFF files and a table, and return the total duration of the files in seconds."""
    folder.mkdir()
    lines, seconds = ["audio,text\n"], 0.0
    for number, utterance in enumerate(utterances(num)):
        source = folder / "one.flac"
        source.write_bytes(utterance.data)
        values, rate = soundfile.read(source, dtype="int16")
        soundfile.write(folder / f"{number:05d}.aiff", values, rate, format="AIFF", subtype="PCM_16")
        lines.append(f"{number:05d}.aiff,text {number}\n")
        seconds += len(values) / rate
    (folder / "one.flac").unlink()
    (folder / "set.csv").write_text("".join(lines), encoding="utf-8")
    return seconds


def main() -> int:
    """Run the benchmark, and return the exit code: 0 if the goal is met, 1 if not, and 3 without the kit."""
    parser = argparse.ArgumentParser(prog="python -m bench.import_data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=2400, help="number of files")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not (KIT / "asr.jsonl").exists():
        print(json.dumps({"passed": None, "reason": f"no kit at {KIT}; set KIT_DIR"}))
        return 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = write_corpus(folder / "in", options.clips)
        loops, imports = [], []
        for number in range(options.rounds):
            loops.append(loop_time(folder / "in", folder / "loop"))
            imports.append(import_time(folder / "in", folder / "import"))
            print(f"round {number + 1}: loop {loops[-1].seconds:.2f} s, import {imports[-1].seconds:.2f} s", flush=True)
        num = len(list((folder / "import" / "audio").rglob("*.flac")))
        assert num == options.clips, f"{num} files were written"
    best = min(taken.seconds for taken in imports)
    ratio = min(taken.seconds for taken in loops) / best
    cpu_ratio = min(taken.cpu_sec for taken in loops) / min(taken.cpu_sec for taken in imports)
    print(f"{options.clips} files, {seconds / 3600:.2f} h: {seconds / best:.0f} s of audio per second")
    print(
        json.dumps(
            {
                "passed": ratio >= GOAL,
                "ratio": round(ratio, 3),
                "cpu_ratio": round(cpu_ratio, 3),
                "goal": GOAL,
                "hours": round(seconds / 3600, 3),
                "loop_sec": [round(taken.seconds, 2) for taken in loops],
                "import_sec": [round(taken.seconds, 2) for taken in imports],
            }
        )
    )
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
