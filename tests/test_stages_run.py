"""Tests of a run with training stages, which resumes bit-identically within a stage and between stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.golden.corpus import write_corpus
from tests.golden.test_golden import losses, train
from tools.run_status import read_status
from trainer.checkpoint.catalog import find_checkpoint, read_extra
from trainer.checkpoint.folder import Folder
from trainer.checkpoint.layout import EXP_AVG, PARAM
from trainer.checkpoint.reader import Reader, read_manifest
from trainer.checkpoint.rect import matrix_of
from trainer.telemetry.events import read_events

STAGES = (
    "name=staged",
    "stages=[{name: connector, steps: 2, train: [connector], lr: 1.0e-2, schedule: constant}, "
    "{name: adapters, steps: 3, train: [connector, lora], parts: [{pattern: '*.lora_?', lr: 2.0e-3}]}, "
    "{name: encoders, steps: 2, train: [connector, encoders], warmup_steps: 1, llm: false}]",
    "lora=[{pattern: 'llm.*', rank: 2}]",
    "train.steps=7",
    "checkpoint.every_steps=1",
)


def checkpoint(run: Path, step: int) -> Folder:
    return find_checkpoint(str(run / "checkpoints" / f"step-{step:08d}"))


def tensors(run: Path, step: int, kind: str = PARAM) -> dict[str, torch.Tensor]:
    folder = checkpoint(run, step)
    reader, found = Reader(folder, read_manifest(folder)), {}
    for name, entry in reader.manifest.tensors.items():
        if kind != PARAM and entry.step is None:
            continue
        whole = matrix_of(entry.shape)
        found[name] = torch.empty(whole.rows, whole.cols, dtype=reader.dtype(name, kind))
        reader.read_rect(name, kind, whole, found[name])
    return found


def moved(run: Path, before: int, after: int) -> set[str]:
    """Return the parts of the model whose weights changed between two steps."""
    first, second = tensors(run, before), tensors(run, after)
    names = {name for name in first if not torch.equal(first[name], second[name]) and "router.steps" not in name}
    return {"lora" if ".lora_" in name else ".".join(name.split(".")[:2]) for name in names}


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_stages_train_what_they_name_and_resume_bit_identically(tmp_path: Path) -> None:
    corpus, runs = tmp_path / "corpus", tmp_path / "runs"
    corpus.mkdir()
    write_corpus(corpus)
    done = train(corpus, runs, *STAGES)
    assert done.returncode == 0, done.stderr
    run = runs / "staged"
    connector = {"audio.adapter", "audio.projector", "audio.router", "audio.ctc_head"}
    assert moved(run, 1, 2) - {"audio.experts"} == connector, "of the experts, only feature projections are trained"
    assert moved(run, 2, 5) - {"audio.experts"} == connector | {"lora"}
    without_llm = connector - {"audio.projector"}
    assert moved(run, 5, 7) == without_llm | {"audio.primary", "audio.experts"}
    moments = tensors(run, 2, EXP_AVG)
    assert moments["audio.projector.weight"].any() and not moments["llm.model.layers.0.mlp.up_proj.lora_B"].any()
    steps = {name: entry.step for name, entry in read_manifest(checkpoint(run, 3)).tensors.items()}
    assert steps["audio.projector.weight"] == 1, "the optimizer's moments must restart in each stage"
    assert [read_extra(checkpoint(run, step))["stage"] for step in (1, 2, 3, 5, 6)] == [
        "connector",
        "connector",
        "adapters",
        "adapters",
        "encoders",
    ]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["train/stage"] for r in records if "train/loss" in r] == [1, 1, 2, 2, 2, 3, 3]
    assert read_status(run, 0.0).stage == "encoders (3 of 3)"

    whole, whole_losses = tensors(run, 7), losses(run)
    for resumed_at in (2, 6):  # between two stages, and within a stage without the LLM
        again = tmp_path / f"again-{resumed_at}"
        shutil.copytree(runs, again)
        for step in range(resumed_at + 1, 8):
            shutil.rmtree(again / "staged" / "checkpoints" / f"step-{step:08d}")
        done = train(corpus, again, *STAGES)
        assert done.returncode == 0, done.stderr
        assert f"resuming at step {resumed_at}" in done.stdout + done.stderr
        found = tensors(again / "staged", 7)
        assert all(torch.equal(found[name], values) for name, values in whole.items())
        assert losses(again / "staged") == whole_losses
        begun = [e["step"] for e in read_events(again / "staged") if e["event"] == "stage_started"]
        assert begun == [1, 3, 6, *((3, 6) if resumed_at == 2 else (7,))]
