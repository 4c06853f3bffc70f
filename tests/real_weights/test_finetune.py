"""Tests of the commands in docs/finetune.md with real weights and recordings.

They train a few steps, resume, export, and run the export in plain transformers.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.real_weights.kit import rows_of
from trainer.config.load import load_recipe
from trainer.engine.optim import PartConfig, check_patterns
from trainer.evaluation.predictions import read_predictions
from trainer.plan.sizes import parameter_sizes, sized_model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
NUM_CLIPS = 21  # three for test, two or three for dev, and the rest for train
FEWER_STEPS = [
    "model.primary.weights=models/whisper-tiny.en",
    "model.primary.config={}",
    "model.ctc_weight=0",
    "data.num_lanes=2",
    "data.global_batch_samples=2",
    "optim.warmup_steps=0",
    "stages.0.steps=1",
    "stages.1.steps=2",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=9",
    "eval.every_steps=0",
    "eval.max_new_tokens=8",
    "telemetry.trackers=[]",
    "telemetry.log_every_steps=1",
]

# A program that runs an export with plain transformers. The interpreter's options -I and -S hide this project
# (tests/tools/test_export.py).
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
pytestmark = pytest.mark.timeout(900)  # the tests take 110 s of CPU time, and the machine may be busy


def commands() -> list[list[str]]:
    """Return the words of all commands on the page, in order."""
    return [shlex.split(line) for line in re.findall(r"^\$ (.*)$", PAGE, flags=re.MULTILINE)]


def run(folder: Path, words: list[str]) -> str:
    """Run a command of the page in `folder`, and return what it prints."""
    assert words[0] == "earshot", words
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT) + os.pathsep + os.getenv("PYTHONPATH", ""),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tools.cli", *words[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (words, done.stderr[-3000:])
    assert "UNEXPECTED" not in done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_every_pattern_of_the_page_matches_a_parameter() -> None:
    table = PAGE[PAGE.index("| pattern | parameters |") : PAGE.index("`finetune_cpu` freezes")]
    patterns = re.findall(r"`((?:audio|llm)\.[\w.]*\*)`", table)
    assert len(patterns) >= 9
    recipe = load_recipe("mowe_8b", ["model.ctc_weight=0.1", "model.adapter.normalize=true"])
    names = list(parameter_sizes(sized_model(recipe), recipe.optim))
    for pattern in patterns:
        check_patterns(replace(recipe.optim, parts=(PartConfig(pattern),)), names)


def test_the_page(published: Published, kit: Path, tmp_path: Path) -> None:
    for name in ("whisper-tiny.en", "whisper-base", "smollm2-135m"):
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / name).symlink_to(published(name))
    write_table(tmp_path / "my_data", kit)
    (csv_to_manifest,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if "csv" in code)
    subprocess.run([sys.executable, "-c", csv_to_manifest], cwd=tmp_path, check=True, timeout=60)
    models, plan, train, evaluate, export, transcribe = commands()
    assert run(tmp_path, models).splitlines() == ["models/whisper-base", "models/smollm2-135m"]
    assert re.search(r"^ +llm +139\.40 M +4\.88 M +134\.52 M$", run(tmp_path, plan + FEWER_STEPS), flags=re.MULTILINE)
    run_dir, whole = tmp_path / "runs" / "finetune_cpu", tmp_path / "whole"
    run(tmp_path, train + FEWER_STEPS)
    shutil.copytree(run_dir, whole)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000003")
    assert "resuming at step 2" in run(tmp_path, train + FEWER_STEPS)
    assert losses(run_dir) == losses(whole) and sorted(losses(run_dir)) == [1, 2, 3]

    assert "wer" in run(tmp_path, evaluate)
    run(tmp_path, export)
    check_what_was_trained(load_file(tmp_path / "my_model" / "model.safetensors"), tmp_path / "models")
    said = {p.key: p.hypothesis for p in read_predictions(run_dir / "predictions-test-step3.jsonl")}
    rows = [json.loads(line) for line in (tmp_path / "my_data" / "manifest.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "test"]
    assert len(said) == 3 and any(said.values())
    clips = [(str(tmp_path / "my_data" / row["audio"]), row["instruction"]) for row in rows]
    texts = transcribe_elsewhere(tmp_path / "my_model", clips)
    assert {row["id"]: text for row, text in zip(rows, texts, strict=True)} == said
    assert run(tmp_path, transcribe).startswith(said[rows[0]["id"]].strip())


def write_table(folder: Path, kit: Path) -> None:
    """Write `clips.csv`, which lists recordings in `audio/`. The first recording is also available as `clip.flac`."""
    rows = rows_of(kit, "wake_words", "train")[:NUM_CLIPS]
    folder.mkdir()
    (folder / "audio").symlink_to((kit / "audio").resolve())
    (folder / "clip.flac").symlink_to(folder / rows[0]["audio"])
    with (folder / "clips.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "text"])
        table.writerows([row["audio"], row["answer"]] for row in rows)


def check_what_was_trained(tensors: dict[str, torch.Tensor], models: Path) -> None:
    """Check that frozen weights equal the published ones, that adapters are merged, and which parts the export has."""
    encoder = load_file(models / "whisper-tiny.en" / "model.safetensors")
    for name in ("conv1.weight", "layers.3.fc2.bias"):
        assert tensors[f"audio.primary.encoder.{name}"].equal(encoder[f"model.encoder.{name}"].float())
    llm = load_file(models / "smollm2-135m" / "model.safetensors")
    embeddings, merged = "model.embed_tokens.weight", "model.layers.29.mlp.down_proj.weight"
    assert tensors[f"llm.{embeddings}"].equal(llm[embeddings].float())
    assert 0 < (tensors[f"llm.{merged}"] - llm[merged].float()).abs().max() < 0.1, "the adapter must be merged"
    parts = {name.split(".")[1] for name in tensors if name.startswith("audio.")}
    assert parts == {"primary", "adapter", "projector", "feature_norm", "output_norm"}
    rms = tensors[f"llm.{embeddings}"].square().mean().sqrt()
    assert tensors["audio.output_norm.weight"].mean() == pytest.approx(float(rms), rel=0.1)


def transcribe_elsewhere(folder: Path, rows: list[tuple[str, str]]) -> list[str]:
    """Run an exported model in a process that cannot import this project, and return its answers."""
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
