"""Tests of a run that only trains low-rank adapters for another run's weights: starting, resuming and exporting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from model.config import LoraConfig, is_factor
from model.errors import UserError
from tests.golden.corpus import write_corpus
from tests.golden.test_golden import FIRST_LOSS_OF_A_NEW_RUN, GOLDEN, losses, train
from tools import export
from trainer.checkpoint.catalog import find_checkpoint
from trainer.checkpoint.reader import read_manifest
from trainer.config.load import dump, load_recipe
from trainer.training.saver import check_adapters

TRAINED = ("audio.projector.", "audio.adapter.")
RECIPE = (
    "name=lora",
    "checkpoint.every_steps=2",
    f"checkpoint.start_from={GOLDEN / 'run'}",
    "lora=[{pattern: 'llm.*', rank: 2}, {pattern: 'audio.primary.*.q_proj', rank: 1}]",
    "optim.parts=[{pattern: '*', frozen: true}, {pattern: 'audio.projector.*'}, {pattern: 'audio.adapter.*'}]",
)


@pytest.mark.timeout(400)
def test_adapters_alone_are_trained_saved_resumed_and_exported(tmp_path: Path) -> None:
    corpus, runs = tmp_path / "corpus", tmp_path / "runs"
    corpus.mkdir()
    write_corpus(corpus)
    done = train(corpus, runs, *RECIPE, "train.steps=2")
    assert done.returncode == 0, done.stderr
    assert "adapters of llm" in done.stdout + done.stderr and "adapters of audio.primary" in done.stdout + done.stderr
    assert losses(runs / "lora")[1][0] == pytest.approx(FIRST_LOSS_OF_A_NEW_RUN, rel=1e-5), "B is zero at the start"
    done = train(corpus, runs, *RECIPE, "train.steps=4")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 2" in done.stdout + done.stderr and sorted(losses(runs / "lora")) == [1, 2, 3, 4]
    tensors = read_manifest(find_checkpoint(str(runs / "lora"))).tensors
    learned = {name for name, entry in tensors.items() if entry.step is not None}
    assert learned == {name for name in tensors if is_factor(name) or name.startswith(TRAINED)}
    assert sum(is_factor(name) and name.startswith("llm.") for name in learned) % 14 == 0
    assert export.main([str(runs / "lora"), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    found, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", GOLDEN / "export"))
    assert found.keys() == before.keys()
    q_proj = "llm.model.layers.0.self_attn.q_proj.weight"
    assert 0 < (found[q_proj] - before[q_proj].float()).abs().max() < 0.1


@pytest.mark.timeout(100)
def test_a_pattern_without_a_layer_is_an_error_before_ranks_start_to_work(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    done = train(tmp_path, tmp_path, "name=lora", "lora=[{pattern: 'llm.*.q_prj'}]")
    assert done.returncode == 2 and "pattern = llm.*.q_prj: matches no linear layer" in done.stderr
    assert "self_attn.q_proj" in done.stderr and "Traceback" not in done.stderr


def test_a_resumed_run_keeps_the_factors_of_its_adapters() -> None:
    lora = (LoraConfig("llm.*", rank=4, alpha=8), LoraConfig("llm.*.v_proj", rank=2))
    entries = "[{pattern: 'llm.*', rank: 4, alpha: 8}, {pattern: 'llm.*.v_proj', rank: 2}]"
    stored = dump(load_recipe("debug", [f"lora={entries}"]))
    check_adapters(stored, lora)
    check_adapters("", lora)
    with pytest.raises(UserError) as error:
        check_adapters(stored, (replace(lora[0], alpha=16.0), lora[1]))
    second = "{pattern: llm.*.v_proj, rank: 2, alpha: 16}]"
    assert str(error.value) == (
        f"lora = [{{pattern: llm.*, rank: 4, alpha: 16}}, {second}: this run has trained its adapters with "
        f"[{{pattern: llm.*, rank: 4, alpha: 8}}, {second}; use these values, or export the run and start from the "
        "export with new adapters (checkpoint.start_from)"
    )
    for other in (lora[:1], lora[::-1], ()):
        with pytest.raises(UserError, match="this run has trained its adapters with"):
            check_adapters(stored, other)
