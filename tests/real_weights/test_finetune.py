"""Published Whisper and SmolLM2 weights: a few steps on real recordings, resume, export, plain transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.real_weights.kit import rows_of
from trainer.evaluation.predictions import read_predictions

ROOT = Path(__file__).parents[2]
NUM_ROWS = {"train": 8, "dev": 2, "test": 3}
MAX_NEW_TOKENS = 8

# -I: neither the current folder nor PYTHONPATH; -S: no editable installation of this project. See tests/tools.
FRESH = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
assert not any(importlib.util.find_spec(name) for name in ("model", "trainer", "tools")), "this project is importable"
from transformers import AutoModelForCausalLM, AutoProcessor
folder, rows = sys.argv[2], json.loads(sys.argv[3])
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
texts = []
for audio, instruction in rows:
    tokens = model.generate(**processor(audio=[[audio]], text=instruction))
    texts += processor.batch_decode(tokens, skip_special_tokens=True)
print(json.dumps(texts))
"""

Published = Callable[[str], Path]
pytestmark = pytest.mark.timeout(400)


def run_module(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", name, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "UNEXPECTED" not in done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def write_data(folder: Path, kit: Path) -> None:
    rows = [row for split, count in NUM_ROWS.items() for row in rows_of(kit, "wake_words", split)[:count]]
    folder.mkdir()
    (folder / "audio").symlink_to((kit / "audio").resolve())
    (folder / "asr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_training_resuming_and_exporting(published: Published, kit: Path, tmp_path: Path) -> None:
    whisper, llm = published("whisper-tiny.en"), published("smollm2-135m")
    data, whole, half = tmp_path / "data", tmp_path / "whole" / "finetune_cpu", tmp_path / "half" / "finetune_cpu"
    write_data(data, kit)
    arguments = [
        "finetune_cpu",
        f"data.root={data}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"model.primary.weights={whisper}",
        "model.primary.config={}",
        f"model.llm.weights={llm}",
        f"data.tokenizer.path={llm}",
        "model.ctc_weight=0",
        "data.num_lanes=2",
        "data.global_batch_samples=2",
        "optim.parts.1.frozen=true",
        "optim.warmup_steps=0",
        "optim.schedule=constant",
        "train.steps=3",
        "checkpoint.every_steps=2",
        "checkpoint.keep_last=9",
        "eval.every_steps=0",
        f"eval.max_new_tokens={MAX_NEW_TOKENS}",
        "telemetry.mlflow=false",
        "telemetry.log_every_steps=1",
    ]
    run_module("trainer", *arguments, f"train.run_dir={whole.parent}")
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step-00000003")
    resumed = run_module("trainer", *arguments, f"train.run_dir={half.parent}")
    assert "resuming at step 2" in resumed and losses(half) == losses(whole) and sorted(losses(whole)) == [1, 2, 3]

    out = tmp_path / "out"
    run_module("tools.export", str(half), str(out), "--dtype", "fp32", "--verify", str(data / "asr.jsonl"))
    check_what_was_trained(load_file(out / "model.safetensors"), whisper, llm)
    said = {p.key: p.hypothesis for p in read_predictions(half / "predictions-test-step3.jsonl")}
    rows = rows_of(data, "wake_words")
    assert len(said) == NUM_ROWS["test"] and any(said.values())
    texts = transcribe_elsewhere(out, [(str(data / row["audio"]), row["instruction"]) for row in rows])
    assert {row["id"]: text for row, text in zip(rows, texts, strict=True)} == said


def check_what_was_trained(tensors: dict[str, torch.Tensor], whisper: Path, llm: Path) -> None:
    """Frozen parts are the published weights; the connector is none of them."""
    encoder = load_file(whisper / "model.safetensors")
    for name in ("conv1.weight", "layers.3.fc2.bias"):
        assert tensors[f"audio.primary.encoder.{name}"].equal(encoder[f"model.encoder.{name}"].float())
    name = "model.layers.29.mlp.down_proj.weight"
    assert tensors[f"llm.{name}"].equal(load_file(llm / "model.safetensors")[name].float())
    assert {name.split(".")[1] for name in tensors if name.startswith("audio.")} == {"primary", "adapter", "projector"}


def transcribe_elsewhere(folder: Path, rows: list[tuple[str, str]]) -> list[str]:
    """Return the answers of an exported model in a process that cannot import this project."""
    site = next(p for p in sys.path if p.endswith("site-packages"))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", FRESH, site, str(folder), json.dumps(rows)],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(folder / "hf")},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found
