"""Tests of runs that start from an imported model: adding encoders, resuming, and exporting in the original layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2AudioForConditionalGeneration

from tests.golden.corpus import write_corpus
from tests.golden.test_golden import ROOT, losses
from tests.tools.published_models import Reference, qwen2_audio
from tests.tools.test_import_model import LENGTHS, wave
from tools import export, import_model

CONV = "conv_dim: [16, 16, 16, 16, 16, 16, 16], num_conv_pos_embeddings: 8, num_conv_pos_embedding_groups: 4"
SMALL = f"{{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32, {CONV}}}"
NAMES = ("hubert", "wavlm")
EXPERTS = (
    f"model.experts=[{', '.join(f'{{name: {n}, family: {n}, config: {SMALL}}}' for n in NAMES)}]",
    "model.expert_dim=8",
    "model.router.join=add",
)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    """Return a folder and the original model, a Qwen2-Audio.

    The folder contains a corpus, the imported model, and a run that starts from it without changing the model.
    """
    root = tmp_path_factory.mktemp("imported")
    write_corpus(root)
    reference = qwen2_audio(root / "original")
    assert import_model.main([str(root / "original"), str(root / "imported")]) == 0
    done = train(root, "same", "train.steps=1", "optim.lr=1e-30")
    assert done.returncode == 0, done.stderr
    return root, reference


def train(root: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    keys = {
        "data.root": root,
        "data.datasets": "[{name: golden, manifest: golden.jsonl}]",
        "data.global_batch_samples": 8,
        "data.num_lanes": 4,
        "data.num_workers": 0,
        "data.tokenizer.train_vocab_size": 64,
        "data.cache_dir": root / "cache",
        "parallel.num_ranks": 2,
        "train.run_dir": root / "runs",
        "train.deepspeed": "ds_configs/zero3_cpu.json",
        "train.llm_tokens_per_microbatch": 256,
        "optim.warmup_steps": 0,
        "telemetry.trackers": "[]",
        "telemetry.log_every_steps": 1,
        "eval.batch_size": 4,
        "eval.max_new_tokens": 4,
        "name": name,
    }
    command = [sys.executable, "-m", "trainer", str(root / "imported" / "recipe.yaml")]
    command += [f"{key}={value}" for key, value in keys.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *overrides], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_encoders_are_added_with_the_same_first_loss(imported: tuple[Path, Reference]) -> None:
    root, _ = imported
    done = train(root, "more", *EXPERTS, "train.steps=2", "optim.lr=1e-2")
    assert done.returncode == 0, done.stderr
    assert "encoder hubert" in done.stdout + done.stderr and "the router" in done.stdout + done.stderr
    done = train(root, "more", *EXPERTS, "train.steps=4", "optim.lr=1e-2")
    assert done.returncode == 0 and "resuming at step 2" in done.stdout + done.stderr, done.stderr
    # The total loss has a new term L_MoWE, so only the loss of the next token is compared.
    assert next_token_loss(root / "runs/same") == pytest.approx(next_token_loss(root / "runs/more"), rel=1e-6)
    found = losses(root / "runs/more")
    assert sorted(found) == [1, 2, 3, 4] and found[4][0] < found[1][0]


def next_token_loss(run: Path) -> float:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float(next(r["train/loss_next_token"] for r in records if "train/loss_next_token" in r))


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_the_original_layout_is_exported(imported: tuple[Path, Reference], tmp_path: Path) -> None:
    root, reference = imported
    command = [str(root / "runs/same"), str(tmp_path / "out"), "--original", str(root / "original"), "--dtype", "fp32"]
    assert export.main(command) == 0
    found, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", root / "original"))
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    model = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    _, wanted = reference.logits(wave(LENGTHS[0]))
    assert reference.logits(wave(LENGTHS[0]), model)[1].equal(wanted)


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_added_encoders_cannot_be_exported_in_the_original_layout(
    imported: tuple[Path, Reference], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = imported
    command = [str(root / "runs/more"), str(tmp_path / "out"), "--original", str(root / "original")]
    assert export.main(command) == 2
    assert "the run added encoders, but that layout cannot contain them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
