"""Helpers that install tiny packages with entry points, and start training runs that can import them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.golden.corpus import write_corpus

ROOT = Path(__file__).parents[1]


def write_plugin(folder: Path, package: str, source: str, points: Mapping[str, Mapping[str, str]]) -> Path:
    """Write a package of one module, with the metadata that an installer would write, and return `folder`.

    Args:
        folder: The folder of the module and the metadata. It must be on the Python path of processes that use them.
        package: The name of the package and of its module.
        source: The text of the module.
        points: The entry points of each group, as a mapping from their names to names of objects in the module.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{package}.py").write_text(source, encoding="utf-8")
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
    lines = []
    for group, named in points.items():
        lines += [f"[{group}]", *(f"{name} = {package}:{value}" for name, value in named.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_task_corpus(folder: Path, task: str) -> Path:
    """Write the golden corpus with a different task, and return the path of its manifest."""
    folder.mkdir()
    write_corpus(folder)
    manifest = folder / "golden.jsonl"
    rows = [json.loads(line) | {"task": task} for line in manifest.read_text(encoding="utf-8").splitlines()]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


def run(module: str, *arguments: str, path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a module of the project in a process that has `path` on its Python path."""
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{path}"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def train_two_steps(
    corpus: Path, runs: Path, plugin: str, *overrides: str, path: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Train the recipe `debug` for two steps on the corpus of `write_task_corpus`, and evaluate it."""
    keys = [f"data.root={corpus}", f"data.cache_dir={corpus / 'cache'}", f"train.run_dir={runs}", "train.steps=2"]
    keys += ["data.datasets=[{name: golden, manifest: golden.jsonl}]", "data.tokenizer.train_vocab_size=48"]
    keys += ["data.eval_splits=[test]", "eval.split=test", f"plugins=[{plugin}]", *overrides]
    return run("trainer", "debug", *keys, path=path, **variables)


def records(run_dir: Path) -> list[dict[str, float]]:
    """Return the records of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
