"""Tests that a run of an earlier version (commit e967171) can be resumed, exported and used to start other runs.

`run/` contains the run's checkpoint after step 2 of 4. The run had two ranks and read the corpus of `corpus.py`.
`export/` contains the weights and settings that the same version exported from the checkpoint, without the code. These
files must never be rewritten, because they stand for the checkpoints of users.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.golden.corpus import write_corpus
from tools import export
from trainer.checkpoint.catalog import find_checkpoint
from trainer.checkpoint.layout import EXP_AVG
from trainer.checkpoint.reader import Reader, read_manifest
from trainer.checkpoint.rect import matrix_of

GOLDEN = Path(__file__).parent
ROOT = GOLDEN.parents[1]
LOSS_AND_NORM = {3: (7.941641271114349, 2.018651991508812), 4: (7.886083507537842, 1.9900836047533546)}
"""The loss and gradient norm of steps 3 and 4, after the version that wrote the run has resumed it."""
FIRST_LOSS_OF_A_NEW_RUN = 7.941641038656234
"""The loss of the first step of a run that starts with the weights of the golden run."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden-corpus")
    write_corpus(folder)
    return folder


def train(corpus: Path, runs: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer", "tests/golden/recipe.yaml", f"data.root={corpus}"]
    command += [f"data.cache_dir={corpus / 'cache'}", f"train.run_dir={runs}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def losses(run: Path) -> dict[int, tuple[float, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: (r["train/loss"], r["train/grad_norm"]) for r in records if "train/loss" in r}


def test_it_resumes_with_the_same_losses(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "run", tmp_path / "golden")
    done = train(corpus, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming at step 2" in done.stdout + done.stderr
    found = losses(tmp_path / "golden")
    assert sorted(found) == sorted(LOSS_AND_NORM)
    for step, expected in LOSS_AND_NORM.items():
        assert found[step] == pytest.approx(expected, rel=1e-5), step


def test_other_runs_start_from_its_weights(corpus: Path, tmp_path: Path) -> None:
    done = train(corpus, tmp_path, "name=new", "train.steps=1", f"checkpoint.start_from={GOLDEN / 'run'}")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "new")[1][0] == pytest.approx(FIRST_LOSS_OF_A_NEW_RUN, rel=1e-5)


def test_its_export_contains_the_same_tensors(tmp_path: Path) -> None:
    assert export.main([str(GOLDEN / "run"), str(tmp_path / "export")]) == 0
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "export", GOLDEN / "export"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_new_run_takes_the_moments_of_adam_on_request(corpus: Path, tmp_path: Path) -> None:
    start = (f"checkpoint.start_from={GOLDEN / 'run'}", "train.steps=1", "optim.warmup_steps=0")
    found = {}
    for name, keys in (("without", ()), ("with", ("checkpoint.start_optimizer=true",))):
        done = train(corpus, tmp_path, f"name={name}", *start, *keys)
        assert done.returncode == 0, done.stderr
        found[name] = moments(tmp_path / name, 1)
    before = moments(GOLDEN / "run", 2)
    assert losses(tmp_path / "with")[1] == losses(tmp_path / "without")[1], "weights and data must be the same"
    beta = 0.9
    for name, (values, updates) in found["with"].items():
        assert (updates, found["without"][name][1]) == (3, 1), name
        carried = values - found["without"][name][0]
        torch.testing.assert_close(carried, beta * before[name][0], rtol=1e-3, atol=1e-7)
    assert any(values.abs().max() > 1e-5 for values, _ in before.values())


def moments(run: Path, step: int) -> dict[str, tuple[torch.Tensor, int]]:
    """Return, for every trained tensor of a checkpoint, Adam's first moment and the number of updates."""
    folder = find_checkpoint(str(run / "checkpoints" / f"step-{step:08d}"))
    reader, found = Reader(folder, read_manifest(folder)), {}
    for name, updates in reader.learned().items():
        whole = matrix_of(reader.manifest.tensors[name].shape)
        values = torch.empty(whole.rows, whole.cols)
        reader.read_rect(name, EXP_AVG, whole, values)
        found[name] = (values, updates)
    return found


def test_an_export_has_no_moments_to_start_with(corpus: Path, tmp_path: Path) -> None:
    export_made = tmp_path / "export"
    assert export.main([str(GOLDEN / "run"), str(export_made), "--dtype", "fp32"]) == 0
    done = train(corpus, tmp_path, "name=x", f"checkpoint.start_from={export_made}", "checkpoint.start_optimizer=true")
    assert done.returncode == 2 and "holds no optimizer state" in done.stderr and "Traceback" not in done.stderr
