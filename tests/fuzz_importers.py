"""Fuzzing of the importers: each input is a corpus in which one file is changed at random."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tests.trainer.import_sources import SOURCES
from trainer.importers.fields import Naming
from trainer.importers.run import run_import
from trainer.importers.sinks import Sink
from trainer.importers.source import Source
from trainer.importers.table import IMPORTERS

Change = Callable[[bytes, random.Random], bytes]
Replace = Callable[[Any, random.Random], Any]
NAMING = Naming({}, {"task": "asr"})


@contextlib.contextmanager
def _written(form: str) -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        source = SOURCES[form](Path(folder) / "in")
        yield Path(folder) / "in", source


@cache
def _files(form: str) -> dict[str, bytes]:
    with _written(form) as (folder, _):
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@cache
def _source_name(form: str) -> str:
    with _written(form) as (folder, source):
        return str(source.relative_to(folder))


def maker(form: str, changed: Change, replaced: Replace) -> Callable[[random.Random], bytes]:
    """Return a function that makes inputs. An input is the name of a file of the corpus and its changed content."""

    def make(source: random.Random) -> bytes:
        files = _files(form)
        tables = [name for name in files if not name.endswith(".wav")]
        name = source.choice(tables if source.random() < 0.9 else list(files))
        data = gzip.decompress(files[name]) if name.endswith(".gz") else files[name]
        if ".json" in name and source.random() < 0.7:
            with contextlib.suppress(ValueError):
                records = [json.loads(data)] if name.endswith(".json") else [json.loads(r) for r in data.splitlines()]
                data = "\n".join(json.dumps(replaced(r, source)) for r in records).encode()
        if source.random() < 0.5:
            data = changed(data, source)
        return f"{name}\n".encode() + (gzip.compress(data) if name.endswith(".gz") else data)

    return make


def parser(form: str) -> Callable[[bytes, Path], None]:
    """Return a function that reads the corpus with one changed file as an import would, without writing samples."""

    def parse(data: bytes, folder: Path) -> None:
        name, _, content = data.partition(b"\n")
        inner = folder / "in"
        shutil.rmtree(inner, ignore_errors=True)
        for other, original in (_files(form) | {name.decode(): content}).items():
            (inner / other).parent.mkdir(parents=True, exist_ok=True)
            (inner / other).write_bytes(original)
        run_import(IMPORTERS[form].rows, Source(inner / _source_name(form)), NAMING, Sink(), {})

    return parse
