"""A model with an encoder of every family is exported with the code of the families, and planned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.audio_tower import AudioTower
from tests.encoder_table import model_of, one_per_family
from tests.tools.exportable import write_manifest, write_run
from tools import export
from trainer.engine.optim import OptimConfig
from trainer.plan.encoder_memory import EncoderTracer


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_an_export_computes_what_training_computes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--verify` compares the answers and logits of the exported folder's own code with the training graph."""
    names = one_per_family()
    write_run(tmp_path / "run", model=model_of(names))
    manifest, out = write_manifest(tmp_path), tmp_path / "out"
    code = export.main([str(tmp_path / "run"), str(out), "--dtype", "fp32", "--verify", str(manifest)])
    assert code == 0, capsys.readouterr().err
    tensors = load_file(out / "model.safetensors")
    assert all(any(name.startswith(f"audio.experts.{expert}.encoder.") for name in tensors) for expert in names)
    assert "audio.experts.parakeet.encoder.encoder.layers.0.conv.norm.running_var" in tensors
    assert not (out / "encoders_hubert.py").exists()


@pytest.mark.slow
def test_the_memory_of_a_call_is_traced_and_fits_its_shape() -> None:
    """Windows of encoders that compute the clips' own length are longer than the shapes that are traced."""
    names = one_per_family()
    model = model_of(names)
    longer = [
        replace(e, config={**e.config, "max_source_positions": 1500}) if "max_source_positions" in e.config else e
        for e in model.experts
    ]
    experts = tuple(e if e.family == "ast" else replace(e, window_sec=30.0) for e in longer)
    with torch.device("meta"):
        tower = AudioTower(replace(model, experts=experts), 32, 61)
    tracer = EncoderTracer(tower, OptimConfig(), torch.float32, recompute=False, device="cuda")
    for name in names:
        clips = (40_000, 40_000) if name.startswith("auto") else (50_000, 30_000)  # `auto` may pad less than the plan
        assert tracer.calls(name).kept(clips) == pytest.approx(tracer.traced(name, clips).kept, rel=0.05), name
