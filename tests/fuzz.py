"""Fuzzing of all parsers that read files and texts from other sources.

    python -m tests.fuzz --inputs 2000

Each input is a valid input with random changes: bytes are flipped, inserted, removed and repeated, and JSON values are
replaced. A parser may accept the input, or raise a UserError or SampleError (or a ValueError if its docstring says so).
Anything else is a failure, as is an input that takes longer than `MAX_SEC`. The memory of the process is limited by
`MAX_BYTES`. The seed of a failure is printed, and `--only TARGET --first SEED --inputs 1` repeats the failure.

The exit code is 1 if there were failures, else 0.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import resource
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from model.conversation import audio_blocks
from model.errors import UserError
from tests import fuzz_importers
from tests.trainer.data_corpus import audio_bytes, row, write_shards
from trainer.checkpoint.layout import TensorEntry
from trainer.checkpoint.manifest import FileEntry, Manifest
from trainer.checkpoint.rect import Rect
from trainer.config.load import load_recipe
from trainer.data.decode import decode_audio
from trainer.data.errors import SampleError
from trainer.data.manifest import Row, read_manifest
from trainer.data.metadata import check_metadata, earlier_texts, has_earlier_answers, turns_of
from trainer.data.shard_check import build_index
from trainer.data.shards import INDEX_NAME, ShardSet
from trainer.evaluation.predictions import read_predictions, score_predictions
from trainer.importers.table import IMPORTERS
from trainer.job.slurm import Allocation
from trainer.run.launch import rank_env, rendezvous
from trainer.scoring.text import normalise
from trainer.storage.store import LocalStore
from trainer.telemetry.events import read_events
from trainer.telemetry.jsonl import StepLog, read_metrics

MAX_SEC = 10.0
MAX_BYTES = 1 << 30
"""The limit, in bytes, for the growth of the process's address space while it parses inputs."""
_ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 2**63, 10**400, 1e308, "", "all", "\u2028", "../x", "a" * 5000, [], {}, [[]], {"a": []}),
    *("\ud800", "nan", ["x", 1], float("nan")),
)
_BYTES = (
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b'"',
    b"\n",
    b",",
    b"\xef\xbb\xbf",
    b"\\ud800",
    b"OggS",
    b"Xing",
    b"[" * 3000,
)


@dataclass(frozen=True)
class Target:
    """A parser, and a function that makes inputs for it."""

    make: Callable[[random.Random], bytes]
    parse: Callable[[bytes, Path], object]
    """A function that parses an input and may write files to the given folder."""
    allowed: tuple[type[Exception], ...] = (UserError, SampleError)


def changed(data: bytes, source: random.Random) -> bytes:
    """Return the bytes with one to six random changes. Most of them are near the beginning, where headers are."""
    content = bytearray(data)
    for _ in range(source.randint(1, 6)):
        reach = len(content) if source.random() < 0.5 else min(len(content), 200)
        at = source.randrange(reach + 1)
        kind = source.randrange(6)
        if kind == 0 and content:
            content[min(at, len(content) - 1)] ^= 1 << source.randrange(8)
        elif kind == 1:
            content[at : at + source.randint(1, 8)] = source.randbytes(source.randint(1, 8))
        elif kind == 2:
            content[at:at] = source.choice(_BYTES)
        elif kind == 3:
            del content[at : at + source.randint(1, 64)]
        elif kind == 4:
            content[at:at] = content[at : at + source.randint(1, 2000)]
        else:
            del content[source.randrange(len(content) + 1) :]
    return bytes(content)


def replaced(value: Any, source: random.Random) -> Any:
    """Return a copy of a JSON value in which random parts are replaced, removed or repeated."""
    if source.random() < 0.06:
        return source.choice(_ODD)
    if isinstance(value, dict):
        kept = {k: replaced(v, source) for k, v in value.items() if source.random() > 0.03}
        return kept | ({"extra": source.choice(_ODD)} if source.random() < 0.05 else {})
    if isinstance(value, list):
        items = [replaced(v, source) for v in value if source.random() > 0.03]
        return items + items[-1:] if source.random() < 0.05 else items
    return value


