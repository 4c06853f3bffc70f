"""Tests of a run that adds FFN experts to another run's LLM: starting, resuming without the donors, and exporting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.golden.corpus import write_corpus
from tests.golden.test_golden import FIRST_LOSS_OF_A_NEW_RUN, GOLDEN, losses, train
from tools import export
from trainer.checkpoint.catalog import find_checkpoint, read_extra
from trainer.telemetry.token_history import HISTORY_NAME, read_history

RECIPE = (
    "name=mixture",
    "parallel={num_ranks: 2, ffn_expert: 2}",
    "checkpoint.every_steps=2",
    "model.llm.moe_layers=second_half",
    "model.llm.router={null_experts: 1, bias_rate: 0.001}",
    "lora=[{pattern: 'llm.*', rank: 2}]",
    "model.losses={expert_balance: {weight: 0.0001}, router_z: {weight: 0.0001}}",
)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_experts_are_trained_saved_resumed_and_exported(tmp_path: Path) -> None:
    corpus, runs, donor = tmp_path / "corpus", tmp_path / "runs", tmp_path / "donor"
    corpus.mkdir()
    write_corpus(corpus)
    shutil.copytree(GOLDEN / "run", donor)
    experts = f"model.llm.experts=[{{name: speech, from: {donor}}}, {{name: sound, from: {donor}}}]"
    recipe = (*RECIPE, experts, f"checkpoint.start_from={donor}")
    done = train(corpus, runs, *recipe, "train.steps=2")
    assert done.returncode == 0, done.stderr
    assert "expert speech of the LLM" in done.stdout + done.stderr
    # Every token chooses at least one of two equal experts, whose low-rank adapters are zero. The LLM therefore
    # computes the same as the donor. The router's losses add little.
    assert losses(runs / "mixture")[1][0] == pytest.approx(FIRST_LOSS_OF_A_NEW_RUN, abs=1e-3)
    *_, load = read_history(runs / "mixture" / HISTORY_NAME)
    assert {(group.task, group.language) for group in load.cells} == {("asr", "en")}
    assert load.experts == ("speech", "sound", "null")
    rows = [json.loads(line) for line in (corpus / "golden.jsonl").read_text().splitlines()]
    shutil.rmtree(donor)
    done = train(corpus, runs, *recipe, "train.steps=4")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 2" in done.stdout + done.stderr and sorted(losses(runs / "mixture")) == [1, 2, 3, 4]
    origins = read_extra(find_checkpoint(str(runs / "mixture")))["ffn_experts"]
    assert [(one["name"], one["run"], one["step"]) for one in origins] == [
        ("speech", "golden", 2),
        ("sound", "golden", 2),
    ]
    manifest = tmp_path / "dev.jsonl"
    own = [row for row in rows if row.get("audio")][:2]
    for row in own:
        audio = row["audio"] if isinstance(row["audio"], list) else [row["audio"]]
        row["audio"] = [str(corpus / path) for path in audio]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in own))
    command = [str(runs / "mixture"), str(tmp_path / "out"), "--dtype", "fp32", "--merge", "--verify", str(manifest)]
    assert export.main(command) == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "llm.model.layers.1.mlp.experts.speech.router.weight" in tensors
    biases = [tensors[f"llm.model.layers.1.mlp.experts.{e}.router.score_bias"] for e in ("speech", "sound", "null")]
    command = [str(runs / "mixture"), str(tmp_path / "half"), "--dtype", "bf16", "--merge"]
    assert export.main(command) == 0
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", trust_remote_code=True, dtype=torch.bfloat16)
    loaded = half.get_parameter("llm.model.layers.1.mlp.experts.speech.router.score_bias")
    assert torch.equal(loaded, biases[0]), "biases must not be rounded"
    assert half.get_parameter("llm.model.layers.1.mlp.experts.speech.router.weight").dtype == torch.bfloat16
    changes = torch.cat(biases) / 0.001
    assert 1 <= changes.abs().max().round() <= 4, "each of the four steps changes a bias by the bias rate or not at all"
    torch.testing.assert_close(changes, changes.round(), atol=1e-3, rtol=0)
    assert export.main([str(runs / "mixture"), str(tmp_path / "llm"), "--llm-only", "--merge"]) == 2
    assert "| `speech` | `golden` | `2` |" in (tmp_path / "out" / "README.md").read_text()