def lines_of(records: list[dict[str, Any]]) -> Callable[[random.Random], bytes]:
    """Return a function that makes JSON lines of the records, with random changes of values and bytes."""

    def make(source: random.Random) -> bytes:
        text = "\n".join(json.dumps(replaced(r, source)) for r in records).encode() + b"\n"
        return changed(text, source) if source.random() < 0.5 else text

    return make


def audio(kind: str) -> Target:
    @cache
    def whole() -> bytes:
        return audio_bytes(0.3, kind=kind)

    return Target(lambda source: changed(whole(), source), lambda data, folder: decode_audio(data, 5.0))


def tar_bytes(source: random.Random) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=source.choice([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
    ) as tar:
        for key in "abc":
            fields = json.dumps(replaced(row(key, audio="x"), source)).encode()
            for name, data in ((f"{key}.flac", audio_bytes(0.02)), (f"{key}.json", fields)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return changed(buffer.getvalue(), source) if source.random() < 0.8 else buffer.getvalue()


def _parse_tar(data: bytes, folder: Path) -> None:
    for old in folder.iterdir():
        old.unlink()
    (folder / "a.tar").write_bytes(data)
    build_index(LocalStore(folder), {})


@cache
def _shard_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), [(row(k), [("flac", audio_bytes(0.05))]) for k in "ab"], per_shard=2)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def index(name: str) -> Target:
    def make(source: random.Random) -> bytes:
        text = json.dumps(replaced(json.loads(_shard_files()[name]), source)).encode()
        return changed(text, source) if source.random() < 0.5 else text

    def parse(data: bytes, folder: Path) -> None:
        for other, content in _shard_files().items():
            (folder / other).write_bytes(data if other == name else content)
        shards = ShardSet(LocalStore(folder))
        for number in range(len(shards.shards)):
            shards.table(number)

    return Target(make, parse)


def of_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], None]:
    def parse(data: bytes, folder: Path) -> None:
        (folder / name).write_bytes(data)
        read(folder / name)

    return parse


def _manifest_of_checkpoint(source: random.Random) -> bytes:
    entry = TensorEntry((2, 3), ("param",), None, (("a-00000.safetensors", Rect(0, 0, 2, 3)),))
    manifest = Manifest(4, {"world": 2}, {"a-00000.safetensors": FileEntry(8, "0" * 32)}, {"x": entry})
    body = replaced(json.loads(manifest.dumps())["body"], source)
    plain = json.dumps(body, sort_keys=True, separators=(",", ":"))
    text = json.dumps({"sha256": hashlib.sha256(plain.encode()).hexdigest(), "body": body}).encode()
    return changed(text, source) if source.random() < 0.3 else text


def _environment(source: random.Random) -> bytes:
    names = ("SLURM_JOB_ID", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_ID")
    names += ("SLURM_RESTART_COUNT", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "RANK", "WORLD_SIZE")
    names += ("MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_NODELIST", "SLURM_CPUS_PER_TASK")
    values = ("", "1", "h100", "h100:4", "-1", "1.5", "x[", "n[1-2", "²", "9" * 30, "4(x2)", "n[1-2]", "a,b")
    return json.dumps({n: source.choice(values) for n in names if source.random() < 0.7}).encode()


def _parse_environment(data: bytes, folder: Path) -> None:
    environ: Mapping[str, str] = json.loads(data)
    for read in (lambda: rank_env(environ, 2), lambda: rendezvous(environ), lambda: Allocation.read(environ)):
        try:
            read()
        except UserError:
            pass


@cache
def _recipe_text() -> bytes:
    import trainer.config.load

    return (Path(trainer.config.load.__file__).parents[1] / "recipes" / "debug.yaml").read_bytes()


def _override(source: random.Random) -> bytes:
    words = ["model", "experts", "0", "name", "train", "steps", "data", "datasets", "=", ".", "{", "}", "[", "]", ": "]
    words += [
        "!!",
        "null",
        "1e400",
        "-1",
        "9" * 400,
        "&a",
        "*a",
        "'",
        "é",
        "weight",
        "tokenizer",
        "path",
        "lora",
        "-99",
    ]
    return "".join(source.choice(words) for _ in range(source.randint(1, 12))).encode()


_PREDICTION = {
    "key": "a",
    "task": "asr",
    "reference": "one two",
    "hypothesis": "one",
    "language": "en",
    "audio_sec": 1.0,
}
_CHOICE = {"key": "b", "task": "er", "reference": "sad", "hypothesis": "(A)", "choices": ["sad", "glad"], "subset": "x"}
_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": "c", "loss": False},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e"},
]
_TAGS = [{"role": "user", "content": "<audio>f"}, {"role": "assistant", "content": "g"}]
_EVENT = {"time": 1.0, "event": "started", "attempt": 1, "host": "h", "step": 3}


def _parse_messages(row: Row) -> object:
    num_clips = len(audio_blocks(row.metadata.get("messages")))
    try:
        check_metadata(row.metadata, num_clips)
    except SampleError as error:
        return error
    return earlier_texts(row.metadata), has_earlier_answers(row.metadata), turns_of(row.metadata, num_clips)


TARGETS: dict[str, Target] = {
    **{kind.lower(): audio(kind) for kind in ("FLAC", "WAV", "MP3", "OGG", "OPUS")},
    "tar": Target(tar_bytes, _parse_tar),
    "index": index(INDEX_NAME),
    "table": index("shard-000000.idx.json"),
    "manifest": Target(
        lines_of([row("a"), row("b", audio=["x.flac"], choices=["1"], duration=2.0)]),
        of_file(
            "m.jsonl", lambda path: [check_metadata(r.metadata, 1) for r in read_manifest(path) if r.error is None]
        ),
    ),
    "messages": Target(
        lines_of([row("a", task="text", messages=_MESSAGES), row("b", messages=_TAGS)]),
        of_file("m.jsonl", lambda path: [_parse_messages(r) for r in read_manifest(path) if r.error is None]),
    ),
    "metrics": Target(
        lines_of([{"step": i, "time": 1.5, "train/loss": 2.0} for i in range(3)]),
        of_file("metrics.jsonl", lambda path: (StepLog(path, 2).close(), list(read_metrics(path)))),
    ),
    "events": Target(lines_of([_EVENT, _EVENT]), of_file("events.jsonl", lambda path: read_events(path.parent))),
    "predictions": Target(
        lines_of([_PREDICTION, _CHOICE]), of_file("p.jsonl", lambda path: score_predictions(read_predictions(path)))
    ),
    "recipe": Target(
        lambda source: changed(_recipe_text(), source), of_file("r.yaml", lambda path: load_recipe(str(path)))
    ),
    "override": Target(
        _override, lambda data, folder: load_recipe("debug", [part for part in data.decode().split("\t")])
    ),
    "checkpoint": Target(
        _manifest_of_checkpoint,
        lambda data, folder: Manifest.loads(data.decode("utf-8", "surrogateescape")),
        (UserError, ValueError),
    ),
    "environment": Target(_environment, _parse_environment),
    **{f"import-{f}": Target(fuzz_importers.maker(f, changed, replaced), fuzz_importers.parser(f)) for f in IMPORTERS},
}
"""The parsers by name."""


def fuzz(name: str, target: Target, first: int, num: int, folder: Path) -> list[str]:
    """Parse `num` inputs, and return a description of each failure."""
    failures = []
    for seed in range(first, first + num):
        data = target.make(random.Random(f"{name} {seed}"))
        started = time.monotonic()
        try:
            target.parse(data, folder)
        except target.allowed as error:
            if isinstance(error, UserError) and "\n" in str(error):
                failures.append(f"{name} {seed}: a message of several lines: {error}")
        except Exception:
            failures.append(f"{name} {seed}: {traceback.format_exc(limit=-4)}")
        if (seconds := time.monotonic() - started) > MAX_SEC:
            failures.append(f"{name} {seed}: took {seconds:.1f} s")
    return failures


def main() -> int:
    """Run the command, and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000, help="inputs per parser (default: 2000)")
    parser.add_argument("--first", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument(
        "--only", nargs="*", default=list(TARGETS), choices=list(TARGETS), help="parsers (default: all)"
    )
    args = parser.parse_args()
    normalise("imports transformers")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, used + MAX_BYTES))
    failures = []
    for name in args.only:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = fuzz(name, TARGETS[name], args.first, args.inputs, Path(folder))
        print(f"{name}: {args.inputs} inputs, {len(found)} failures, {time.monotonic() - started:.1f} s", flush=True)
        failures += found
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
